"""NRRD and MetaImage: headers through SimpleITK, integrity by streaming, voxels through MONAI's ITKReader."""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from monai.data.image_reader import ITKReader

from monai_adv.data.image_header import CHUNK, ROOM, ImageHeader, corrupt, make_header, too_long, too_short
from monai_adv.errors import DataError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_TEXT_LIMIT = 1 << 20  # a text header longer than this is none
_ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}


@dataclass(frozen=True)
class _Layout:
    """Where the voxels of a file are: the file that holds them, from which byte, packed how, skipping what."""

    format: str
    data: Path
    offset: int
    encoding: str
    skip: int
    oriented: bool


def read_itk_header(file: Path, ndim: int | None) -> ImageHeader:
    """Read and judge the header of an NRRD or MetaImage file; see :func:`monai_adv.data.headers.read_header`."""
    import SimpleITK as sitk

    layout = _layout(file)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if layout.format == "NRRD" else "MetaImageIO")
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise DataError(f"{file}: cannot be read as {layout.format} ({reason}). Copy or download it again.") from error
    if reader.GetNumberOfComponents() != 1:
        raise DataError(
            f"{file}: {reader.GetNumberOfComponents()} numbers per voxel; expected one. Save one file per channel."
        )
    code = int(layout.oriented)
    return make_header(
        file, tuple(int(size) for size in reader.GetSize()), sitk_dtype(reader.GetPixelID()), ras_affine(reader), ndim,
        sform_code=code, qform_code=code, sform_qform_distance=0.0, format=layout.format,
    )  # fmt: skip


def sitk_dtype(pixel: int) -> np.dtype[Any]:
    """The NumPy type of a SimpleITK pixel ID; a structured one, which no check lets pass, for what is no number."""
    import SimpleITK as sitk

    names = ("Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64", "Float32", "Float64")
    known = {getattr(sitk, f"sitk{name}"): np.dtype(name.lower()) for name in names}
    known |= {sitk.sitkComplexFloat32: np.dtype("complex64"), sitk.sitkComplexFloat64: np.dtype("complex128")}
    return known.get(pixel, np.dtype("V1"))


def ras_affine(image: Any) -> np.ndarray:
    """The (4, 4) affine to RAS millimetres of a SimpleITK image or reader, as MONAI's ITKReader makes it."""
    axes = len(image.GetSize())
    if axes < 3:
        return np.diag([-1.0, -1.0, 1.0, 1.0])  # the number of axes is complained about, not this
    affine = np.eye(4)
    direction = np.reshape(image.GetDirection(), (axes, axes))[:3, :3]
    affine[:3, :3] = direction @ np.diag(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    return LPS_TO_RAS @ affine


def itk_reader(dtype: np.dtype[Any]) -> ITKReader:
    """MONAI's ITKReader for voxels of a type in the file.

    ITK's Python wrapping has no images of 8-bit signed or 64-bit signed integers; asked for one it loads every module
    it has before it gives up. So the voxels are read as float32 where that holds every number of the type, else as
    float64.
    """
    # SWIG makes its types when a module is loaded and when the interpreter ends. Where DeprecationWarning is an error
    # (python -W error, a strict pytest) making them fails and the process dies of a segmentation fault.
    warnings.filterwarnings("ignore", r"builtin type swig\w+ has no __module__ attribute", DeprecationWarning)
    import itk

    exact = dtype == np.float32 or (dtype.kind in "iu" and dtype.itemsize <= 2)
    return ITKReader(pixel_type=itk.F if exact else itk.D)


def check_itk_integrity(header: ImageHeader) -> None:
    """Make sure that an NRRD or MetaImage file is whole; see :func:`monai_adv.data.headers.check_integrity`."""
    layout = _layout(Path(header.path))
    voxels = math.prod(header.shape) * header.dtype.itemsize
    claimed = voxels + max(layout.skip, 0)
    stored = layout.data.stat().st_size - layout.offset
    held = stored if layout.encoding == "raw" else _unpacked_size(layout, claimed)
    if held < claimed:
        raise too_short(layout.data, claimed, held, header.shape, header.dtype)


def _unpacked_size(layout: _Layout, claimed: int) -> int:
    held = 0
    try:
        with open(layout.data, "rb") as stream:
            stream.seek(layout.offset)
            for size in _inflate_gzip(stream) if layout.encoding == "gzip" else _inflate_zlib(stream):
                held += size
                if held > claimed + ROOM:
                    raise too_long(layout.data, claimed)
    except (OSError, EOFError, zlib.error) as error:
        raise corrupt(layout.data, claimed, held, error) from error
    return held


def _inflate_gzip(stream: BinaryIO) -> Iterator[int]:
    with gzip.GzipFile(fileobj=stream, mode="rb") as unpacked:
        while piece := unpacked.read(CHUNK):
            yield len(piece)


def _inflate_zlib(stream: BinaryIO) -> Iterator[int]:
    unpacker = zlib.decompressobj(47)  # zlib or gzip, as MetaIO takes both
    pending = b""
    while not unpacker.eof:
        pending = pending or stream.read(CHUNK)
        if not pending:
            raise EOFError("the compressed stream has no end")
        yield len(unpacker.decompress(pending, CHUNK))
        pending = unpacker.unconsumed_tail


def _layout(file: Path) -> _Layout:
    try:
        with open(file, "rb") as stream:
            layout = _nrrd_layout(file, stream) if file.suffix.lower() == ".nrrd" else _meta_layout(file, stream)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}). Are you allowed to?") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: a number in the header is none ({error}). Copy or download it again.") from error
    if not layout.data.is_file():
        raise DataError(f"{file}: its voxels are in {layout.data.name}, which is not there. Copy both files.")
    return layout


def _text_lines(stream: BinaryIO) -> Iterator[str]:
    """Lines of a text header, up to the end of the file or to where no header reaches."""
    while stream.tell() < _TEXT_LIMIT and (line := stream.readline(4096)):
        yield line.decode("latin-1").rstrip("\r\n")


def _unreadable(file: Path, what: str, why: str) -> DataError:
    return DataError(f"{file}: cannot be read as {what} ({why}). Copy or download it again.")


def _nrrd_layout(file: Path, stream: BinaryIO) -> _Layout:
    fields: dict[str, str] = {}
    lines = _text_lines(stream)
    if not next(lines, "").startswith("NRRD"):
        raise _unreadable(file, "NRRD", "it does not begin with NRRD")
    ended = False
    for line in lines:
        if not line:
            ended = True
            break
        name, separator, value = line.partition(": ")
        if separator and not line.startswith("#"):
            fields[name.lower().replace(" ", "")] = value.strip()
    if not ended and "datafile" not in fields:
        raise _unreadable(file, "NRRD", "its text header has no end")
    encoding = fields.get("encoding", "raw").lower()
    if encoding not in _ENCODINGS or int(fields.get("lineskip", "0")):
        raise DataError(f"{file}: NRRD with encoding {encoding!r} or skipped lines is not read. Save it raw or gzip.")
    data, offset = _data_file(file, fields.get("datafile", ""), stream.tell())
    oriented = bool(fields.get("space")) and "spacedirections" in fields
    return _Layout("NRRD", data, offset, _ENCODINGS[encoding], int(fields.get("byteskip", "0")), oriented)


def _meta_layout(file: Path, stream: BinaryIO) -> _Layout:
    fields: dict[str, str] = {}
    for line in _text_lines(stream):
        name, separator, value = line.partition("=")
        if not separator and line.strip():
            raise _unreadable(file, "MetaImage", f"a line of its header is {line[:40]!r}")
        fields[name.strip().lower()] = value.strip()
        if name.strip().lower() == "elementdatafile":
            break
    if "elementdatafile" not in fields:
        raise _unreadable(file, "MetaImage", "its text header has no end")
    if fields.get("binarydata", "true").lower() != "true":
        raise DataError(f"{file}: MetaImage with its voxels as text is not read. Save it as binary.")
    named = fields["elementdatafile"]
    data, offset = _data_file(file, "" if named.lower() == "local" else named, stream.tell())
    packed = fields.get("compresseddata", "false").lower() == "true"
    oriented = not {"transformmatrix", "rotation", "orientation"}.isdisjoint(fields)
    skip = int(fields.get("headersize", "0"))
    return _Layout("MetaImage", data, offset, "zlib" if packed else "raw", skip, oriented)


def _data_file(file: Path, named: str, offset: int) -> tuple[Path, int]:
    """The file that holds the voxels, and where in it they begin."""
    if not named:
        return file, offset
    if "%" in named or named.upper().split()[0] == "LIST":
        raise DataError(f"{file}: voxels in several files ({named}) are not read. Save one file.")
    if Path(named).is_absolute() or ".." in Path(named).parts:
        raise DataError(f"{file}: its voxels are said to be in {named}. They must lie beside the header.")
    return file.parent / named, 0
