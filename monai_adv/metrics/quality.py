"""How much of an attack an eye could see: SSIM and PSNR inside the support."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
from scipy.ndimage import gaussian_filter

from ._arrays import bounding_box, image_pair, robust_range, to_support

# the window of Wang et al. and of MONAI's SSIMMetric: 11 voxels, sigma 1.5; constants k1, k2
_SIGMA, _RADIUS = 1.5, 5
_K1, _K2 = 0.01, 0.03


class ImageQuality(TypedDict):
    """What `image_quality` gives."""

    ssim: float
    psnr: float
    ssim_per_channel: list[float]
    psnr_per_channel: list[float]


def image_quality(clean: Any, adversarial: Any, support: Any) -> ImageQuality:
    """Compare an adversarial with its clean image inside the support: SSIM and PSNR in dB.

    Both relate to the robust range of each modality (0.5 to 99.5 percentile of the clean image inside the support),
    moved to [0, 1] first. So neither depends on the units of the image: scanner units and z-scores agree, except
    for windows that reach outside the support.
    SSIM is the map of `monai.metrics.SSIMMetric` (Gaussian window, sigma 1.5, 11 voxels, data range 1), averaged over
    the support's voxels; the window is applied axis by axis with SciPy, which is 10 times faster in 3D than the full
    kernel and equal to it. Beyond the volume's border the edge voxel is repeated.
    Reference: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004).

    Args:
        clean: ``(C, *spatial)``, two or three spatial axes.
        adversarial: the same shape and intensity units.
        support: boolean, ``(*spatial)``, ``(1, *spatial)`` or, with a mask for each channel,
            ``(C, *spatial)``; as a rule the brain.

    Returns:
        ``ssim``: mean over the modalities, 1 for identical images; ``psnr``: of the squared error averaged over the
        modalities (so that a modality left alone does not make it infinite), infinite for identical images;
        and both per modality. A modality that is constant in the support has no range: SSIM 1 and PSNR infinite
        where it is unchanged, NaN and -infinity where it is changed. A modality without a voxel in its support is
        NaN and left out of the mean.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or the support is empty.

    Example:
        >>> import numpy as np
        >>> clean = np.random.default_rng(0).random((1, 16, 16))
        >>> quality = image_quality(clean, clean, np.ones((16, 16), bool))
        >>> quality["ssim"], quality["psnr"]
        (1.0, inf)
    """
    x, y = image_pair(clean, adversarial)
    ssim, errors, measured = [], [], []
    for before, after, inside in zip(x, y, to_support(support, x.shape)):
        measured.append(bool(inside.any()))
        if not measured[-1]:
            ssim.append(float("nan"))
            errors.append(float("nan"))
            continue
        box = bounding_box(inside, margin=_RADIUS)
        where = inside[box]
        a, b = before[box].astype(np.float64), after[box].astype(np.float64)
        low, high = robust_range(a[where])
        if np.array_equal(a, b):
            ssim.append(1.0)
            errors.append(0.0)
        elif high > low:
            a, b = (a - low) / (high - low), (b - low) / (high - low)
            ssim.append(float(_ssim_map(a, b)[where].mean()))
            errors.append(float(np.mean((b - a)[where] ** 2)))
        else:
            ssim.append(float("nan"))
            errors.append(float("inf"))
    return {
        "ssim": float(np.mean(np.array(ssim)[measured])),
        "psnr": _psnr(float(np.mean(np.array(errors)[measured]))),
        "ssim_per_channel": ssim,
        "psnr_per_channel": [_psnr(error) for error in errors],
    }


def _psnr(mean_squared_error: float) -> float:
    """PSNR in dB for a data range of 1."""
    if mean_squared_error == 0:
        return float("inf")
    return float(-10.0 * np.log10(mean_squared_error))


def _ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Structural similarity at each voxel for a data range of 1."""

    def window(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, _SIGMA, mode="nearest", radius=_RADIUS)

    c1, c2 = _K1**2, _K2**2
    mean_x, mean_y = window(x), window(y)
    variances = window(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)
