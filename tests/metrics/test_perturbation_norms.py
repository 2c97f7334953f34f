"""Norms of a perturbation in three units against hand-computed cases and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_adv.metrics import perturbation_norms


@pytest.fixture
def volume() -> tuple[np.ndarray, np.ndarray]:
    """Four channels of very different scale, zero outside a ball-like support."""
    rng = np.random.default_rng(0)
    support = np.zeros((9, 10, 11), bool)
    support[2:8, 2:9, 1:10] = True
    scales = np.array([1.0, 300.0, 0.01, 20.0])[:, None, None, None]
    return (100 + rng.standard_normal((4, *support.shape))) * scales * support, support


def test_by_hand_two_channels() -> None:
    """Channel 0 has std 1 and channel 1 std 10 in the support; the voxel outside must not enter the std."""
    clean = np.array([[[1.0, 3.0, 1000.0]], [[10.0, 30.0, 1000.0]]])
    support = np.array([[True, True, False]])
    delta = np.array([[[0.3, 0.0, 0.0]], [[4.0, -4.0, 0.0]]])
    norms = perturbation_norms(clean, clean + delta, support)
    assert norms["linf_absolute"] == 4.0
    assert norms["linf_std"] == pytest.approx(0.4)
    assert norms["linf_std_per_channel"] == pytest.approx([0.3, 0.4])
    assert norms["l2_absolute"] == pytest.approx(math.sqrt(0.09 + 32))
    assert norms["l2_std"] == pytest.approx(math.sqrt(0.09 + 0.32))
    assert norms["rms_std"] == pytest.approx(math.sqrt((0.09 + 0.32) / 4))
    assert norms["rms_std_per_channel"] == pytest.approx([0.3 / math.sqrt(2), 0.4])
    # the 0.5 to 99.5 percentile of two values a and b, linear between them, spans 0.99 (b - a)
    assert norms["linf_range_per_channel"] == pytest.approx([0.3 / 1.98, 4.0 / 19.8])
    assert norms["changed"] == 1.0
    assert norms["changed_per_channel"] == [0.5, 1.0]
    assert norms["outside_max"] == 0.0
    assert norms["support_voxels"] == 2


def test_a_budget_in_std_or_range_is_measured_as_that_budget(volume: tuple[np.ndarray, np.ndarray]) -> None:
    clean, support = volume
    sign = np.where(np.random.default_rng(1).random(clean.shape) < 0.5, -1.0, 1.0) * support
    std = clean[:, support].std(axis=1)[:, None, None, None]
    low, high = np.percentile(clean[:, support], (0.5, 99.5), axis=1)
    spread = (high - low)[:, None, None, None]
    by_std = perturbation_norms(clean, clean + 0.1 * std * sign, support)
    assert by_std["linf_std_per_channel"] == pytest.approx([0.1] * 4, rel=1e-9)
    assert by_std["rms_std"] == pytest.approx(0.1, rel=1e-9)
    assert by_std["l2_std"] == pytest.approx(0.1 * math.sqrt(4 * support.sum()), rel=1e-9)
    by_range = perturbation_norms(clean, clean + 8 / 255 * spread * sign, support)
    assert by_range["linf_range_per_channel"] == pytest.approx([8 / 255] * 4, rel=1e-9)


def test_relative_units_ignore_scale_and_offset(volume: tuple[np.ndarray, np.ndarray]) -> None:
    clean, support = volume
    adversarial = clean + np.random.default_rng(2).standard_normal(clean.shape) * 0.2 * support
    before = perturbation_norms(clean, adversarial, support)
    after = perturbation_norms(50 * clean + 7, 50 * adversarial + 7, support)
    for key in ("linf_std", "l2_std", "rms_std", "linf_range", "l2_range", "rms_range"):
        assert after[key] == pytest.approx(before[key], rel=1e-6)
    assert after["linf_absolute"] == pytest.approx(50 * before["linf_absolute"], rel=1e-9)


def test_change_outside_the_support_is_seen(volume: tuple[np.ndarray, np.ndarray]) -> None:
    clean, support = volume
    adversarial = clean.copy()
    adversarial[2, 0, 0, 0] = -7.0
    norms = perturbation_norms(clean, adversarial, support)
    assert norms["outside_max"] == 7.0
    assert norms["linf_absolute"] == 7.0
    assert norms["changed"] == 0.0


def test_identical_images_and_a_constant_channel(volume: tuple[np.ndarray, np.ndarray]) -> None:
    clean, support = volume
    clean[3] = 0.1  # a modality filled with a constant, whose mean is not exactly itself in floating point
    norms = perturbation_norms(clean, clean, support)
    assert {value for key, value in norms.items() if key.startswith(("linf", "l2", "rms")) and "per" not in key} == {0}
    adversarial = clean.copy()
    adversarial[3, 4, 4, 4] += 1
    norms = perturbation_norms(clean, adversarial, support)
    assert norms["linf_std"] == math.inf
    assert norms["linf_absolute"] == pytest.approx(1.0)
    assert norms["linf_std_per_channel"] == [0.0, 0.0, 0.0, math.inf]


def test_two_dimensions_equal_three_of_depth_one() -> None:
    rng = np.random.default_rng(0)
    clean, adversarial, support = rng.random((4, 6, 7)), rng.random((4, 6, 7)), rng.random((6, 7)) < 0.7
    flat = perturbation_norms(clean, adversarial, support)
    assert perturbation_norms(clean[:, None], adversarial[:, None], support[None]) == flat


def test_a_support_for_each_channel() -> None:
    """The threat's foreground is each channel's own: its unit comes from there."""
    clean = np.array([[[0.0, 1.0, 3.0]], [[10.0, 30.0, 0.0]]])
    delta = np.array([[[0.0, 0.1, 0.0]], [[2.0, 2.0, 0.0]]])
    norms = perturbation_norms(clean, clean + delta, clean != 0)
    assert norms["linf_std_per_channel"] == pytest.approx([0.1, 0.2])
    assert norms["rms_std_per_channel"] == pytest.approx([0.1 / math.sqrt(2), 0.2])
    assert norms["rms_std"] == pytest.approx(math.sqrt((0.01 + 0.08) / 4))
    assert norms["changed_per_channel"] == [0.5, 1.0]
    assert (norms["changed"], norms["support_voxels"]) == (pytest.approx(2 / 3), 3)
    shared = perturbation_norms(clean, clean + delta, np.ones((1, 3), bool))
    assert shared["linf_std_per_channel"][0] == pytest.approx(0.1 / np.std([0, 1, 3]))
    delta[0, 0, 0] = 5.0
    assert perturbation_norms(clean, clean + delta, clean != 0)["outside_max"] == 5.0


def test_a_channel_without_support() -> None:
    """A missing modality filled with zeros has no foreground of its own."""
    clean = np.array([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0]]])
    delta = np.array([[[0.1, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    norms = perturbation_norms(clean, clean + delta, clean != 0)
    assert norms["linf_std_per_channel"] == pytest.approx([0.1 / np.std([1, 2, 3]), 0.0])
    assert (norms["changed_per_channel"], norms["changed"]) == ([1 / 3, 0.0], 1 / 3)
    assert norms["rms_absolute"] == pytest.approx(0.1 / math.sqrt(3))
    delta[1] = 0.2
    norms = perturbation_norms(clean, clean + delta, clean != 0)
    assert (norms["outside_max"], norms["linf_std"]) == (0.2, math.inf)


def test_takes_meta_tensors_and_a_support_with_a_channel_axis(volume: tuple[np.ndarray, np.ndarray]) -> None:
    clean, support = volume
    image, changed = MetaTensor(torch.from_numpy(clean)), MetaTensor(torch.from_numpy(clean + 1.0))
    assert perturbation_norms(image, changed, torch.from_numpy(support)[None])["linf_absolute"] == pytest.approx(1)


def test_float32_is_measured_in_float64() -> None:
    """No rounding of a float32 difference may hide or make an excess over the budget."""
    clean = np.full((1, 4, 4), 1e-9, dtype=np.float32)
    adversarial = np.ones((1, 4, 4), dtype=np.float32)
    exact = 1.0 - float(np.float32(1e-9))
    assert exact != 1.0
    assert perturbation_norms(clean, adversarial, np.ones((4, 4), bool))["linf_absolute"] == exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adversarial": np.ones((1, 4, 5))}, "shape"),
        ({"adversarial": np.full((1, 4, 4), np.nan)}, "NaN"),
        ({"clean": np.ones((4, 4)), "adversarial": np.ones((4, 4))}, "expected"),
        ({"support": np.zeros((4, 4), bool)}, "empty"),
        ({"support": np.ones((4, 5), bool)}, "shape"),
        ({"support": np.full((4, 4), 3)}, "other than 0 and 1"),
        ({"support": np.ones((2, 4, 4), bool)}, "shape"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    arguments = {"clean": np.ones((1, 4, 4)), "adversarial": np.ones((1, 4, 4)), "support": np.ones((4, 4), bool)}
    with pytest.raises(ValueError, match=message):
        perturbation_norms(**(arguments | change))
