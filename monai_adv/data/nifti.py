"""NIfTI headers and the integrity of NIfTI files."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from monai_adv.data.image_header import CHUNK, ROOM, ImageHeader, corrupt, first_line, make_header, too_long, too_short
from monai_adv.errors import DataError

GEOMETRY = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units",
)  # fmt: skip
"""Header fields that say where the voxels are."""
# what nibabel makes of bytes that are no header
_ERRORS = (
    *(ImageFileError, nib.spatialimages.HeaderDataError, zlib.error, OSError, EOFError, MemoryError),
    *(ArithmeticError, LookupError, TypeError, ValueError),
)


def read_nifti_header(file: Path, ndim: int | None) -> ImageHeader:
    """Read and judge the header of a NIfTI file; see :func:`monai_adv.data.headers.read_header`."""
    distance, codes = 0.0, (0, 0)
    try:
        with np.errstate(all="ignore"):  # what is not finite is found below
            image: Any = nib.load(file)
            header = image.header
            shape, dtype = tuple(int(size) for size in image.shape), header.get_data_dtype()
            if isinstance(image, nib.Nifti1Pair):  # Nifti2Image is one too
                proxy: Any = image.dataobj
                slope, inter = float(proxy.slope), float(proxy.inter)
                codes = int(header["sform_code"]), int(header["qform_code"])
                if min(codes) > 0:
                    distance = float(np.abs(header.get_sform() - header.get_qform()).max())
    except _ERRORS as error:
        what = f"cannot be read as NIfTI ({first_line(error)})"
        raise DataError(f"{file}: {what}. Copy or download it again.") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise DataError(f"{file}: is {type(image).__name__}, not NIfTI. Convert it to .nii.gz.")
    return make_header(
        file, shape, dtype, image.affine, ndim,
        sform_code=codes[0], qform_code=codes[1], sform_qform_distance=distance, slope=slope, inter=inter,
        fields={name: np.array(header[name]) for name in GEOMETRY},
    )  # fmt: skip


def check_nifti_integrity(header: ImageHeader) -> None:
    """Make sure that a NIfTI file is whole; see :func:`monai_adv.data.headers.check_integrity`."""
    file = Path(header.path)
    image: Any = nib.load(file)
    claimed = int(image.dataobj.offset) + math.prod(header.shape) * header.dtype.itemsize
    if file.suffix.lower() == ".gz":
        held, limit = 0, claimed + ROOM  # room for extensions behind the voxels
        try:
            with gzip.open(file, "rb") as stream:
                while held <= limit and (piece := stream.read(CHUNK)):
                    held += len(piece)
        except (OSError, EOFError, zlib.error) as error:
            raise corrupt(file, claimed, held, error) from error
        if held > limit:
            raise too_long(file, claimed)
    else:
        held = file.stat().st_size
    if held < claimed:
        raise too_short(file, claimed, held, header.shape, header.dtype)
