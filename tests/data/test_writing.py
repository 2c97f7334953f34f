from __future__ import annotations

import os
import resource

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import LPS, case_file, make_case, write_nifti
from monai.data import MetaTensor
from monai.transforms import Orientation
from readers import with_simpleitk

from monai_adv.data import LabelScheme, brats_datalist, load_case, save_nifti
from monai_adv.data.writing import atomic_file
from monai_adv.errors import DataError

ANGLE = 0.3
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = TURN @ np.diag([-1.0, -1.2, 3.0])
OBLIQUE[:3, 3] = (11, -22, 33)
SHEARED = np.diag([1.0, 1, 2, 1])
SHEARED[0, 1] = 0.25


@pytest.fixture
def loaded(tmp_path):
    """A case on an oblique, anisotropic grid, and the arrays that were written."""
    written = make_case(tmp_path / "in", affine=OBLIQUE)
    return load_case(brats_datalist(tmp_path / "in")[0]), written


@pytest.mark.parametrize("affine", [LPS, np.diag([2.0, 2, 2, 1]), OBLIQUE], ids=["LPS", "RAS", "oblique"])
def test_another_reader_sees_the_same_voxels_at_the_same_places(tmp_path, affine):  # itk: test_geometry_round_trip
    make_case(tmp_path, affine=affine)
    case = load_case(brats_datalist(tmp_path)[0])
    adversarial = case["image"][0] + 0.25
    path = save_nifti(adversarial, case["image"], tmp_path / "out" / "adversarial.nii.gz")
    files = [path, case_file(tmp_path, case["subject"], "T1")]
    written, source = map(with_simpleitk, files)
    assert np.array_equal(written.array, adversarial.numpy())
    assert np.allclose(written.affine, affine, atol=1e-4)
    assert np.array_equal(source.array, case["image"][0].numpy())  # and the loader agrees with them about the source
    assert np.allclose(source.affine, case["image"].affine, atol=1e-4)


@pytest.mark.parametrize("kind", ["tensor", "path"])
@pytest.mark.parametrize(("sform", "qform"), [(1, 1), (0, 1), (4, 0), (1, 2), (2, 0)])
def test_affine_codes_and_units_are_those_of_the_source(tmp_path, sform, qform, kind):
    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    array = np.asarray(nib.load(item["image"][0]).dataobj)
    for path in item["image"]:
        write_nifti(tmp_path / path, array, OBLIQUE, sform, qform)
    write_nifti(tmp_path / item["label"], np.uint8(array > 900), OBLIQUE)
    like = load_case(item)["image"] if kind == "tensor" else item["image"][0]
    written = nib.load(save_nifti(array, like, tmp_path / "out.nii"))
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (sform, qform)
    assert np.allclose(written.affine, OBLIQUE, atol=1e-4)
    assert written.header.get_xyzt_units()[0] == "mm"
    assert np.allclose(written.header.get_zooms(), np.linalg.norm(OBLIQUE[:3, :3], axis=0), atol=1e-5)


@pytest.mark.parametrize("affine", [SHEARED, np.diag([1.0, 1, 3, 1])], ids=["sheared", "straight"])
@pytest.mark.parametrize(("sform", "qform"), [(1, 1), (0, 1), (0, 0)])
def test_an_affine_that_the_codes_cannot_hold_is_kept_all_the_same(tmp_path, affine, sform, qform):
    like = MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.from_numpy(affine))
    like.meta.update(sform_code=sform, qform_code=qform)
    written = nib.load(save_nifti(like, like, tmp_path / "out.nii"))
    assert np.allclose(written.affine, affine, atol=1e-5)
    if affine is SHEARED:  # a qform that says something else would mislead the readers that prefer it
        assert int(written.header["qform_code"]) == 0


def test_free_text_is_left_behind(tmp_path):
    image = nib.Nifti1Image(np.ones((3, 4, 5), np.int16), LPS)
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = b"Jane Doe"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, tmp_path / "in.nii")
    content = save_nifti(np.ones((3, 4, 5), np.int16), tmp_path / "in.nii", tmp_path / "out.nii").read_bytes()
    assert b"Jane" in (tmp_path / "in.nii").read_bytes()
    assert b"Jane" not in content
    assert str(tmp_path).encode() not in content


def test_the_same_voxels_give_the_same_bytes(tmp_path, loaded):
    case, _ = loaded
    first = save_nifti(case["image"][1], case["image"], tmp_path / "a.nii.gz").read_bytes()
    second = save_nifti(case["image"][1], case["image"], tmp_path / "b" / "other.nii.gz").read_bytes()
    assert first == second
    assert first[4:8] == bytes(4)  # no time in the gzip header


def test_a_label_goes_back_in_the_numbers_of_its_scheme(tmp_path, loaded):
    case, written = loaded
    numbers = LabelScheme.get("brats2021").from_classes(case["label"])
    image = nib.load(save_nifti(numbers, case["label"], tmp_path / "out_seg.nii.gz"))
    assert image.get_data_dtype() == np.uint8
    source = nib.load(case["label"].meta["filename_or_obj"])
    assert np.array_equal(image.dataobj, source.dataobj)
    assert np.array_equal(np.asarray(image.dataobj) == 4, written["label"] == 3)


def test_a_transformed_volume_is_written_where_it_lies_now(tmp_path, loaded):
    case, written = loaded
    turned = Orientation("RAS", labels=None)(case["image"])
    path = save_nifti(turned[0], turned, tmp_path / "out.nii")
    image = nib.load(path)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    back = nib.as_closest_canonical(nib.load(case["image"].meta["filename_or_obj"]))
    assert np.allclose(image.affine, back.affine, atol=1e-4)
    assert np.array_equal(np.asarray(image.dataobj), np.asarray(back.dataobj))
    assert written["T1"].any()


@pytest.mark.parametrize(
    ("array", "dtype", "kept"),
    [
        (np.array([1.5, -2.5, 0.5]), None, np.float32),
        (torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64), torch.float64, np.float64),
        (torch.tensor([1.5, 2.0, 3.0], dtype=torch.bfloat16).float(), None, np.float32),
        (np.array([1, 2, 3], np.uint8), None, np.uint8),
        (np.array([1, 2, 3], np.int64), None, np.int32),
        (np.array([True, False, True]), None, np.uint8),
        (np.array([1.6, -1.6, 2.5]), np.int16, np.int16),
        (np.array([1.6, 1.4, 2.5]), torch.int16, np.int16),
    ],
)
def test_types_and_rounding(tmp_path, array, dtype, kept):
    grid = write_nifti(tmp_path / "grid.nii", np.zeros((3, 1, 1), np.uint8))
    image = nib.load(save_nifti(array.reshape(3, 1, 1), grid, tmp_path / "out.nii", dtype))
    assert image.get_data_dtype() == kept
    expected = np.asarray(array, dtype=np.float64)
    if np.dtype(kept).kind in "iu":
        expected = np.rint(expected)
    assert np.array_equal(np.asarray(image.dataobj).ravel(), expected)
    assert image.dataobj.slope == 1  # no hidden scale: the numbers in the file are the numbers
    assert image.dataobj.inter == 0


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (40000.0, np.int16, "values from 0 to 40000 do not fit int16"),
        (-1.0, np.uint8, "values from -1 to 0 do not fit uint8"),
        (2**40, None, "do not fit int32"),
        (np.nan, None, "1 of 3 voxels are NaN or Inf"),
        (np.inf, np.int16, "1 of 3 voxels are NaN or Inf"),
        (1e300, np.float32, "do not fit float32"),
        (1.0, np.complex64, "NIfTI cannot hold complex64"),
        (1.0, np.float16, "NIfTI cannot hold float16"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, value, dtype, says):
    grid = write_nifti(tmp_path / "grid.nii", np.zeros((3, 1, 1), np.uint8))
    with pytest.raises(DataError) as error:
        save_nifti(np.array([0, value, 0]).reshape(3, 1, 1), grid, tmp_path / "out.nii", dtype)
    assert says in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.nii"]


def test_shapes_names_and_grids_that_do_not_fit(tmp_path, loaded):
    case, _ = loaded
    for array, like, name, says in (
        (case["image"], case["image"], "x.nii.gz", "one file per channel"),
        (case["image"][0, 1:], case["image"], "x.nii.gz", "array of shape"),
        (case["image"][0], case["image"], "x.mha", r"must end in \.nii"),
        (case["image"][0], case["image"].as_tensor(), "x.nii", "like has no affine"),
    ):
        with pytest.raises(DataError, match=says):
            save_nifti(array, like, tmp_path / name)


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path):
    grid = write_nifti(tmp_path / "grid.nii", np.zeros((40, 40, 40), np.uint8))
    save_nifti(np.ones((40, 40, 40), np.uint8), grid, tmp_path / "out.nii")
    before = (tmp_path / "out.nii").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write .*out\.nii"):
            save_nifti(np.zeros((40, 40, 40), np.uint8), grid, tmp_path / "out.nii")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out.nii").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.nii", "out.nii"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    grid = write_nifti(tmp_path / "grid.nii", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(DataError, match="cannot write"):
        save_nifti(np.zeros((4, 4, 4), np.uint8), grid, grid / "below_a_file.nii")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DataError, match=r"Permission denied.*make the folder writable"):
        save_nifti(np.zeros((4, 4, 4), np.uint8), grid, tmp_path / "out.nii")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.nii"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        with atomic_file(tmp_path / "out.bin") as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
