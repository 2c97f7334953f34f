"""Losses against MONAI's and torch's own, their gradients, and what ignored voxels do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss
from oracles import SHAPES, make_label, out_channels

from monai_adv.errors import ConfigError
from monai_adv.losses import (
    LOSSES,
    AttackLoss,
    CrossEntropy,
    Dice,
    DiceCrossEntropy,
    Margin,
    as_loss,
    logit_margin,
)
from monai_adv.victims import Head

HEADS = ["softmax", "sigmoid"]


def make_logits(head: str, batch: int = 4, dims: int = 3, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return scale * torch.randn(batch, out_channels(head), *SHAPES[dims], generator=generator, dtype=torch.float64)


def monai(kind: type, head: str, smooth: float, mean: bool = False, **options):
    common = {"softmax": head == "softmax", "sigmoid": head == "sigmoid", "to_onehot_y": head == "softmax"}
    common.update(include_background=head == "sigmoid", smooth_nr=smooth, smooth_dr=smooth)
    return kind(**common, reduction="mean" if mean else "none", **options)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("head", HEADS)
def test_cross_entropy_is_torchs(head, dims):
    logits, label = make_logits(head, dims=dims), make_label(head, dims=dims)
    if head == "softmax":
        expected = F.cross_entropy(logits, label[:, 0], reduction="none").flatten(1).sum(1)
    else:
        expected = F.binary_cross_entropy(torch.sigmoid(logits), label.double(), reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(CrossEntropy()(logits, label, Head(head)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("head", HEADS)
def test_dice_is_monais(head, dims, smooth):
    logits, label = make_logits(head, dims=dims), make_label(head, dims=dims)
    each = monai(DiceLoss, head, smooth)(logits, label.double())  # (B, K, 1, ...)
    voxels = math.prod(SHAPES[dims])
    found = Dice(smooth)(logits, label, Head(head))
    torch.testing.assert_close(found, voxels * each.flatten(1).mean(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 2.0)])
@pytest.mark.parametrize("head", HEADS)
def test_the_parts_of_dice_ce_weigh_as_monais(head, weights):
    logits, label = make_logits(head, 1), make_label(head, 1)
    if head == "softmax":
        expected = monai(DiceCELoss, head, 1, lambda_dice=weights[0], lambda_ce=weights[1], mean=True)(logits, label)
    else:
        entropy = F.binary_cross_entropy_with_logits(logits, label.double())
        expected = weights[0] * monai(DiceLoss, head, 1, mean=True)(logits, label) + weights[1] * entropy
    found = DiceCrossEntropy(1.0, *weights)(logits, label, Head(head))
    torch.testing.assert_close(found, 120 * expected[None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_margin_voxel_by_voxel(head):
    logits, label = make_logits(head, 2), make_label(head, 2)
    found = logit_margin(logits, label, Head(head))
    for index in [(0, 0, 1, 2, 3), (1, 0, 3, 4, 5), (1, 0, 0, 0, 0)]:
        b, _, *place = index
        z = logits[(b, slice(None), *place)]
        if head == "softmax":
            y = int(label[index])
            assert found[index] == max(float(z[k]) for k in range(4) if k != y) - z[y]
        else:
            for k in range(3):
                assert found[(b, k, *place)] == (-z[k] if label[(b, k, *place)] else z[k])
    wrong = Head(head).predict(logits) != label
    assert torch.equal(found > 0, wrong)


@pytest.mark.parametrize("kappa", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("head", HEADS)
def test_margin_stops_counting_at_kappa(head, kappa):
    logits, label = make_logits(head).requires_grad_(True), make_label(head)
    margin = logit_margin(logits.detach(), label, Head(head))
    loss = Margin(kappa)(logits, label, Head(head))
    torch.testing.assert_close(loss, margin.clamp_max(kappa).flatten(1).sum(1), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    pushed = gradient.abs().amax(1, keepdim=True) if head == "softmax" else gradient
    assert torch.equal(pushed != 0, margin <= kappa)


def test_dice_ce_of_one_region_is_monais():
    logits, label = make_logits("sigmoid", 1)[:, :1], make_label("sigmoid", 1)[:, :1]
    expected = monai(DiceCELoss, "sigmoid", 1, mean=True)(logits, label.double())
    found = DiceCrossEntropy()(logits, label, Head("sigmoid", ["TC"]))
    torch.testing.assert_close(found, 120 * expected[None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_a_targeted_margin_pulls_the_voxels_that_are_far_from_the_target(head):
    """And lets go of those that are at the target by more than kappa."""
    head_ = Head(head)
    logits, target = make_logits(head, scale=6.0).requires_grad_(True), make_label(head)
    margin = logit_margin(logits.detach(), target, head_)
    ascended = Margin(1.0).towards(logits, target, head_)
    torch.testing.assert_close(ascended, -margin.clamp_min(-1.0).flatten(1).sum(1), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(ascended.sum(), logits)
    moved = gradient.abs().amax(1, keepdim=True) if head == "softmax" else gradient
    assert torch.equal(moved != 0, margin > -1.0)
    assert (margin > 1).any()
    assert (margin < -1).any()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["ce", "dice", "dice_ce"])
def test_towards_a_target_is_the_negative(head, name):
    logits, target = make_logits(head), make_label(head)
    loss = as_loss(name)
    assert torch.equal(loss.towards(logits, target, Head(head)), -loss(logits, target, Head(head)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_against_finite_differences(name, head, weighted):
    logits = make_logits(head, 2, 2)[..., :2].clone().requires_grad_(True)
    label = make_label(head, 2, 2)[..., :2]
    weight = torch.rand(2, 1, *label.shape[2:], generator=torch.Generator().manual_seed(0)) if weighted else None
    assert torch.autograd.gradcheck(lambda z: as_loss(name)(z, label, Head(head), weight), logits)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", list(LOSSES))
def test_one_number_per_sample_that_the_others_do_not_touch(name, head):
    loss, logits, label = as_loss(name), make_logits(head), make_label(head)
    together = loss(logits, label, Head(head))
    alone = [loss(logits[b : b + 1], label[b : b + 1], Head(head)) for b in range(4)]
    assert together.shape == (4,)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=0)
    assert len(set(together.tolist())) == 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", list(LOSSES))
def test_ignored_voxels_neither_count_nor_divide(name, head, dtype):
    loss, logits, label = as_loss(name), make_logits(head).requires_grad_(True), make_label(head)
    weight = torch.zeros(4, 1, *SHAPES[3])
    weight[:, :, 1:3, :, 2:] = 1
    found = loss(logits, label, Head(head), weight.to(dtype))
    cropped = loss(logits[:, :, 1:3, :, 2:], label[:, :, 1:3, :, 2:], Head(head))
    torch.testing.assert_close(found, cropped, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert not gradient[(weight == 0).expand_as(gradient)].any()
    assert torch.equal(loss(logits, label, Head(head), torch.ones_like(weight)), loss(logits, label, Head(head)))


def test_dice_of_an_absent_region_grows_a_false_positive_only_with_smoothing():
    head = Head("softmax", {"a": (1,)})
    logits = torch.zeros(1, 2, 5, dtype=torch.float64, requires_grad=True)
    label = torch.zeros(1, 1, 5, dtype=torch.long)
    for smooth, moves in ((0.0, False), (1.0, True)):
        (gradient,) = torch.autograd.grad(Dice(smooth)(logits, label, head).sum(), logits)
        assert bool((gradient[:, 1] > 0).all()) == moves


def test_dice_leaves_the_background_out():
    logits = torch.full((1, 2, 4), -20.0)
    logits[:, 0] = 20  # all background, as is the label of three voxels
    label = torch.tensor([[[0, 0, 0, 1]]])
    torch.testing.assert_close(Dice(0.0)(logits, label, Head("softmax")), torch.tensor([4.0]))


def test_large_logits_stay_finite():
    for head in HEADS:
        logits = make_logits(head, scale=1e4).float().requires_grad_(True)
        for loss in LOSSES.values():
            value = loss()(logits, make_label(head), Head(head))
            assert value.isfinite().all()
            assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("name", list(LOSSES))
def test_labels_are_checked(name):
    with pytest.raises(ConfigError, match="do not fit 4 classes"):
        as_loss(name)(make_logits("softmax"), make_label("softmax") + 1, Head("softmax"))
    with pytest.raises(ConfigError, match="needs a label of shape"):
        as_loss(name)(make_logits("sigmoid"), make_label("softmax"), Head("sigmoid"))


def test_by_name():
    margin = Margin(3.0)
    assert as_loss(margin) is margin
    assert as_loss("dice_ce") == DiceCrossEntropy()
    assert all(isinstance(as_loss(name), AttackLoss) for name in LOSSES)
    with pytest.raises(ConfigError, match="loss 'rumour' is unknown: use one of ce, dice"):
        as_loss("rumour")
