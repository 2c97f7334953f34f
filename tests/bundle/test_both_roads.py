"""One bundle attacked by MONAI's own command line and by ours: the same Dice; and what bad cases cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from builders import CORRUPTIONS
from cli_caller import call
from monai.bundle import ConfigWorkflow
from zoo_bundle import REGIONS, make_bundle, monai_bundle

from monai_adv.bundle import bundle_hash, load_bundle, overlay_path

ATTACK = {"attack#eps": 0.5, "attack#steps": 3}
OURS = ("--eps", "0.5", "--option", "steps=3")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("roads"))


def raw_dice(folder: Path) -> dict[tuple[str, str], float]:
    """MetricsSaver's table: (case, region) -> Dice; joined on the file's name, never on the row."""
    table = pd.read_csv(folder / "val_mean_dice_raw.csv")
    return {
        (Path(row["filename"]).name.split(".nii")[0], region.upper()): row[f"class{k}"]
        for _, row in table.iterrows()
        for k, region in enumerate(REGIONS)
    }


def our_dice(folder: Path, attack: str) -> dict[tuple[str, str], float]:
    table = pd.read_csv(folder / "records.csv")
    return table[table["attack"] == attack].set_index(["subject", "region"])["dice"].to_dict()


@pytest.mark.slow
def test_both_roads_give_the_same_dice(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration = bundle_hash(bundle)
    out = tmp_path / "ours"
    assert call(monkeypatch, "run", "--bundle", str(bundle), "--trust", configuration, *OURS, "-o", str(out)) == 0
    said = capsys.readouterr().out
    for part in ("SegResNet", "sigmoid (validate#postprocessing)", "TC, WT, ET", "T1c, T1, T2, FLAIR", "4 units"):
        assert part in said
    for name, overlays, options in (("clean", (), {}), ("pgd", (overlay_path("attack"),), ATTACK)):
        done = monai_bundle(bundle, "train", "evaluate", *overlays, output_dir=tmp_path / name, **options)
        assert done.returncode == 0, done.stderr
        theirs = raw_dice(tmp_path / name)
        assert len(theirs) == 2 * 3
        assert our_dice(out, name) == pytest.approx(theirs, abs=1e-6)  # MONAI's table is float32
    clean, attacked = our_dice(out, "clean"), our_dice(out, "pgd")
    assert all(attacked[key] <= clean[key] for key in clean)
    assert sum(attacked.values()) < sum(clean.values()) - 0.3  # of 6
    assert bundle_hash(bundle) == configuration  # neither road changed the bundle
    assert call(monkeypatch, "compare", str(out)) == 0
    assert (out / "tables" / f"comparison_{bundle.name}.csv").is_file()
    assert call(monkeypatch, "run", "--bundle", str(bundle), "--trust", configuration, *OURS, "-o", str(out)) == 0
    assert "0 units computed, 4 reused" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # the workflow's own
def test_robust_training_of_an_unmodified_bundle(bundle: Path, tmp_path: Path) -> None:
    def train(*overlays: Path, **options: Any) -> dict[str, torch.Tensor]:
        files = [str(bundle / "configs" / "train.json"), *map(str, overlays)]
        where = {"bundle_root": str(bundle), "output_dir": str(tmp_path)}
        workflow = ConfigWorkflow(files, logging_file=False, amp=False, **where, **options)
        workflow.initialize()
        workflow.run()
        return torch.load(tmp_path / "trained.pt", weights_only=True)

    overlay, strong = overlay_path("robust_train"), {"robust_attack#steps": 1, "robust_attack#eps": 0.5}
    plain, robust, again = train(), train(overlay, **strong), train(overlay, **strong)
    assert plain.keys() == robust.keys()
    assert any(not torch.equal(robust[k], plain[k]) for k in robust)
    assert all(torch.equal(robust[k], again[k]) for k in robust)


def test_without_trust_nothing_runs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(monkeypatch, "run", "--bundle", str(bundle), "-o", str(out)) == 1
    assert f"--trust {bundle_hash(bundle)}" in capsys.readouterr().err
    assert call(monkeypatch, "run", "--bundle", str(bundle), "--trust", "0" * 64, "-o", str(out)) == 1
    assert "not the trusted" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a study"),
        (("study.yaml", "--bundle", "b"), "give either a study"),
        (("study.yaml", "--eps", "0.1"), "--eps go with --bundle"),
        (("--bundle", "nowhere", "--attack", "fgms"), "unknown"),
        (("--bundle", "nowhere"), "no MONAI bundle"),
        (("--bundle", "nowhere", "--override", "x"), "must be key=value"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "run", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("corruption", ["truncated", "missing", "shape", "nan"])
def test_a_bad_case_costs_only_itself(
    corruption: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path)
    (broken,) = (tmp_path / "data" / "BraTS2021_00000").glob("*_t2.nii.gz")
    CORRUPTIONS[corruption](broken)
    out = tmp_path / "out"
    arguments = ("--trust", bundle_hash(bundle), "--attack", "fgsm", "--eps", "0.5", "-o", str(out))
    assert call(monkeypatch, "run", "--bundle", str(bundle), *arguments) == 1
    captured = capsys.readouterr()
    assert "BraTS2021_00000_t1ce" in captured.err
    assert "2 units computed" in captured.out
    assert "1 problems" in captured.out
    table = pd.read_csv(out / "records.csv")
    good = table[table["status"] == "ok"]
    assert set(good["subject"]) == {"BraTS2021_00001_t1ce"}
    assert set(good["attack"]) == {"clean", "fgsm"}
    if corruption == "nan":
        assert set(table[table["status"] != "ok"]["status"]) == {"invalid_nonfinite"}


def test_limit_budgets_and_another_bundle_in_the_folder(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("run", "--bundle", str(bundle), "--trust", bundle_hash(bundle), "--attack", "fgsm", "-o", str(out))
    assert call(monkeypatch, *command, "--limit", "1", "--eps", "0.1", "--eps", "0.5") == 0
    table = pd.read_csv(out / "records.csv")
    assert list(table.groupby("setting").size()) == [3, 3, 3]
    assert set(table["setting"]) == {"clean", "fgsm 0.1 std", "fgsm 0.5 std"}
    assert set(table["subject"]) == {"BraTS2021_00000_t1ce"}
    capsys.readouterr()
    assert call(monkeypatch, *command, "--override", "validate#inferer#overlap=0.25") == 1
    assert "another bundle" in capsys.readouterr().err


def test_overlay_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "attack.json"
    assert call(monkeypatch, "bundle-overlay", "attack", "-o", str(copy)) == 0
    assert copy.read_bytes() == overlay_path("attack").read_bytes()
    capsys.readouterr()
    assert call(monkeypatch, "bundle-overlay", "defend") == 0
    assert capsys.readouterr().out.strip() == str(overlay_path("defend"))
    assert call(monkeypatch, "bundle-overlay", "nothing") == 2


def test_cases_with_equal_file_names_are_told_apart(bundle: Path) -> None:
    from monai_adv.studies.bundle_run import _subjects

    items = load_bundle(bundle, bundle_hash(bundle)).items()
    assert _subjects(items) == ["BraTS2021_00000_t1ce", "BraTS2021_00001_t1ce"]
    same = [{"image": f"case{k}/image.nii.gz"} for k in range(2)]
    assert _subjects(same) == ["case0/image", "case1/image"]
