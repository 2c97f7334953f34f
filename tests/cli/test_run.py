"""``monai-adv run`` and ``monai-adv merge`` as a user or a launcher calls them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from builders import case_file, make_cohort
from cli_caller import call
from victims_on_disk import tiny_checkpoint


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """9 units."""
    make_cohort(tmp_path / "data", 3)
    return write(tmp_path, attacks=[{"name": "noise"}, {"name": "fgsm"}])


def write(folder: Path, **changes: Any) -> Path:
    if not (folder / "tiny.pt").exists():
        tiny_checkpoint(folder / "tiny.pt", steps=20)
    content = {
        "data": {"root": "data"},
        "victims": [{"name": "tiny", "checkpoint": "tiny.pt"}],
        "budgets": {"eps": [0.5]},
        "figures": {"montages": 0},
        "output": "run",
        **changes,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return folder / "study.yaml"


def run(monkeypatch: pytest.MonkeyPatch, study: Path, *options: str) -> int:
    return call(monkeypatch, "run", str(study), "--no-report", *options)


def test_shards_by_option_and_by_environment(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, study, "--shard", "1/2") == 0
    assert "shard 1 of 2 (by --shard)" in capsys.readouterr().out
    assert not (tmp_path / "run" / "records.csv").exists()
    assert call(monkeypatch, "merge", str(tmp_path / "run"), "--no-report") == 1
    captured = capsys.readouterr()
    assert "units have no result yet" in captured.err
    assert " missing" in captured.out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(monkeypatch, study) == 0
    assert f"monai-adv merge {tmp_path / 'run'}" in capsys.readouterr().out.replace("\n", "")
    assert call(monkeypatch, "merge", str(tmp_path / "run")) in (0, 3)  # 3: what the checks say of so small a network
    assert (tmp_path / "run" / "report.html").exists()
    assert "9 units merged, 0 missing, 0 problems" in capsys.readouterr().out
    assert run(monkeypatch, study, "--shard", "1/1") in (0, 3)  # the environment is not asked
    assert "0 units computed, 9 reused" in capsys.readouterr().out


def test_resume_and_retry(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = case_file(tmp_path / "data", "BraTS2021_00001", "T1")
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-20])
    for _ in range(2):  # the same problem again, without another try
        assert run(monkeypatch, study, "--resume") in (1, 3)
        assert bad.name in capsys.readouterr().err
    assert run(monkeypatch, study, "--no-resume") == 1
    assert "holds units already" in capsys.readouterr().err
    assert run(monkeypatch, study, "--retry-failed") in (1, 3)
    assert "0 units computed, 6 reused, 1 problems" in capsys.readouterr().out
    bad.write_bytes(whole)
    assert run(monkeypatch, study) in (0, 3)
    assert "3 units computed, 6 reused, 0 problems" in capsys.readouterr().out


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, study, "--dry-run", "--shard", "1/2") == 0
    text = capsys.readouterr().out
    assert "9 units, 3 subjects" in text
    assert "2 shards" in text
    for word in ("noise", "fgsm", "estimate for cpu", "GiB at most", "2/2"):
        assert word in text
    assert not (tmp_path / "run").exists()


def test_options_that_do_not_go_together(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "--bundle", str(tmp_path), "--retry-failed", "--shard", "1/2") == 1
    assert "--retry-failed, --shard go with a study" in capsys.readouterr().err.replace("\n", " ")
    assert run(monkeypatch, study, "--shard", "3/2") == 1
    assert "there is no shard 3 of 2" in capsys.readouterr().err
    assert call(monkeypatch, "merge", str(tmp_path)) == 1
    assert "plan.json is missing or damaged" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_table_and_the_exit_code_says_which(
    study: Path, tmp_path: Path, sent: int, code: int
) -> None:
    study = write(tmp_path, attacks=[{"name": "noise"}, {"name": "ifgsm", "steps": 5000}])
    command = [sys.executable, "-W", "ignore", "-m", "monai_adv", "run", str(study), "--no-report"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    units = tmp_path / "run" / "units"
    for _ in range(1200):
        if len(list(units.rglob("*.json"))) == 2 or process.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(sent)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code, message
    assert "finished units are kept" in message
    table = pd.read_csv(tmp_path / "run" / "records.csv")
    assert table["attack"].unique().tolist() == ["clean", "noise"]
    assert (table["status"] == "ok").all()
