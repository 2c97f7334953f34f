"""Headers and integrity of image files, looked at before a single voxel is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from monai_adv.data.findings import Finding
from monai_adv.data.image_header import MAX_VOXELS, ImageHeader
from monai_adv.data.itk_formats import check_itk_integrity, read_itk_header
from monai_adv.data.nifti import check_nifti_integrity, read_nifti_header
from monai_adv.data.storage import Storage
from monai_adv.errors import DataError

__all__ = [
    "DICOM_ENDINGS",
    "GEOMETRY_TOLERANCE",
    "ITK_ENDINGS",
    "MAX_VOXELS",
    "NIFTI_ENDINGS",
    "ImageHeader",
    "check_integrity",
    "geometry_findings",
    "is_nifti",
    "read_header",
    "stem",
    "stored_type",
]

GEOMETRY_TOLERANCE = 1e-3
"""Largest difference between affines (mm) and spacings (mm) of files that are said to lie on one grid."""
NIFTI_ENDINGS = (".nii.gz", ".nii")
ITK_ENDINGS = (".nrrd", ".mha", ".mhd")
"""Formats that are read besides NIfTI."""
DICOM_ENDINGS = (".dcm", ".ima", ".dicom")
"""Names that DICOM files often have; one file is a slice."""


def stem(path: str | Path) -> str | None:
    """The name of an image file without folder and ending; None for a name that no image format has.

    Example:
        >>> stem("a/BraTS2021_00000_t1.nii.gz"), stem("b/Scan.MHA"), stem("notes.txt")
        ('BraTS2021_00000_t1', 'Scan', None)
    """
    name = Path(path).name
    ending = next((end for end in (*NIFTI_ENDINGS, *ITK_ENDINGS) if name.lower().endswith(end)), None)
    return None if ending is None else name[: -len(ending)]


def is_nifti(path: str | Path) -> bool:
    """Whether a file is read as NIfTI: every name that is not one of NRRD or MetaImage."""
    return not str(path).lower().endswith(ITK_ENDINGS)


def read_header(path: str | Path, ndim: int | None = 3) -> ImageHeader:
    """Read and judge the header of an image file; the voxels are not read.

    Args:
        path: a NIfTI (.nii, .nii.gz), NRRD (.nrrd) or MetaImage (.mha, .mhd) file.
        ndim: number of axes the file must have (4 for a Decathlon image); None takes 3 or 4.

    Raises:
        DataError: if the file is missing, empty, not of its format, has another number of axes, claims an insane size,
            holds colours or complex numbers, or has an affine that is not finite or not invertible; and for DICOM,
            which has to be converted.
    """
    file = Path(path)
    convert = f"Convert a DICOM series first: monai-adv convert {file if file.is_dir() else file.parent} -o FILE.nii.gz"
    if file.is_dir():
        raise DataError(f"{file}: is a folder, not an image file. {convert}")
    if not file.is_file():
        raise DataError(f"{file}: no such file. Is the path right, and the link, if it is one, whole?")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty (0 bytes). Copy or download it again.")
    if file.name.lower().endswith(DICOM_ENDINGS):
        raise DataError(f"{file}: is one DICOM file, not a volume. {convert}")
    return read_nifti_header(file, ndim) if is_nifti(file) else read_itk_header(file, ndim)


def stored_type(path: str | Path) -> Storage:
    """In what numbers a file stores its voxels: type, and slope and intercept (1 and 0 where a format has none).

    Args:
        path: an image file with three or four axes.

    Raises:
        DataError: if the file is missing, cut off, or no image of this kind.
    """
    return read_header(path, None).storage


def check_integrity(header: ImageHeader) -> None:
    """Make sure that the file holds every byte its header claims, and that a compressed one passes its checksum.

    A compressed file is streamed to its end in small pieces: a reader that stops after the last voxel never sees the
    checksum, and one that allocates first believes any header.

    Raises:
        DataError: if the file is truncated or corrupt, or the header claims more than the file holds.
    """
    if header.format == "NIfTI":
        check_nifti_integrity(header)
    else:
        check_itk_integrity(header)


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
