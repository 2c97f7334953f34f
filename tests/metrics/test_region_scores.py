"""Dice, IoU and HD95 of one region against hand-computed cases, MONAI, SciPy and SimpleITK."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from monai_adv.metrics import BRATS_HD95_PENALTY, region_scores, voxel_accuracy


def blob(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A random smooth region of irregular outline that holds about a fifth of the volume."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return field > np.quantile(field, 0.8)


def hd95_by_scipy(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> float:
    """The same definition from dense distance maps: the larger of two directed 95th percentiles."""
    surfaces = [mask & ~binary_erosion(mask) for mask in (prediction, truth)]
    maps = [distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    return max(np.percentile(maps[1][surfaces[0]], 95), np.percentile(maps[0][surfaces[1]], 95))


def monai_hd95(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compute_hausdorff_distance(
            torch.from_numpy(prediction)[None, None],
            torch.from_numpy(truth)[None, None],
            include_background=True,
            percentile=95,
            spacing=list(spacing),
        ).item()


CASES = [
    ((24, 24), (1.0, 1.0)),
    ((31, 17), (0.5, 3.0)),
    ((16, 20, 12), (1.0, 1.0, 1.0)),
    ((14, 18, 16), (2.5, 1.0, 0.7)),
]


@pytest.mark.parametrize(("shape", "spacing"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_scipy_and_monai(shape: tuple[int, ...], spacing: tuple[float, ...], seed: int) -> None:
    prediction, truth = blob(shape, seed), blob(shape, seed + 10)
    scores = region_scores(prediction, truth, spacing)
    assert scores["hd95"] == pytest.approx(hd95_by_scipy(prediction, truth, spacing), rel=1e-5)
    assert scores["hd95"] == pytest.approx(monai_hd95(prediction, truth, spacing), rel=1e-6)
    dice = compute_dice(torch.from_numpy(prediction)[None, None], torch.from_numpy(truth)[None, None]).item()
    assert scores["dice"] == pytest.approx(dice, rel=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 20, 12)])
def test_overlap_agrees_with_simpleitk(shape: tuple[int, ...]) -> None:
    prediction, truth = blob(shape, 3), blob(shape, 4)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in (truth, prediction)))
    scores = region_scores(prediction, truth, 1.0, hd95=False)
    assert scores["dice"] == pytest.approx(overlap.GetDiceCoefficient(), abs=1e-12)
    assert scores["iou"] == pytest.approx(overlap.GetJaccardCoefficient(), abs=1e-12)
    assert math.isnan(scores["hd95"])


@pytest.mark.parametrize("corner", [(0, 0, 0), (5, 3, 9), (30, 32, 20)])
def test_cropping_does_not_change_hd95(corner: tuple[int, int, int]) -> None:
    """Small masks anywhere in a large volume, also at its border, where the cropped box cannot have a margin."""
    prediction, truth = np.zeros((40, 40, 30), bool), np.zeros((40, 40, 30), bool)
    inner = tuple(slice(start, start + length) for start, length in zip(corner, (10, 8, 10)))
    prediction[inner], truth[inner] = blob((10, 8, 10), 1), blob((10, 8, 10), 2)
    spacing = (1.0, 2.0, 3.0)
    assert region_scores(prediction, truth, spacing)["hd95"] == pytest.approx(
        monai_hd95(prediction, truth, spacing), rel=1e-7
    )
    # independent of what MONAI crops itself
    assert region_scores(prediction, truth, spacing)["hd95"] == pytest.approx(
        hd95_by_scipy(prediction, truth, spacing), rel=1e-5
    )


@pytest.mark.parametrize(("axis", "expected"), [(0, 4.0), (1, 1.0), (2, 0.5)])
def test_shifted_cube_by_hand(axis: int, expected: float) -> None:
    truth = np.zeros((10, 10, 10), bool)
    truth[3:7, 3:7, 3:7] = True  # 64 voxels, shifted by one: 48 in common
    scores = region_scores(np.roll(truth, 1, axis=axis), truth, (4.0, 1.0, 0.5))
    assert scores == {
        "dice": 0.75,
        "hd95": expected,
        "iou": 0.6,
        "truth_voxels": 64,
        "prediction_voxels": 64,
        "truth_empty": False,
        "prediction_empty": False,
    }


def test_hd95_forgives_a_twentieth_but_not_more() -> None:
    """100 single-voxel surfaces; 4 stray voxels of 104 are within the 5 %, 10 of 110 are not."""
    truth = np.zeros((64, 300), bool)
    truth[2, :200:2] = True
    few, many = truth.copy(), truth.copy()
    few[52, :8:2] = True
    many[52, :20:2] = True
    assert region_scores(few, truth, 1.0)["hd95"] == 0.0
    assert region_scores(many, truth, 1.0)["hd95"] == 50.0


def test_brats_rule_for_empty_regions() -> None:
    nothing, something = np.zeros((6, 6, 6), bool), np.zeros((6, 6, 6), bool)
    something[3, 3, 3] = True  # one hallucinated voxel turns 1 into 0
    both = region_scores(nothing, nothing, 1.0)
    assert (both["dice"], both["iou"], both["hd95"]) == (1.0, 1.0, 0.0)
    assert both["truth_empty"]
    assert both["prediction_empty"]
    for prediction, truth in ((something, nothing), (nothing, something)):
        scores = region_scores(prediction, truth, 2.0)
        assert (scores["dice"], scores["iou"], scores["hd95"]) == (0.0, 0.0, BRATS_HD95_PENALTY)
        assert scores["truth_empty"] is (truth is nothing)
        assert scores["prediction_empty"] is (prediction is nothing)
    assert round(math.hypot(240, 240, 155), 2) == BRATS_HD95_PENALTY


@pytest.mark.parametrize("prediction_voxel", [False, True])
@pytest.mark.parametrize("truth_voxel", [False, True])
def test_nan_rule_is_monais_default(prediction_voxel: bool, truth_voxel: bool) -> None:
    prediction, truth = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    prediction[2, 2], truth[2, 2] = prediction_voxel, truth_voxel
    scores = region_scores(prediction, truth, (1.0, 1.0), empty="nan")
    dice = compute_dice(torch.from_numpy(prediction)[None, None], torch.from_numpy(truth)[None, None]).item()
    np.testing.assert_equal(scores["dice"], dice)
    np.testing.assert_equal(scores["iou"], dice)  # 0, 1 or NaN alike
    np.testing.assert_equal(scores["hd95"], monai_hd95(prediction, truth, (1.0, 1.0)))


def test_brats_dice_is_monais_with_ignore_empty_off() -> None:
    empty, full = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    for p, t in ((empty, empty), (empty, full), (full, empty)):
        expected = compute_dice(p, t, ignore_empty=False).item()
        assert region_scores(p[0, 0], t[0, 0], 1.0)["dice"] == expected


@pytest.mark.parametrize("kind", ["bool", "uint8", "float", "tensor"])
def test_takes_masks_of_any_kind(kind: str) -> None:
    prediction, truth = blob((8, 9, 7), 0), blob((8, 9, 7), 1)
    expected = region_scores(prediction, truth, 1.0)
    if kind == "tensor":
        assert region_scores(torch.from_numpy(prediction), torch.from_numpy(truth), torch.ones(3)) == expected
    else:
        dtype = {"bool": bool, "uint8": np.uint8, "float": np.float32}[kind]
        assert region_scores(prediction.astype(dtype), truth.astype(dtype), 1) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": np.zeros((4, 5), bool)}, "shape"),
        ({"prediction": np.full((4, 4), 2)}, "other than 0 and 1"),
        ({"prediction": np.full((4, 4), np.nan)}, "other than 0 and 1"),
        ({"prediction": np.zeros((1, 2, 4, 4), bool)}, "shape"),
        ({"spacing": (1.0, 1.0, 1.0)}, "spacing"),
        ({"spacing": (1.0, 0.0)}, "spacing"),
        ({"spacing": (1.0, float("nan"))}, "spacing"),
        ({"empty": "drop"}, "rule"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"prediction": np.zeros((4, 4), bool), "truth": np.zeros((4, 4), bool), "spacing": 1.0} | change
    with pytest.raises(ValueError, match=message):
        region_scores(**arguments)


def test_a_volume_takes_well_under_a_second() -> None:
    prediction, truth = np.zeros((120, 120, 78), bool), np.zeros((120, 120, 78), bool)
    prediction[30:80, 30:80, 20:60], truth[34:84, 28:78, 20:60] = blob((50, 50, 40), 1), blob((50, 50, 40), 2)
    region_scores(prediction, truth, 2.0)  # imports MONAI
    start = time.process_time()
    region_scores(prediction, truth, 2.0)
    assert time.process_time() - start < 2.0


def test_voxel_accuracy() -> None:
    prediction = np.array([[0, 1, 2], [3, 0, 0]])
    truth = np.array([[0, 1, 1], [3, 3, 0]])
    assert voxel_accuracy(prediction, truth) == 4 / 6
    assert voxel_accuracy(torch.from_numpy(prediction), truth, truth > 0) == 2 / 4
    with pytest.raises(ValueError, match="empty"):
        voxel_accuracy(prediction, truth, np.zeros((2, 3), bool))
    with pytest.raises(ValueError, match="shape"):
        voxel_accuracy(prediction, truth[:1])
    with pytest.raises(ValueError, match="shape"):
        voxel_accuracy(prediction, truth, truth[:1] > 0)
