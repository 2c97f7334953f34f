"""Which prediction belongs to which truth, and what a pair on disk must agree in."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_adv.data import load_pair, pair_segmentations
from monai_adv.errors import DataError

AFFINE = np.diag([2.0, 1.5, 1.0, 1.0])


def write(path: Path, values: object = 0, shape: tuple[int, ...] = (6, 5, 4), affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = np.zeros(shape, np.uint8)
    volume[1, 1, 1] = volume[2, 2, 2] = np.uint8(values)
    nib.save(nib.Nifti1Image(volume, affine), path)
    return path


def names(root: Path, *files: str) -> Path:
    for file in files:
        write(root / file)
    return root


def found(predictions: Path, truths: Path, **options: str) -> dict[str, str]:
    pairs, problems = pair_segmentations(predictions, truths, **options)
    assert problems == []
    return {pair.subject: pair.prediction.name for pair in pairs}


@pytest.mark.parametrize(
    ("truth", "prediction", "subject", "scheme"),
    [
        ("BraTS2021_00000/BraTS2021_00000_seg.nii.gz", "BraTS2021_00000.nii.gz", "BraTS2021_00000", "brats2021"),
        ("BraTS2021_00000/BraTS2021_00000_seg.nii.gz", "a/BraTS2021_00000_seg.nii", "BraTS2021_00000", "brats2021"),
        ("Brats18_TCIA_1_seg.nii.gz", "Brats18_TCIA_1_prediction.nii.gz", "Brats18_TCIA_1", "brats2018"),
        ("BraTS-GLI-00000-000-seg.nii.gz", "BraTS-GLI-00000-000.nii.gz", "BraTS-GLI-00000-000", "brats2023"),
        ("BraTS-GLI-00000-000.nii.gz", "BraTS-GLI-00000-000-pred.nii.gz", "BraTS-GLI-00000-000", "brats2023"),
        ("labelsTr/BRATS_001.nii.gz", "BRATS_001.nii.gz", "BRATS_001", "msd"),
    ],
)
def test_the_layouts_of_the_releases(tmp_path: Path, truth: str, prediction: str, subject: str, scheme: str) -> None:
    names(tmp_path / "truth", truth)
    names(tmp_path / "predicted", prediction)
    (pair,), problems = pair_segmentations(tmp_path / "predicted", tmp_path / "truth")
    assert problems == []
    assert (pair.subject, pair.scheme, pair.prediction_scheme) == (subject, scheme, scheme)
    assert pair.prediction.name == Path(prediction).name


def test_images_beside_the_segmentations_are_passed_over(tmp_path: Path) -> None:
    truth = names(tmp_path / "t", *(f"A/BraTS2021_1_{end}.nii.gz" for end in ("t1", "t1ce", "t2", "flair", "seg")))
    own = names(tmp_path / "p", "BraTS2021_1_t1.nii.gz", "BraTS2021_1.nii.gz")
    assert found(own, truth) == {"BraTS2021_1": "BraTS2021_1.nii.gz"}
    with pytest.raises(DataError, match=r"no predictions found \(only images"):
        pair_segmentations(names(tmp_path / "q", "BraTS2021_1_t1.nii.gz"), truth)


def test_a_decathlon_folder_gives_its_labels_not_its_images(tmp_path: Path) -> None:
    root = names(tmp_path / "Task01", "labelsTr/BRATS_001.nii.gz", "imagesTs/BRATS_002.nii.gz")
    assert found(names(tmp_path / "p", "BRATS_001.nii.gz"), root) == {"BRATS_001": "BRATS_001.nii.gz"}


def test_a_number_after_the_subject_is_another_subject(tmp_path: Path) -> None:
    truth = names(tmp_path / "t", "BraTS-1_seg.nii.gz")
    pairs, problems = pair_segmentations(names(tmp_path / "p", "BraTS-1_2.nii.gz"), truth)
    assert pairs == []
    texts = [str(problem) for problem in problems]
    assert any("BraTS-1_2" in text and "no truth has this name" in text for text in texts)
    assert any("has no prediction" in text and "name it BraTS-1.nii.gz" in text for text in texts)


def test_the_exact_name_wins_and_a_tie_asks(tmp_path: Path) -> None:
    truth = names(tmp_path / "t", "BraTS2021_1_seg.nii.gz")
    own = names(tmp_path / "p", "BraTS2021_1.nii.gz", "BraTS2021_1_uncertainty.nii.gz")
    assert found(own, truth) == {"BraTS2021_1": "BraTS2021_1.nii.gz"}
    own = names(tmp_path / "q", "BraTS2021_1_clean.nii.gz", "BraTS2021_1_fold0.nii.gz", "BraTS2021_1_pgd.nii.gz")
    pairs, (tie, stranger) = pair_segmentations(own, truth)
    assert pairs == []
    assert "fold0" in str(stranger)
    assert '--files): "*_clean.nii.gz"' in str(tie)
    assert found(own, truth, files="*_fold0.nii.gz") == {"BraTS2021_1": "BraTS2021_1_fold0.nii.gz"}
    with pytest.raises(DataError, match="called \\*_x"):
        pair_segmentations(own, truth, files="*_x.nii.gz")
    with pytest.raises(DataError, match="must hold one"):
        pair_segmentations(own, truth, files="x.nii.gz")


def test_a_truth_that_is_there_twice_or_of_unknown_scheme_is_named(tmp_path: Path) -> None:
    truth = names(tmp_path / "t", "a/X_seg.nii.gz", "b/X_seg.nii.gz", "Y_seg.nii.gz")
    own = names(tmp_path / "p", "X.nii.gz", "Y.nii.gz")
    pairs, problems = pair_segmentations(own, truth)
    assert [pair.subject for pair in pairs] == ["Y"]
    assert any("there 2 times" in str(problem) for problem in problems)
    plain = names(tmp_path / "plain", "patient.nii.gz")
    _, (problem,) = pair_segmentations(names(tmp_path / "r", "patient.nii.gz"), plain)
    assert "--scheme" in str(problem)
    assert found(tmp_path / "r", plain, scheme="brats2023") == {"patient": "patient.nii.gz"}
    with pytest.raises(DataError, match="unknown label scheme"):
        pair_segmentations(tmp_path / "r", plain, prediction_scheme="brats1999")


def test_folders_that_hold_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    truth = names(tmp_path / "t", "X_seg.nii.gz")
    for predictions, truths in ((tmp_path / "no", truth), (tmp_path / "empty", truth), (truth, tmp_path / "no")):
        with pytest.raises(DataError, match=r"no such folder|no image files"):
            pair_segmentations(predictions, truths)


def test_values_come_in_canonical_classes_of_each_scheme(tmp_path: Path) -> None:
    write(tmp_path / "t" / "BraTS2021_1_seg.nii.gz", 4)
    write(tmp_path / "p" / "BraTS2021_1.nii.gz", 3)
    (pair,), _ = pair_segmentations(tmp_path / "p", tmp_path / "t")
    with pytest.raises(DataError, match=r"BraTS2021_1.nii.gz.*unexpected \[3\].*--prediction-scheme"):
        load_pair(pair)
    (pair,), _ = pair_segmentations(tmp_path / "p", tmp_path / "t", prediction_scheme="brats2023")
    prediction, truth, spacing = load_pair(pair)
    assert np.array_equal(prediction, truth)
    assert set(np.unique(truth)) == {0, 3}
    assert spacing == (2.0, 1.5, 1.0)


def test_a_prediction_on_another_grid_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "t" / "BraTS2021_1_seg.nii.gz", 4)
    path = write(tmp_path / "p" / "BraTS2021_1.nii.gz", 4, affine=np.eye(4))
    (pair,), _ = pair_segmentations(tmp_path / "p", tmp_path / "t")
    with pytest.raises(DataError, match=r"the prediction is not on the grid of the truth.*--ignore-affine"):
        load_pair(pair)
    assert load_pair(pair, ignore_affine=True)[2] == (2.0, 1.5, 1.0)
    write(path, 4, shape=(5, 6, 4))
    with pytest.raises(DataError, match=r"shape \(5, 6, 4\) instead of \(6, 5, 4\)"):
        load_pair(pair, ignore_affine=True)


def test_many_without_a_prediction_are_named_in_one_line_and_what_helps_comes_first(tmp_path: Path) -> None:
    truth = names(tmp_path / "t", *(f"BraTS2021_{n}_seg.nii.gz" for n in range(6)))
    written = (f"BraTS2021_0_{kind}.nii.gz" for kind in ("clean_prediction", "adversarial_prediction"))
    own = names(tmp_path / "p", *written, "BraTS2021_0_t1.nii.gz", "BraTS2021_0_t1_perturbation.nii.gz")
    _, (first, second) = pair_segmentations(own, truth)
    assert "has 2 predictions" in str(first)
    assert "and 4 more have none" in str(second)
    pairs, _ = pair_segmentations(own, truth, files="*_adversarial_prediction.nii.gz")
    assert [pair.subject for pair in pairs] == ["BraTS2021_0"]
