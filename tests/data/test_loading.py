from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import CORRUPTIONS, LPS, MODALITIES, case_file, make_case, make_cohort, real_data, rewrite
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, CropForegroundd

from monai_adv.data import LoadCased, brats_datalist, load_case
from monai_adv.errors import DataError


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize("naming", ["2021", "2023", "msd"])
def test_what_was_written_is_loaded_in_canonical_order(tmp_path, naming, suffix):
    subject = "BraTS-GLI-00007-000" if naming == "2023" else "case"
    written = make_case(tmp_path, subject, naming=naming, suffix=suffix)
    (item,) = brats_datalist(tmp_path)
    case = load_case(item)
    assert set(case) == {"image", "label", "subject"}
    assert case["subject"] == subject
    image, label = case["image"], case["label"]
    assert isinstance(image, MetaTensor)
    assert isinstance(label, MetaTensor)
    assert image.dtype == torch.float32
    assert label.dtype == torch.uint8
    assert np.array_equal(image.numpy(), np.stack([written[modality] for modality in MODALITIES]))
    assert np.array_equal(label.numpy(), written["label"][None])
    assert np.allclose(image.affine, LPS)
    assert np.allclose(label.affine, LPS)
    assert image.meta["filename_or_obj"] == str(case_file(tmp_path, subject, "T1", naming, suffix))
    assert label.meta["filename_or_obj"] == item["label"]


@pytest.mark.parametrize("axes", [(1, 1, 1), (-1, -1, 1), (-1, 1, 1)])  # RAS, LPS, LAS
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_orientation_and_label_type_are_the_files_own(tmp_path, axes, dtype):
    affine = np.diag([*(2.0 * np.array(axes)), 1.0])
    affine[:3, 3] = (3, -7, 11)
    written = make_case(tmp_path, affine=affine, label_dtype=dtype)
    case = load_case(brats_datalist(tmp_path)[0])
    assert np.allclose(case["image"].affine, affine)
    assert np.array_equal(case["label"].numpy()[0], written["label"])


def test_the_type_asked_for(tmp_path):
    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    assert load_case(item, dtype=torch.float64)["image"].dtype == torch.float64
    assert load_case(item, dtype=np.float16)["image"].dtype == torch.float16


def test_without_a_label(tmp_path):
    make_case(tmp_path, label=False)
    assert set(load_case(brats_datalist(tmp_path, require_label=False)[0])) == {"image", "subject"}


def test_in_a_monai_pipeline_with_a_data_loader(tmp_path):
    subjects = make_cohort(tmp_path / "b", 1, naming="2021") + make_cohort(tmp_path / "m", 1, naming="msd")
    items = [{**item, "fold": 3} for item in brats_datalist(tmp_path)]
    crop = CropForegroundd(["image", "label"], "image", allow_smaller=False)
    for transform in (LoadCased(), Compose([LoadCased(), crop])):
        (batch,) = DataLoader(Dataset(items, transform), batch_size=2)
        assert sorted(batch["subject"]) == sorted(subjects)
        assert batch["fold"].tolist() == [3, 3]
        assert batch["image"].shape[:2] == (2, 4)
        assert batch["label"].shape[1:] == (1, *batch["image"].shape[2:])
        assert "channels" not in batch
    assert batch["image"].shape[-1] < 12  # the crop did cut
    assert torch.equal(batch["label"] > 0, (batch["label"] > 0) & (batch["image"] != 0).any(1, keepdim=True))


@pytest.mark.parametrize(
    ("how", "role", "says"),
    [
        ("empty", "T1c", "empty"),
        ("truncated", "T1c", "truncated or corrupt"),
        ("truncated", "label", "truncated or corrupt"),
        ("checksum_cut", "T2", "truncated or corrupt"),
        ("bit_flip", "T2", "truncated or corrupt"),
        ("short", "FLAIR", "truncated: the header claims"),
        ("not_nifti", "T1", "cannot be read as NIfTI"),
        ("insane_header", "T1", "the header claims shape (32000, 32000, 32000)"),
        ("boastful_header", "T1", "truncated: the header claims"),
        ("missing", "T1", "no such file"),
        ("four_axes", "T2", "has 4 axes"),
        ("shape", "T1c", "T1c is not on the grid of T1: shape (13, 16, 12) instead of (14, 16, 12)"),
        ("shape", "label", "label is not on the grid of T1: shape"),
        (
            "affine",
            "FLAIR",
            "FLAIR is not on the grid of T1: affine differs by up to 0.01 (LPS, origin (20.01, 30, -5) mm",
        ),
        ("affine", "T1", "T1 is not on the grid of T1c: affine differs by up to 0.01"),
        ("affine", "label", "label is not on the grid of T1: affine differs by up to 0.01"),
        ("orientation", "T1c", "(RPS, origin"),
        ("spacing", "T2", "spacing (1, 1, 1.01) mm instead of (1, 1, 1) mm"),
        ("nan", "T1c", "1 NaN or Inf voxels"),
        ("inf", "FLAIR", "1 NaN or Inf voxels"),
        ("zero", "T2", "T2 is all zero"),
        ("constant", "T2", "T2 is constant (7)"),
        ("label_value", "label", "unexpected [7]"),
        ("label_fraction", "label", "not whole numbers (such as 1.5)"),
    ],
)
def test_bad_input_names_file_and_fault(tmp_path, how, role, says):
    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    file = case_file(tmp_path, item["subject"], role)
    CORRUPTIONS[how](file)
    with pytest.raises(DataError) as error:
        load_case(item)
    assert str(file) in str(error.value)
    assert says in str(error.value)


def test_an_uncompressed_file_that_is_cut(tmp_path):
    make_case(tmp_path, suffix=".nii", corrupt="truncated", role="T2")
    with pytest.raises(DataError, match=r"_t2\.nii: truncated: the header claims"):
        load_case(brats_datalist(tmp_path)[0])


@pytest.mark.parametrize(
    ("how", "role", "says"), [("four_axes", "image", "has 5 axes"), ("truncated", "image", "truncated or corrupt")]
)
def test_bad_decathlon_files(tmp_path, how, role, says):
    make_case(tmp_path, "BRATS_001", naming="msd", corrupt=how, role=role)
    with pytest.raises(DataError, match=says):
        load_case(brats_datalist(tmp_path)[0])


def test_a_decathlon_image_with_fewer_channels(tmp_path):
    make_case(tmp_path, "BRATS_001", naming="msd")
    rewrite(lambda array, affine: (array[..., :3], affine))(case_file(tmp_path, "BRATS_001", "image", "msd"))
    with pytest.raises(DataError, match="3 channels; expected 4"):
        load_case(brats_datalist(tmp_path)[0])


def test_every_bad_file_is_named_at_once(tmp_path):
    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    CORRUPTIONS["truncated"](case_file(tmp_path, item["subject"], "T1"))
    CORRUPTIONS["empty"](case_file(tmp_path, item["subject"], "FLAIR"))
    with pytest.raises(DataError) as error:
        load_case(item)
    assert "_t1.nii.gz" in str(error.value)
    assert "_flair.nii.gz" in str(error.value)


def test_affines_within_the_tolerance_pass(tmp_path):
    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    rewrite(lambda array, affine: (array, affine + 5e-4 * np.eye(4)[[3, 1, 2, 0]]))(
        case_file(tmp_path, item["subject"], "T2")
    )
    load_case(item)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image": None}, "expected a permutation of 0..3"),
        ({"image": ["a", "b"]}, "2 image files; expected 4"),
        ({"image": "x.nii", "channels": (0, 0, 1, 2)}, "expected a permutation"),
        ({"scheme": "brats1999"}, "unknown label scheme"),
    ],
)
def test_items_that_are_none(tmp_path, change, says):
    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    with pytest.raises(DataError, match=says):
        load_case({**item, **change})
    with pytest.raises(DataError, match="lacks"):
        load_case({"image": item["image"]})


@pytest.mark.real
def test_thirty_real_patients_load():
    items = brats_datalist(real_data("brats_2mm"))
    assert len(items) == 30
    schemes = {item["subject"]: item["scheme"] for item in items}
    assert schemes["BraTS-GLI-00000-000"] == "brats2023"
    assert schemes["BraTS2021_01480"] == "brats2021"
    without_et = []
    for item in items:
        case = load_case(item)
        assert case["image"].shape == (4, 120, 120, 78)
        classes = case["label"].unique().tolist()
        assert set(classes) <= {0, 1, 2, 3}
        if 3 not in classes:
            without_et.append(item["subject"])
    assert without_et == ["BraTS2021_01480", "BraTS2021_01483", "BraTS2021_01484"]


@pytest.mark.real
@pytest.mark.parametrize(
    ("subject", "enhancing"), [("BraTS-GLI-00000-000", True), ("BraTS2021_01480", False), ("BraTS2021_01659", True)]
)
def test_real_files_with_traps_load_at_1_mm(subject, enhancing):
    case = load_case(brats_datalist(real_data("brats_1mm") / subject)[0])
    assert case["image"].shape == (4, 240, 240, 155)
    assert (3 in case["label"].unique().tolist()) is enhancing
    assert np.allclose(case["image"].affine, case["label"].affine, atol=1e-3)
    assert np.allclose(np.diag(case["image"].affine)[:3], (-1, -1, 1))  # LPS, whichever of sform and qform says so
