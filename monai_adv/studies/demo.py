"""The demonstration: a simulated cohort, the small U-Net that ships with the package, four attacks."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from monai_adv.data import simulate_cohort
from monai_adv.engines import TrainConfig, train
from monai_adv.errors import ConfigError
from monai_adv.studies.config import StudyConfig, study_from

SPACING = 2.5
TRAINING: dict[str, Any] = {"subjects": 120, "spacing": SPACING, "seed": 1}
"""The cohort the packaged victim was trained on; the demo attacks subjects of another seed."""
RECIPE: dict[str, Any] = {"steps": 3000, "patch": (64, 64, 64), "batch": 2, "seed": 0, "half": True}
"""How it was trained; ``monai_adv/networks/assets/README.md`` has the command and the hash."""


def packaged_victim() -> Path:
    """Checkpoint of the small U-Net that ships with the package."""
    return Path(str(resources.files("monai_adv.networks") / "assets" / "demo_unet.pt"))


def train_demo_victim(
    folder: Path, output: Path, on_step: Callable[[float, float], None] | None = None, **changes: Any
) -> Path:
    """Make the packaged victim again: simulate its training cohort and train on all of it.

    Args:
        folder: where the training cohort goes.
        output: checkpoint to write.
        on_step: see :func:`monai_adv.engines.train`.
        **changes: of the recipe (fewer steps for a test).
    """
    items = simulate_cohort(folder, **TRAINING)
    provenance = {"cohort": TRAINING, "command": "monai-adv demo --retrain"}
    config = TrainConfig(**{**RECIPE, **changes})
    train(items, output, config, spacing=[SPACING] * 3, provenance=provenance, on_step=on_step)
    return output


def demo_study(
    folder: Path,
    subjects: int = 12,
    seed: int = 7,
    retrain: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
) -> StudyConfig:
    """Simulate the held-out cohort and describe the study of the demonstration.

    Args:
        folder: where everything goes; what is there already is reused.
        subjects: held-out subjects.
        seed: of the held-out cohort and the attacks; not the training cohort's.
        retrain: train the victim here instead of taking the packaged one.
        on_progress: told the share done and what is going on.

    Raises:
        ConfigError: if the seed is the training cohort's.
    """
    if seed == TRAINING["seed"]:
        raise ConfigError(f"seed {seed} is the training cohort's: its subjects are not held out; take another")
    say = on_progress or (lambda done, what: None)
    checkpoint = packaged_victim()
    if retrain:
        checkpoint = folder / "demo_unet.pt"
        say(0.0, "training")
        train_demo_victim(folder / "training", checkpoint, lambda done, loss: say(done, f"training, loss {loss:.3f}"))
    say(0.0, "simulating the cohort")
    items = simulate_cohort(folder / "cohort", subjects=subjects, spacing=SPACING, seed=seed)
    return study_from(
        {
            "title": "Demonstration: a small U-Net on simulated brain tumour MRI",
            "data": {"root": str(folder / "cohort"), "subjects": [item["subject"] for item in items]},
            "victims": [{"name": "demo U-Net", "checkpoint": str(checkpoint)}],
            "attacks": [
                {"name": "noise"},
                {"name": "fgsm"},
                {"name": "ifgsm", "steps": 10},
                {"name": "targeted_ifgsm", "steps": 5},
            ],
            "budgets": {"eps": [0.05, 0.1, 0.2], "units": "std"},
            "seed": seed,
            "output": str(folder / ("run_retrained" if retrain else "run")),
        }
    )
