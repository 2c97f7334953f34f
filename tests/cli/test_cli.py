from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from builders import make_case, make_cohort
from cli_caller import call
from victims_on_disk import tiny_checkpoint


@pytest.fixture
def study(tmp_path: Path) -> Path:
    make_cohort(tmp_path / "data", 6)
    checkpoint = tiny_checkpoint(tmp_path / "tiny.pt")
    file = tmp_path / "study.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "data": {"root": "data"},
                "victims": [{"name": "tiny", "checkpoint": checkpoint.name}],
                "attacks": [{"name": "noise"}, {"name": "fgsm"}],
                "budgets": {"eps": [0.5]},
                "figures": {"montages": 1},
                "output": "run",
            }
        )
    )
    return file


def test_run_compare_report(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", str(study)) == 0
    assert "18 units computed, 0 reused, 0 problems" in capsys.readouterr().out
    assert call(monkeypatch, "run", str(study)) == 0
    assert "0 units computed, 18 reused" in capsys.readouterr().out
    run = tmp_path / "run"
    for name in ("records.csv", "summary.json", "report.html", "tables/comparison_tiny.csv",
                 "tables/comparison_tiny.md", "tables/comparison_tiny.tex", "tables/ordering.csv"):  # fmt: skip
        assert (run / name).stat().st_size > 0
    assert len(list((run / "figures").glob("montage_*fgsm*.png"))) == 1
    assert call(monkeypatch, "compare", str(run)) == 0
    assert call(monkeypatch, "report", str(run)) == 0
    table = pd.read_csv(run / "tables" / "comparison_tiny.csv")
    assert set(table["n"]) == {6}
    assert (table.loc[table["attack"] == "fgsm", "mean_difference"] < 0).all()
    summary = json.loads((run / "summary.json").read_text())
    assert {c["status"] for c in summary["checks"]} <= {"PASS", "NOT RUN"}
    html = (run / "report.html").read_text()
    assert "Wilcoxon" in html
    assert "vulnerability" in html
    assert re.search(r"\brobust\b(?! range)", html) is None


def test_a_bad_subject_gives_a_non_zero_exit_and_the_others_results(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = next((tmp_path / "data" / "BraTS2021_00003").glob("*_flair*"))
    bad.write_bytes(b"")
    assert call(monkeypatch, "run", str(study)) == 1
    captured = capsys.readouterr()
    assert bad.name in captured.err
    assert "15 units computed" in captured.out
    assert (tmp_path / "run" / "report.html").exists()


def test_check_prints_a_table_and_fails_on_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cohort(tmp_path, 2)
    assert call(monkeypatch, "check", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "BraTS2021_00001" in printed
    assert "(14, 16, 12)" in printed
    make_case(tmp_path, "BraTS2021_00007", corrupt="nan")
    assert call(monkeypatch, "check", str(tmp_path)) == 1


def test_attack_writes_files_that_other_readers_open(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adversarial"
    arguments = ["attack", str(tmp_path / "data"), "--checkpoint", str(tmp_path / "tiny.pt"), "-o", str(out)]
    arguments += ["--subject", "BraTS2021_00002", "--attack", "ifgsm", "--eps", "0.5", "--option", "steps=2"]
    code = call(monkeypatch, *arguments)
    assert code == 0
    folder = out / "BraTS2021_00002"
    written = nib.load(folder / "BraTS2021_00002_t1ce.nii.gz")
    source = nib.load(next((tmp_path / "data" / "BraTS2021_00002").glob("*_t1ce*")))
    assert np.array_equal(written.affine, source.affine)
    before, after = np.asarray(source.dataobj, dtype=float), np.asarray(written.dataobj, dtype=float)
    assert (after[before == 0] == 0).all()
    assert 0 < np.abs(after - before).max() <= 0.5 * before[before != 0].std() * (1 + 1e-5)
    content = json.loads((folder / "BraTS2021_00002_attack.json").read_text())
    assert content["attack"]["name"] == "ifgsm"
    assert content["in_memory"][0]["dice"] < content["clean"][0]["dice"]
    assert content["from_disk"][0]["dice"] == content["in_memory"][0]["dice"]
    assert call(monkeypatch, "compare", str(out)) == 0  # records.csv: clean, in memory, from disk


def test_datalist_train_and_attacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cohort(tmp_path / "data", 2)
    assert call(monkeypatch, "datalist", str(tmp_path / "data"), "-o", str(tmp_path / "list.json")) == 0
    assert len(json.loads((tmp_path / "list.json").read_text())) == 2
    assert call(monkeypatch, "train", str(tmp_path / "data"), "-o", str(tmp_path / "net.pt"), "--steps", "2",
                "--channels", "4,8", "--patch", "16", "--hold-out", "2") == 0  # fmt: skip
    assert "Dice of the subjects left out" in capsys.readouterr().out
    assert call(monkeypatch, "attacks") == 0
    assert "targeted_ifgsm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "none.yaml"], "study none.yaml does not exist"),
        (["compare", "nowhere"], "nowhere"),
        (["report", "nowhere"], "no study.json"),
        (["check", "nowhere"], "nowhere"),
        (["attack", "x", "--checkpoint", "none.pt", "-o", "o", "--attack", "fgms"], "attack 'fgms' is unknown"),
        (["attack", "x", "--checkpoint", "none.pt", "-o", "o"], "checkpoint none.pt does not exist"),
        (["demo", "--seed", "1"], "not held out"),
    ],
)
def test_errors_are_one_message_without_a_traceback(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 1
    text = capsys.readouterr().err
    assert "error:" in text
    assert says in text.replace("\n", " ")
    assert "Traceback" not in text


def test_import_is_light() -> None:
    heavy = ("itk", "matplotlib", "torch", "monai")
    code = f"import sys, monai_adv, monai_adv.cli; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
