"""NIfTI headers and file integrity, looked at before a single voxel is allocated."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from monai_adv.data.findings import Finding
from monai_adv.errors import DataError

MAX_VOXELS = 2**31
"""More voxels than this in one file are taken for a broken header (a BraTS volume has 2**23)."""
GEOMETRY_TOLERANCE = 1e-3
"""Largest difference between affines (mm) and spacings (mm) of files that are said to lie on one grid."""


@dataclass(frozen=True)
class ImageHeader:
    """What the header of a NIfTI file says.

    Attributes:
        path: the file.
        shape: size per axis, in voxels.
        dtype: type of the numbers in the file.
        affine: (4, 4), voxel indices to millimetres (RAS+).
        spacing: voxel edge lengths of the three spatial axes, in mm.
        orientation: such as ``"LPS"``: where the three voxel axes point.
        sform_code, qform_code: as in the file; both 0 means that the orientation is unknown.
        sform_qform_distance: largest difference between the two affines (mm), 0 when only one is set.
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

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0


def read_header(path: str | Path, ndim: int = 3) -> ImageHeader:
    """Read and judge the header of a NIfTI file; the voxels are not read.

    Args:
        path: a .nii or .nii.gz file.
        ndim: number of axes the file must have (4 for a Decathlon image).

    Raises:
        DataError: if the file is missing, empty, not NIfTI, has another number of axes, claims an insane size, holds
            colours or complex numbers, or has an affine that is not finite or not invertible.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file. Is the path right, and the link, if it is one, whole?")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty (0 bytes). Copy or download it again.")
    try:
        image: Any = nib.load(file)
        header = image.header
        shape, dtype = tuple(int(size) for size in image.shape), header.get_data_dtype()
    except (ImageFileError, nib.spatialimages.HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        what = f"cannot be read as NIfTI ({_first_line(error)})"
        raise DataError(f"{file}: {what}. Copy or download it again.") from error
    if not isinstance(image, nib.Nifti1Pair):  # Nifti2Image is one too
        raise DataError(f"{file}: is {type(image).__name__}, not NIfTI. Convert it to .nii.gz.")
    _check_extent(file, shape, dtype, ndim)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{file}: the affine is not finite or not invertible (a spacing of 0?). Repair the header.")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    distance = 0.0
    if sform_code > 0 and qform_code > 0:
        distance = float(np.abs(header.get_sform() - header.get_qform()).max())
    return ImageHeader(
        path=str(file),
        shape=shape,
        dtype=dtype,
        affine=affine,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        orientation="".join(axis or "?" for axis in nib.aff2axcodes(affine)),
        sform_code=sform_code,
        qform_code=qform_code,
        sform_qform_distance=distance,
    )


def _check_extent(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any], ndim: int) -> None:
    if len(shape) != ndim:
        want = "one volume per file (three axes)" if ndim == 3 else "one file with four channels (four axes)"
        raise DataError(f"{file}: shape {shape} has {len(shape)} axes; expected {want}. Split or squeeze the file.")
    if min(shape) < 1 or math.prod(shape) > MAX_VOXELS:
        raise DataError(
            f"{file}: the header claims shape {shape}, {math.prod(shape):.3g} voxels; between 1 and {MAX_VOXELS} are "
            "sane. The header is broken or the file is not a brain volume: download it again."
        )
    if dtype.kind not in "iuf":
        raise DataError(f"{file}: voxels of type {dtype}; expected integer or real numbers. Convert the file.")


def check_integrity(header: ImageHeader) -> None:
    """Make sure that the file holds every byte its header claims, and that a compressed one passes its checksum.

    A compressed file is streamed to its end in small pieces: a reader that stops after the last voxel never sees the
    checksum, and one that allocates first believes any header.

    Raises:
        DataError: if the file is truncated or corrupt, or the header claims more than the file holds.
    """
    file = Path(header.path)
    image: Any = nib.load(file)
    claimed = int(image.dataobj.offset) + math.prod(header.shape) * header.dtype.itemsize
    if file.suffix.lower() == ".gz":
        held, limit = 0, claimed + (1 << 26)  # room for extensions behind the voxels; more is a decompression bomb
        try:
            with gzip.open(file, "rb") as stream:
                while held <= limit and (piece := stream.read(1 << 20)):
                    held += len(piece)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{file}: the compressed file is truncated or corrupt after {held} of {claimed} bytes "
                f"({_first_line(error)}). Copy or download it again."
            ) from error
        if held > limit:
            raise DataError(f"{file}: holds far more than the {claimed} bytes its header claims. Download it again.")
    else:
        held = file.stat().st_size
    if held < claimed:
        raise DataError(
            f"{file}: truncated: the header claims {claimed} bytes (shape {header.shape}, {header.dtype}), the file "
            f"holds {held}. Copy or download it again."
        )


def geometry_findings(subject: str, headers: Mapping[str, ImageHeader]) -> list[Finding]:
    """Compare shape, spacing and affine of a subject's files with the grid that most of them have.

    MONAI keeps the first file's affine without a word when differing files are loaded by key and concatenated.

    Args:
        subject: subject ID, for the findings.
        headers: role (modality or ``"label"``) -> header.

    Returns:
        One finding per file that differs by more than :data:`GEOMETRY_TOLERANCE`.
    """
    if not headers:
        return []
    votes = {
        name: sum(not _difference(header, other) for other in headers.values()) for name, header in headers.items()
    }
    chosen = max(votes, key=lambda name: votes[name])  # the first of those with the most
    reference, findings = headers[chosen], []
    for role, header in headers.items():
        difference = _difference(header, reference)
        if difference:
            what = f"{role} is not on the grid of {chosen}: {difference}"
            advice = f"Resample it onto the grid of {Path(reference.path).name}, or repair the wrong header"
            findings.append(Finding("error", subject, header.path, what, advice))
    return findings


def _difference(header: ImageHeader, reference: ImageHeader) -> str:
    """In what two grids differ; empty when they are the same within the tolerance."""
    if header.shape[:3] != reference.shape[:3]:
        return f"shape {header.shape[:3]} instead of {reference.shape[:3]}"
    if float(np.abs(np.subtract(header.spacing, reference.spacing)).max()) > GEOMETRY_TOLERANCE:
        return f"spacing {_mm(header.spacing)} instead of {_mm(reference.spacing)}"
    gap = float(np.abs(header.affine - reference.affine).max())
    if gap > GEOMETRY_TOLERANCE:
        return (
            f"affine differs by up to {gap:.4g} ({header.orientation}, origin {_mm(header.affine[:3, 3])} instead of "
            f"{reference.orientation}, origin {_mm(reference.affine[:3, 3])})"
        )
    return ""


def _mm(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.4g}" for value in values) + ") mm"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
