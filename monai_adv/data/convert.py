"""DICOM series, NRRD and MetaImage to NIfTI."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_adv.data.headers import DICOM_ENDINGS, check_integrity, is_nifti, read_header
from monai_adv.data.image_header import first_line, make_header
from monai_adv.data.itk_formats import LPS_TO_RAS, ras_affine
from monai_adv.data.storage import Storage
from monai_adv.data.writing import Grid, grid_of, write_volume
from monai_adv.errors import DataError

GAP_TOLERANCE = 0.01
"""Distances of neighbouring slices may differ by this share of the usual one (DICOM rounds positions)."""
_COSINE_TOLERANCE = 1e-4
_SERIES_TEXT = {"modality": "0008|0060", "description": "0008|103e", "protocol": "0018|1030", "number": "0020|0011"}
_SLOPE, _INTER = "0028|1053", "0028|1052"


@dataclass(frozen=True)
class _Slice:
    """One file of a series: its size, in-plane geometry (LPS) and scale."""

    path: str
    size: tuple[int, ...]
    position: np.ndarray
    axes: np.ndarray
    spacing: tuple[float, float]
    pixel: int
    components: int
    slope: float
    inter: float


def convert_volume(source: str | os.PathLike[str], out: str | os.PathLike[str], *, series: str | None = None) -> Path:
    """Write a DICOM series, an NRRD or a MetaImage volume as NIfTI.

    The voxels stay where they are: nothing is resampled, flipped or cropped. The affine of a DICOM series comes from
    the positions of its slices, so an oblique orientation and the tilt of a gantry are kept. Rescale slope and
    intercept are applied; values that are whole numbers are stored as int16 (uint16 or int32 where they do not fit),
    others as float32. NRRD and MetaImage keep their type. Nothing of the patient is written: no text at all.

    Args:
        source: folder of one DICOM series (its sub-folders are not searched), or an image file.
        out: destination, ending in .nii or .nii.gz.
        series: series instance UID, where the folder holds more than one.

    Returns:
        The path written.

    Raises:
        DataError: if the folder holds no DICOM series or several and none is chosen; if slices are missing, doubled,
            unequally spaced, or of different size or orientation; if the file cannot be read, or the destination not
            be written.
    """
    folder = Path(source)
    if folder.is_dir():
        voxels, affine, dtype = _read_series(folder, series)
        grid = Grid(voxels.shape, affine)
        return write_volume(voxels, grid, out, Storage(dtype))
    if series is not None:
        raise DataError(f"{folder}: series={series!r} chooses among DICOM files, and this is one file. Leave it out.")
    header = read_header(folder)
    check_integrity(header)
    voxels = header.storage.decode(_stored(folder))
    return write_volume(voxels, grid_of(folder), out, header.storage)


def _stored(file: Path) -> np.ndarray:
    """The numbers in an image file, axes x, y, z."""
    if is_nifti(file):
        import nibabel as nib

        proxy: Any = nib.load(file).dataobj  # type: ignore[attr-defined]
        return np.asarray(proxy.get_unscaled())
    import SimpleITK as sitk

    try:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(file))).transpose(2, 1, 0)
    except RuntimeError as error:
        raise DataError(f"{file}: the voxels cannot be read ({_reason(error)}). Copy or download it again.") from error


def _read_series(folder: Path, series: str | None) -> tuple[np.ndarray, np.ndarray, np.dtype[Any]]:
    """Voxels (x, y, z), RAS affine, and the type to store."""
    import SimpleITK as sitk

    files = _series_files(folder, series)
    slices = [_read_slice(file) for file in files]
    if slices[0].components != 1:
        raise DataError(f"{folder}: {slices[0].components} numbers per voxel (colour?); expected one. Wrong series?")
    if len(files) == 1:
        affine = _multi_frame(files[0])
    else:
        slices = _in_order(slices)
        affine = _series_affine(folder, slices)
    alike = len({(item.slope, item.inter, item.pixel) for item in slices}) == 1
    reader: Any = sitk.ImageSeriesReader() if len(files) > 1 else sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    if len(files) > 1:
        reader.SetFileNames([item.path for item in slices])
    else:
        reader.SetFileName(files[0])
    if not alike:  # the type of the first slice would round the others
        reader.SetOutputPixelType(sitk.sitkFloat64)
    try:
        voxels = sitk.GetArrayFromImage(reader.Execute()).transpose(2, 1, 0)
    except RuntimeError as error:
        raise DataError(f"{folder}: the slices cannot be read ({_reason(error)}). Copy the series again.") from error
    header = make_header(folder, voxels.shape, voxels.dtype, affine, 3, sform_code=1, qform_code=1,
                         sform_qform_distance=0.0)  # fmt: skip
    return voxels, header.affine, _smallest(voxels)


def _series_files(folder: Path, series: str | None) -> list[str]:
    import SimpleITK as sitk

    found = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not found:
        raise DataError(f"{folder}: no DICOM series here. Pass the folder that holds the slices themselves.")
    names: dict[str, list[str]] = {
        uid: list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)) for uid in found
    }
    known = {Path(file).name for files in names.values() for file in files}
    lost = sorted(file.name for file in folder.iterdir() if file.name not in known and _looks_like_dicom(file))
    if lost:
        raise DataError(
            f"{folder}: {lost[0]} cannot be read as an image ({len(lost)} such files): truncated? Copy the series "
            "again, or take the file away if it is no slice."
        )
    if series is None and len(found) > 1:
        listed = "\n".join(f"  - {uid}: {_describe(names[uid])}" for uid in found)
        raise DataError(f"{folder}: {len(found)} DICOM series. Choose one with --series (series=):\n{listed}")
    if series is not None and series not in names:
        listed = "\n".join(f"  - {uid}: {_describe(names[uid])}" for uid in found)
        raise DataError(f"{folder}: no series {series!r}. There are:\n{listed}")
    return names[found[0] if series is None else series]


def _looks_like_dicom(file: Path) -> bool:
    """Whether a file says that it is DICOM, or its name does; the index of a disk is none."""
    if not file.is_file() or file.name.upper() == "DICOMDIR":
        return False
    with open(file, "rb") as stream:
        return file.suffix.lower() in DICOM_ENDINGS or stream.read(132)[128:] == b"DICM"


def _describe(files: list[str]) -> str:
    reader = _information(files[0])
    texts = [_tag(reader, tag) for tag in _SERIES_TEXT.values()]
    said = ", ".join(f"{name} {text}" for name, text in zip(_SERIES_TEXT, texts) if text)
    return f"{len(files)} files" + (f", {said}" if said else "")


def _information(file: str) -> Any:
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{file}: cannot be read as DICOM ({_reason(error)}). Copy the series again.") from error
    return reader


def _tag(reader: Any, tag: str) -> str:
    return str(reader.GetMetaData(tag)).strip() if reader.HasMetaDataKey(tag) else ""


def _number(reader: Any, tag: str, default: float) -> float:
    try:
        return float(_tag(reader, tag) or default)
    except ValueError:
        raise DataError(f"{reader.GetFileName()}: DICOM tag ({tag}) is no number. Export the series again.") from None


def _read_slice(file: str) -> _Slice:
    reader = _information(file)
    direction = np.reshape(reader.GetDirection(), (3, 3))
    spacing = reader.GetSpacing()
    return _Slice(
        path=file,
        size=tuple(reader.GetSize()),
        position=np.asarray(reader.GetOrigin()),
        axes=direction[:, :2],
        spacing=(float(spacing[0]), float(spacing[1])),
        pixel=int(reader.GetPixelID()),
        components=int(reader.GetNumberOfComponents()),
        slope=_number(reader, _SLOPE, 1.0),
        inter=_number(reader, _INTER, 0.0),
    )


def _multi_frame(file: str) -> np.ndarray:
    reader = _information(file)
    if reader.GetSize()[2] < 2:
        raise DataError(f"{file}: one slice is no volume. Pass the folder of the whole series.")
    return ras_affine(reader)


def _in_order(slices: list[_Slice]) -> list[_Slice]:
    """Slices of one size, orientation and pixel spacing, by their place; names and numbers are not to be trusted."""
    first = slices[0]
    for item in slices:
        if item.size != first.size or item.size[2] != 1:
            raise DataError(f"{item.path}: size {item.size}, {Path(first.path).name} has {first.size}. Wrong series?")
        if np.abs(item.axes - first.axes).max() > _COSINE_TOLERANCE:
            raise DataError(f"{item.path}: orientation differs from {Path(first.path).name}. A localiser? Take it out.")
        if not np.allclose(item.spacing, first.spacing, rtol=1e-4):
            raise DataError(f"{item.path}: pixel spacing {item.spacing} instead of {first.spacing}. Wrong series?")
    return sorted(slices, key=_along)


def _along(item: _Slice) -> float:
    """Where a slice lies along the normal of its plane, in mm."""
    return float(item.position @ np.cross(item.axes[:, 0], item.axes[:, 1]))


def _series_affine(folder: Path, slices: list[_Slice]) -> np.ndarray:
    """The RAS affine of slices in their order, after every doubt about their distances is out of the way."""
    first = slices[0]
    gaps = np.diff([_along(item) for item in slices])
    usual = float(np.median(gaps))
    tolerance = GAP_TOLERANCE * abs(usual)
    for index, gap in enumerate(gaps):
        before, after = (Path(slices[k].path).name for k in (index, index + 1))
        if abs(gap) < 1e-4 or abs(gap) < GAP_TOLERANCE * abs(usual):
            raise DataError(
                f"{folder}: {before} and {after} lie at the same place. Several echoes or time points in one series? "
                "Leave one of them in the folder."
            )
        if abs(gap - usual) > tolerance:
            lost = round(gap / usual) - 1
            whole = lost > 0 and abs(gap - (lost + 1) * usual) < tolerance * (lost + 1)
            guess = f"{lost} missing there?" if whole else "A slice is missing, or the spacing varies."
            raise DataError(
                f"{folder}: slices are not equally spaced: {gap:.4g} mm between {before} and {after}, {usual:.4g} mm "
                f"elsewhere. {guess} Export the series again, or "
                "resample it with a tool made for that."
            )
    steps = np.diff([item.position for item in slices], axis=0)
    step = (slices[-1].position - first.position) / (len(slices) - 1)
    if np.abs(steps - step).max() > max(tolerance, 1e-3):
        raise DataError(f"{folder}: the slices do not lie on a line: their origins wander. Export the series again.")
    affine = np.eye(4)
    affine[:3, :2] = first.axes * np.asarray(first.spacing)
    affine[:3, 2], affine[:3, 3] = step, first.position
    return LPS_TO_RAS @ affine


def _smallest(voxels: np.ndarray) -> np.dtype[Any]:
    """int16 for whole numbers that fit, else uint16 or int32; float32 for others."""
    if voxels.dtype.kind == "f" and not np.array_equal(voxels, np.rint(voxels)):
        return np.dtype(np.float32)
    low, high = float(voxels.min()), float(voxels.max())
    for dtype in (np.int16, np.uint16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(np.float32)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)
