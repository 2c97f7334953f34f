"""DICOM series, NRRD and MetaImage to NIfTI: the same voxels at the same places, and every doubt an error."""

from __future__ import annotations

import locale
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from builders import LPS, write_itk, write_nifti
from cli_caller import call
from readers import with_itk, with_nibabel, with_simpleitk

from monai_adv.data import convert_volume
from monai_adv.errors import DataError

SPACING = (1.5, 2.0, 3.0)
ORIGIN = (10.0, -20.0, 30.0)
A, B = 0.3, 0.2
OBLIQUE = np.array([[np.cos(A), -np.sin(A), 0], [np.sin(A), np.cos(A), 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, np.cos(B), -np.sin(B)], [0, np.sin(B), np.cos(B)]]
)  # columns: where rows, columns and slices point, LPS
NUMBERS = np.random.default_rng(0).integers(-50, 900, (8, 7, 6)).astype(np.int16)  # x, y, z


def execute(writer: sitk.ImageFileWriter, image: sitk.Image) -> None:
    """GDCM's writer (not its reader) leaves the process in the C locale, where Python opens text as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        writer.Execute(image)
    finally:
        locale.setlocale(locale.LC_ALL, before)


def write_series(
    folder: Path, numbers: np.ndarray = NUMBERS, *, axes: np.ndarray = OBLIQUE, uid: str = "1.2.3.4",
    description: str = "t1 tra", tilt: float = 0.0, slope: str = "1", inter: str = "0",
) -> Path:  # fmt: skip
    """A series as a scanner would send it, one file per slice, in an order that the names do not tell.

    SimpleITK stores values: ``numbers`` are what a reader finds when slope and intercept are honoured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    for k in range(numbers.shape[2]):
        image = sitk.GetImageFromArray(np.ascontiguousarray(numbers[:, :, k].T))
        image.SetSpacing(SPACING[:2])
        position = np.asarray(ORIGIN) + axes[:, 2] * SPACING[2] * k + np.array([0, tilt * k, 0])
        tags = {
            "0008|0060": "CT", "0008|0018": f"{uid}.{k + 1}", "0008|103e": description, "0010|0010": "Doe^Jane",
            "0020|000d": "1.2.3", "0020|000e": uid, "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{value:.10g}" for value in position),
            "0020|0037": "\\".join(f"{value:.10g}" for value in (*axes[:, 0], *axes[:, 1])),
            "0028|1052": inter, "0028|1053": slope,
        }  # fmt: skip
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}_{(k * 5) % 7}.dcm"))
        execute(writer, image)
    return folder


def expected_affine(axes: np.ndarray = OBLIQUE) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.diag(SPACING)
    affine[:3, 3] = ORIGIN
    return np.diag([-1.0, -1, 1, 1]) @ affine


def slices(folder: Path) -> list[Path]:
    """The files from the first slice to the last."""
    return sorted(folder.iterdir(), key=lambda file: float(sitk.ReadImage(str(file)).GetMetaData("0020|0013")))


def test_every_reader_sees_the_series_where_it_was(tmp_path):
    before = locale.setlocale(locale.LC_ALL)
    out = convert_volume(write_series(tmp_path / "dicom"), tmp_path / "out" / "t1.nii.gz")
    assert locale.setlocale(locale.LC_ALL) == before
    source = with_simpleitk_series(tmp_path / "dicom")
    seen = {"nibabel": with_nibabel(out), "SimpleITK": with_simpleitk(out), "itk": with_itk([out], tmp_path)[out]}
    for name, found in seen.items():
        assert np.array_equal(found.array, NUMBERS), name
        assert np.allclose(found.affine, expected_affine(), atol=1e-4), name
        assert np.allclose(found.affine[:3, :3], source[:3, :3], atol=1e-5), name
    image = nib.load(out)
    assert image.get_data_dtype() == np.int16
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert b"Doe" in next((tmp_path / "dicom").iterdir()).read_bytes()
    plain = convert_volume(tmp_path / "dicom", tmp_path / "t1.nii").read_bytes()
    assert b"Doe" not in plain
    assert b"t1 tra" not in plain


def with_simpleitk_series(folder: Path) -> np.ndarray:
    """The RAS affine that SimpleITK's series reader finds, for slices without tilt."""
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1, 1, 1]) @ affine


@pytest.mark.parametrize("axes", [np.eye(3), np.diag([1.0, -1, -1]), OBLIQUE[:, [1, 2, 0]]])
def test_other_orientations(tmp_path, axes):
    image = nib.load(convert_volume(write_series(tmp_path / "dicom", axes=axes), tmp_path / "t1.nii"))
    found, affine = np.asarray(image.dataobj), image.affine
    assert np.allclose(affine, expected_affine(axes), atol=1e-4)
    assert np.array_equal(found, NUMBERS)


def test_the_tilt_of_a_gantry_stays_in_the_affine(tmp_path, monkeypatch, capsys):
    out = tmp_path / "t1.nii.gz"
    folder = write_series(tmp_path / "dicom", axes=np.eye(3), tilt=0.5)
    assert call(monkeypatch, "convert", str(folder), "-o", str(out)) == 0
    assert "not at right angles" in capsys.readouterr().err
    image = nib.load(out)
    sheared = expected_affine(np.eye(3))
    sheared[1, 2] = -0.5
    assert np.allclose(image.affine, sheared, atol=1e-5)
    assert int(image.header["qform_code"]) == 0  # it cannot hold a shear
    assert np.array_equal(np.asarray(image.dataobj), NUMBERS)


def set_tag(file: Path, tag: bytes, value: bytes) -> None:
    """Another text of the same length behind a tag (implicit VR, as SimpleITK writes)."""
    content = file.read_bytes()
    head = content.index(tag + len(value).to_bytes(4, "little")) + 8
    file.write_bytes(content[:head] + value + content[head + len(value) :])


SLOPE_TAG = b"\x28\x00\x53\x10"


def test_slope_and_intercept_are_honoured(tmp_path):
    even = (NUMBERS // 2 * 2).astype(np.int16)
    scaled = write_series(tmp_path / "scaled", even, slope="2", inter="-10")
    image = nib.load(convert_volume(scaled, tmp_path / "scaled.nii"))
    assert image.get_data_dtype() == np.int16  # whole numbers
    assert np.array_equal(np.asarray(image.dataobj), even)
    stored = sitk.ReadImage(str(slices(scaled)[0]))
    assert stored.GetMetaData("0028|1053").strip() == "2"

    half = write_series(tmp_path / "half")
    for file in half.iterdir():
        set_tag(file, SLOPE_TAG, b".5")
    image = nib.load(convert_volume(half, tmp_path / "half.nii"))
    assert image.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(image.dataobj), NUMBERS * 0.5)


def test_a_slope_that_differs_by_slice_is_honoured_in_each(tmp_path):
    folder = write_series(tmp_path / "dicom")
    set_tag(slices(folder)[3], SLOPE_TAG, b".5")
    expected = NUMBERS.astype(np.float32)
    expected[:, :, 3] *= 0.5
    image = nib.load(convert_volume(folder, tmp_path / "out.nii"))
    assert np.array_equal(np.asarray(image.dataobj), expected)


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 60000, "uint16"), (-40000, 60000, "int32"), (-32768, 32767, "int16")]
)
def test_whole_numbers_get_the_type_they_need(tmp_path, low, high, dtype):
    numbers = NUMBERS.astype(np.int32)
    numbers[numbers < 0] = 0
    numbers[0, 0, 0], numbers[1, 0, 0] = low, high
    folder = write_series(tmp_path / "dicom", numbers)
    image = nib.load(convert_volume(folder, tmp_path / "out.nii"))
    assert image.get_data_dtype() == dtype
    assert np.array_equal(np.asarray(image.dataobj), numbers)


def test_several_series_are_listed_and_one_is_chosen(tmp_path, monkeypatch, capsys):
    folder = write_series(tmp_path / "dicom")
    write_series(folder, (NUMBERS + 1).astype(np.int16), uid="1.2.3.5", description="t2 tra")
    out = tmp_path / "out.nii"
    assert call(monkeypatch, "convert", str(folder), "-o", str(out)) == 1
    message = capsys.readouterr().err
    for text in ("2 DICOM series", "--series", "1.2.3.4: 6 files", "description t1 tra", "1.2.3.5: 6 files", "t2 tra"):
        assert text in message
    assert "Doe" not in message
    assert not out.exists()
    assert call(monkeypatch, "convert", str(folder), "-o", str(out), "--series", "1.2.3.5") == 0
    assert "(8, 7, 6), int16, 1.5 x 2 x 3 mm, LPS" in capsys.readouterr().out
    assert np.array_equal(np.asarray(nib.load(out).dataobj), NUMBERS + 1)
    with pytest.raises(DataError, match=r"no series '9'. There are:\n  - 1\.2\.3\.4"):
        convert_volume(folder, out, series="9")


def _lose(number: int, folder: Path) -> None:
    slices(folder)[number].unlink()


def _move(folder: Path) -> None:
    """One slice nearer to its neighbour."""
    axes = OBLIQUE.copy()
    one = write_series(folder.parent / "moved", axes=axes)
    file = slices(folder)[2]
    position = np.asarray(ORIGIN) + axes[:, 2] * (SPACING[2] * 2 + 0.7)
    image = sitk.ReadImage(str(slices(one)[2]))
    image.SetMetaData("0020|0032", "\\".join(f"{value:.10g}" for value in position))
    _write_slice(image, file)


def _write_slice(image: sitk.Image, file: Path) -> None:
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(file))
    flat = sitk.GetImageFromArray(sitk.GetArrayFromImage(image)[0])
    flat.SetSpacing(SPACING[:2])
    for tag in image.GetMetaDataKeys():
        flat.SetMetaData(tag, image.GetMetaData(tag))
    execute(writer, flat)


def _double(folder: Path) -> None:
    image = sitk.ReadImage(str(slices(folder)[2]))
    image.SetMetaData("0008|0018", "1.2.3.4.99")
    _write_slice(image, folder / "again.dcm")


def _turn(folder: Path) -> None:
    image = sitk.ReadImage(str(slices(folder)[2]))
    image.SetMetaData("0020|0037", "1\\0\\0\\0\\1\\0")
    _write_slice(image, slices(folder)[2])


def _widen(folder: Path) -> None:
    image = sitk.ReadImage(str(slices(folder)[2]))
    padded = sitk.ConstantPad(image, (0, 0, 0), (1, 0, 0))
    for tag in image.GetMetaDataKeys():
        padded.SetMetaData(tag, image.GetMetaData(tag))
    _write_slice(padded, slices(folder)[2])


def _only_one(folder: Path) -> None:
    for file in slices(folder)[1:]:
        file.unlink()


def _cut(folder: Path, number: int, by: int | None) -> None:
    file = slices(folder)[number]
    file.write_bytes(file.read_bytes()[:-by] if by else b"")


@pytest.mark.parametrize(
    ("breaking", "says"),
    [
        (lambda folder: _lose(3, folder), r"6 mm between .*\.dcm and .*\.dcm, 3 mm elsewhere\. 1 missing there\?"),
        (_move, "not equally spaced"),
        (_double, "lie at the same place"),
        (_turn, "orientation differs from"),
        (_widen, r"has \(8, 7, 1\)"),
        (_only_one, "one slice is no volume"),
        (lambda folder: _cut(folder, 2, 40), r"dcm cannot be read as an image \(1 such files\)"),
        (lambda folder: _cut(folder, 0, 40), "cannot be read as an image"),
        (lambda folder: _cut(folder, 5, None), "cannot be read as an image"),
    ],
    ids=["missing", "uneven", "doubled", "turned", "size", "single", "truncated", "truncated first", "empty last"],
)
def test_a_series_with_a_fault_is_not_converted(tmp_path, breaking, says):
    folder = write_series(tmp_path / "dicom")
    breaking(folder)
    with pytest.raises(DataError, match=says) as error:
        convert_volume(folder, tmp_path / "out.nii")
    assert str(folder) in str(error.value)
    assert not (tmp_path / "out.nii").exists()


def test_a_folder_without_slices_and_a_file_with_a_series(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no DICOM series here"):
        convert_volume(tmp_path / "empty", tmp_path / "out.nii")
    source = write_itk(tmp_path / "v.nrrd", NUMBERS)
    with pytest.raises(DataError, match="this is one file"):
        convert_volume(source, tmp_path / "out.nii", series="1.2")
    with pytest.raises(DataError, match=r"must end in \.nii"):
        convert_volume(source, tmp_path / "out.mha")


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_volume_files_keep_type_numbers_and_place(tmp_path, suffix, dtype):
    array = (np.abs(NUMBERS) % 250).astype(dtype) + (
        np.asarray(0.25, dtype) if dtype[0] == "f" else np.asarray(0, dtype)
    )
    affine = expected_affine()
    source = tmp_path / f"in{suffix}"
    (write_nifti if suffix == ".nii.gz" else write_itk)(source, array, affine)
    image = nib.load(convert_volume(source, tmp_path / "out.nii"))
    assert image.get_data_dtype() == dtype
    assert np.array_equal(np.asarray(image.dataobj), array)
    assert np.allclose(image.affine, affine, atol=1e-5)


def test_a_broken_volume_file_is_not_converted(tmp_path):
    source = write_itk(tmp_path / "v.mha", NUMBERS, LPS)
    source.write_bytes(source.read_bytes()[:-50])
    with pytest.raises(DataError, match="truncated or corrupt"):
        convert_volume(source, tmp_path / "out.nii")
