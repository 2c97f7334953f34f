"""Clinical edits of a segmentation: remove, swap, grow, shrink, shift and insert lesions, with distances in mm.

Pure functions of class indices ``(B, 1, *spatial)``, 0 is background, everything else is lesion. Every sample is edited
for itself, dtype and device are kept, and what is given is never changed. Distances are between voxel centres.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from monai_adv.errors import ConfigError

Array = NDArray[np.integer]
Mask = NDArray[np.bool_]


def remove(labels: Tensor, classes: Sequence[int], spacing: Sequence[float]) -> Tensor:
    """Fill the voxels of some classes with the nearest label that remains.

    Args:
        labels: class indices ``(B, 1, *spatial)``.
        classes: what is removed.
        spacing: voxel size in mm, one per axis.

    Raises:
        ConfigError: if nothing else is in a sample.
    """

    def edit(values: Array, sample: int) -> Array:
        gone = np.isin(values, classes)
        if gone.all():
            raise ConfigError(
                f"cannot hide classes {list(classes)}: nothing else is left in sample {sample} to fill with"
            )
        return _nearest(values, ~gone, spacing)[1] if gone.any() else values

    return _each(labels, edit)


def swap(labels: Tensor, first: Sequence[int], second: Sequence[int], spacing: Sequence[float]) -> Tensor:
    """Exchange two parts without common classes; twice is the identity where each is one class.

    A voxel that comes to a part of several classes takes the class of the nearest voxel of that part (the first class
    of the part if the sample has none of it).

    Args:
        labels: class indices ``(B, 1, *spatial)``.
        first: classes of one part.
        second: classes of the other.
        spacing: voxel size in mm, one per axis.
    """

    def edit(values: Array, sample: int) -> Array:
        result = values.copy()
        for old, new in ((first, second), (second, first)):
            leaving, known = np.isin(values, old), np.isin(values, new)
            if len(new) > 1 and known.any():
                result[leaving] = _nearest(values, known, spacing)[1][leaving]
            else:
                result[leaving] = new[0]
        return result

    return _each(labels, edit)


def grow(labels: Tensor, mm: float, spacing: Sequence[float], classes: Sequence[int] | None = None) -> Tensor:
    """Dilate the lesion: voxels at most ``mm`` away take the label of the nearest lesion voxel.

    Args:
        labels: class indices ``(B, 1, *spatial)``.
        mm: distance; 0 changes nothing.
        spacing: voxel size in mm, one per axis.
        classes: the part that grows, over whatever is around it; the whole lesion if None.
    """

    def edit(values: Array, sample: int) -> Array:
        part = _part(values, classes)
        if not part.any():
            return values
        distance, nearest = _nearest(values, part, spacing)
        return np.where(distance <= mm + _tolerance(spacing), nearest, values)

    return _each(labels, edit)


def shrink(labels: Tensor, mm: float, spacing: Sequence[float], classes: Sequence[int] | None = None) -> Tensor:
    """Erode the lesion: its voxels at most ``mm`` away from another one take the label of the nearest of those.

    For the whole lesion that is background. The border of the volume does not erode; a part larger than the volume
    stays as it is.

    Args:
        labels: class indices ``(B, 1, *spatial)``.
        mm: distance; 0 changes nothing.
        spacing: voxel size in mm, one per axis.
        classes: the part that shrinks; the whole lesion if None.
    """

    def edit(values: Array, sample: int) -> Array:
        part = _part(values, classes)
        if part.all():
            return values
        distance, nearest = _nearest(values, ~part, spacing)
        return np.where(distance <= mm + _tolerance(spacing), nearest, values)

    return _each(labels, edit)


def shift(labels: Tensor, mm: Sequence[float], spacing: Sequence[float]) -> Tensor:
    """Move the lesion by the nearest whole number of voxels; the place it leaves becomes background.

    What leaves the volume is lost.

    Args:
        labels: class indices ``(B, 1, *spatial)``.
        mm: distance along each voxel axis, positive towards larger indices.
        spacing: voxel size in mm, one per axis.
    """
    voxels = [round(distance / size) for distance, size in zip(mm, spacing, strict=True)]
    return _each(labels, lambda values, sample: ndimage.shift(values, voxels, order=0, mode="constant", cval=0))


def remove_smallest_lesion(labels: Tensor) -> Tensor:
    """Turn the smallest connected component of the lesion into background.

    Components touch by faces, edges or corners (8 neighbours in 2D, 26 in 3D); of equal ones the first in scan order
    goes. A single component goes too; without a lesion nothing changes.

    Args:
        labels: class indices ``(B, 1, *spatial)``.
    """

    def edit(values: Array, sample: int) -> Array:
        parts, count = ndimage.label(values != 0, structure=np.ones((3,) * values.ndim))
        if not count:
            return values
        smallest = 1 + int(np.argmin(np.bincount(parts.ravel())[1:]))
        return np.where(parts == smallest, 0, values)

    return _each(labels, edit)


def insert(
    labels: Tensor,
    radius: float,
    value: int,
    spacing: Sequence[float],
    support: Tensor | None = None,
    center: Sequence[int] | None = None,
    seed: int | None = None,
) -> Tensor:
    """Put a ball of one class into the volume.

    Without a centre it lies wholly inside the support and touches no lesion: as far from the existing lesion as the
    support allows (as deep in the support as it goes where there is no lesion), or with a seed anywhere there is room.

    Args:
        labels: class indices ``(B, 1, *spatial)``.
        radius: of the ball in mm.
        value: its class.
        spacing: voxel size in mm, one per axis.
        support: where there may be a lesion, ``(B, 1 or C, *spatial)``: the union of its channels; everywhere if None.
        center: voxel indices; the ball then overwrites what is there, and is cut at the border of the volume.
        seed: draws the place, for every sample from the same random numbers.

    Raises:
        ConfigError: if there is no room, or the centre lies outside the volume.
    """
    room = torch.ones_like(labels, dtype=torch.bool) if support is None else support.bool().any(1, keepdim=True)
    shape = tuple(labels.shape[2:])
    if center is not None and any(not 0 <= c < n for c, n in zip(center, shape, strict=True)):
        raise ConfigError(f"the center {list(center)} of the inserted lesion is outside the volume {shape}")
    reach = radius + _tolerance(spacing)

    def edit(values: Array, sample: int) -> Array:
        place = _place(values, room[sample, 0].cpu().numpy(), reach, spacing, seed) if center is None else center
        axes = np.ogrid[tuple(slice(n) for n in values.shape)]
        squared = sum(((axis - c) * size) ** 2 for axis, c, size in zip(axes, place, spacing))
        return np.where(squared <= reach**2, value, values)

    return _each(labels, edit)


def _place(
    values: Array, room: Mask, reach: float, spacing: Sequence[float], seed: int | None
) -> tuple[np.intp | int, ...]:
    """Centre of a ball that stays inside ``room`` and clear of the lesion."""
    inside = (slice(1, -1),) * values.ndim  # outside the volume there is no room
    border = ndimage.distance_transform_edt(np.pad(room, 1), sampling=spacing)[inside]
    away = border
    if values.any():  # a voxel's diagonal between the two, or they would be one component
        away = ndimage.distance_transform_edt(values == 0, sampling=spacing) - math.hypot(*spacing)
    clear = np.minimum(border, away)
    free = clear > reach
    if not free.any():
        raise ConfigError(
            f"there is no room for a lesion of radius {reach:.4g} mm inside the support and clear of the existing one: "
            f"the radius must be below {clear.max():.4g} mm; or give its center"
        )
    if seed is None:
        index = int(np.argmax(np.where(free, away, -np.inf)))
    else:
        found = np.flatnonzero(free)
        index = int(found[np.random.default_rng(seed).integers(len(found))])
    return np.unravel_index(index, values.shape)


def _each(labels: Tensor, edit: Callable[[Array, int], Array]) -> Tensor:
    edited = [torch.as_tensor(edit(values.cpu().numpy(), b)) for b, values in enumerate(labels[:, 0])]
    return torch.stack(edited)[:, None].to(labels)


def _part(values: Array, classes: Sequence[int] | None) -> Mask:
    return values != 0 if classes is None else np.isin(values, classes)


def _nearest(values: Array, known: Mask, spacing: Sequence[float]) -> tuple[NDArray[np.floating], Array]:
    """Distance in mm to the nearest known voxel, and its value."""
    distance, index = ndimage.distance_transform_edt(~known, sampling=spacing, return_indices=True)
    return distance, values[tuple(index)]


def _tolerance(spacing: Sequence[float]) -> float:
    """Spacings come out of float32 affines: 3 voxels of .1 mm are within .3 mm."""
    return 1e-4 * min(spacing)
