"""Units of a budget: MRI has no [0, 1] scale, so eps is measured against the image it changes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

UNITS = ("std", "range", "absolute")
"""Units of a budget: standard deviations of the support, shares of its robust range, image units."""


def foreground(image: Tensor) -> Tensor:
    """Voxels where a channel is not exactly zero, ``(B, C, *spatial)`` bool: the brain of a skull-stripped scan."""
    return image != 0


def unit_scale(image: Tensor, mask: Tensor, units: str) -> Tensor:
    """Size of one unit in the image's own units, ``(B, C, 1, ...)``.

    Args:
        image: ``(B, C, *spatial)``.
        mask: voxels the statistics are taken over, same shape, bool.
        units: "std" (population standard deviation), "range" (0.5 to 99.5 percentile) or "absolute" (1).

    Returns:
        One positive number per sample and channel; 0 for a channel without voxels (it cannot change).
    """
    shape = (*image.shape[:2], *[1] * (image.dim() - 2))
    if units == "absolute":
        return torch.ones(shape, dtype=image.dtype, device=image.device)
    scales = np.zeros(image.shape[:2])
    for b in range(image.shape[0]):
        for c in range(image.shape[1]):
            values = image[b, c][mask[b, c]].detach().cpu().numpy()
            if values.size == 0:
                continue
            if units == "std":
                scales[b, c] = values.std(dtype=np.float64)
            else:
                low, high = np.percentile(values, (0.5, 99.5))
                scales[b, c] = high - low
    return torch.as_tensor(scales, dtype=image.dtype, device=image.device).view(shape)
