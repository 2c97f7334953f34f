"""Write volumes as NIfTI: same grid as their source, atomically, reproducibly, without free text."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from monai_adv.data.files import atomic_file
from monai_adv.data.labels import as_numpy
from monai_adv.errors import DataError


@dataclass(frozen=True)
class _Geometry:
    shape: tuple[int, ...]
    affine: np.ndarray
    sform_code: int
    qform_code: int
    xyzt_units: int


def save_nifti(
    array: Any, like: MetaTensor | str | os.PathLike[str], path: str | os.PathLike[str], dtype: Any = None
) -> Path:
    """Write one volume on the grid of another.

    Affine, sform and qform codes and the units of the spacing are those of ``like``; free-text fields (descrip,
    aux_file, intent_name, db_name) stay empty. The file is written beside its destination, synced and renamed: there
    is the whole file or none. The same voxels give the same bytes (the gzip stream holds no time and no name).

    Args:
        array: voxels (X, Y, Z) or (1, X, Y, Z), tensor or NumPy array. Label classes must be translated back first
            (:meth:`LabelScheme.from_classes`).
        like: the MetaTensor (from :func:`monai_adv.data.load_case`) or the file that has the grid.
        path: destination, ending in .nii or .nii.gz; its folder is made when missing.
        dtype: type in the file, NumPy or torch. None keeps integers of up to 32 bits and stores the rest as float32.
            An integer type rounds to the nearest whole number and refuses what does not fit.

    Returns:
        The path written.

    Raises:
        DataError: if the shape is not that of ``like``, a value is not finite or does not fit the type, the name does
            not end in .nii or .nii.gz, or the destination cannot be written.
    """
    destination, geometry = Path(path), _geometry(like)
    if not destination.name.lower().endswith((".nii", ".nii.gz")):
        raise DataError(f"{destination}: the name must end in .nii or .nii.gz")
    voxels = as_numpy(array)
    if voxels.ndim == 4 and voxels.shape[0] == 1:
        voxels = voxels[0]
    if voxels.shape != geometry.shape:
        raise DataError(
            f"{destination}: array of shape {voxels.shape}, grid of shape {geometry.shape}. Write one file per "
            "channel, and invert crops and resampling before."
        )
    voxels = _cast(voxels, _file_dtype(voxels, dtype), destination)
    image = nib.Nifti1Image(voxels, geometry.affine, dtype=voxels.dtype)
    _set_geometry(image, geometry)
    with atomic_file(destination) as stream:
        if destination.name.lower().endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0, compresslevel=6) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(stream)
    return destination


def _geometry(like: MetaTensor | str | os.PathLike[str]) -> _Geometry:
    if isinstance(like, MetaTensor):
        meta = like.meta
        # An affine that a transform has changed is still in the coordinate system its code names.
        codes = [int(meta.get(key, default)) for key, default in (("sform_code", 1), ("qform_code", 0))]
        affine = as_numpy(like.affine).astype(np.float64)
        return _Geometry(tuple(like.shape[-3:]), affine, codes[0], codes[1], int(meta.get("xyzt_units", 2)))
    if isinstance(like, torch.Tensor | np.ndarray):
        raise DataError("save_nifti: like has no affine; pass the MetaTensor of load_case or the path of a file")
    image: Any = nib.load(Path(like))
    header = image.header
    codes = [int(header["sform_code"]), int(header["qform_code"])]
    return _Geometry(image.shape[:3], image.affine, codes[0], codes[1], int(header["xyzt_units"]))


def _set_geometry(image: Any, geometry: _Geometry) -> None:
    header, affine = image.header, geometry.affine
    header.set_sform(affine, code=geometry.sform_code)
    header.set_qform(affine, code=geometry.qform_code, strip_shears=True)
    header["xyzt_units"] = geometry.xyzt_units
    if geometry.qform_code and not np.allclose(header.get_qform(), affine, atol=1e-3):
        header.set_qform(affine, code=0, strip_shears=True)  # a qform cannot hold a shear: the sform speaks alone
    # Where no code is left that says the affine, nibabel sets the sform to it with code 2 ("aligned") when writing.


def _file_dtype(voxels: np.ndarray, dtype: Any) -> np.dtype[Any]:
    if dtype is not None:
        name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
        wanted = np.dtype(name)
    elif voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 4:
        wanted = voxels.dtype
    else:
        wanted = np.dtype({"b": np.uint8, "i": np.int32, "u": np.uint32}.get(voxels.dtype.kind, np.float32))
    if wanted.kind not in "iuf" or wanted == np.float16:
        raise DataError(f"NIfTI cannot hold {wanted}; use float32 or an integer type")
    return wanted


def _cast(voxels: np.ndarray, dtype: np.dtype[Any], destination: Path) -> np.ndarray:
    broken = int(voxels.size - np.isfinite(voxels).sum())
    if broken:
        raise DataError(f"{destination}: {broken} of {voxels.size} voxels are NaN or Inf; nothing was written")
    if dtype.kind not in "iu":
        limit = float(np.finfo(dtype).max)
        if voxels.size and np.abs(voxels, dtype=np.float64).max() > limit:
            raise DataError(f"{destination}: values beyond {limit:g} do not fit {dtype}. Choose float64.")
        return voxels.astype(dtype)
    whole = np.rint(voxels) if voxels.dtype.kind == "f" else voxels
    if voxels.size:
        low, high, bounds = whole.min(), whole.max(), np.iinfo(dtype)
        if int(low) < bounds.min or int(high) > bounds.max:
            raise DataError(
                f"{destination}: values from {low:g} to {high:g} do not fit {dtype} ({bounds.min} to {bounds.max}). "
                "Choose a wider type, or float32."
            )
    return whole.astype(dtype)
