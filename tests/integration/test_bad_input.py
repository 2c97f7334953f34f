"""Every way a file can be broken: the error names it, the other subjects are scored, the exit code is not zero."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from builders import CORRUPTIONS, make_case
from cli_caller import call
from victims_on_disk import tiny_checkpoint

from monai_adv.studies import read_records

GOOD, BAD = "BraTS2021_00000", "BraTS2021_00001"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("victim") / "tiny.pt", steps=5)


def write_study(folder: Path, checkpoint: Path) -> Path:
    study = {
        "data": {"root": "data"},
        "victims": [{"name": "tiny", "checkpoint": str(checkpoint)}],
        "attacks": [{"name": "noise"}],
        "budgets": {"eps": [0.5]},
        "figures": {"montages": 0},
        "output": "run",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


@pytest.mark.parametrize("corruption", sorted(CORRUPTIONS))
def test_a_broken_file_costs_its_own_subject(
    corruption: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_case(tmp_path / "data", GOOD)
    make_case(tmp_path / "data", BAD, corrupt=corruption, role="label" if "label" in corruption else "T1c")
    code = call(monkeypatch, "run", str(write_study(tmp_path, checkpoint)), "--no-report")
    message = capsys.readouterr().err
    table = read_records(tmp_path / "run")
    scored = table[table["status"] == "ok"]
    assert code == 1
    assert BAD in message
    assert ".nii" in message or "missing" in message
    assert set(scored["subject"]) == {GOOD}
    assert len(scored) == 6
    assert any(BAD in line for line in json.loads((tmp_path / "run" / "problems.json").read_text()))


@pytest.mark.parametrize(
    ("suffix", "corruption"),
    [(".mha", "truncated"), (".nrrd", "truncated"), (".mha", "empty"), (".nrrd", "affine"), (".mha", "shape")],
)
def test_a_broken_nrrd_or_metaimage_file_costs_its_own_subject(
    suffix: str, corruption: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_case(tmp_path / "data", GOOD, suffix=suffix)
    make_case(tmp_path / "data", BAD, suffix=suffix, corrupt=corruption)
    code = call(monkeypatch, "run", str(write_study(tmp_path, checkpoint)), "--no-report")
    message = capsys.readouterr().err
    table = read_records(tmp_path / "run")
    assert code == 1
    assert f"{BAD}_t1ce{suffix}" in message
    assert set(table[table["status"] == "ok"]["subject"]) == {GOOD}


def test_channels_that_differ_from_the_network_are_explained(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    make_case(tmp_path / "data", GOOD)
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["network"]["in_channels"] = 3
    state = content["state_dict"]
    first = next(k for k, v in state.items() if v.dim() == 5 and v.shape[1] == 4)
    state[first] = state[first][:, :3]
    torch.save(content, tmp_path / "three.pt")
    code = call(monkeypatch, "run", str(write_study(tmp_path, tmp_path / "three.pt")), "--no-report")
    assert code == 1
    assert "channels" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_its_network_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    make_case(tmp_path / "data", GOOD)
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["network"]["channels"] = [8, 16]
    torch.save(content, tmp_path / "wrong.pt")
    code = call(monkeypatch, "run", str(write_study(tmp_path, tmp_path / "wrong.pt")), "--no-report")
    assert code == 1
    assert "wrong.pt does not fit its network" in capsys.readouterr().err.replace("\n", " ")


def test_an_output_in_the_way_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_case(tmp_path / "data", GOOD)
    (tmp_path / "run").write_text("a file where the folder should be")
    code = call(monkeypatch, "run", str(write_study(tmp_path, checkpoint)))
    assert code == 1
    assert "cannot write" in capsys.readouterr().err
