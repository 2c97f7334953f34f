"""Write volumes as NIfTI: same grid as their source, atomically, reproducibly, without free text."""

from __future__ import annotations

import gzip
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from monai_adv.data.files import atomic_file
from monai_adv.data.headers import NIFTI_ENDINGS, read_header
from monai_adv.data.labels import as_numpy
from monai_adv.data.nifti import GEOMETRY
from monai_adv.data.storage import Storage
from monai_adv.errors import DataError

_NIFTI1_LIMIT = 32767  # voxels along an axis


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file to be written are.

    Attributes:
        shape: (X, Y, Z).
        affine: (4, 4), voxel indices to RAS millimetres.
        sform_code, qform_code, xyzt_units: as NIfTI has them.
        fields: NIfTI header fields (:data:`monai_adv.data.nifti.GEOMETRY`) to write as they are, when the source has
            them and its affine still holds.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    sform_code: int = 1
    qform_code: int = 1
    xyzt_units: int = 2
    fields: Mapping[str, Any] = field(default_factory=dict)


def save_nifti(
    array: Any,
    like: MetaTensor | str | os.PathLike[str],
    path: str | os.PathLike[str],
    dtype: Any = None,
    *,
    storage: Storage | None = None,
) -> Path:
    """Write one volume on the grid of another.

    Affine, spacing, sform and qform (codes and numbers) and the units of the spacing are those of ``like``; free-text
    fields (descrip, aux_file, intent_name, db_name), extensions and the display range (cal_min, cal_max) stay empty.
    The file is NIfTI-1 in little-endian order whatever the source was: ITK reads no NIfTI-2. It is written beside its
    destination, synced and renamed: there is the whole file or none. The same voxels give the same bytes (the gzip
    stream holds no time and no name).

    Args:
        array: voxels (X, Y, Z) or (1, X, Y, Z), tensor or NumPy array. Label classes must be translated back first
            (:meth:`LabelScheme.from_classes`).
        like: the file that has the grid (NIfTI, NRRD or MetaImage; exact for each modality), or the MetaTensor from
            :func:`monai_adv.data.load_case`, whose header fields are those of its first file.
        path: destination, ending in .nii or .nii.gz; its folder is made when missing.
        dtype: type in the file, NumPy or torch. None keeps integers of up to 32 bits and stores the rest as float32.
            An integer type rounds to the nearest whole number and refuses what does not fit.
        storage: instead of ``dtype``: type, slope and intercept, such as those of the source
            (:func:`monai_adv.data.stored_type`). Values come back to within half of ``storage.quantum``; where the
            source is real numbers they come back bit for bit.

    Returns:
        The path written.

    Raises:
        DataError: if the shape is not that of ``like``, a value is not finite or does not fit the type, the name does
            not end in .nii or .nii.gz, both ``dtype`` and ``storage`` are given, or the destination cannot be written.
    """
    voxels = as_numpy(array)
    if voxels.ndim == 4 and voxels.shape[0] == 1:
        voxels = voxels[0]
    if dtype is not None and storage is not None:
        raise DataError("save_nifti: pass dtype= or storage=, not both")
    if storage is None:
        storage = Storage(_file_dtype(voxels, dtype))
    return write_volume(voxels, grid_of(like), path, storage)


def write_volume(
    voxels: np.ndarray, grid: Grid, path: str | os.PathLike[str], storage: Storage, *, vectors: bool = False
) -> Path:
    """Write voxels, or vectors (X, Y, Z, 1, 3), on a grid; see :func:`save_nifti`."""
    destination = Path(path)
    if not destination.name.lower().endswith(NIFTI_ENDINGS):
        raise DataError(f"{destination}: the name must end in .nii or .nii.gz")
    if voxels.shape != ((*grid.shape, 1, 3) if vectors else grid.shape):
        raise DataError(
            f"{destination}: array of shape {voxels.shape}, grid of shape {grid.shape}. Write one file per "
            "channel, and invert crops and resampling before."
        )
    if storage.dtype == np.float16:
        raise DataError(f"NIfTI cannot hold {storage.dtype}; use float32 or an integer type")
    stored = storage.encode(voxels, str(destination))
    new = nib.Nifti1Image if max(grid.shape) <= _NIFTI1_LIMIT else nib.Nifti2Image  # which ITK does not read
    image = new(stored, grid.affine, dtype=stored.dtype)
    _set_geometry(image, grid)
    if vectors:
        image.header.set_intent("vector")
    if not storage.identity:
        image.header.set_slope_inter(storage.slope, storage.inter)  # nibabel then writes the numbers as they are
    with atomic_file(destination) as stream:
        if destination.name.lower().endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0, compresslevel=6) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(stream)
    return destination


def grid_of(like: MetaTensor | str | os.PathLike[str]) -> Grid:
    """The grid of a MetaTensor or of a file.

    Raises:
        DataError: if it has no affine, or the file cannot be read.
    """
    if isinstance(like, MetaTensor):
        meta, affine = like.meta, as_numpy(like.affine).astype(np.float64)
        shape = tuple(like.shape[-3:])
        # An affine that a transform has changed is still in the coordinate system its code names.
        codes = [int(meta.get(key, 1)) for key in ("sform_code", "qform_code")]
        kept = (
            all(name in meta for name in (*GEOMETRY, "original_affine", "spatial_shape"))
            and (
                np.allclose(
                    as_numpy(meta["original_affine"]), affine, rtol=0, atol=1e-6
                )  # as after an inverted transform
                and tuple(int(size) for size in as_numpy(meta["spatial_shape"])[:3]) == shape
            )
        )
        fields = {name: as_numpy(meta[name]) for name in GEOMETRY} if kept else {}
        return Grid(shape, affine, codes[0], codes[1], int(meta.get("xyzt_units", 2)), fields)
    if isinstance(like, torch.Tensor | np.ndarray):
        raise DataError("save_nifti: like has no affine; pass the MetaTensor of load_case or the path of a file")
    header = read_header(os.fspath(like), None)
    units = int(header.fields.get("xyzt_units", 2))
    return Grid(header.shape[:3], header.affine, header.sform_code, header.qform_code, units, header.fields)


def _set_geometry(image: Any, grid: Grid) -> None:
    header, affine = image.header, grid.affine
    header["xyzt_units"] = grid.xyzt_units
    if grid.fields:
        for name in GEOMETRY:
            if name != "pixdim":
                header[name] = grid.fields[name]
        header["pixdim"][:4] = grid.fields["pixdim"][:4]  # the sign of the qform, and the spacing
        return
    header.set_sform(affine, code=grid.sform_code)
    header.set_qform(affine, code=grid.qform_code, strip_shears=True)
    if grid.qform_code and not np.allclose(header.get_qform(), affine, atol=1e-3):
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
