"""`monai-adv score`: predictions and truths on disk to tables, and the tables to paired statistics."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cli_caller import call

from monai_adv.errors import ConfigError
from monai_adv.studies.scoring import RULES, read_scores, score_folders, summarise_scores

SHAPE = (40, 20, 20)


def volume(**boxes: tuple[int, int]) -> np.ndarray:
    """Labels NCR, ED, ET in slabs along the first axis, 6 voxels square otherwise."""
    values = np.zeros(SHAPE, np.uint8)
    for name, (start, stop) in boxes.items():
        values[start:stop, 4:10, 4:10] = {"NCR": 1, "ED": 2, "ET": 4}[name.split("_")[0]]
    return values


def save(folder: Path, subject: str, values: np.ndarray, ending: str = "", spacing: float = 1.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([spacing] * 3 + [1.0])
    nib.save(nib.Nifti1Image(values, affine), folder / f"{subject}{ending}.nii.gz")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three subjects: perfect, without ET and with a lesion missed, and with everything missed."""
    truth, predicted = tmp_path / "truth", tmp_path / "predicted"
    one = volume(NCR=(2, 4), ED=(4, 8), ET=(8, 12))
    two = volume(NCR=(2, 4), ED=(4, 8), ED_=(28, 34))
    for number, (true, prediction) in enumerate(
        [(one, one), (two, volume(NCR=(2, 4), ED=(4, 8))), (one, volume())], start=1
    ):
        save(truth / f"BraTS2021_{number}", f"BraTS2021_{number}", true, "_seg")
        save(predicted, f"BraTS2021_{number}", prediction)
    return predicted, truth


def test_scores_of_every_region_and_lesion(folders: tuple[Path, Path]) -> None:
    scored = score_folders(*folders)
    assert scored.problems == []
    table = scored.scores.set_index(["subject", "region"])
    assert list(table.loc["BraTS2021_1", "dice"]) == [1.0] * 3
    second = table.loc[("BraTS2021_2", "WT")]
    assert second["dice"] == pytest.approx(2 * 216 / (216 + 432))
    assert second["lesion_dice"] == 0.5
    assert second["lesion_hd95"] == 187.0
    assert second[["lesions_found", "lesions_missed", "lesions_invented"]].tolist() == [1, 1, 0]
    assert table.loc[("BraTS2021_2", "ET"), ["dice", "lesion_dice", "hd95"]].tolist() == [1.0, 1.0, 0.0]  # no ET at all
    third = table.loc[("BraTS2021_3", "TC")]
    assert third[["dice", "lesion_dice", "hd95", "lesion_hd95"]].tolist() == [0.0, 0.0, 373.13, 374.0]
    lesions = scored.lesions[scored.lesions["subject"] == "BraTS2021_2"]
    assert lesions[["region", "volume_mm3", "found"]].to_numpy().tolist() == [
        ["WT", 216.0, True], ["WT", 216.0, False], ["TC", 72.0, True],
    ]  # fmt: skip


def test_the_summary_tells_empty_truths_from_scores(folders: tuple[Path, Path]) -> None:
    table = summarise_scores(score_folders(*folders).scores).set_index("region")
    et = table.loc["ET"]
    assert (et["subjects"], et["empty_truth"], et["empty_prediction"]) == (3, 1, 2)
    assert et["dice_mean"] == pytest.approx(2 / 3)
    assert et["dice_mean_where_present"] == 0.5
    assert et["hd95_median"] == 0.0


def test_rules_differ_by_challenge(tmp_path: Path) -> None:
    save(tmp_path / "t", "BraTS2021_1", volume(ED=(2, 3)), "_seg")  # 36 mm^3
    save(tmp_path / "p", "BraTS2021_1", volume())
    wt = {}
    for rules in RULES:
        scores = score_folders(tmp_path / "p", tmp_path / "t", rules=rules).scores
        wt[rules] = float(scores.loc[scores["region"] == "WT", "lesion_dice"].item())
    assert wt == {"GLI": 1.0, "SSA": 1.0, "PED": 1.0, "MEN": 1.0, "MET": 0.0}
    with pytest.raises(ConfigError, match="one of GLI"):
        score_folders(tmp_path / "p", tmp_path / "t", rules="gli")


def test_bad_input_costs_its_own_subject(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predicted, truth = folders
    (predicted / "BraTS2021_1.nii.gz").write_bytes(b"not an image")
    save(predicted, "BraTS2021_2", volume(), spacing=2.0)
    scored = score_folders(predicted, truth, output=tmp_path / "out")
    assert set(scored.scores["subject"]) == {"BraTS2021_3"}
    assert len(scored.problems) == 2
    assert all(f"BraTS2021_{n}" in problem for n, problem in zip((1, 2), scored.problems))
    assert set(pd.read_csv(tmp_path / "out" / "scores.csv")["subject"]) == {"BraTS2021_3"}


def test_what_is_scored_is_kept_when_the_run_is_stopped(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def stop(done: int, total: int, subject: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_folders(*folders, output=tmp_path / "out", on_progress=stop)
    assert pd.read_csv(tmp_path / "out" / "scores.csv")["subject"].nunique() == 2


def test_the_command_scores_and_compares(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted, truth = map(str, folders)
    perfect = tmp_path / "perfect"
    for number in (1, 2, 3):
        source = next(Path(truth).rglob(f"BraTS2021_{number}_seg.nii.gz"))
        perfect.mkdir(exist_ok=True)
        (perfect / source.name).write_bytes(source.read_bytes())
    assert call(monkeypatch, "score", str(perfect), truth, "-o", str(tmp_path / "a")) == 0
    assert call(monkeypatch, "score", predicted, truth, "-o", str(tmp_path / "b")) == 0
    assert "lesions_missed" in capsys.readouterr().out
    files = [str(tmp_path / folder / "scores.csv") for folder in ("a", "b")]
    code = call(monkeypatch, "compare", *files, "--metric", "lesion_dice", "-o", str(tmp_path / "c"))
    assert code == 0
    table = pd.concat(pd.read_csv(path) for path in (tmp_path / "c").rglob("*.csv"))
    wt = table[(table["region"] == "WT") & (table["mean_difference"].notna())].iloc[0]
    assert wt["mean_difference"] == pytest.approx(-0.5)


def test_a_prediction_that_is_missing_ends_with_1(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted, truth = folders
    (predicted / "BraTS2021_2.nii.gz").unlink()
    assert call(monkeypatch, "score", str(predicted), str(truth)) == 1
    assert "BraTS2021_2" in (said := capsys.readouterr().err)
    assert "has no prediction" in said


def test_tables_of_other_subjects_are_not_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predicted, truth = folders
    score_folders(predicted, truth, output=tmp_path / "a")
    (predicted / "BraTS2021_2.nii.gz").unlink()
    score_folders(predicted, truth, output=tmp_path / "b")
    tables = [tmp_path / folder / "scores.csv" for folder in ("a", "b")]
    with pytest.raises(ConfigError, match=r"1 subjects are not in both.*BraTS2021_2"):
        read_scores(tables)
    with pytest.raises(ConfigError, match="different names"):
        read_scores(tables, ["x", "x"])


def test_lesion_wise_metrics_have_the_direction_of_their_kind() -> None:
    from monai_adv.stats.records import better_is_higher, penalised

    assert [better_is_higher(name) for name in ("lesion_dice", "lesion_hd95")] == [True, False]
    assert [penalised(name) for name in ("lesion_dice", "lesion_hd95")] == [False, True]
