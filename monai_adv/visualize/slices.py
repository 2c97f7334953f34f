"""Axial slices the way a radiologist looks at them: anterior up, the patient's right on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from monai_adv.data.labels import REGIONS, region_masks


def as_array(array: Any) -> np.ndarray:
    """Give a NumPy array or tensor (any device, MetaTensor too) as a NumPy array."""
    return np.asarray(array.detach().cpu().numpy() if hasattr(array, "detach") else array)


def masks_of(segmentation: Any, spatial: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
    """Give region masks of a segmentation.

    Args:
        segmentation: canonical class indices, (*spatial) or (1, *spatial); or region name -> boolean mask.
        spatial: the expected spatial shape.
        name: what to call it in an error.

    Raises:
        ValueError: if a shape does not fit.
    """
    if isinstance(segmentation, Mapping):
        masks = {str(region): as_array(mask).astype(bool) for region, mask in segmentation.items()}
    else:
        classes = as_array(segmentation)
        if classes.ndim == len(spatial) + 1 and classes.shape[0] == 1:
            classes = classes[0]
        masks = region_masks(classes, tuple(REGIONS))
    for region, mask in masks.items():
        if mask.shape != spatial:
            raise ValueError(f"The {name} ({region}) has shape {mask.shape}, the image's spatial shape is {spatial}.")
    return masks


@dataclass(frozen=True)
class AxialView:
    """How volumes of one geometry become upright axial pictures.

    In a picture rows run from anterior to posterior and columns from the patient's right to the left
    (radiological convention), whatever the orientation of the array.

    Attributes:
        spatial: shape of the arrays, (X, Y, Z) or (X, Y).
        orientation: nibabel's orientation transform of a 3D array to L, P, S.

    Example:
        >>> view = AxialView.of((4, 5, 6), np.diag([2.0, 2.0, 3.0, 1.0]))  # RAS
        >>> volume = np.zeros((4, 5, 6))
        >>> volume[0, 4, 2] = 1  # the leftmost and most anterior voxel of the third slice
        >>> np.argwhere(view.picture(volume, 2)).tolist()  # top right
        [[0, 3]]
    """

    spatial: tuple[int, ...]
    orientation: np.ndarray

    @classmethod
    def of(cls, spatial: Sequence[int], affine: Any = None) -> AxialView:
        """Build the view for arrays of a shape.

        Args:
            spatial: (X, Y, Z) or (X, Y).
            affine: 4 x 4, voxel to RAS mm as nibabel and MONAI have it. Without one the axes are taken as L, P, S,
                as BraTS files have them.

        Raises:
            ValueError: if the array is neither 2D nor 3D or the affine is not one.
        """
        if len(spatial) not in (2, 3):
            raise ValueError(f"Expected a volume or a slice, got spatial shape {tuple(spatial)}.")
        target = nib.orientations.axcodes2ornt(("L", "P", "S"))
        if affine is None:
            return cls(tuple(spatial), nib.orientations.ornt_transform(target, target))
        matrix = as_array(affine).astype(float)
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            raise ValueError(f"The affine must be a finite 4 x 4 matrix, got shape {matrix.shape}.")
        codes = nib.orientations.io_orientation(matrix)
        if np.isnan(codes).any():
            raise ValueError("The affine has an axis without a direction; the file's header is broken.")
        return cls(tuple(spatial), nib.orientations.ornt_transform(codes, target))

    @property
    def axis(self) -> int:
        """The array axis that runs along the body (2 for a 2D array: the one it has not)."""
        return int(np.flatnonzero(self.orientation[:, 0] == 2)[0])

    @property
    def slices(self) -> int:
        """Number of axial slices."""
        return (*self.spatial, 1)[self.axis]

    def picture(self, volume: np.ndarray, index: int) -> np.ndarray:
        """Cut one axial slice out of an array of the view's shape and turn it upright.

        Args:
            volume: (X, Y, Z) or (X, Y).
            index: position along the array's own axial axis.

        Returns:
            (rows, columns): anterior in the first row, the patient's right in the first column.
        """
        cube = volume[..., None] if volume.ndim == 2 else volume
        one = np.take(cube, [index], axis=self.axis)
        upright: np.ndarray = nib.orientations.apply_orientation(one, self.orientation)[:, :, 0].T
        return upright

    def pixel(self, spacing: Sequence[float] | None, affine: Any = None) -> tuple[float, float]:
        """Give height and width of a picture's pixel in mm.

        Args:
            spacing: mm along each axis of the array, or None to take it from the affine (1 without one).
            affine: 4 x 4.

        Raises:
            ValueError: if the spacing is not positive or does not fit the axes.
        """
        if spacing is None:
            steps = [1.0, 1.0, 1.0] if affine is None else [float(s) for s in nib.affines.voxel_sizes(as_array(affine))]
        else:
            steps = [float(step) for step in spacing]
            if len(steps) != len(self.spatial) or not all(np.isfinite(s) and s > 0 for s in steps):
                raise ValueError(f"The spacing {tuple(spacing)} is not one positive number of mm for each axis.")
            steps = (steps + [1.0])[:3]
        across = {int(towards): steps[axis] for axis, towards in enumerate(self.orientation[:, 0])}
        return across[1], across[0]


def most_changed_slice(before: Any, after: Any, affine: Any = None) -> int:
    """Find the axial slice in which most voxels changed their class.

    Args:
        before: class indices (X, Y, Z), (1, X, Y, Z), or region name -> mask: the prediction on the clean image.
        after: the same for the adversarial image.
        affine: 4 x 4; without one the last axis is the axial one.

    Returns:
        Index along the array's own axial axis; where nothing changed, the slice with the most foreground, and the
        middle one where there is none. 0 for 2D.

    Example:
        >>> before, after = np.zeros((4, 4, 5), int), np.zeros((4, 4, 5), int)
        >>> after[1:3, 1, 3] = 2
        >>> most_changed_slice(before, after)
        3
    """
    first, second = _stacked(before), _stacked(after)
    if first.shape != second.shape:
        raise ValueError(f"The predictions have shapes {first.shape[1:]} and {second.shape[1:]}.")
    spatial = first.shape[1:]
    view = AxialView.of(spatial, affine)
    if len(spatial) == 2:
        return 0
    others = tuple(axis for axis in range(3) if axis != view.axis)
    changed = (first != second).any(axis=0).sum(axis=others)
    if not changed.any():
        changed = ((first != 0) | (second != 0)).any(axis=0).sum(axis=others)
    return int(changed.argmax()) if changed.any() else spatial[view.axis] // 2


def _stacked(segmentation: Any) -> np.ndarray:
    """Class indices or region masks as one array with a leading axis."""
    if isinstance(segmentation, Mapping):
        return np.stack([as_array(segmentation[region]) for region in sorted(segmentation)])
    classes = as_array(segmentation)
    return classes if classes.ndim == 4 and classes.shape[0] == 1 else classes[None]
