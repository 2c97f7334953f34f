"""Attack one patient whole at its native resolution and print the peak memory of the process.

    python benchmarks/native_resolution.py FOLDER CHECKPOINT [--subject NAME] [--attack ifgsm] [--steps 3]

``FOLDER`` holds 240x240x155 volumes at 1 mm. Nothing is cropped: every window of the whole grid is inferred.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from monai_adv import attacks
from monai_adv.data import brats_datalist, load_case
from monai_adv.victims import load_victim, read_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("checkpoint")
    parser.add_argument("--subject")
    parser.add_argument("--attack", default="ifgsm")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--roi", type=int, default=None, help="window side; the checkpoint's if left out")
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--keep-windows", default="0")
    parser.add_argument("--resample", action="store_true", help="run the network at the voxel size of its training")
    options = parser.parse_args()

    items = brats_datalist(options.folder)
    item = next(i for i in items if options.subject in (None, i["subject"]))
    keep = options.keep_windows if options.keep_windows == "auto" else int(options.keep_windows)
    roi = [options.roi] * 3 if options.roi else None
    victim = load_victim(options.checkpoint, overlap=options.overlap, roi_size=roi, keep_windows=keep)
    case = load_case(item)
    if options.resample:
        working = read_checkpoint(options.checkpoint)[1].spacing
        native = torch.linalg.norm(torch.as_tensor(case["image"].affine)[:3, :3], dim=0).tolist()
        victim = victim.resampled(native, working)
    image, classes = case["image"][None].as_tensor(), case["label"][None].as_tensor()
    extra = {"steps": options.steps} if options.attack not in ("noise", "fgsm") else {}
    attack = attacks.create(options.attack, eps=options.eps, **extra)
    start = time.perf_counter()
    result = attack(victim, image, victim.head.label_from_classes(classes))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{case['subject']} {tuple(image.shape)}, {attack.threat.describe()}, {options.attack}")
    print(f"mean Dice over regions {result.clean_score.item():.3f} -> {result.score.item():.3f}")
    print(f"{result.cost.forwards} forwards, {result.cost.backwards} backwards, {seconds:.0f} s")
    print(f"peak resident memory {peak:.2f} GiB, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
