"""Targets of targeted attacks, and how far a prediction has come."""

from __future__ import annotations

import pytest
import torch
from oracles import SHAPES, make_label, out_channels

from monai_adv.errors import ConfigError
from monai_adv.losses import RULES, hide, make_target, target_agreement
from monai_adv.victims import Head

SOFTMAX, SIGMOID = Head("softmax"), Head("sigmoid")  # sigmoid channels: TC, WT, ET


def logits_like(head: str, label: torch.Tensor) -> torch.Tensor:
    shape = (len(label), out_channels(head), *label.shape[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("rule", [*RULES, "hide", "mask"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_every_rule_gives_a_label_of_the_head(head, rule, dims):
    label = make_label(head, dims=dims)
    logits = logits_like(head, label)
    chosen = {"hide": {"hide": "ET"}, "mask": make_label(head, dims=dims, seed=5)}.get(rule, rule)
    before = label.clone()
    target = make_target(chosen, label, logits, Head(head))
    assert torch.equal(Head(head).check_label(target, logits), target)
    assert target.dtype == label.dtype
    assert not torch.equal(target, label)
    assert torch.equal(label, before)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_background(head):
    label = make_label(head)
    assert not make_target("background", label, logits_like(head, label), Head(head)).any()


def test_least_likely_of_classes_is_the_lowest_logit():
    label = make_label("softmax")
    logits = logits_like("softmax", label)
    target = make_target("least_likely", label, logits, SOFTMAX)
    assert torch.equal(target[:, 0], (-logits).argmax(1))


def test_least_likely_of_regions_is_the_other_bit():
    label = make_label("sigmoid")
    logits = logits_like("sigmoid", label)
    assert torch.equal(make_target("least_likely", label, logits, SIGMOID), logits <= 0)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_permute(head):
    classes = torch.tensor([0, 1, 2, 3]).view(1, 1, 4)  # background, NCR, ED, ET
    label = Head(head).label_from_classes(classes)
    target = make_target("permute", label, logits_like(head, label), Head(head))
    assert Head(head).classes_from_prediction(target).flatten().tolist() == [0, 2, 0, 1]


def test_permute_of_other_classes_is_the_one_before():
    head = Head("softmax", {"a": (1,), "b": (2,)})
    label = torch.tensor([[[0, 1, 2]]])
    assert make_target("permute", label, torch.zeros(1, 3, 3), head).flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ET", [0, 0, 2, 2, 1, 1, 1]),
        (3, [0, 0, 2, 2, 1, 1, 1]),
        ("TC", [0, 0, 2, 2, 2, 2, 2]),
        ("WT", [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_hidden_classes_are_filled_with_the_nearest_that_is_left(name, expected):
    label = torch.tensor([0, 0, 2, 3, 3, 1, 1]).view(1, 1, 7)
    assert hide(label, name, SOFTMAX).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("name", "left"), [("WT", (False, False, False)), ("TC", (False, True, False)), ("ET", (True, True, False))]
)
def test_hidden_regions_take_those_inside_them_along(name, left):
    label = make_label("sigmoid")
    found = hide(label, name, SIGMOID)
    for k, stays in enumerate(left):
        assert torch.equal(found[:, k], label[:, k] & stays)


def test_hiding_one_sample_at_a_time():
    label = make_label("softmax")
    found = hide(label, "ET", SOFTMAX)
    assert all(torch.equal(found[b : b + 1], hide(label[b : b + 1], "ET", SOFTMAX)) for b in range(4))
    assert torch.equal(found[label != 3], label[label != 3])
    absent = label.clamp_max(2)
    assert torch.equal(hide(absent, "ET", SOFTMAX), absent)


@pytest.mark.parametrize(
    ("head", "rule", "message"),
    [
        ("softmax", "vanish", "target 'vanish' is unknown"),
        ("softmax", {"vanish": 3}, "use one of background"),
        ("softmax", {"hide": "liver"}, "cannot hide 'liver'"),
        ("softmax", {"hide": 4}, r"cannot hide class 4: the network has the classes 0\.\.3"),
        ("softmax", {"hide": -1}, "cannot hide class -1"),
        ("sigmoid", {"hide": "NCR"}, "the head's regions are TC, WT, ET"),
        ("softmax", torch.zeros(4, 1, 2, 2, 2), "needs a label of shape"),
        ("sigmoid", torch.full((4, 3, *SHAPES[3]), 2), "0 and 1"),
    ],
)
def test_impossible_targets(head, rule, message):
    label = make_label(head)
    with pytest.raises(ConfigError, match=message):
        make_target(rule, label, logits_like(head, label), Head(head))


def test_nothing_left_to_fill_with():
    with pytest.raises(ConfigError, match="nothing else is left in sample 0"):
        hide(torch.full((1, 1, 3), 3), "ET", SOFTMAX)


def test_agreement_by_hand():
    label = torch.tensor([0, 1, 1, 2, 2, 0]).view(1, 1, 6)
    target = torch.tensor([0, 0, 0, 2, 0, 0]).view(1, 1, 6)  # three voxels have to change
    cases = {
        (0, 1, 1, 2, 2, 0): 0.0,  # nothing happened
        (0, 0, 0, 2, 0, 0): 1.0,  # the target
        (0, 0, 1, 2, 2, 0): 1 / 3,
        (0, 0, 3, 2, 0, 0): 2 / 3,  # changed, but to something else
        (0, 0, 0, 2, 0, 3): 3 / 4,  # one that had to stay did not
        (3, 1, 1, 0, 2, 3): 0.0,
    }
    for prediction, expected in cases.items():
        found = target_agreement(torch.tensor(prediction).view(1, 1, 6), target, label)
        assert found.tolist() == pytest.approx([expected]), prediction
    assert target_agreement(label, label, label).item() == 1


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_agreement_of_a_batch_and_of_counted_voxels(head):
    label, target = make_label(head), make_label(head, seed=5)
    prediction = torch.where(torch.rand(label.shape, generator=torch.Generator().manual_seed(1)) < 0.5, label, target)
    together = target_agreement(prediction, target, label)
    one = [target_agreement(*(x[b : b + 1] for x in (prediction, target, label))) for b in range(4)]
    assert torch.equal(together, torch.cat(one))
    assert (together > 0).all()
    assert (together < 1).all()
    weight = torch.zeros(4, 1, *label.shape[2:])
    weight[..., 1:3] = 1
    cropped = target_agreement(*(x[..., 1:3] for x in (prediction, target, label)))
    assert torch.equal(target_agreement(prediction, target, label, weight), cropped)
