"""The voxel-weighted losses and those of SEA against their definitions, voxel by voxel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses import FocalLoss
from oracles import SHAPES, make_label, out_channels

from monai_adv.errors import ConfigError
from monai_adv.losses import (
    AttackLoss,
    BalancedCrossEntropy,
    CosPGDCrossEntropy,
    CrossEntropy,
    Focal,
    JensenShannon,
    MaskedCrossEntropy,
    SegPGDCrossEntropy,
    Spherical,
    Tracked,
    as_loss,
    tracked,
)
from monai_adv.victims import Head

HEADS = ["softmax", "sigmoid"]
heads = pytest.mark.parametrize("head", HEADS)
WEIGHTED = [SegPGDCrossEntropy(0.3), CosPGDCrossEntropy(), BalancedCrossEntropy(masked=False), Spherical(masked=False)]
ALL = [*WEIGHTED, MaskedCrossEntropy(), BalancedCrossEntropy(), Spherical(), JensenShannon(), Focal()]


def make_logits(head: str, dims: int = 3, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return scale * torch.randn(4, out_channels(head), *SHAPES[dims], generator=generator, dtype=torch.float64)


def entropies(logits, label, head: str) -> torch.Tensor:
    """Cross entropy per voxel by torch, (B, 1 or K, *spatial)."""
    if head == "softmax":
        return F.cross_entropy(logits, label[:, 0], reduction="none")[:, None]
    return F.binary_cross_entropy(torch.sigmoid(logits), label.double(), reduction="none")


def right(logits, label, head: str) -> torch.Tensor:
    return (logits.argmax(1, keepdim=True) == label) if head == "softmax" else ((logits > 0) == label)


def total(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).sum(1)


def assert_close(a, b, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


def one_voxel(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().view(1, -1, 1, 1)


# ------------------------------------------------------------------------------------------ SegPGD, CosPGD
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("share", [0.0, 0.45, 1.0])
@heads
def test_segpgd_weighs_right_and_fooled_voxels(head, share, dims):
    logits, label = make_logits(head, dims), make_label(head, 4, dims)
    values, correct = entropies(logits, label, head), right(logits, label, head)
    loss = SegPGDCrossEntropy(share)
    expected = total(torch.where(correct, (1 - share) * values, share * values))
    assert_close(loss(logits, label, Head(head)), expected)
    # targeted: what is not at the target yet weighs 1 - share
    expected = -total(torch.where(correct, share * values, (1 - share) * values))
    assert_close(loss.towards(logits, label, Head(head)), expected)


@pytest.mark.parametrize(
    ("probabilities", "true", "cosine"),
    [([0.5, 0.5], 0, math.sqrt(0.5)), ([0.6, 0.3, 0.1], 0, 0.6 / math.sqrt(0.46)), ([0.2, 0.8], 0, 0.2 / 0.68**0.5)],
)
def test_cospgd_golden_cosines(probabilities, true, cosine):
    logits, label = one_voxel(probabilities), torch.full((1, 1, 1, 1), true)
    entropy = -math.log(probabilities[true])
    assert_close(
        CosPGDCrossEntropy()(logits, label, Head("softmax", {})), torch.tensor([cosine * entropy], dtype=torch.float64)
    )
    towards = CosPGDCrossEntropy().towards(logits, label, Head("softmax", {}))
    assert_close(towards, torch.tensor([-(1 - cosine) * entropy], dtype=torch.float64))


def test_cospgd_of_a_bit_is_that_of_two_classes():
    head, z = Head("sigmoid", ["a"]), torch.linspace(-4, 4, 9, dtype=torch.float64).view(1, 1, 9)
    for bit in (False, True):
        label = torch.full((1, 1, 9), bit)
        two = torch.cat([torch.zeros_like(z), z], 1)
        for method in ("__call__", "towards"):
            binary = getattr(CosPGDCrossEntropy(), method)(z, label, head)
            softmax = getattr(CosPGDCrossEntropy(), method)(two, label.long(), Head("softmax", {}))
            assert_close(binary, softmax)


@heads
def test_the_weights_are_constants_for_the_gradient(head):
    """The gradient at a voxel is that of cross entropy times one positive number, the same for all its channels."""
    logits, label = make_logits(head).requires_grad_(True), make_label(head)
    (plain,) = torch.autograd.grad(CrossEntropy()(logits, label, Head(head)).sum(), logits)
    for loss in (CosPGDCrossEntropy(), SegPGDCrossEntropy(0.3), BalancedCrossEntropy(masked=False)):
        (found,) = torch.autograd.grad(loss(logits, label, Head(head)).sum(), logits)
        ratio = found / plain
        assert (ratio > 0).all()
        if head == "softmax":
            assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-7)
        if isinstance(loss, CosPGDCrossEntropy) and head == "softmax":
            p = logits.detach().softmax(1)
            assert_close(ratio[:, :1], p.gather(1, label) / p.square().sum(1, keepdim=True).sqrt(), rtol=1e-7)


def test_impossible_losses():
    with pytest.raises(ConfigError, match="share must be in"):
        SegPGDCrossEntropy(1.5)
    for gamma in (0.5, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="gamma of the focal loss"):
            Focal(gamma)


# ------------------------------------------------------------------------------------------- masked losses
MASKED = [MaskedCrossEntropy(), BalancedCrossEntropy(), Spherical()]


@pytest.mark.parametrize("loss", MASKED, ids=repr)
@heads
def test_only_voxels_that_are_not_fooled_count(head, loss):
    logits, label = make_logits(head).requires_grad_(True), make_label(head)
    correct = right(logits.detach(), label, head)
    assert 0.1 < correct.double().mean() < 0.9
    for value, kept in (
        (loss(logits, label, Head(head)), correct),
        (loss.towards(logits, label, Head(head)), ~correct),
    ):
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        moved = (gradient != 0).any(1, keepdim=True) if head == "softmax" else gradient != 0
        assert torch.equal(moved, kept)


@heads
def test_masked_cross_entropy(head):
    logits, label = make_logits(head), make_label(head)
    values, correct = entropies(logits, label, head), right(logits, label, head)
    assert_close(MaskedCrossEntropy()(logits, label, Head(head)), total(values * correct))
    assert_close(MaskedCrossEntropy().towards(logits, label, Head(head)), -total(values * ~correct))


@pytest.mark.parametrize("loss", MASKED, ids=repr)
@heads
def test_masked_losses_fall_where_the_attack_succeeds_and_their_progress_does_not(head, loss):
    """A voxel just right and just fooled: the masked loss loses it, the progress hardly notices; targeted likewise."""
    channels = out_channels(head)
    label = torch.ones(1, 1, 2, dtype=torch.long) if head == "softmax" else torch.ones(1, channels, 2) > 0
    logits = torch.zeros(1, channels, 2, dtype=torch.float64)
    logits[:, 1 if head == "softmax" else slice(None)] = 1.0
    fooled = logits.clone()
    fooled[:, 0, 0] = 1.001 if head == "softmax" else -0.001
    logits[:, 0, 0] = 0.999 if head == "softmax" else 0.001
    assert loss.progress(fooled, label, Head(head)) > loss.progress(logits, label, Head(head))
    assert loss.progress.towards(logits, label, Head(head)) > loss.progress.towards(fooled, label, Head(head))
    assert loss.progress.progress == loss.progress
    if not isinstance(loss, Spherical):  # its values are below 0: a voxel that is dropped is a gain
        assert loss(fooled, label, Head(head)) < loss(logits, label, Head(head))


@heads
def test_balanced_classes_by_counting(head):
    logits, label = make_logits(head), make_label(head)
    values = entropies(logits, label, head)
    weight = torch.rand(4, 1, *SHAPES[3], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight[:, :, 1] = 0
    expected = []
    for b in range(4):
        sample = 0.0
        for k in range(values.shape[1]):
            found = label[b, k].long()
            classes = [c for c in found.unique().tolist() if weight[b, 0][found == c].sum() > 0]
            for c in classes:
                of_class = weight[b, 0] * (found == c)
                sample += weight[b].sum() / (len(classes) * of_class.sum()) * (of_class * values[b, k]).sum()
        expected.append(sample)
    loss = BalancedCrossEntropy(masked=False)
    assert_close(loss(logits, label, Head(head), weight), torch.stack(expected))
    assert_close(loss.towards(logits, label, Head(head), weight), -torch.stack(expected))


def test_balanced_classes_golden():
    """Six background voxels and two of class 1, class 2 absent: weights 8/12 and 8/4."""
    logits, label = torch.zeros(1, 3, 8, dtype=torch.float64), torch.tensor([[[0, 0, 0, 1, 1, 0, 0, 0]]])
    logits.requires_grad_(True)
    loss = BalancedCrossEntropy(masked=False)(logits, label, Head("softmax", {}))
    assert_close(loss.detach(), torch.tensor([8 * math.log(3)], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert_close(gradient[0, 2], torch.tensor([2 / 3] * 3 + [2.0] * 2 + [2 / 3] * 3, dtype=torch.float64) / 3)


# --------------------------------------------------------------------------------------------- Jensen-Shannon
def by_definition(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(KL(p | m) + KL(q | m)) / 2 over the first axis."""
    m = (p + q) / 2
    return (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(0) / 2


@heads
def test_jensen_shannon_is_the_definition(head):
    logits, label = make_logits(head, scale=3.0), make_label(head)
    if head == "softmax":
        p, q = logits.softmax(1).movedim(1, 0), F.one_hot(label[:, 0], 4).movedim(-1, 0).double()
        each = by_definition(p, q)[:, None]
    else:
        p, q = torch.sigmoid(logits), label.double()
        each = by_definition(torch.stack([p, 1 - p]), torch.stack([q, 1 - q]))
    assert (each >= 0).all()
    assert (each <= math.log(2)).all()
    assert_close(JensenShannon()(logits, label, Head(head)), total(each), rtol=1e-9)
    assert_close(JensenShannon().towards(logits, label, Head(head)), -total(each), rtol=1e-9)


@pytest.mark.parametrize("true", [0.999, 0.7, 0.5, 0.03, 1e-9])
def test_jensen_shannon_golden_value_and_gradient(true):
    """JS = ln 2 + (p ln p - (1 + p) ln(1 + p)) / 2 and dJS/dz_k = ln(p / (1 + p)) p (delta_ky - p_k) / 2."""
    p = [true, (1 - true) * 0.75, (1 - true) * 0.25]
    logits, label = one_voxel(p).requires_grad_(True), torch.zeros(1, 1, 1, 1, dtype=torch.long)
    value = JensenShannon()(logits, label, Head("softmax", {}))
    expected = math.log(2) + (true * math.log(true) - (1 + true) * math.log(1 + true)) / 2
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    for k in range(3):
        slope = math.log(true / (1 + true)) * true * ((k == 0) - p[k]) / 2
        assert float(gradient[0, k]) == pytest.approx(slope, rel=1e-7, abs=1e-15)


@heads
def test_jensen_shannon_is_finite_at_logits_of_200(head):
    """And at every logit on the way, in single precision, with its gradient; the definition is not."""
    z = torch.tensor([-200.0, -110, -104, -88, -20, 0, 20, 88, 104, 110, 200])
    if head == "softmax":
        logits, kind = torch.stack([z, -z])[None], Head("softmax", {})
        label = torch.zeros(1, 1, 11, dtype=torch.long)
    else:
        logits, kind, label = z.view(1, 1, 11), Head("sigmoid", ["a"]), torch.ones(1, 1, 11)
    for i in range(11):
        one = logits[..., i : i + 1].clone().requires_grad_(True)
        value = JensenShannon()(one, label[..., :1], kind)
        (gradient,) = torch.autograd.grad(value.sum(), one)
        value = value.detach()
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        assert -1e-7 <= float(value) <= math.log(2) + 1e-6
        if z[i] <= -20:
            assert float(value) == pytest.approx(math.log(2), rel=1e-6)
        if z[i] >= 88:
            assert float(value) == pytest.approx(0, abs=1e-6)
    if head == "softmax":
        p, q = logits.softmax(1)[0], torch.tensor([1.0, 0]).view(2, 1).expand(2, 11)
        m = (p + q) / 2
        assert not (p * (p / m).log() + q * (q / m).log()).isfinite().all()


# -------------------------------------------------------------------------------------------------- spherical
@pytest.mark.parametrize("dims", [2, 3])
def test_spherical_loss_of_classes(dims):
    logits, label = make_logits("softmax", dims), make_label("softmax", 4, dims)
    unit = logits / logits.square().sum(1, keepdim=True).sqrt()
    truth = F.one_hot(label[:, 0], 4).movedim(-1, 1)
    each = (unit - truth).square().sum(1, keepdim=True) / 2 - 1  # half the squared distance, up to a constant
    correct = right(logits, label, "softmax")
    head = Head("softmax")
    assert_close(Spherical(masked=False)(logits, label, head), total(each))
    assert_close(Spherical()(logits, label, head), total(each * correct))
    assert_close(Spherical().towards(logits, label, head), -total(each * ~correct))
    assert_close(Spherical()(7 * logits, label, head), Spherical()(logits, label, head))


def test_spherical_loss_of_regions():
    logits, label = make_logits("sigmoid"), make_label("sigmoid")
    sign = 2 * label.double() - 1
    each = -sign * logits / (logits.square() + 1).sqrt()
    assert_close(Spherical()(logits, label, Head("sigmoid")), total(each * (logits * sign > 0)))


def test_logits_of_zero_have_no_direction():
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    value = Spherical()(logits, torch.zeros(1, 1, 3, dtype=torch.long), Head("softmax"))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.tolist() == [0]
    assert not gradient.any()


# ------------------------------------------------------------------------------------------------------ focal
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
@heads
def test_focal_is_monais(head, gamma):
    logits, label = make_logits(head).float(), make_label(head)
    reference = FocalLoss(gamma=gamma, to_onehot_y=head == "softmax", use_softmax=head == "softmax", reduction="none")
    expected = reference(logits, label.float()).flatten(1).sum(1)
    torch.testing.assert_close(Focal(gamma)(logits, label, Head(head)), expected, rtol=1e-5, atol=0)
    if gamma == 0:
        assert_close(Focal(0)(logits, label, Head(head)), CrossEntropy()(logits, label, Head(head)), rtol=1e-6)


# ------------------------------------------------------------------------------------------------ all of them
@pytest.mark.parametrize("loss", ALL, ids=repr)
@heads
def test_a_weight_is_a_crop(head, loss):
    logits, label = make_logits(head), make_label(head)
    weight = torch.zeros(4, 1, *SHAPES[3])
    weight[:, :, 1:3, :, 2:] = 1
    cut = (slice(None), slice(None), slice(1, 3), slice(None), slice(2, None))
    for method in ("__call__", "towards"):
        found = getattr(loss, method)(logits, label, Head(head), weight)
        assert_close(found, getattr(loss, method)(logits[cut], label[cut], Head(head)))
        assert_close(2 * found, getattr(loss, method)(logits, label, Head(head), 2 * weight))


@pytest.mark.parametrize("loss", ALL, ids=repr)
@heads
def test_towards_and_away_move_the_true_logit_opposite_ways(head, loss):
    """A targeted ascent raises the target's probability wherever it moves a voxel, an untargeted one lowers it."""
    logits, label = make_logits(head).requires_grad_(True), make_label(head)
    for method, sign in (("__call__", -1), ("towards", 1)):
        value = getattr(loss, method)(logits, label, Head(head))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        true = gradient.gather(1, label) if head == "softmax" else gradient * (2 * label - 1)
        assert (sign * true >= 0).all()
        assert (sign * true > 0).any()


@pytest.mark.parametrize("loss", ALL, ids=repr)
@heads
def test_large_logits_stay_finite(head, loss):
    for method in ("__call__", "towards"):
        logits = make_logits(head, scale=100.0).float().requires_grad_(True)
        value = getattr(loss, method)(logits, make_label(head), Head(head))
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def test_names():
    assert as_loss("focal") == Focal()
    assert as_loss("masked_ce") == MaskedCrossEntropy()
    assert as_loss("balanced_ce") == BalancedCrossEntropy(masked=True)
    assert as_loss("js") == JensenShannon()
    assert as_loss("spherical") == Spherical(masked=True)


# ---------------------------------------------------------------------------------------------------- tracked
@pytest.mark.parametrize("method", ["__call__", "towards"])
@heads
def test_tracked_has_the_value_of_one_and_the_gradient_of_the_other(head, method):
    logits, label = make_logits(head).requires_grad_(True), make_label(head)
    found = getattr(Tracked(JensenShannon(), by=CrossEntropy()), method)(logits, label, Head(head))
    assert torch.equal(found, getattr(CrossEntropy(), method)(logits, label, Head(head)))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    (expected,) = torch.autograd.grad(getattr(JensenShannon(), method)(logits, label, Head(head)).sum(), logits)
    assert torch.equal(gradient, expected)


def test_what_tracks_what():
    plain: list[AttackLoss] = [CrossEntropy(), JensenShannon(), Focal(), BalancedCrossEntropy(masked=False)]
    assert all(tracked(loss) is loss for loss in plain)
    masked = tracked(Spherical())
    assert isinstance(masked, Tracked)
    assert (masked.loss, masked.by) == (Spherical(), Spherical(masked=False))
    assert tracked(MaskedCrossEntropy()).by == CrossEntropy()
    assert repr(masked) == "Tracked(Spherical(masked=True), by=Spherical(masked=False))"
