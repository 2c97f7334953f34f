"""SSIM and PSNR inside the support against MONAI's kernels and closed forms."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from monai.metrics import PSNRMetric
from monai.metrics.regression import compute_ssim_and_cs
from scipy.ndimage import gaussian_filter

from monai_adv.metrics import image_quality


def pair(shape: tuple[int, ...], channels: int = 2, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    clean = np.stack([gaussian_filter(rng.random(shape), 1) for _ in range(channels)])
    return clean, clean + noise * clean.std() * rng.standard_normal(clean.shape)


@pytest.mark.parametrize("shape", [(30, 26), (18, 16, 20)])
def test_ssim_and_psnr_agree_with_monai(shape: tuple[int, ...]) -> None:
    """The support is the part that MONAI's unpadded map covers; images are brought to the robust range first."""
    clean, adversarial = pair(shape, noise=0.5)
    support = np.zeros(shape, bool)
    support[tuple(slice(5, -5) for _ in shape)] = True
    quality = image_quality(clean, adversarial, support)
    psnr_errors = []
    for channel in range(2):
        low, high = np.percentile(clean[channel][support], (0.5, 99.5))
        x, y = (torch.from_numpy((image[channel] - low) / (high - low))[None, None] for image in (clean, adversarial))
        dims = len(shape)
        expected, _ = compute_ssim_and_cs(y, x, dims, [11] * dims, [1.5] * dims, data_range=1.0)
        assert quality["ssim_per_channel"][channel] == pytest.approx(expected.mean().item(), abs=1e-5)
        inside = torch.from_numpy(support)
        values = PSNRMetric(max_val=1.0)(y[..., inside], x[..., inside])
        assert quality["psnr_per_channel"][channel] == pytest.approx(values.item(), abs=1e-5)
        psnr_errors.append((x - y)[..., inside].square().mean().item())
    assert quality["ssim"] == pytest.approx(np.mean(quality["ssim_per_channel"]))
    assert quality["psnr"] == pytest.approx(-10 * math.log10(np.mean(psnr_errors)))
    assert 0.2 < quality["ssim"] < 0.99


def test_psnr_of_a_constant_shift_is_closed_form() -> None:
    """A shift by one tenth of the robust range is 20 dB whatever the image."""
    clean, _ = pair((12, 12, 12))
    support = np.ones((12, 12, 12), bool)
    low, high = np.percentile(clean.reshape(2, -1), (0.5, 99.5), axis=1)
    adversarial = clean + 0.1 * (high - low)[:, None, None, None]
    assert image_quality(clean, adversarial, support)["psnr_per_channel"] == pytest.approx([20.0, 20.0])


def test_identical_images() -> None:
    clean, _ = pair((12, 14))
    quality = image_quality(clean, clean, np.ones((12, 14), bool))
    assert quality == {"ssim": 1.0, "psnr": math.inf, "ssim_per_channel": [1, 1], "psnr_per_channel": [math.inf] * 2}


def test_one_untouched_modality_leaves_psnr_finite() -> None:
    clean, adversarial = pair((12, 14))
    adversarial[0] = clean[0]
    quality = image_quality(clean, adversarial, np.ones((12, 14), bool))
    assert quality["psnr_per_channel"][0] == math.inf
    assert quality["psnr"] == pytest.approx(quality["psnr_per_channel"][1] + 10 * math.log10(2))


def test_units_do_not_matter_and_more_noise_is_worse() -> None:
    clean, adversarial = pair((20, 20))
    support = np.ones((20, 20), bool)
    quality = image_quality(clean, adversarial, support)
    scaled = image_quality(1000 * clean - 30, 1000 * adversarial - 30, support)
    assert scaled["ssim"] == pytest.approx(quality["ssim"], rel=1e-9)
    assert scaled["psnr"] == pytest.approx(quality["psnr"], rel=1e-9)
    worse = image_quality(clean, clean + 3 * (adversarial - clean), support)
    assert worse["ssim"] < quality["ssim"]
    assert worse["psnr"] == pytest.approx(quality["psnr"] - 20 * math.log10(3))


def test_only_the_support_counts() -> None:
    """A change farther from the support than the window reaches is not seen; PSNR sees none outside it."""
    clean, _ = pair((30, 30))
    support = np.zeros((30, 30), bool)
    support[3:10, 3:10] = True
    far, near = clean.copy(), clean.copy()
    far[:, 20:, 20:] += 1.0
    near[:, 12, 5] += 1.0
    assert image_quality(clean, far, support)["ssim"] == 1.0
    assert image_quality(clean, near, support)["ssim"] < 1.0
    assert image_quality(clean, near, support)["psnr"] == math.inf


def test_a_support_for_each_channel() -> None:
    clean, adversarial = pair((20, 20))
    supports = np.zeros((2, 20, 20), bool)
    supports[0, 3:15, 3:15], supports[1, 8:, 8:] = True, True
    quality = image_quality(clean, adversarial, supports)
    for channel in range(2):
        alone = image_quality(clean[[channel]], adversarial[[channel]], supports[channel])
        assert alone["ssim"] == quality["ssim_per_channel"][channel]
        assert alone["psnr"] == quality["psnr_per_channel"][channel]


def test_a_modality_without_support_is_left_out() -> None:
    clean, adversarial = pair((12, 12))
    clean[1] = adversarial[1] = 0.0
    quality = image_quality(clean, adversarial, clean != 0)
    assert quality["ssim"] == quality["ssim_per_channel"][0]
    assert quality["psnr"] == quality["psnr_per_channel"][0]
    assert math.isnan(quality["ssim_per_channel"][1])
    assert math.isnan(quality["psnr_per_channel"][1])


def test_a_constant_modality_has_no_range() -> None:
    clean, adversarial = pair((12, 12))
    clean[1] = adversarial[1] = 3.0
    support = np.ones((12, 12), bool)
    quality = image_quality(clean, adversarial, support)
    assert (quality["ssim_per_channel"][1], quality["psnr_per_channel"][1]) == (1.0, math.inf)
    adversarial[1] = 4.0
    quality = image_quality(clean, adversarial, support)
    assert math.isnan(quality["ssim_per_channel"][1])
    assert quality["psnr"] == -math.inf


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 20, 20)])
def test_volumes_smaller_than_the_window(shape: tuple[int, ...]) -> None:
    clean, adversarial = pair(shape)
    quality = image_quality(clean, adversarial, np.ones(shape, bool))
    assert 0 < quality["ssim"] < 1


def test_bad_input_is_refused() -> None:
    clean, adversarial = pair((8, 8))
    with pytest.raises(ValueError, match="empty"):
        image_quality(clean, adversarial, np.zeros((8, 8), bool))
    with pytest.raises(ValueError, match="NaN"):
        image_quality(clean, adversarial * np.nan, np.ones((8, 8), bool))


def test_a_volume_takes_about_a_second() -> None:
    clean = np.random.default_rng(0).random((4, 120, 120, 78)).astype(np.float32)
    support = np.zeros((120, 120, 78), bool)
    support[25:95, 15:105, 5:73] = True
    start = time.process_time()
    image_quality(clean, clean * np.float32(1.01), support)
    assert time.process_time() - start < 4.0
