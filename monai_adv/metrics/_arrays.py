"""Arrays as the metrics want them: NumPy, checked, cropped."""

from __future__ import annotations

from typing import Any

import numpy as np


def to_numpy(array: Any) -> np.ndarray:
    """Give any array (NumPy, tensor on any device, MetaTensor) as NumPy, without copying where possible."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        # bfloat16 has no NumPy type; a MetaTensor must not carry its metadata through NumPy
        return np.asarray(array.float().numpy() if str(array.dtype) == "torch.bfloat16" else array.numpy())
    return np.asarray(array)


def to_mask(array: Any, name: str) -> np.ndarray:
    """Give a mask as booleans of shape (*spatial).

    Args:
        array: booleans, or numbers that are all 0 or 1; (*spatial) of two or three dimensions.
        name: what to call it in an error.

    Raises:
        ValueError: if it holds anything but 0 and 1, or is not two- or three-dimensional.
    """
    mask = to_numpy(array)
    if mask.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {mask.shape}; expected (H, W) or (D, H, W).")
    if mask.dtype != np.bool_:
        bits = mask.astype(bool)
        if not np.array_equal(mask, bits):
            raise ValueError(f"{name} holds values other than 0 and 1; pass the boolean mask of one region.")
        mask = bits
    return mask


def to_support(support: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Give the support as booleans of the image's shape (C, *spatial), one mask per channel.

    Args:
        support: one mask for all channels, (*spatial) or (1, *spatial), or one for each, (C, *spatial).
        shape: the image's shape.

    Raises:
        ValueError: if the shape does not fit, values are not 0 or 1, or no voxel is in the support.
    """
    mask = to_numpy(support)
    if mask.shape == shape[1:]:
        mask = mask[None]
    if mask.ndim != len(shape) or mask.shape[1:] != shape[1:] or mask.shape[0] not in (1, shape[0]):
        raise ValueError(f"The support has shape {mask.shape}, the image {shape}.")
    masks = [to_mask(channel, "The support") for channel in mask]
    if not any(channel.any() for channel in masks):
        raise ValueError("The support is empty: no voxel to measure in. Was the foreground found in this volume?")
    return np.broadcast_to(np.stack(masks), shape)


def image_pair(clean: Any, adversarial: Any) -> tuple[np.ndarray, np.ndarray]:
    """Give a clean and an adversarial image as (C, *spatial) floating-point arrays of one shape, all finite.

    Raises:
        ValueError: if shapes differ, the shape is not (C, H, W) or (C, D, H, W), or a value is NaN or infinite.
    """
    images = []
    for name, image in (("clean", clean), ("adversarial", adversarial)):
        array = to_numpy(image)
        if array.ndim not in (3, 4):
            raise ValueError(f"The {name} image has shape {array.shape}; expected (C, H, W) or (C, D, H, W).")
        if not np.isfinite(array).all():
            raise ValueError(f"The {name} image holds NaN or infinite values; exclude the case as non-finite.")
        images.append(array)
    if images[0].shape != images[1].shape:
        raise ValueError(f"The clean image has shape {images[0].shape}, the adversarial image {images[1].shape}.")
    return images[0], images[1]


def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...]:
    """Give the slices of the box around the true voxels of a mask, widened by a margin and cut off at the border.

    The whole array where no voxel is true.
    """
    slices = []
    for axis in range(mask.ndim):
        along = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if along.size == 0:
            return tuple(slice(0, length) for length in mask.shape)
        slices.append(slice(max(0, int(along[0]) - margin), min(mask.shape[axis], int(along[-1]) + 1 + margin)))
    return tuple(slices)


def robust_range(values: np.ndarray) -> tuple[float, float]:
    """Give the 0.5 and 99.5 percentile of an image's values inside the support (the ends of the robust range)."""
    low, high = np.percentile(values, (0.5, 99.5))
    return float(low), float(high)
