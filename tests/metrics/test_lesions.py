"""Lesion-wise scores: cases computed by hand, the rules written out plainly, and the evaluation's own HD95."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from monai_adv.metrics import LESION_HD95_PENALTY, lesion_scores

SHAPE = (40, 20, 20)


def box(*corners: tuple[int, int]) -> np.ndarray:
    """A cuboid; the sides after the last one given are 4 to 10."""
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*side) for side in (*corners, *[(4, 10)] * (3 - len(corners))))] = True
    return mask


LEFT, RIGHT = box((2, 8)), box((28, 34))  # 216 mm^3 each, 20 mm apart
SMALL = box((28, 31), (4, 8), (4, 8))  # 48 mm^3: does not count
JUST = box((28, 30), (4, 9), (4, 9))  # 50 mm^3: does not count either ("larger than")
BIG_ENOUGH = box((28, 31), (4, 8), (4, 9))  # 60 mm^3
DOT = box((20, 21), (5, 6), (5, 6))
EMPTY = np.zeros(SHAPE, bool)


@pytest.mark.parametrize(
    ("prediction", "truth", "dice", "hd95", "counts"),
    [
        pytest.param(EMPTY, EMPTY, 1.0, 0.0, (0, 0, 0), id="both empty"),
        pytest.param(LEFT, LEFT, 1.0, 0.0, (1, 0, 0), id="the same"),
        pytest.param(LEFT, LEFT | RIGHT, 0.5, 187.0, (1, 1, 0), id="one of two missed"),
        pytest.param(EMPTY, LEFT | RIGHT, 0.0, 374.0, (0, 2, 0), id="all missed"),
        pytest.param(LEFT | RIGHT, LEFT, 0.5, 187.0, (1, 0, 1), id="one invented"),
        pytest.param(
            LEFT | RIGHT | DOT, LEFT, 1 / 3, 2 * 374 / 3, (1, 0, 2), id="a single voxel invented counts whole"
        ),
        pytest.param(DOT, EMPTY, 0.0, 374.0, (0, 0, 1), id="a voxel where there is nothing"),
        pytest.param(LEFT, LEFT | SMALL, 1.0, 0.0, (1, 0, 0), id="a small one missed does not count"),
        pytest.param(LEFT | SMALL, LEFT | SMALL, 1.0, 0.0, (1, 0, 0), id="nor does a small one found"),
        pytest.param(EMPTY, SMALL, 1.0, 0.0, (0, 0, 0), id="only a small one, nothing predicted"),
        pytest.param(SMALL, SMALL, 1.0, 0.0, (0, 0, 0), id="only a small one, found"),
        pytest.param(EMPTY, JUST, 1.0, 0.0, (0, 0, 0), id="exactly 50 does not count"),
        pytest.param(EMPTY, BIG_ENOUGH, 0.0, 374.0, (0, 1, 0), id="60 counts"),
        # 216 of 216 + 108 voxels; the farther face is 3 mm off, its nearest voxel centre-surface 3
        pytest.param(box((2, 8), (4, 7)), LEFT, 2 * 108 / 324, 3.0, (1, 0, 0), id="half of one"),
        # shares no voxel, but touches the lesion dilated by 3
        pytest.param(box((10, 14)), LEFT, 0.0, None, (1, 0, 0), id="near but not in it"),
        pytest.param(box((11, 14)), LEFT, 0.0, 374.0, (0, 1, 1), id="one voxel too far: missed and invented"),
        # one component over both: 432 and the bridge between them against 216, twice
        pytest.param(box((2, 34)), LEFT | RIGHT, 2 * 216 / (216 + 1152), None, (2, 0, 0), id="one bridge for two"),
    ],
)
def test_cases_computed_by_hand(
    prediction: np.ndarray, truth: np.ndarray, dice: float, hd95: float | None, counts: tuple[int, int, int]
) -> None:
    scores = lesion_scores(prediction, truth, 1.0)
    assert scores.dice == pytest.approx(dice)
    assert hd95 is None or scores.hd95 == pytest.approx(hd95)
    assert (scores.found, scores.missed, scores.false_positives) == counts


@pytest.mark.parametrize(("gap", "lesions"), [(5, 1), (6, 1), (7, 2)])
def test_parts_that_touch_when_dilated_are_one_lesion(gap: int, lesions: int) -> None:
    truth = box((2, 8)) | box((8 + gap, 14 + gap))
    assert len(lesion_scores(EMPTY, truth, 1.0).lesions) == lesions
    assert len(lesion_scores(EMPTY, truth, 1.0, dilation=0).lesions) == 2
    assert len(lesion_scores(EMPTY, truth, 1.0, dilation=1).lesions) == 2


def test_corners_that_touch_are_one_component() -> None:
    diagonal = np.zeros(SHAPE, bool)
    diagonal[4:8, 4:8, 4:8] = diagonal[8:12, 8:12, 8:12] = True
    assert lesion_scores(diagonal, EMPTY, 1.0).false_positives == 1


def test_volumes_are_in_cubic_millimetres() -> None:
    (lesion,) = lesion_scores(EMPTY, SMALL, (2.0, 1.0, 1.5)).lesions
    assert lesion.volume == pytest.approx(48 * 3)
    assert lesion.counted
    assert not lesion_scores(EMPTY, SMALL, (2.0, 1.0, 1.5), min_volume=144).lesions[0].counted


@pytest.mark.parametrize("seed", range(12))
def test_the_rules_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spacing = [float(s) for s in rng.choice([1.0, 0.5, 2.0], 3)]
    dilation, volume = int(rng.integers(0, 4)), float(rng.choice([0, 5, 20]))
    noise = ndimage.gaussian_filter(rng.normal(size=(32, 28, 26)), 1.2)
    other = ndimage.gaussian_filter(rng.normal(size=noise.shape), 1.2) + noise
    truth, prediction = noise > np.quantile(noise, 0.99), other > np.quantile(other, 0.985)
    scores = lesion_scores(prediction, truth, spacing, dilation=dilation, min_volume=volume)
    expected = plainly(prediction, truth, spacing, dilation, volume)
    assert len(scores.lesions) > 1
    assert scores.dice == pytest.approx(expected[0], abs=1e-12)
    assert scores.hd95 == pytest.approx(expected[1], abs=1e-4)
    assert (scores.found, scores.missed, scores.false_positives) == expected[2:]


def plainly(p: np.ndarray, t: np.ndarray, spacing: list[float], dilation: int, volume: float) -> tuple[Any, ...]:
    """The same on whole volumes, step by step, with the surface distances of the evaluation's own library."""
    near = ndimage.generate_binary_structure(3, 2)

    def grown(mask: np.ndarray) -> np.ndarray:
        for _ in range(dilation):
            mask = ndimage.binary_dilation(mask, near)
        return mask

    def label(mask: np.ndarray) -> np.ndarray:
        numbers = np.zeros(mask.shape, int)
        for start in zip(*np.nonzero(mask)):
            if numbers[start]:
                continue
            number, front = numbers.max() + 1, [start]
            numbers[start] = number
            while front:
                at = front.pop()
                for step in np.ndindex(3, 3, 3):
                    to = tuple(a + s - 1 for a, s in zip(at, step))
                    inside = all(0 <= i < n for i, n in zip(to, mask.shape))
                    if inside and mask[to] and not numbers[to]:
                        numbers[to] = number
                        front.append(to)
        return numbers

    components, groups = label(p), label(grown(t)) * t
    touched: set[int] = set()
    dices, distances, found = [], [], 0
    for index in range(1, groups.max() + 1):
        lesion = groups == index
        hits = set(components[grown(lesion)]) - {0}
        touched |= hits
        predicted = np.isin(components, list(hits))
        if lesion.sum() * np.prod(spacing) > volume:
            found += bool(hits)
            dices.append(2 * (lesion & predicted).sum() / (lesion.sum() + predicted.sum()))
            distances.append(library_hd95(predicted, lesion, spacing) if hits else 374.0)
    false = len(set(components.ravel()) - {0} - touched)
    if not dices and not false:
        return 1.0, 0.0, 0, 0, 0
    number = len(dices) + false
    return sum(dices) / number, (sum(distances) + 374 * false) / number, found, len(dices) - found, false


def library_hd95(p: np.ndarray, t: np.ndarray, spacing: list[float]) -> float:
    import surface_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it calls scipy.ndimage by its old names
        surfaces = surface_distance.compute_surface_distances(t, p, spacing)
    return float(surface_distance.compute_robust_hausdorff(surfaces, 95))


def test_a_lesion_at_the_border_is_scored_like_one_inside() -> None:
    inside, border = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    inside[10:16, 4:10, 4:10] = border[0:6, 0:6, 0:6] = True
    moved = lesion_scores(np.roll(inside, 1, axis=0), inside, 1.0)
    cut = lesion_scores(np.roll(border, 1, axis=0), border, 1.0)
    assert (cut.dice, cut.hd95) == pytest.approx((moved.dice, moved.hd95))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((LEFT[0], LEFT[0], 1.0), "volumes of one shape"),
        ((LEFT, LEFT[1:], 1.0), "volumes of one shape"),
        ((LEFT * 2, LEFT, 1.0), "other than 0 and 1"),
        ((LEFT, LEFT, (1.0, 1.0)), "three axes"),
        ((LEFT, LEFT, 0.0), "three axes"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        lesion_scores(*arguments)
    with pytest.raises(ValueError, match="negative"):
        lesion_scores(LEFT, LEFT, 1.0, dilation=-1)


def test_the_penalty_is_that_of_2023() -> None:
    assert LESION_HD95_PENALTY == 374.0
