"""NRRD and MetaImage wherever NIfTI is taken, and every way such a file can be broken."""

from __future__ import annotations

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from builders import ITK_CORRUPTIONS, LPS, MODALITIES, case_file, make_case, make_cohort, write_itk

from monai_adv.data import brats_datalist, check_folder, load_case, load_mask, save_nifti, scan
from monai_adv.data.headers import check_integrity, read_header
from monai_adv.data.loading import read_volume
from monai_adv.errors import DataError

SUFFIXES = (".nrrd", ".mha", ".mhd")
TURN = np.array([[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = TURN @ np.diag([-1.0, -1.2, 3.0])
OBLIQUE[:3, 3] = (11, -22, 33)


@pytest.mark.parametrize("affine", [LPS, np.diag([2.0, 1, 3, 1]), OBLIQUE], ids=["LPS", "RAS", "oblique"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_case_as_nifti(tmp_path, suffix, affine):
    written = make_case(tmp_path / "itk", suffix=suffix, affine=affine)
    make_case(tmp_path / "nifti", affine=affine)
    (item,) = brats_datalist(tmp_path / "itk")
    assert item["image"][2] == str(case_file(tmp_path / "itk", "BraTS2021_00000", "T2", suffix=suffix))
    case, twin = load_case(item), load_case(brats_datalist(tmp_path / "nifti")[0])
    assert torch.equal(case["image"].as_tensor(), twin["image"].as_tensor())
    assert torch.equal(case["label"].as_tensor(), twin["label"].as_tensor())
    assert np.array_equal(case["image"][1].numpy(), written["T1c"])
    for key in ("image", "label"):
        assert np.allclose(case[key].affine, affine, atol=1e-5)
    for path in item["image"]:  # SimpleITK's header and ITKReader's volume say the same
        header = read_header(path)
        assert np.allclose(header.affine, case["image"].affine, atol=1e-9)
        assert (header.dtype, header.sform_code, header.qform_code) == (np.int16, 1, 1)
    assert np.array_equal(load_mask(item["label"], "brats2021").numpy()[0], written["label"])


def test_a_case_may_mix_formats(tmp_path):
    written = make_case(tmp_path, affine=OBLIQUE)
    for role, suffix in (("T1c", ".mha"), ("T2", ".nrrd"), ("label", ".mhd")):
        file = case_file(tmp_path, "BraTS2021_00000", role)
        array = np.asarray(nib.load(file).dataobj)
        file.unlink()
        write_itk(case_file(tmp_path, "BraTS2021_00000", role, suffix=suffix), array, OBLIQUE)
    case = load_case(brats_datalist(tmp_path)[0])
    assert np.array_equal(case["image"].numpy(), np.stack([written[modality] for modality in MODALITIES]))
    make_case(tmp_path, suffix=".mha", label=False)
    assert "more than one file for T1: " in scan(tmp_path).problems[0].what


def test_a_decathlon_image_with_four_axes(tmp_path):
    make_case(tmp_path / "a", "BRATS_001", naming="msd", suffix=".nrrd")
    make_case(tmp_path / "b", "BRATS_001", naming="msd")
    case, twin = (load_case(brats_datalist(tmp_path / folder)[0]) for folder in "ab")
    assert torch.equal(case["image"].as_tensor(), twin["image"].as_tensor())
    assert np.allclose(case["image"].affine, twin["image"].affine)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]
)
def test_every_type_of_number_is_read_exactly(tmp_path, dtype, suffix, compress):
    numbers = np.arange(60).reshape(3, 4, 5) - (0 if dtype[0] == "u" else 20)
    numbers[0, 0, 0] = {1: 100, 2: 30001}.get(np.dtype(dtype).itemsize, 2**24 + 1)  # the last is no float32
    array = (numbers + (0.1 if dtype[0] == "f" else 0)).astype(dtype)
    header = read_header(write_itk(tmp_path / f"v{suffix}", array, OBLIQUE, compress))
    check_integrity(header)
    assert header.dtype == np.dtype(dtype)
    assert np.array_equal(read_volume(header, torch.float64).numpy()[0], array.astype(np.float64))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "no such file"),
        ("empty", "empty"),
        ("truncated", "truncated or corrupt"),
        ("header_cut", "cannot be read as"),
        ("checksum_cut", "truncated or corrupt"),
        ("bit_flip", "truncated or corrupt"),
        ("not_an_image", "cannot be read as"),
        ("insane_header", "the header claims shape (2000000000, 16, 12)"),
        ("boastful_header", "truncated: the header claims"),
        ("four_axes", "has 4 axes"),
        ("shape", "T1c is not on the grid of T1: shape (13, 16, 12) instead of (14, 16, 12)"),
        ("affine", "T1c is not on the grid of T1: affine differs by up to 0.01"),
        ("orientation", "(RPS, origin"),
        ("spacing", "spacing (1, 1, 1.01) mm instead of (1, 1, 1) mm"),
        ("nan", "1 NaN or Inf voxels"),
        ("zero", "T1c is all zero"),
    ],
)
@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_bad_input_names_file_and_fault_and_costs_its_own_subject(tmp_path, suffix, how, says):
    subjects = make_cohort(tmp_path, 2, suffix=suffix)
    items = brats_datalist(tmp_path)
    file = case_file(tmp_path, subjects[1], "T1c", suffix=suffix)
    ITK_CORRUPTIONS[how](file)
    with pytest.raises(DataError) as error:
        load_case(items[1])
    assert str(file) in str(error.value)
    assert says in str(error.value)
    report = check_folder(tmp_path)
    assert {finding.subject for finding in report.findings if finding.severity == "error"} == {subjects[1]}
    assert [item["subject"] for item in report.items] == [subjects[0]]


@pytest.mark.parametrize("compress", [True, False])
def test_voxels_in_a_file_of_their_own(tmp_path, compress):
    header = write_itk(tmp_path / "v.mhd", np.arange(60, dtype=np.int16).reshape(3, 4, 5), compress=compress)
    voxels = header.with_suffix(".zraw" if compress else ".raw")
    content = voxels.read_bytes()
    voxels.write_bytes(content[:-3])
    with pytest.raises(DataError, match="truncated"):
        check_integrity(read_header(header))
    voxels.unlink()
    with pytest.raises(DataError, match=rf"{voxels.name}, which is not there"):
        read_header(header)


def test_a_raw_nrrd_that_is_cut(tmp_path):
    path = write_itk(tmp_path / "v.nrrd", np.ones((3, 4, 5), np.int16), compress=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"truncated: the header claims 120 bytes.*the file holds 119"):
        check_integrity(read_header(path))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("ElementDataFile = v.raw", "ElementDataFile = /etc/passwd", "must lie beside the header"),
        ("ElementDataFile = v.raw", "ElementDataFile = ../v.raw", "must lie beside the header"),
        ("ElementDataFile = v.raw", "ElementDataFile = v%03d.raw 1 5 1", "several files"),
        ("ElementDataFile = v.raw", "ElementDataFile = LIST", "several files"),
        ("BinaryData = True", "BinaryData = False", "voxels as text"),
        ("ElementDataFile = v.raw", "HeaderSize = many\nElementDataFile = v.raw", "a number in the header is none"),
    ],
)
def test_headers_that_are_not_followed(tmp_path, old, new, says):
    path = write_itk(tmp_path / "v.mhd", np.ones((3, 4, 5), np.int16), compress=False)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=says) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_colours_complex_numbers_and_text_encodings_are_refused(tmp_path):
    vector = sitk.GetImageFromArray(np.ones((3, 4, 5, 4), np.int16), isVector=True)
    sitk.WriteImage(vector, str(tmp_path / "four.nrrd"))
    with pytest.raises(DataError, match="4 numbers per voxel"):
        read_header(tmp_path / "four.nrrd")
    path = write_itk(tmp_path / "v.nrrd", np.ones((3, 4, 5), np.int16), compress=False)
    path.write_bytes(path.read_bytes().replace(b"encoding: raw", b"encoding: hex"))
    with pytest.raises(DataError, match="encoding 'hex'"):
        read_header(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_file_that_does_not_say_where_left_is(tmp_path, suffix):
    make_case(tmp_path, suffix=suffix, affine=np.diag([-1.0, -1, 1, 1]))
    file = case_file(tmp_path, "BraTS2021_00000", "T2", suffix=suffix)
    assert check_folder(tmp_path).findings == []
    head, rest = file.read_bytes().split(b"encoding: gzip" if suffix == ".nrrd" else b"CompressedData", 1)
    lost = (b"space", b"TransformMatrix")
    whole = [line for line in head.split(b"\n") if not line.startswith(lost)]
    head = b"\n".join(whole[:-1] + [b"spacings: 1 1 1", b""] if suffix == ".nrrd" else whole)
    text, voxels = rest.split(b"\n\n" if suffix == ".nrrd" else b"ElementDataFile", 1)
    text = b"\n".join(line for line in text.split(b"\n") if not line.startswith(lost))
    if suffix == ".nrrd":
        file.write_bytes(head + b"encoding: gzip" + text + b"\n\n" + voxels)
    else:
        file.write_bytes(head + b"CompressedData" + text + b"ElementDataFile" + voxels)
    (finding,) = check_folder(tmp_path).findings
    assert (finding.severity, finding.file) == ("warning", str(file))
    assert "T2 has no orientation in its header" in finding.what


def test_dicom_is_to_be_converted(tmp_path):
    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    series = tmp_path / "series"
    series.mkdir()
    (series / "1.dcm").write_bytes(b"DICM")
    for path in (series, series / "1.dcm"):
        with pytest.raises(DataError, match=rf"monai-adv convert {series} -o FILE\.nii\.gz") as error:
            load_case({**item, "image": [str(path), *item["image"][1:]]})
        assert f"{item['subject']}: {path}" in str(error.value)
    file = case_file(tmp_path, item["subject"], "T1")
    file.unlink()
    (tmp_path / item["subject"] / "BraTS2021_00000_t1").mkdir()
    (problem,) = scan(tmp_path).problems
    assert "monai-adv convert" in problem.advice


def test_a_grid_may_be_that_of_another_format(tmp_path):
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    source = write_itk(tmp_path / "v.nrrd", array, OBLIQUE)
    written = nib.load(save_nifti(array, source, tmp_path / "v.nii.gz"))
    assert np.allclose(written.affine, OBLIQUE, atol=1e-5)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 1)
    assert np.allclose(written.header.get_qform(), OBLIQUE, atol=1e-5)


def test_the_command_line_ends_with_0_even_where_warnings_are_errors(tmp_path):
    make_case(tmp_path, suffix=".mha")
    program = (
        "import sys, warnings\n"
        "warnings.filterwarnings('error', 'builtin type')\n"
        "from monai_adv.cli import main\n"
        "sys.argv = ['monai-adv', 'check', sys.argv[1]]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert "no errors" in done.stdout
    assert done.returncode == 0, done.stderr  # -11 where SWIG fails to make its types at the interpreter's end
