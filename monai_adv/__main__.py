"""``python -m monai_adv`` is ``monai-adv``."""

from monai_adv.cli import main

if __name__ == "__main__":
    main()
