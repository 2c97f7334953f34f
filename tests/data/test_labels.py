from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from monai.transforms import ConvertToMultiChannelBasedOnBratsClasses

from monai_adv.data import CLASSES, REGIONS, SIGMOID_CHANNELS, LabelScheme, region_channels, region_masks
from monai_adv.errors import DataError

TABLE = [  # scheme, numbers in the file, what they are (reference: the label table of the releases)
    ("brats2017", [0, 1, 2, 4], ["background", "NCR", "ED", "ET"]),
    ("brats2018", [0, 1, 2, 4], ["background", "NCR", "ED", "ET"]),
    ("brats2021", [0, 1, 2, 4], ["background", "NCR", "ED", "ET"]),
    ("brats2023", [0, 1, 2, 3], ["background", "NCR", "ED", "ET"]),
    ("brats2024", [0, 1, 2, 3, 4], ["background", "NCR", "ED", "ET", "background"]),
    ("brats2025", [0, 1, 2, 3, 4], ["background", "NCR", "ED", "ET", "background"]),
    ("msd", [0, 1, 2, 3], ["background", "ED", "NCR", "ET"]),
]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize(("name", "numbers", "meaning"), TABLE)
def test_numbers_mean_what_the_release_says(name, numbers, meaning, dtype):
    classes = LabelScheme.get(name).to_classes(np.array(numbers, dtype=dtype))
    assert classes.dtype == np.uint8
    assert [CLASSES[index] for index in classes] == meaning


@pytest.mark.parametrize("name", LabelScheme.names())
def test_classes_survive_the_way_to_the_file_and_back(name):
    scheme = LabelScheme.get(name)
    classes = np.random.default_rng(0).integers(0, 4, (3, 4, 5))
    assert np.array_equal(scheme.to_classes(scheme.from_classes(classes)), classes)


def test_the_resection_cavity_is_no_tumour_and_is_not_written_back():
    scheme = LabelScheme.get("brats2024")
    classes = scheme.to_classes(np.array([4, 4, 3]))
    assert not region_masks(classes)["WT"][:2].any()
    assert scheme.from_classes(classes).tolist() == [0, 0, 3]


@pytest.mark.parametrize(
    ("name", "numbers", "says"),
    [
        ("brats2023", [0, 1, 2, 3, 4], "scheme='brats2024'"),
        ("brats2023", [0, 1, 2, 4], "scheme='brats2021'"),
        ("brats2021", [0, 1, 2, 3], "scheme='brats2023' or scheme='msd'"),
        ("brats2021", [0, 1, 2, 3, 4], "brats2024, brats2025"),
        ("msd", [0, 1, 4], "The Decathlon has no 4"),
        ("brats2021", [0, 255], "No known scheme"),
        ("brats2021", [-1, 0], "No known scheme"),
        ("brats2021", [0, 100000], "No known scheme"),
    ],
)
def test_values_outside_the_scheme_name_file_values_and_the_way_out(name, numbers, says):
    with pytest.raises(DataError) as error:
        LabelScheme.get(name).to_classes(np.array(numbers), where="patient_seg.nii.gz")
    message = str(error.value)
    assert message.startswith("patient_seg.nii.gz: ")
    assert str(numbers) in message
    assert says in message


@pytest.mark.parametrize(
    ("array", "says"),
    [
        ([0.0, 1.5, 2.25], "2 label voxels are not whole numbers (such as 1.5, 2.25)"),
        ([0.0, np.nan, np.inf], "2 label voxels are NaN or Inf"),
        ([1j, 0], "type complex128"),
    ],
)
def test_labels_that_are_no_whole_numbers(array, says):
    with pytest.raises(DataError) as error:
        LabelScheme.get("brats2021").to_classes(np.array(array), where="seg.nii")
    assert str(error.value).startswith("seg.nii: ")
    assert says in str(error.value)


def test_writing_back_refuses_what_is_no_class():
    with pytest.raises(DataError, match=r"expected 0\.\.3"):
        LabelScheme.get("brats2021").from_classes(np.array([0, 4]))


def test_unknown_scheme_lists_the_known_ones():
    with pytest.raises(DataError, match=r"'brats2022'.*brats2021.*msd"):
        LabelScheme.get("brats2022")
    with pytest.raises(DataError, match="unknown classes"):
        LabelScheme("mine", {0: "background", 1: "lesion"})


def test_a_scheme_is_a_value():
    scheme = LabelScheme.get("BraTS2021")
    assert scheme == LabelScheme.get(scheme) == pickle.loads(pickle.dumps(scheme))
    assert len({scheme, LabelScheme.get("brats2021"), LabelScheme.get("brats2023")}) == 2
    with pytest.raises(TypeError):
        scheme.values[9] = "ET"


@pytest.mark.parametrize(("name", "et_label"), [("brats2021", 4), ("brats2023", 3)])
def test_region_channels_are_those_of_monai(name, et_label):
    numbers = torch.as_tensor(np.random.default_rng(1).choice([0, 1, 2, et_label], (1, 5, 6, 7)))
    expected = ConvertToMultiChannelBasedOnBratsClasses(et_label=et_label)(numbers)
    channels = region_channels(torch.from_numpy(LabelScheme.get(name).to_classes(numbers)))
    assert channels.dtype == torch.uint8
    assert torch.equal(channels.bool(), expected.bool())


def test_regions_of_a_batch_and_in_an_order_of_ones_own():
    classes = torch.randint(0, 4, (2, 1, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    channels = region_channels(classes, ("ET", "WT"), dim=1)
    assert channels.shape == (2, 2, 3, 4, 5)
    assert torch.equal(channels[:, 0].bool(), classes[:, 0] == 3)
    assert torch.equal(channels[:, 1].bool(), classes[:, 0] > 0)
    with pytest.raises(DataError, match="one channel at axis 0"):
        region_channels(classes)
    with pytest.raises(DataError, match="unknown region 'RC'"):
        region_masks(classes, ("RC",))


def test_regions_are_nested_and_canonical():
    assert set(REGIONS["ET"]) < set(REGIONS["TC"]) < set(REGIONS["WT"])
    assert set(SIGMOID_CHANNELS) == set(REGIONS)
    assert [CLASSES[index] for index in REGIONS["TC"]] == ["NCR", "ET"]
