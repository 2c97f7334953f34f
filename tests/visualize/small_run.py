"""A small real run with a report: two victims, three attacks, one of them with a hostile name."""

from __future__ import annotations

from pathlib import Path

from builders import make_cohort
from victims_on_disk import tiny_checkpoint

from monai_adv.studies import run_study, study_from
from monai_adv.visualize.study_report import write_study_report

HOSTILE = "<script>alert(1)</script> FGSM"


def make_run(folder: Path) -> Path:
    """Run the study and write its report; the run folder."""
    make_cohort(folder / "data", 2)
    checkpoint = tiny_checkpoint(folder / "tiny.pt")
    study = study_from(
        {
            "title": "A small study & more",
            "data": {"root": str(folder / "data"), "crop": 1},
            "victims": [{"name": name, "checkpoint": str(checkpoint)} for name in ("zeta", "alpha")],
            "attacks": [{"name": "noise"}, {"name": "ifgsm", "steps": 3}, {"name": "fgsm", "label": HOSTILE}],
            "budgets": {"eps": [0.2, 0.8], "units": "std"},
            "figures": {"montages": 1},
            "output": str(folder / "run"),
        }
    )
    assert run_study(study).problems == []
    write_study_report(folder / "run")
    return folder / "run"
