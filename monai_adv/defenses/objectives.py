"""What robust training minimises beside a segmentation loss: divergences of logits, soft labels, frequencies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_adv.attacks.frequency import BlockDCT
from monai_adv.errors import ConfigError
from monai_adv.losses import AttackLoss
from monai_adv.victims import Head


def kl_divergence(logits: Tensor, other: Tensor, head: Head) -> Tensor:
    """KL(p || q) of two predictions, the mean over voxels of each sample.

    Args:
        logits: of p, ``(B, K, *spatial)``.
        other: logits of q, same shape.
        head: "softmax": of the class distribution; "sigmoid": of each bit, the mean over the channels.

    Returns:
        ``(B,)``, >= 0.

    Example:
        >>> p, q = torch.tensor([[[2.0]], [[0.0]]])[None], torch.zeros(1, 2, 1, 1)
        >>> round(float(kl_divergence(p, q, Head("softmax", {"WT": (1,)}))), 4)
        0.3278
    """
    return _divergence(logits, other, head).flatten(1).mean(1)


def _divergence(logits: Tensor, other: Tensor, head: Head) -> Tensor:
    """The divergence of every voxel, ``(B, 1 or K, *spatial)``."""
    if head.exclusive:
        log_p, log_q = torch.log_softmax(logits, 1), torch.log_softmax(other, 1)
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1, keepdim=True)
    ones, zeros = F.logsigmoid(logits), F.logsigmoid(-logits)
    return F.kl_div(F.logsigmoid(other), ones, reduction="none", log_target=True) + F.kl_div(
        F.logsigmoid(-other), zeros, reduction="none", log_target=True
    )


@dataclass(frozen=True, eq=False)
class Divergence(AttackLoss):
    """KL(reference || prediction), summed over voxels: what TRADES ascends; the label plays no part.

    Reference:
        Zhang et al., Theoretically principled trade-off between robustness and accuracy, ICML 2019.

    Args:
        reference: logits of the clean images, ``(B, K, *spatial)``, without a graph.
    """

    reference: Tensor

    def __call__(self, logits: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
        values = _divergence(self.reference, logits, head)
        return (values if weight is None else values * weight.to(values.dtype)).flatten(1).sum(1)


def soft_cross_entropy(logits: Tensor, target: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """Cross entropy of ``logits / temperature`` against probabilities, the mean over batch and voxels.

    For a sigmoid head the binary cross entropy of each bit, the mean over the channels too.

    Args:
        logits: ``(B, K, *spatial)``.
        target: probabilities, same shape.
        head: the head of both.
        temperature: T > 0.

    Example:
        >>> z = torch.tensor([[[4.0]], [[0.0]]])[None]
        >>> round(float(soft_cross_entropy(z, torch.softmax(z / 2, 1), Head("softmax", {"WT": (1,)}), 2)), 4)
        0.3653
    """
    if head.exclusive:
        return F.cross_entropy(logits / temperature, target)
    return F.binary_cross_entropy_with_logits(logits / temperature, target)


def hard_cross_entropy(logits: Tensor, label: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """:func:`soft_cross_entropy` against a label: class indices ``(B, 1, *spatial)`` or bits ``(B, K, *spatial)``.

    With T = 1 that is ``torch.nn.CrossEntropyLoss`` or ``BCEWithLogitsLoss``, bit for bit.
    """
    if head.exclusive:
        return F.cross_entropy(logits / temperature, head.check_label(label, logits)[:, 0])
    return F.binary_cross_entropy_with_logits(logits / temperature, head.encode(label, logits))


def frequency_distance(logits: Tensor, other: Tensor, block: int | None = None) -> Tensor:
    """How far the cosine transforms of two predictions are apart: ``|DCT a - DCT b|_1 / |DCT a|_1``.

    Reference:
        Hanif et al., Frequency domain adversarial training for robust volumetric medical segmentation, MICCAI 2023;
        their released code divides by the norm of the clean logits' transform, of the whole patch.

    Args:
        logits: of the clean images, ``(B, K, *spatial)``.
        other: of the adversarial ones, same shape.
        block: side in voxels of the blocks that are transformed; the whole image if None.

    Returns:
        One number for the batch, >= 0.
    """
    if block is not None and (isinstance(block, bool) or block != int(block) or block < 1):
        raise ConfigError(f"block must be a number of voxels >= 1, or None for the whole image, got {block!r}")
    transform = BlockDCT(logits.shape, int(block or max(logits.shape[2:])), logits)
    clean = transform.forward(logits)
    length = clean.abs().sum()
    distance = (clean - transform.forward(other)).abs().sum()
    return distance / torch.where(length > 0, length, torch.ones_like(length))
