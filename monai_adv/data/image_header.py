"""What the header of an image says, whatever its format."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from monai_adv.data.storage import Storage
from monai_adv.errors import DataError

MAX_VOXELS = 2**31
"""More voxels than this in one file are taken for a broken header (a BraTS volume has 2**23)."""
CHUNK = 1 << 20
"""Bytes read at a time when a file is streamed."""
ROOM = 1 << 26
"""Bytes a compressed file may hold beyond what its header claims; more is a decompression bomb."""


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an image file says.

    Attributes:
        path: the file.
        shape: size per axis, in voxels.
        dtype: type of the numbers in the file.
        affine: (4, 4), voxel indices to millimetres (RAS+).
        spacing: voxel edge lengths of the three spatial axes, in mm.
        orientation: such as ``"LPS"``: where the three voxel axes point.
        sform_code, qform_code: as in the file; both 0 means that the orientation is unknown. Other formats than NIfTI
            count as 1 (scanner) when they say where their axes point, else as 0.
        sform_qform_distance: largest difference between the two affines (mm), 0 when only one is set.
        format: ``"NIfTI"``, ``"NRRD"`` or ``"MetaImage"``.
        slope, inter: value = slope * stored number + inter.
        fields: the geometry of a NIfTI header as it stands in the file, see :data:`monai_adv.data.nifti.GEOMETRY`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: np.ndarray
    spacing: tuple[float, float, float]
    orientation: str
    sform_code: int
    qform_code: int
    sform_qform_distance: float
    format: str = "NIfTI"
    slope: float = 1.0
    inter: float = 0.0
    fields: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def storage(self) -> Storage:
        """Type and scale of the stored numbers."""
        return Storage(self.dtype, self.slope, self.inter)


def make_header(
    file: Path, shape: tuple[int, ...], dtype: np.dtype[Any], affine: np.ndarray, ndim: int | None, **more: Any
) -> ImageHeader:
    """Judge what a header says and make an :class:`ImageHeader` of it.

    Args:
        file, shape, dtype, affine: as there.
        ndim: number of axes the file must have; None takes 3 or 4.
        more: the other attributes that are not derived from these.

    Raises:
        DataError: if the file has another number of axes, claims an insane size, holds colours or complex numbers, or
            has an affine that is not finite or not invertible.
    """
    if len(shape) != ndim and not (ndim is None and len(shape) in (3, 4)):
        want = "one file with four channels (four axes)" if ndim == 4 else "one volume per file (three axes)"
        raise DataError(f"{file}: shape {shape} has {len(shape)} axes; expected {want}. Split or squeeze the file.")
    if min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise DataError(
            f"{file}: the header claims shape {shape}, {math.prod(shape):.3g} voxels; between 1 and {MAX_VOXELS} are "
            "sane. The header is broken or the file is not a brain volume: download it again."
        )
    if dtype.kind not in "iuf":
        raise DataError(f"{file}: voxels of type {dtype}; expected integer or real numbers. Convert the file.")
    affine = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{file}: the affine is not finite or not invertible (a spacing of 0?). Repair the header.")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return ImageHeader(
        path=str(file),
        shape=shape,
        dtype=dtype,
        affine=affine,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        orientation="".join(axis or "?" for axis in nib.orientations.aff2axcodes(affine)),
        **more,
    )


def too_short(file: Path, claimed: int, held: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DataError:
    """The error of a file that holds fewer bytes than its header claims."""
    return DataError(
        f"{file}: truncated: the header claims {claimed} bytes (shape {shape}, {dtype}), the file holds {held}. "
        "Copy or download it again."
    )


def corrupt(file: Path, claimed: int, held: int, error: BaseException | str) -> DataError:
    """The error of a compressed stream that breaks off or fails its checksum."""
    return DataError(
        f"{file}: the compressed file is truncated or corrupt after {held} of {claimed} bytes ({first_line(error)}). "
        "Copy or download it again."
    )


def too_long(file: Path, claimed: int) -> DataError:
    """The error of a compressed stream that does not end."""
    return DataError(f"{file}: holds far more than the {claimed} bytes its header claims. Download it again.")


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
