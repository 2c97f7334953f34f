"""The study of universal perturbations: its split, its files, its table, and what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from builders import case_file, make_cohort
from cli_caller import call
from monai.data import MetaTensor

from monai_adv import attacks
from monai_adv.attacks import UniversalPerturbation
from monai_adv.data import scan
from monai_adv.errors import ConfigError, DataError, WriteError
from monai_adv.studies import cases, read_records, run_study, study_from
from monai_adv.studies.analysis import analyse
from monai_adv.studies.config import DataConfig
from monai_adv.studies.universal import modality_table, study_universal
from monai_adv.victims import load_victim

SMALL = {"eps": 1.0, "steps": 3, "batch": 2, "hold_out": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, 6)
    return folder


def test_every_modality_is_trained_on_some_and_scored_on_others(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = study_universal(root, checkpoint, tmp_path, **SMALL)
    assert result.problems == []
    held, kept = ["BraTS2021_00000", "BraTS2021_00003"], [f"BraTS2021_0000{i}" for i in (1, 2, 4, 5)]
    assert sorted(result.records["subject"].unique()) == held
    assert sorted(result.training_records["subject"].unique()) == kept
    assert list(result.perturbations) == ["T1", "T1c", "T2", "FLAIR", "all"]
    for index, (name, found) in enumerate(result.perturbations.items()):
        assert set(found.subjects) <= set(kept)
        assert not {s for entry in found.details["trace"] for s in entry["subjects"]} & set(held)
        changed = found.data.flatten(1).any(1).tolist()
        assert changed == ([True] * 4 if name == "all" else [i == index for i in range(4)])
        assert found.data.abs().max() <= 1.0
        saved = UniversalPerturbation.load(tmp_path / f"universal_{name}.nii.gz")
        assert torch.equal(saved.data, found.data)
        assert torch.equal(saved.affine, found.affine)
        assert saved.victim == "tiny"
        training = pd.read_csv(tmp_path / f"universal_{name}_training.csv")
        assert training["step"].tolist() == [1, 2, 3]
    described = json.loads((tmp_path / "universal.json").read_text())
    assert described["data"]["tested"] == held
    assert described["asked"]["steps"] == 3

    table = pd.read_csv(tmp_path / "modality_table.csv")
    assert len(table) == 5 * 3
    assert set(table["n"]) == {2}
    assert set(table["training_n"]) == {4}
    row = table[(table["modality"] == "all") & (table["region"] == "WT")].iloc[0]
    dice = result.records.groupby(["attack", "region"])["dice"]
    for column, attack in (("clean", "clean"), ("noise", "noise all"), ("universal", "universal all")):
        assert row[f"{column}_mean"] == pytest.approx(dice.mean()[attack, "WT"])
        assert row[f"{column}_median"] == pytest.approx(dice.median()[attack, "WT"])
    assert row["drop_mean"] == pytest.approx(row["clean_mean"] - row["universal_mean"])
    assert row["universal_mean"] < row["noise_mean"] - 0.05
    text = (tmp_path / "modality_table.md").read_text()
    assert f"| all | WT | {row['clean_mean']:.3f} ({row['clean_median']:.3f}) |" in text
    assert "vulnerability" in text


def test_the_records_are_those_of_the_attack_and_can_be_compared(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["universal", str(root), "--checkpoint", str(checkpoint), "-o", str(tmp_path), "--modality", "T2",
                 "--modality", "all", "--eps", "1.0", "--steps", "3", "--hold-out", "2"]  # fmt: skip
    assert call(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "universal_mean" in printed
    assert call(monkeypatch, "compare", str(tmp_path)) == 0
    table = analyse(read_records(tmp_path)).comparisons["tiny"].table
    assert set(table["attack"]) == {"noise T2", "universal T2", "noise all", "universal all"}
    assert set(table["n"]) == {3}

    # the same Dice as the attack of that name in a study, from the file
    study = study_from(
        {
            "data": {"root": str(root), "subjects": ["BraTS2021_00002"]},
            "victims": [{"name": "tiny", "checkpoint": str(checkpoint)}],
            "attacks": [{"name": "universal", "perturbation": str(tmp_path / "universal_all.nii.gz")}],
            "budgets": {"eps": [0.5, 1.0]},
            "output": str(tmp_path / "run"),
        }
    )
    found = run_study(study)
    assert found.problems == []
    one, other = (
        frame[(frame["subject"] == "BraTS2021_00002") & (frame["method"] == "universal") & (frame["eps"] == 1.0)]
        for frame in (read_records(tmp_path / "run"), read_records(tmp_path))
    )
    other = other[other["attack"] == "universal all"]
    for column in ("dice", "linf_std", "ssim"):
        np.testing.assert_allclose(one[column].to_numpy(), other[column].to_numpy(), rtol=1e-6)
    assert 0.99 < other["linf_std"].max() <= 1 + 1e-4
    assert (other["outside_max"] == 0).all()


def test_a_crop_of_its_own_does_not_move_the_perturbation(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    """A subject is attacked on its crop; what it gets is the piece of the reference grid that lies there."""
    result = study_universal(root, checkpoint, tmp_path, modalities=["all"], **SMALL)
    perturbation = result.perturbations["all"]
    item = scan(root).items[0]
    whole = cases.load(item, DataConfig(root=root, crop=None))
    tight = cases.load(item, DataConfig(root=root, crop=0))
    assert tight.image.shape != whole.image.shape
    on = perturbation.on(MetaTensor(tight.image[0], affine=tight.affine))
    assert torch.equal(on, perturbation.data[(slice(None), *tight.box)])
    attack = attacks.create("universal", eps=1.0, perturbation=perturbation)
    victim = load_victim(checkpoint)
    found = attack(victim, tight.image, tight.classes, affine=tight.affine)
    assert not torch.equal(found.image, attack(victim, tight.image, tight.classes, affine=whole.affine).image)


@pytest.mark.parametrize(
    ("mode", "target"),
    [("static", {"subject": "BraTS2021_00004"}), ("dynamic", {"hide": "ET"}), ("static", "file")],
)
def test_targets(root: Path, checkpoint: Path, tmp_path: Path, mode: str, target: object) -> None:
    if target == "file":
        target = {"file": str(case_file(root, "BraTS2021_00004", "label"))}
    result = study_universal(root, checkpoint, tmp_path, modalities=["all"], mode=mode, target=target, **SMALL)
    saved = UniversalPerturbation.load(tmp_path / "universal_all.nii.gz")
    assert (saved.mode, saved.target) == (mode, target)
    trace = result.perturbations["all"].details["trace"]
    assert trace[-1]["loss"] > trace[0]["loss"]  # closer to the target


def test_a_seed_gives_the_same_bits(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    first, same, other = (
        study_universal(root, checkpoint, tmp_path / str(i), modalities=["T2"], seed=seed, **SMALL)
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(same.perturbations["T2"].data, first.perturbations["T2"].data)
    pd.testing.assert_frame_equal(same.records, first.records)
    assert not torch.equal(other.perturbations["T2"].data, first.perturbations["T2"].data)


def test_the_held_out_subjects_are_tested_on_the_way(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    result = study_universal(root, checkpoint, tmp_path, modalities=["all"], test_every=3, **SMALL)
    steps = pd.read_csv(tmp_path / "universal_all_training.csv")
    assert steps["dice_held_out"].isna().tolist() == [True, True, False]
    records = result.records
    last = records[records["attack"] == "universal all"].groupby("subject")["dice"].mean().mean()
    assert steps["dice_held_out"].iloc[-1] == pytest.approx(last)


def test_a_bad_subject_costs_only_itself(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cohort(tmp_path / "data", 7)
    for subject, role in (("BraTS2021_00002", "T2"), ("BraTS2021_00003", "FLAIR")):  # one to train on, one to test
        path = case_file(tmp_path / "data", subject, role)
        path.write_bytes(path.read_bytes()[:-30])
    out = tmp_path / "out"
    code = call(monkeypatch, "universal", str(tmp_path / "data"), "--checkpoint", str(checkpoint), "-o", str(out),
                "--steps", "2", "--hold-out", "3", "--eps", "1.0", "--modality", "T1", "--modality", "all")  # fmt: skip
    assert code == 1
    problems = capsys.readouterr().err.strip().splitlines()
    assert len(problems) == 2
    assert "BraTS2021_00002_t2" in problems[0]
    assert "BraTS2021_00003_flair" in problems[1]
    assert sorted(read_records(out)["subject"].unique()) == ["BraTS2021_00000", "BraTS2021_00006"]
    trained = UniversalPerturbation.load(out / "universal_all.nii.gz").subjects
    assert trained == ("BraTS2021_00001", "BraTS2021_00004", "BraTS2021_00005")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modalities": ["T3"]}, ConfigError, "modalities T3: use T1, T1c, T2, FLAIR or all"),
        ({"modalities": []}, ConfigError, "none"),
        ({"hold_out": 1}, ConfigError, "hold_out must be at least 2"),
        ({"mode": "static", "target": {"subject": "nobody"}}, ConfigError, "'nobody' is not in the cohort"),
        ({"mode": "static", "target": "background"}, ConfigError, "subject: NAME"),
        ({"mode": "dynamic"}, ConfigError, "needs a rule"),
        ({"norm": "l1"}, ConfigError, "norm 'l1'"),
    ],
)
def test_what_does_not_fit_is_said(
    root: Path, checkpoint: Path, tmp_path: Path, options: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        study_universal(root, checkpoint, tmp_path, **{**SMALL, **options})


def test_nothing_to_train_on_and_nowhere_to_write(checkpoint: Path, tmp_path: Path) -> None:
    make_cohort(tmp_path / "one", 1)
    with pytest.raises(DataError, match="0 subjects to train on, 1 to test"):
        study_universal(tmp_path / "one", checkpoint, tmp_path / "out", **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        study_universal(tmp_path / "one", checkpoint, tmp_path / "file" / "out", **SMALL)


def test_the_table_of_one_region() -> None:
    def row(subject: str, attack: str, dice: float) -> dict[str, object]:
        return {"subject": subject, "attack": attack, "method": attack.split()[0], "region": "WT", "dice": dice}

    test = [row("a", "clean", 0.9), row("b", "clean", 0.7), row("c", "clean", 0.5)]
    test += [row(s, "noise T1", d) for s, d in zip("abc", (0.8, 0.7, 0.4))]
    test += [row(s, "universal T1", d) for s, d in zip("abc", (0.1, 0.2, 0.6))]
    table = modality_table(
        pd.DataFrame(test), pd.DataFrame([row("d", "clean", 0.8), row("d", "universal T1", 0.05)])
    ).iloc[0]
    assert (table["modality"], table["region"], table["n"], table["training_n"]) == ("T1", "WT", 3, 1)
    assert table["universal_mean"] == pytest.approx(0.3)
    assert table["universal_median"] == 0.2
    assert table["drop_mean"] == pytest.approx(0.4)
    assert table["noise_drop_mean"] == pytest.approx(0.7 - 1.9 / 3)
    assert table["training_universal_mean"] == 0.05
