"""Displacement fields as files: vectors in mm that ITK, ANTs and 3D Slicer take for a transform."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor

from monai_adv.data.labels import as_numpy
from monai_adv.data.storage import Storage
from monai_adv.data.writing import grid_of, write_volume
from monai_adv.errors import DataError

_LPS = np.array([-1.0, -1.0, 1.0])
_VECTOR = 1007  # NIfTI's intent code of a vector per voxel


def along_world(field: Any, affine: Any) -> np.ndarray:
    """Vectors along an image's own axes as vectors in world coordinates (RAS).

    Args:
        field: ``(3, X, Y, Z)`` in mm along the axes of the array.
        affine: (4, 4), voxel indices to RAS millimetres; oblique, flipped and sheared ones too.

    Returns:
        ``(3, X, Y, Z)`` in mm, components to the right, anterior and superior.

    Example:
        >>> lps = np.diag([-2.0, -2.0, 3.0, 1.0])
        >>> along_world(np.ones((3, 1, 1, 1)), lps).ravel().tolist()
        [-1.0, -1.0, 1.0]
    """
    return _turned(field, _directions(affine))


def along_axes(field: Any, affine: Any) -> np.ndarray:
    """The inverse of :func:`along_world`: vectors in world coordinates (RAS) along an image's own axes."""
    return _turned(field, np.linalg.inv(_directions(affine)))


def save_displacement(field: Any, like: MetaTensor | str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write a displacement field on the grid of a volume, as ITK understands it.

    The file holds float32 vectors in mm in ITK's physical space (to the left, posterior and superior), shape
    (X, Y, Z, 1, 3), intent code 1007. ``SimpleITK.DisplacementFieldTransform`` of it resamples the clean image to the
    moved one: ``moved(p) = clean(p + u(p))`` for world places ``p``, the convention of ITK, ANTs and 3D Slicer.
    Everything else is as :func:`monai_adv.data.save_nifti` writes it.

    Args:
        field: ``u``, ``(3, X, Y, Z)`` in mm in world coordinates (RAS, see :func:`along_world`).
        like: see :func:`monai_adv.data.save_nifti`.
        path: destination, ending in .nii or .nii.gz.

    Returns:
        The path written.

    Raises:
        DataError: if the field is not on the grid of ``like``, is not finite, or cannot be written.
    """
    vectors = as_numpy(field)
    if vectors.ndim != 4 or len(vectors) != 3:
        raise DataError(f"{path}: a displacement field must be (3, X, Y, Z), got {vectors.shape}")
    lps = np.moveaxis(vectors * _LPS[:, None, None, None], 0, -1)[:, :, :, None]
    return write_volume(lps.astype(np.float32), grid_of(like), path, Storage(np.dtype("float32")), vectors=True)


def load_displacement(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read a file of :func:`save_displacement`.

    Returns:
        The field ``(3, X, Y, Z)`` in mm in world coordinates (RAS), and the affine (4, 4) of its grid.

    Raises:
        DataError: if the file holds no vectors of three components.
    """
    try:
        image: Any = nib.load(Path(path))
        vectors = np.asarray(image.dataobj)
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise DataError(f"{path}: cannot be read as NIfTI ({error})") from error
    if vectors.ndim != 5 or vectors.shape[3:] != (1, 3) or int(image.header["intent_code"]) != _VECTOR:
        raise DataError(
            f"{path}: no displacement field: shape {vectors.shape}, intent code {int(image.header['intent_code'])}; "
            f"expected (X, Y, Z, 1, 3) and {_VECTOR}"
        )
    return np.moveaxis(vectors[:, :, :, 0], -1, 0) * _LPS[:, None, None, None], image.affine


def _directions(affine: Any) -> np.ndarray:
    """Unit vectors of the axes, one per column."""
    matrix = as_numpy(affine).astype(np.float64)[:3, :3]
    return matrix / np.linalg.norm(matrix, axis=0)


def _turned(field: Any, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("ij,j...->i...", matrix, as_numpy(field))
