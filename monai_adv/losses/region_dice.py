"""Dice of the scored regions, hard or soft: the quantity whose drop an attack can be asked for.

Regions that the truth lacks do not count: their Dice jumps between 0 and 1 with a single voxel, so that no drop of it
can be chosen. That is the difference from :func:`monai_adv.victims.mean_dice`, the score of the tables; the Dice loss
averages over output channels, which of a softmax head are classes and no regions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from monai_adv.errors import ConfigError
from monai_adv.victims import Head

PRESENT = "present"


def region_bits(head: Head, label: Tensor) -> Tensor:
    """The regions of a label or prediction as 0 and 1, ``(B, R, *spatial)`` float32, in the head's order.

    Args:
        head: whose regions.
        label: ``(B, 1, *spatial)`` class indices (softmax) or ``(B, K, *spatial)`` bits (sigmoid).

    Example:
        >>> region_bits(Head("softmax"), torch.tensor([[[[0, 1, 2, 3]]]]))[0, :, 0].tolist()  # WT, TC, ET
        [[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    """
    return torch.stack(list(head.regions_of(label).values()), dim=1).float()


def region_probabilities(head: Head, logits: Tensor) -> Tensor:
    """Probability of every region ``(B, R, *spatial)``: the sum over its classes (softmax) or its channel (sigmoid).

    Args:
        head: whose regions.
        logits: ``(B, K, *spatial)``.
    """
    probability = head.probabilities(logits)
    if not isinstance(head.regions, Mapping):
        return probability
    classes = logits.shape[1]  # regions may name classes that a network does not have
    return torch.stack([probability[:, [i for i in c if i < classes]].sum(1) for c in head.regions.values()], dim=1)


def counted_regions(head: Head, truth: Tensor, region: str = PRESENT) -> Tensor:
    """Which regions a Dice is the mean of, ``(B, R)`` bool: those the truth has, or the one named if the truth has it.

    Args:
        head: whose regions.
        truth: ``(B, R, *spatial)`` bits, see :func:`region_bits`.
        region: "present" or a region's name.

    Raises:
        ConfigError: for a region that the head does not have.
    """
    check_region(head, region)
    present = (truth > 0).flatten(2).any(2)
    if region == PRESENT:
        return present
    chosen = torch.zeros_like(present)
    index = head.region_names.index(region)
    chosen[:, index] = present[:, index]
    return chosen


def check_region(head: Head, region: str) -> None:
    """Raise a :class:`ConfigError` if ``region`` is neither "present" nor one of the head's."""
    if region != PRESENT and region not in head.region_names:
        raise ConfigError(f"region {region!r} is unknown: use {PRESENT!r} or one of {', '.join(head.region_names)}")


def region_dice(
    prediction: Tensor, truth: Tensor, present: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Mean Dice of the counted regions, ``2 sum(p y) / (sum p + sum y)`` each; differentiable in both arguments.

    Args:
        prediction: ``(B, R, *spatial)``: bits give the hard Dice, probabilities the soft one.
        truth: ``(B, R, *spatial)`` bits (or shares, of an interpolated truth).
        present: ``(B, R)`` bool, the regions that count, see :func:`counted_regions`; those the truth has if None.
        weight: voxels that count, ``(B, 1, *spatial)``; all if None.

    Returns:
        ``(B,)`` float64. 1, without a gradient, for a sample none of whose regions counts: nothing can be missed.

    Example:
        >>> truth = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])  # the second region is empty
        >>> region_dice(torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]]), truth).tolist()
        [0.6666666666666666]
    """
    prediction, truth = prediction.flatten(2), truth.flatten(2).to(prediction)
    if weight is not None:
        counted = weight.flatten(2).to(prediction)
        prediction, truth = prediction * counted, truth * counted
    mass = truth.sum(2, dtype=torch.float64)
    present = mass > 0 if present is None else present & (mass > 0)
    total = prediction.sum(2, dtype=torch.float64) + mass
    overlap = (prediction * truth).sum(2, dtype=torch.float64)
    # where a region is absent neither its value nor its gradient may be 0 / 0
    dice = torch.where(present, 2 * overlap / torch.where(present, total, 1.0), 0.0)
    count = present.sum(1)
    return torch.where(count > 0, dice.sum(1) / count.clamp_min(1), 1.0)
