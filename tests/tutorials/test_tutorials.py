from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).resolve().parents[2] / "tutorials").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MONAI_ADV_TUTORIAL_SUBJECTS", "1")
    found = runpy.run_path(str(path))
    table = found["comparison"].table.set_index(["region", "attack"])["mean_difference"]
    assert table["WT", "fgsm"] < table["WT", "noise"]
    assert (tmp_path / "tutorial_01" / "montage.png").stat().st_size > 10_000
