"""Dice of the regions that the truth has: hard and soft, for both heads."""

from __future__ import annotations

import pytest
import torch
from oracles import make_image, make_label, make_victim

from monai_adv.errors import ConfigError
from monai_adv.losses import counted_regions, region_bits, region_dice, region_probabilities
from monai_adv.victims import Head, mean_dice

F64 = torch.float64


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_of_a_truth_with_every_region_it_is_the_score_of_the_tables(kind, dims):
    victim, image, label = make_victim("smooth", kind, dims), make_image(4, dims), make_label(kind, 4, dims)
    prediction, head = victim.predict(image), victim.head
    truth, found = region_bits(head, label), region_bits(head, prediction)
    assert truth.shape == (4, 3, *image.shape[2:])
    torch.testing.assert_close(region_dice(found, truth), mean_dice(prediction, label, head))
    weight = (torch.rand(4, 1, *image.shape[2:], generator=torch.Generator().manual_seed(0)) < 0.7).float()
    expected = mean_dice(prediction, label, head, weight)
    torch.testing.assert_close(region_dice(found, truth, weight=weight), expected)
    for b in range(4):  # B = 4, and nothing of a neighbour
        alone = region_dice(found[b : b + 1], truth[b : b + 1])
        assert torch.equal(alone[0], region_dice(found, truth)[b])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_certain_logits_make_the_soft_dice_the_hard_one(kind):
    victim, image, label = make_victim("smooth", kind), make_image(2), make_label(kind, 2)
    logits, head = victim(image).detach(), victim.head
    truth = region_bits(head, label)
    assert region_probabilities(head, logits).shape == truth.shape
    if kind == "softmax":  # TC is the sum of its classes
        expected = head.probabilities(logits)[:, [1, 3]].sum(1)
        assert torch.equal(region_probabilities(head, logits)[:, list(head.regions).index("TC")], expected)
    hard = region_dice(region_bits(head, head.predict(logits)), truth)
    torch.testing.assert_close(region_dice(region_probabilities(head, 1e6 * logits), truth), hard, rtol=0, atol=1e-9)
    assert not torch.allclose(region_dice(region_probabilities(head, logits), truth), hard, atol=1e-3)


def test_absent_regions_do_not_count():
    head = Head("softmax")  # WT, TC, ET
    label = torch.tensor([[2, 2, 0, 0], [3, 3, 1, 0], [0, 0, 0, 0]]).view(3, 1, 1, 4)  # no TC and ET; all; nothing
    prediction = torch.tensor([[2, 0, 0, 3], [3, 0, 1, 0], [3, 0, 0, 0]]).view(3, 1, 1, 4)
    truth, found = region_bits(head, label), region_bits(head, prediction)
    names = list(head.region_names)
    present = counted_regions(head, truth)
    assert present[:, names.index("ET")].tolist() == [False, True, False]
    assert present[:, names.index("WT")].tolist() == [True, True, False]
    whole, core, enhancing = 2 * 2 / 5, 2 * 2 / 5, 2 * 1 / 3
    expected = [2 * 1 / 4, (whole + core + enhancing) / 3, 1.0]
    assert region_dice(found, truth).tolist() == pytest.approx(expected)
    assert region_dice(found, truth, present).tolist() == pytest.approx(expected)
    one = counted_regions(head, truth, "ET")
    assert one.sum(1).tolist() == [0, 1, 0]
    assert region_dice(found, truth, one).tolist() == pytest.approx([1.0, enhancing, 1.0])
    with pytest.raises(ConfigError, match="region 'XT' is unknown: use 'present' or one of"):
        counted_regions(head, truth, "XT")


def test_it_is_differentiable_in_both_and_zero_where_nothing_counts():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 2, 4, 3, generator=generator, dtype=F64)
    truth[0, 1] = 0
    truth[2] = 0
    probability = torch.rand(3, 2, 4, 3, generator=generator, dtype=F64)
    probability[2, 0] = 0  # nothing there and nothing found: 0 / 0
    probability.requires_grad_(True)
    present = truth.flatten(2).any(2)
    leaf = truth.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda p, t: region_dice(p, t, present), [probability, leaf])
    value = region_dice(probability, leaf, present)
    slopes = torch.autograd.grad(value.sum(), [probability, leaf])
    assert all(slope.isfinite().all() for slope in slopes)
    assert not slopes[0][0, 1].any()
    assert not slopes[0][2].any()
    assert slopes[0][1].any()
    assert value[2].item() == 1


def test_half_precision_sums_do_not_overflow():
    """A volume has more voxels than float16 has numbers."""
    n = 2**17
    truth = torch.ones(1, 1, n, dtype=torch.float16)
    found = truth.clone()
    found[..., :1001] = 0
    dice = region_dice(found, truth)
    assert dice.dtype == F64
    assert dice.item() == pytest.approx(2 * (n - 1001) / (2 * n - 1001), rel=1e-14)
