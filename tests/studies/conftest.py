from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import make_cohort
from recorded_run import make_recorded_run
from victims_on_disk import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("victim") / "tiny.pt")


@pytest.fixture
def content(tmp_path: Path, checkpoint: Path) -> dict[str, Any]:
    """A small study over three built subjects."""
    make_cohort(tmp_path / "data", 3)
    return {
        "title": "small study",
        "data": {"root": str(tmp_path / "data"), "crop": 1},
        "victims": [{"name": "tiny", "checkpoint": str(checkpoint)}],
        "attacks": [{"name": "noise"}, {"name": "fgsm"}, {"name": "ifgsm", "steps": 3}],
        "budgets": {"eps": [0.2, 0.8], "units": "std"},
        "figures": {"montages": 1},
        "output": str(tmp_path / "run"),
    }


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The folder of a run with its summary; copy it to change it."""
    return make_recorded_run(tmp_path_factory.mktemp("recorded"), checkpoint)
