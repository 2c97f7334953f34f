from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from monai_adv.data import brats_datalist


@pytest.mark.slow
def test_the_script_fills_a_folder_that_passes_the_check(tmp_path, capsys):
    path = Path(__file__).resolve().parents[2] / "data" / "fill.py"
    spec = importlib.util.spec_from_file_location("fill", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert path.parent / "cohort" == script.COHORT
    assert script.main(["--subjects", "1", "--spacing", "4", "--seed", "7"], tmp_path) == 0
    (item,) = brats_datalist(tmp_path)
    assert item["subject"] in capsys.readouterr().out
    Path(item["image"][2]).write_bytes(b"")  # the check is one: a file that breaks behind the simulator's back counts
    report = script.check_folder(tmp_path)
    assert not report.ok
