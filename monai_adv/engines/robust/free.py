"""Free adversarial training: the backward pass of the training step gives the perturbation its step too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.utils import CommonKeys
from torch import Tensor

from monai_adv.attacks.base import positive
from monai_adv.data.meta import like, plain
from monai_adv.defenses.crafting import changeable
from monai_adv.engines.robust.step import SUPPORT, support_of, training_batch
from monai_adv.errors import ConfigError
from monai_adv.threats import Threat, create_threat


class FreeIteration:
    """Free: every batch is replayed m times, and each backward pass moves both the weights and the perturbation.

    The perturbation is kept from batch to batch (projected to the next images' budget), so that m small steps make a
    strong one, at no pass more than plain training of m times the batches. The gradient is that of the training step:
    network in training mode, weights before the step.

    Reference:
        Shafahi et al., Adversarial training for free!, NeurIPS 2019.

    Args:
        threat: what may change, or its options for ``monai_adv.threats.create_threat``, e.g.
            ``{"eps": 0.1, "units": "absolute"}``; every replay steps by the whole eps.
        replays: m, optimiser steps per batch.
        support_key: key of a mask of the voxels that may change, where the batch has one.
        image_key: key of the image in the batch dictionary.
        iteration_update: what takes a step; the engine's own ``_iteration`` if None.

    Attributes:
        delta: the perturbation in image units, ``(B, C, *spatial)``, part of ``state_dict``.
    """

    def __init__(
        self,
        threat: Threat | Mapping[str, Any],
        replays: int = 4,
        support_key: str | None = SUPPORT,
        image_key: str = CommonKeys.IMAGE,
        iteration_update: Callable[[Engine, Any], Any] | None = None,
    ) -> None:
        self.threat = threat if isinstance(threat, Threat) else create_threat(**threat)
        if self.threat.norm not in ("linf", "l2"):
            raise ConfigError(f"Free needs an L-inf or L2 threat, not {self.threat.describe()}")
        self.replays = positive("replays", replays)
        self.support_key = support_key
        self.image_key = image_key
        self.iteration_update = iteration_update
        self.delta: Tensor | None = None

    @property
    def steps_per_batch(self) -> int:
        """Optimiser steps per batch."""
        return self.replays

    def __call__(self, engine: Engine, batchdata: Mapping[str, Any]) -> Any:
        """m optimiser steps on a batch; ``engine.state.output`` is that of the last."""
        trainer, image, _ = training_batch(engine, batchdata, "Free")
        if trainer.accumulation_steps > 1:
            raise ConfigError("Free takes a step at every replay: leave accumulation_steps at 1")
        follow = self.iteration_update or trainer._iteration
        clean, support = plain(image).detach(), support_of(batchdata, self.support_key, self.threat, image)
        chosen = changeable(self.threat, clean, support).nonzero().flatten()
        batch, adversarial, output, ball = trainer.state.batch, clean.clone(), None, None
        if len(chosen):
            ball = self.threat.bind(clean[chosen], None if support is None else support[chosen])
            adversarial[chosen] = ball.project(ball.clean + self._warm(clean)[chosen])
        for _ in range(self.replays):
            leaf = adversarial.clone().requires_grad_(True)
            trainer.state.batch = batch  # the iteration before may have decollated it
            output = follow(trainer, {**batchdata, self.image_key: like(leaf, image)})
            if leaf.grad is None:
                raise ConfigError(
                    f"no gradient reached the image under {self.image_key!r}: prepare_batch must hand it over unchanged"
                )
            if ball is not None and bool(torch.isfinite(leaf.grad).all()):  # else amp's scaler skipped the step too
                adversarial[chosen] = ball.step(adversarial[chosen], leaf.grad[chosen], self.threat.eps)
        self.delta = adversarial - clean
        if isinstance(output, dict) and isinstance(output.get(CommonKeys.IMAGE), Tensor):
            output[CommonKeys.IMAGE] = output[CommonKeys.IMAGE].detach()
        return output

    def _warm(self, clean: Tensor) -> Tensor:
        """The kept perturbation in the shape of a batch; zero where there is none yet."""
        delta = torch.zeros_like(clean)
        if self.delta is not None and self.delta.shape[1:] == clean.shape[1:]:
            known = min(len(self.delta), len(clean))
            delta[:known] = self.delta[:known].to(clean)
        return delta

    def state_dict(self) -> dict[str, Any]:
        """The perturbation, for a checkpoint."""
        return {"delta": self.delta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the perturbation of a checkpoint."""
        self.delta = state["delta"]
