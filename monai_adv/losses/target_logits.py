"""The logits of the target at the voxels that are not there yet: what segmentation-mask attacks ascend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_adv.losses.losses import AttackLoss, logit_margin
from monai_adv.victims import Head


@dataclass(frozen=True)
class TargetLogits(AttackLoss):
    """Raw logit of a voxel's target class, summed over the voxels that are not at their target (Ozbulak et al. 2019).

    For a sigmoid head the logit of a region counts with the sign of the target's bit, and every bit for itself.
    Which voxels count is a constant for the gradient.

    Reference:
        Ozbulak et al., Impact of adversarial examples on deep learning models for biomedical image segmentation,
        MICCAI 2019, Equation 2 without its L2 term.

    Args:
        adaptive: leave voxels out once they are at their target; False keeps every voxel (the static mask).
        kappa: a voxel counts until it is at its target by more than this margin, in logits (ours; 0 is the paper).
    """

    adaptive: bool = True
    kappa: float = 0.0

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        """Against a label: its logits, negated, where it is still predicted."""
        signed = -_logit_of(logits, label, head)
        if self.adaptive:
            right = head.predict(logits) == label
            signed = signed * (right if self.kappa == 0 else right | (logit_margin(logits, label, head) < self.kappa))
        return _sum(signed, weight)

    def towards(self, logits: Tensor, target: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        return _sum(_logit_of(logits, target, head) * self.active(logits.detach(), target, head), weight)

    def active(self, logits: Tensor, target: Tensor, head: Head) -> Tensor:
        """The voxels (bits) that count towards a target: ``(B, 1 or K, *spatial)`` bool."""
        if not self.adaptive:
            return torch.ones_like(target, dtype=torch.bool)
        wrong = head.predict(logits) != target
        return wrong if self.kappa == 0 else wrong | (logit_margin(logits, target, head) >= -self.kappa)


def _logit_of(logits: Tensor, label: Tensor, head: Head) -> Tensor:
    """Logit of the label's class, or of every bit with the sign of the label's."""
    if head.exclusive:
        return logits.gather(1, label)
    return logits * (2 * head.encode(label, logits) - 1)


def _sum(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        values = values * weight.to(values.dtype)
    return values.flatten(1).sum(1)
