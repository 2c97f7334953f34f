"""MI-FGSM: iterative FGSM whose steps follow a running sum of normalised gradients."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from monai_adv.attacks.run import Run
from monai_adv.attacks.sign import IFGSM
from monai_adv.errors import ConfigError
from monai_adv.losses import AttackLoss
from monai_adv.threats import Threat


class MIFGSM(IFGSM):
    """Momentum iterative FGSM: the steps follow a decaying sum of gradients, each of L1 norm 1.

    Reference:
        Dong et al., Boosting adversarial attacks with momentum, CVPR 2018. Theirs: ``m <- decay m + g / ||g||_1`` from
        the clean image, decay 1, L-inf and L2, targeted and not, and steps of ``eps / steps``. Ours: a default step of
        ``2.5 eps / steps``, with which the border of the ball is reached before the last step, the norm of the
        gradient over the support and in the threat's units, and the best iterate instead of the last.

    Args:
        threat: what may change; L-inf steps follow the sign of the momentum, L2 steps its direction.
        loss: what is ascended.
        steps: gradient steps.
        step_size: step in the threat's units; None is ``2.5 eps / steps``.
        decay: what is left of the momentum after a step, >= 0; 0 is :class:`IFGSM`.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "mifgsm"
    reference: ClassVar[str] = "Dong et al. 2018"

    def __init__(
        self,
        threat: Threat,
        loss: str | AttackLoss = "dice_ce",
        steps: int = 10,
        step_size: float | None = None,
        decay: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, steps, step_size, **options)
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < math.inf:
            raise ConfigError(f"decay must be a finite number >= 0, got {decay!r}")
        self.decay = decay

    def _direction(self, run: Run, gradient: Tensor, before: Tensor | None) -> Tensor:
        gradient = gradient * run.ball.mask  # finite, as the run has made sure
        per_channel = torch.linalg.vector_norm(gradient.flatten(2), 1, dim=2, dtype=torch.float64)
        length = (per_channel * run.ball.scale.flatten(1)).sum(1)
        length = torch.where(length > 0, length, torch.ones_like(length)).to(gradient.dtype)
        length = length.view(-1, *[1] * (gradient.dim() - 1))
        if before is None:
            return gradient / length
        return torch.addcdiv(before if self.decay == 1 else before * self.decay, gradient, length)
