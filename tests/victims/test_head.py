"""Head: what logits mean, which labels fit, and how regions and Dice follow."""

from __future__ import annotations

import pytest
import torch
from monai.metrics import DiceMetric
from monai.transforms import ConvertToMultiChannelBasedOnBratsClasses
from oracles import make_label, out_channels

from monai_adv.errors import ConfigError
from monai_adv.victims import Head, as_head, mean_dice

SHAPE = (3, 4, 5)


def random_logits(head: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, out_channels(head), *SHAPE, generator=torch.Generator().manual_seed(3))


def test_softmax_prediction_is_the_argmax_and_keeps_a_channel():
    logits = random_logits("softmax")
    prediction = Head("softmax").predict(logits)
    assert prediction.shape == (2, 1, *SHAPE)
    assert prediction.dtype == torch.int64
    assert torch.equal(prediction[:, 0], logits.max(1).indices)


def test_sigmoid_prediction_is_the_sign_and_bits_may_overlap():
    logits = torch.tensor([[[0.1], [2.0], [-1.0]]])
    prediction = Head("sigmoid").predict(logits)
    assert prediction.dtype == torch.bool
    assert prediction.flatten().tolist() == [True, True, False]
    assert not Head("sigmoid").predict(torch.zeros(1, 3, 1)).any()  # probability 1/2 is not a region


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_prediction_is_where_the_probability_says(kind):
    head, logits = Head(kind), random_logits(kind)
    probability = head.probabilities(logits)
    if kind == "softmax":
        torch.testing.assert_close(probability.sum(1), torch.ones(2, *SHAPE))
        assert torch.equal(probability.argmax(1, keepdim=True), head.predict(logits))
    else:
        assert torch.equal(probability > 0.5, head.predict(logits))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_encode_inverts_predict(kind):
    head, label = Head(kind), make_label(kind)
    logits = torch.zeros(4, out_channels(kind), *label.shape[2:], dtype=torch.float64)
    encoded = head.encode(label, logits)
    assert encoded.dtype == logits.dtype
    assert encoded.shape == logits.shape
    assert torch.equal(head.predict(encoded - 0.5), label)


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("softmax", torch.zeros(2, 4, *SHAPE), r"needs a label of shape \(2, 1, 3, 4, 5\)"),
        ("softmax", torch.zeros(2, *SHAPE), "needs a label of shape"),
        ("softmax", torch.full((2, 1, *SHAPE), 4), r"label values 4\.\.4 do not fit 4 classes"),
        ("softmax", torch.full((2, 1, *SHAPE), -1), r"label values -1\.\.-1"),
        ("softmax", torch.full((2, 1, *SHAPE), 1.5), "integer class indices"),
        ("softmax", torch.full((2, 1, *SHAPE), float("nan")), "integer class indices"),
        ("sigmoid", torch.zeros(2, 1, *SHAPE), r"needs a label of shape \(2, 3, 3, 4, 5\)"),
        ("sigmoid", torch.full((2, 3, *SHAPE), 2), "0 and 1 per region"),
        ("sigmoid", torch.full((2, 3, *SHAPE), 0.5), "0 and 1 per region"),
        ("sigmoid", torch.full((2, 3, *SHAPE), float("nan")), "0 and 1 per region"),
    ],
)
def test_a_label_that_does_not_fit_is_refused(kind, label, message):
    with pytest.raises(ConfigError, match=message):
        Head(kind).check_label(label, random_logits(kind))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_label_of_any_type_means_the_same(kind, dtype):
    label = make_label(kind)
    logits = torch.zeros(4, out_channels(kind), *label.shape[2:])
    checked = Head(kind).check_label(label.to(dtype), logits)
    assert checked.dtype == label.dtype
    assert torch.equal(checked, label)


def test_regions_of_classes_are_the_brats_unions():
    classes = torch.tensor([0, 1, 2, 3]).view(1, 1, 4)
    regions = Head("softmax").regions_of(classes)
    assert {k: v.flatten().tolist() for k, v in regions.items()} == {
        "WT": [False, True, True, True],
        "TC": [False, True, False, True],
        "ET": [False, False, False, True],
    }


def test_sigmoid_bits_are_monais_multichannel_order():
    classes = torch.tensor([0, 1, 2, 3]).view(1, 1, 4, 1, 1)
    brats = torch.tensor([0, 1, 2, 4]).view(1, 4, 1, 1)  # the numbers in the files that MONAI's transform reads
    expected = ConvertToMultiChannelBasedOnBratsClasses()(brats)
    assert torch.equal(Head("sigmoid").label_from_classes(classes)[0], expected.bool())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_classes_survive_the_way_through_a_head(kind):
    classes = torch.randint(0, 4, (2, 1, *SHAPE), generator=torch.Generator().manual_seed(0))
    head = Head(kind)
    back = head.classes_from_prediction(head.label_from_classes(classes))
    assert back.dtype == torch.uint8
    assert torch.equal(back.long(), classes)


def test_bits_that_are_not_nested_are_resolved_from_the_outside_inwards():
    only_et = torch.tensor([False, False, True]).view(1, 3, 1)  # TC, WT, ET
    assert Head("sigmoid").classes_from_prediction(only_et).item() == 3


def test_own_regions():
    organ = Head("softmax", {"liver": (1, 2)})
    assert organ.region_names == ("liver",)
    assert organ.regions_of(torch.tensor([[[0, 1, 2]]]))["liver"].tolist() == [[False, True, True]]
    assert Head("sigmoid", ["a", "b"]).region_names == ("a", "b")
    with pytest.raises(ConfigError, match="no BraTS classes"):
        Head("sigmoid", ["liver"]).label_from_classes(torch.zeros(1, 1, 2))
    with pytest.raises(ConfigError, match="not BraTS"):
        Head("sigmoid", ["liver"]).classes_from_prediction(torch.zeros(1, 1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("kind", "regions", "message"),
    [
        ("softargmax", None, "unknown"),
        ("softmax", ("WT",), "needs regions as"),
        ("sigmoid", {"WT": (1,)}, "needs regions as the names"),
    ],
)
def test_impossible_heads(kind, regions, message):
    with pytest.raises(ConfigError, match=message):
        Head(kind, regions)


def test_a_prediction_of_another_channel_count_is_refused():
    with pytest.raises(ConfigError, match="2 channels for the regions"):
        Head("sigmoid").regions_of(torch.zeros(1, 2, 4, dtype=torch.bool))


def test_as_head_takes_both():
    head = Head("sigmoid")
    assert as_head(head) is head
    assert as_head("softmax") == Head("softmax")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_mean_dice_equals_monais(kind, batch):
    head = Head(kind)
    truth = make_label(kind, batch, seed=1)
    prediction = make_label(kind, batch, seed=2)
    stack = [torch.stack(list(head.regions_of(x).values()), 1).double() for x in (prediction, truth)]
    expected = DiceMetric(reduction="none")(*stack).mean(1)
    torch.testing.assert_close(mean_dice(prediction, truth, head), expected.double(), rtol=1e-6, atol=1e-6)


def test_mean_dice_of_empty_regions():
    head = Head("softmax", {"a": (1,)})
    empty, full = torch.zeros(1, 1, 4, dtype=torch.long), torch.ones(1, 1, 4, dtype=torch.long)
    assert mean_dice(empty, empty, head).item() == 1
    assert mean_dice(full, empty, head).item() == 0
    assert mean_dice(empty, full, head).item() == 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_ignored_voxels_do_not_count_in_dice(kind):
    head = Head(kind)
    truth, prediction = make_label(kind, seed=1), make_label(kind, seed=2)
    weight = torch.zeros(4, 1, *truth.shape[2:])
    weight[..., :2] = 1
    inside = mean_dice(prediction[..., :2], truth[..., :2], head)
    torch.testing.assert_close(mean_dice(prediction, truth, head, weight), inside, rtol=0, atol=0)
    assert not torch.equal(inside, mean_dice(prediction, truth, head))
