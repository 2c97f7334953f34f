"""A small real run with its summary: a defense that nothing adapts to, a hostile name, an unreadable subject."""

from __future__ import annotations

from pathlib import Path

from builders import case_file, make_cohort

from monai_adv.studies import read_records, run_study, study_from
from monai_adv.studies.analysis import analyse
from monai_adv.studies.checks import check_run
from monai_adv.studies.config import StudyConfig
from monai_adv.studies.defended import Declared
from monai_adv.studies.summary import machine_summary
from monai_adv.studies.units import read_json, write_json

HOSTILE = "fgsm|`x` <img src=http://a.b> [l](http://c.d) _i_ $y$"


def make_recorded_run(folder: Path, checkpoint: Path) -> Path:
    """Run the study and write its summary; the run folder."""
    make_cohort(folder / "data", 3)
    case_file(folder / "data", "BraTS2021_00002", "T1c").write_bytes(b"")
    study = study_from(
        {
            "title": "A *small* study | two victims",
            "data": {"root": str(folder / "data"), "crop": 1},
            "victims": [
                {"name": "tiny", "checkpoint": str(checkpoint)},
                {"name": "filtered", "checkpoint": str(checkpoint), "purify": {"kind": "median", "radius": 1}},
            ],
            "attacks": [{"name": "noise"}, {"name": "fgsm", "label": HOSTILE}],
            "budgets": {"eps": [0.8], "units": "std"},
            "figures": {"montages": 0},
            "output": str(folder / "run"),
        }
    )
    run_study(study)
    write_summary(study, folder / "run")
    (folder / "run" / "report.html").write_text("<!doctype html><title>a report</title>")
    return folder / "run"


def write_summary(study: StudyConfig, folder: Path) -> None:
    """What `monai-adv report` does for summary.json."""
    declared = Declared.of(read_json(folder / "study.json"))
    records = declared.sorted(read_records(folder))
    analysis = analyse(records, study.compare, declared=declared)
    problems = [*read_json(folder / "problems.json"), *analysis.notes]
    found = machine_summary(study, records, analysis, check_run(folder), problems, folder=folder)
    write_json(folder / "summary.json", found)
