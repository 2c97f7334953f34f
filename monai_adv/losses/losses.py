"""What an attack maximises: per-sample losses of logits, summed over voxels, for softmax and sigmoid heads.

Sums rather than means: sign and normalised steps do not care, and a mean over a BraTS volume makes nearly every
float16 gradient exactly zero. Losses that are ratios (Dice) are multiplied by the number of voxels, so that
``dice_ce`` weighs its parts as MONAI's ``DiceCELoss`` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_adv.errors import ConfigError
from monai_adv.victims import Head


class AttackLoss(ABC):
    """A loss of logits against a label, one number per sample; an untargeted attack ascends it."""

    @abstractmethod
    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            logits: ``(B, K, *spatial)``.
            label: ``(B, 1, *spatial)`` class indices (softmax) or ``(B, K, *spatial)`` bits (sigmoid).
            head: the head of the logits.
            weight: voxels that count, ``(B, 1, *spatial)``, bool or float >= 0; ignored voxels neither count nor
                divide. All if None.

        Returns:
            ``(B,)``, a sum over voxels.
        """

    def towards(self, logits: Tensor, target: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        """What a targeted attack ascends, ``(B,)``: the loss against the target, negated."""
        return -self(logits, target, head, weight)

    @property
    def progress(self) -> AttackLoss:
        """The loss whose value says how far a search has come: itself, unless it counts fewer voxels on the way."""
        return self


def _sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """Sum ``(B, K, *spatial)`` over everything but the batch, with voxel weights ``(B, 1, *spatial)``."""
    if weight is not None:
        values = values * weight.to(values.dtype)
    return values.flatten(1).sum(1)


@dataclass(frozen=True)
class CrossEntropy(AttackLoss):
    """Cross entropy per voxel; binary cross entropy per region for a sigmoid head."""

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        if head.exclusive:
            return _sum(
                F.cross_entropy(logits, head.check_label(label, logits)[:, 0], reduction="none")[:, None], weight
            )
        return _sum(F.binary_cross_entropy_with_logits(logits, head.encode(label, logits), reduction="none"), weight)


@dataclass(frozen=True)
class Dice(AttackLoss):
    """Soft Dice loss, ``1 - 2 sum(p y) / (sum p + sum y)``, averaged over foreground channels.

    A region that is absent from the label has Dice 0 whatever is predicted, and no gradient, as long as ``smooth``
    is 0; the default gives it the gradient that grows a false positive.

    Args:
        smooth: added to numerator and denominator, in voxels.
    """

    smooth: float = 1.0

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        probability, truth = head.probabilities(logits), head.encode(label, logits)
        if head.exclusive and logits.shape[1] > 1:  # the background is not a region
            probability, truth = probability[:, 1:], truth[:, 1:]
        voxels = torch.full((len(logits),), float(logits[0, 0].numel()), dtype=logits.dtype, device=logits.device)
        if weight is not None:
            weight = weight.to(logits.dtype)
            probability, truth = probability * weight, truth * weight
            voxels = weight.expand(len(logits), *weight.shape[1:]).flatten(1).sum(1)
        probability, truth = probability.flatten(2), truth.flatten(2)
        overlap = (probability * truth).sum(-1)
        dice = (2 * overlap + self.smooth) / (probability.sum(-1) + truth.sum(-1) + self.smooth)
        return voxels * (1 - dice).mean(1)


@dataclass(frozen=True)
class DiceCrossEntropy(AttackLoss):
    """Sum of :class:`CrossEntropy` and :class:`Dice`, weighted as MONAI's ``DiceCELoss``.

    For several regions that is the mean binary cross entropy (``BCEWithLogitsLoss``) plus ``DiceLoss``: MONAI's own
    ``DiceCELoss`` would put a softmax over them.

    Args:
        smooth: see :class:`Dice`.
        lambda_dice: weight of Dice.
        lambda_ce: weight of cross entropy.
    """

    smooth: float = 1.0
    lambda_dice: float = 1.0
    lambda_ce: float = 1.0

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        dice = Dice(self.smooth)(logits, label, head, weight)
        entropy = CrossEntropy()(logits, label, head, weight)
        if not head.exclusive:  # a mean over the regions, as Dice is
            entropy = entropy / logits.shape[1]
        return self.lambda_dice * dice + self.lambda_ce * entropy


@dataclass(frozen=True)
class Margin(AttackLoss):
    """Logit margin: best wrong logit minus true logit; for a sigmoid head ``-s z`` with the target bit's sign ``s``.

    It does not saturate where a softmax does, so it sees through gradient masking. A voxel that is wrong by more
    than ``kappa`` (a targeted attack: at the target by more than ``kappa``) has done its part and gets no gradient.

    Reference:
        Carlini and Wagner, Towards evaluating the robustness of neural networks, S&P 2017.

    Args:
        kappa: margin after which a voxel no longer counts, in logits.
    """

    kappa: float = 1.0

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        return _sum(logit_margin(logits, label, head).clamp_max(self.kappa), weight)

    def towards(self, logits: Tensor, target: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        return -_sum(logit_margin(logits, target, head).clamp_min(-self.kappa), weight)


def logit_margin(logits: Tensor, label: Tensor, head: Head) -> Tensor:
    """How wrong every voxel is, in logits: ``(B, 1, *spatial)`` or, sigmoid, ``(B, K, *spatial)``; > 0 is wrong."""
    if not head.exclusive:
        return logits * (1 - 2 * head.encode(label, logits))
    index = head.check_label(label, logits)
    true = logits.gather(1, index)
    others = logits.scatter(1, index, float("-inf"))
    return others.amax(1, keepdim=True) - true


LOSSES: dict[str, Callable[..., AttackLoss]] = {
    "ce": CrossEntropy,
    "dice": Dice,
    "dice_ce": DiceCrossEntropy,
    "margin": Margin,
}  # weighted.py adds its own
"""Losses by name, with what makes them."""


def as_loss(loss: str | AttackLoss) -> AttackLoss:
    """A loss from its name (a key of :data:`LOSSES`, e.g. "ce", "dice_ce", "margin", "js") or from itself.

    Raises:
        ConfigError: for an unknown name.
    """
    if isinstance(loss, AttackLoss):
        return loss
    if loss not in LOSSES:
        raise ConfigError(f"loss {loss!r} is unknown: use one of {', '.join(LOSSES)}")
    return LOSSES[loss]()
