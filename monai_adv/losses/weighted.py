"""Cross entropy weighted voxel by voxel (SegPGD, CosPGD, masked, balanced, focal) and the other losses of SEA.

All are sums over voxels; for a sigmoid head each bit is a two-class problem of its own, p the probability of the true
bit. *Fooled* is a voxel (bit) whose prediction is not the label; masks and weights are constants for the gradient.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_adv.errors import ConfigError
from monai_adv.losses.losses import LOSSES, AttackLoss, CrossEntropy, _sum
from monai_adv.victims import Head

_NO_DIRECTION = 1e-6  # logits shorter than this have no direction on the sphere


def _true_log_probability(logits: Tensor, label: Tensor, head: Head) -> Tensor:
    """ln p of the true class ``(B, 1, *spatial)``, or of the true bit ``(B, K, *spatial)``."""
    if head.exclusive:
        return torch.log_softmax(logits, dim=1).gather(1, head.check_label(label, logits))
    return F.logsigmoid(logits * (2 * head.encode(label, logits) - 1))


def _correct(logits: Tensor, label: Tensor, head: Head) -> Tensor:
    """1 where the prediction is the label, else 0: ``(B, 1 or K, *spatial)``, without a gradient."""
    return (head.predict(logits.detach()) == head.check_label(label, logits)).to(logits.dtype)


def _balance(logits: Tensor, label: Tensor, head: Head, weight: Tensor | None) -> Tensor:
    """n / (classes present * voxels of the voxel's class) per sample, so that the weights of a sample sum to n."""
    label = head.check_label(label, logits)
    counted = None if weight is None else weight.double().expand(len(label), *weight.shape[1:])
    if head.exclusive:
        voxels = torch.stack(
            [
                torch.bincount(y.flatten(), None if counted is None else counted[b].flatten(), logits.shape[1]).double()
                for b, y in enumerate(label)
            ]
        )
        return torch.stack([share[y] for share, y in zip(_shares(voxels).to(logits.dtype), label)])
    # two classes per channel: bits of 0 and of 1
    counted = torch.ones_like(label[:, :1], dtype=torch.float64) if counted is None else counted
    voxels = torch.stack([(bits * counted).flatten(2).sum(2) for bits in (~label, label)], dim=2)
    shares = _shares(voxels).to(logits.dtype)
    shares = shares.view(*shares.shape, *[1] * (label.dim() - 2))
    return torch.where(label, shares[:, :, 1], shares[:, :, 0])


def _shares(voxels: Tensor) -> Tensor:
    """Weight of a voxel of each class from the voxels per class ``(..., classes)``; 0 for an absent class."""
    present = (voxels > 0).sum(-1, keepdim=True).clamp_min(1)
    share = voxels.sum(-1, keepdim=True) / (present * voxels)
    return torch.where(voxels > 0, share, torch.zeros_like(share))


class Tracked(AttackLoss):
    """The gradient of one loss and the value of another, for searches that weight voxels but must see progress.

    A loss over the voxels that are not fooled yet falls whenever one more is fooled; a search that judges its steps
    by it would turn back from success.

    Args:
        loss: gives the gradient.
        by: gives the value, e.g. the same loss over all voxels.
    """

    def __init__(self, loss: AttackLoss, by: AttackLoss) -> None:
        self.loss = loss
        self.by = by

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        value = self.by(logits.detach(), label, head, weight)
        return _value_of(value, self.loss(logits, label, head, weight))

    def towards(self, logits: Tensor, target: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        value = self.by.towards(logits.detach(), target, head, weight)
        return _value_of(value, self.loss.towards(logits, target, head, weight))

    def __repr__(self) -> str:
        return f"Tracked({self.loss!r}, by={self.by!r})"


def _value_of(value: Tensor, gradient: Tensor) -> Tensor:
    return value + (gradient - gradient.detach())


def tracked(loss: AttackLoss) -> AttackLoss:
    """The loss, with the value by which a search sees its progress (see :attr:`AttackLoss.progress`)."""
    return loss if loss.progress is loss else Tracked(loss, loss.progress)


@dataclass(frozen=True)
class Focal(AttackLoss):
    """Focal loss, ``-(1 - p)^gamma ln p``: cross entropy that leaves voxels alone as long as they are surely right.

    Reference:
        Lin et al., Focal loss for dense object detection, ICCV 2017. The values are those of MONAI's ``FocalLoss``
        (which computes in float32 whatever it is given).

    Args:
        gamma: 0 (cross entropy) or >= 1; in between the gradient is infinite at p = 1.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        if not (self.gamma == 0 or 1 <= self.gamma < math.inf):
            raise ConfigError(f"gamma of the focal loss must be 0 or >= 1, got {self.gamma!r}")

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        log_p = _true_log_probability(logits, label, head)
        return _sum(-((-torch.expm1(log_p)) ** self.gamma) * log_p, weight)


@dataclass(frozen=True)
class MaskedCrossEntropy(AttackLoss):
    """Cross entropy of the voxels that are not fooled yet; targeted: of those that are not at the target yet.

    Reference:
        Croce et al., Towards reliable evaluation and fast training of robust semantic segmentation models, 2023.
    """

    @property
    def progress(self) -> AttackLoss:
        return CrossEntropy()

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        return _sum(-_true_log_probability(logits, label, head) * _correct(logits, label, head), weight)

    def towards(self, logits: Tensor, target: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        return _sum(_true_log_probability(logits, target, head) * (1 - _correct(logits, target, head)), weight)


@dataclass(frozen=True)
class _Masked(AttackLoss):
    """A loss over the voxels that are not fooled (targeted: not at the target) yet, or over all."""

    masked: bool = True

    @abstractmethod
    def _values(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None) -> Tensor:
        """What every voxel contributes, ``(B, 1 or K, *spatial)``, before weight and mask."""

    @property
    def progress(self) -> AttackLoss:
        return replace(self, masked=False) if self.masked else self

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        values = self._values(logits, label, head, weight)
        return _sum(values * _correct(logits, label, head) if self.masked else values, weight)

    def towards(self, logits: Tensor, target: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        values = -self._values(logits, target, head, weight)
        return _sum(values * (1 - _correct(logits, target, head)) if self.masked else values, weight)


@dataclass(frozen=True)
class BalancedCrossEntropy(_Masked):
    """Masked cross entropy in which each class of the label weighs the same: for means over classes, as IoU and Dice.

    A voxel of class c weighs ``n / (C n_c)``, with n voxels counted, n_c of them of class c, and C classes present;
    for a sigmoid head the two classes of a channel are its bits. Croce et al. 2023 take the frequencies of the
    training set; those of the sample's own label (or target) need no data set and are ours.

    Reference:
        Croce et al., Towards reliable evaluation and fast training of robust semantic segmentation models, 2023.

    Args:
        masked: only voxels that are not fooled (targeted: not at the target) yet.
    """

    def _values(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None) -> Tensor:
        return -_true_log_probability(logits, label, head) * _balance(logits, label, head, weight)


@dataclass(frozen=True)
class JensenShannon(AttackLoss):
    """Jensen-Shannon divergence of the softmax and the one-hot label, in [0, ln 2] per voxel.

    It depends on p, the probability of the true class, only: ``ln 2 + (p ln p - (1 + p) ln(1 + p)) / 2``; computed
    from log-softmax it is finite, with its gradient ``ln(p / (1 + p)) p (delta_ky - p_k) / 2``, at any logits. A
    voxel that is surely fooled has no gradient any more, so no mask is needed.

    Reference:
        Croce et al., Towards reliable evaluation and fast training of robust semantic segmentation models, 2023.
    """

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        log_p = _true_log_probability(logits, label, head)
        p, one_minus_p = log_p.exp(), -torch.expm1(log_p)
        log_mean = torch.log1p(-one_minus_p / 2)  # ln((1 + p) / 2); this form keeps its digits where p is close to 1
        return _sum((one_minus_p * math.log(2) - log_mean + p * (log_p - log_mean)) / 2, weight)


@dataclass(frozen=True)
class Spherical(_Masked):
    """Masked spherical loss: minus the true logit of logits that are normalised to length 1, ``-z_y / ||z||_2``.

    Up to a constant that is half the squared distance from the one-hot label to the logits on the unit sphere; it is
    bounded, and scaling the logits does not hide from it. Taken over the voxels that are not fooled yet (targeted:
    not at the target yet). Logits shorter than 1e-6 have no direction and no gradient.

    The logit of a single region has no direction: for a sigmoid head (ours) it is normalised together with a constant
    1, ``-s z / sqrt(z^2 + 1)`` with s = +1 / -1 the true bit's sign.

    Reference:
        Croce et al., Towards reliable evaluation and fast training of robust semantic segmentation models, 2023.

    Args:
        masked: only voxels that are not fooled (targeted: not at the target) yet.
    """

    def _values(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None) -> Tensor:
        return -_on_sphere(logits, label, head)


def _on_sphere(logits: Tensor, label: Tensor, head: Head) -> Tensor:
    """The true coordinate of the logits on the unit sphere, in [-1, 1]."""
    if not head.exclusive:
        true = logits * (2 * head.encode(label, logits) - 1)
        return true / torch.hypot(true, torch.ones_like(true))
    # 30 times faster than a norm over the channels; clamped, so that its root has a gradient
    squares = logits.square().sum(1, keepdim=True).clamp_min(_NO_DIRECTION**2)
    true = logits.gather(1, head.check_label(label, logits)) / squares.sqrt()
    return torch.where(squares > _NO_DIRECTION**2, true, torch.zeros_like(true))


@dataclass(frozen=True)
class SegPGDCrossEntropy(AttackLoss):
    """Cross entropy that weighs voxels not fooled yet by ``1 - share`` and fooled ones by ``share``.

    Targeted, a voxel that is at the target is the fooled one: the weights swap.

    Reference:
        Gu et al., SegPGD: an effective and efficient adversarial attack for evaluating and boosting segmentation
        robustness, ECCV 2022.

    Args:
        share: lambda, in [0, 1]; :class:`monai_adv.attacks.SegPGD` raises it from 0 towards 1/2.
    """

    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share must be in [0, 1], got {self.share!r}")

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        right = _correct(logits, label, head)
        weights = right * (1 - self.share) + (1 - right) * self.share
        return _sum(-_true_log_probability(logits, label, head) * weights, weight)

    def towards(self, logits: Tensor, target: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        return -replace(self, share=1 - self.share)(logits, target, head, weight)


@dataclass(frozen=True)
class CosPGDCrossEntropy(AttackLoss):
    """Cross entropy weighted by the cosine of prediction and label: a voxel that is well fooled has done its part.

    The cosine of the softmax with the one-hot label is ``p_y / ||p||_2`` and is a constant for the gradient. Targeted
    the weight is one minus the cosine with the target. For a sigmoid head p is ``(p, 1 - p)`` of each bit.

    Reference:
        Agnihotri et al., CosPGD: an efficient white-box adversarial attack for pixel-wise prediction tasks, ICML 2024.
    """

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        return _sum(-_true_log_probability(logits, label, head) * _cosine(logits.detach(), label, head), weight)

    def towards(self, logits: Tensor, target: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        return _sum(_true_log_probability(logits, target, head) * (1 - _cosine(logits.detach(), target, head)), weight)


def _cosine(logits: Tensor, label: Tensor, head: Head) -> Tensor:
    if not head.exclusive:
        sign = 2 * head.encode(label, logits) - 1
        true, false = torch.sigmoid(logits * sign), torch.sigmoid(-logits * sign)
        return true / torch.hypot(true, false)
    p = torch.softmax(logits, dim=1)
    return p.gather(1, head.check_label(label, logits)) / p.square().sum(1, keepdim=True).sqrt()


LOSSES.update(
    focal=Focal, masked_ce=MaskedCrossEntropy, balanced_ce=BalancedCrossEntropy, js=JensenShannon, spherical=Spherical
)
