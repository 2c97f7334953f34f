"""Robust training on pairs of a clean image and its adversarial companion: TRADES and frequency training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_adv.attacks import PGD, VAFA, Attack
from monai_adv.data.meta import plain
from monai_adv.defenses.crafting import changeable, craft, ends_where_it_stands
from monai_adv.defenses.objectives import Divergence, frequency_distance, kl_divergence
from monai_adv.engines.robust.step import SUPPORT, PairedIteration, numbers, training_victim
from monai_adv.errors import ConfigError
from monai_adv.victims import Head


class TradesIteration(PairedIteration):
    """TRADES: ``L(clean) + beta KL(clean || adversarial)``, the adversarial image found by ascending that KL.

    L is the engine's loss; KL is the mean over voxels (and channels of a sigmoid head), with a gradient through both
    sides, as in the released code. With beta = 0 it is plain training, without the adversarial pass.

    Reference:
        Zhang et al., Theoretically principled trade-off between robustness and accuracy, ICML 2019. Ours: the search
        begins at a random point of the ball (at the clean image the divergence has no gradient) instead of 1e-3 beside
        the clean image.

    Args:
        attack: PGD with one random start, e.g. ``{"name": "pgd", "eps": 0.1, "steps": 3}``; its loss is replaced by
            the divergence.
        beta: weight of the divergence, >= 0; the paper's is 6 (its 1 / lambda).
        head: see :class:`PairedIteration`, as the others.
        seed: see :class:`PairedIteration`.
        support_key: see :class:`PairedIteration`.
        iteration_update: see :class:`PairedIteration`.
    """

    name = "TRADES"

    def __init__(
        self,
        attack: Attack | Mapping[str, Any],
        beta: float = 6.0,
        head: str | Head = "softmax",
        seed: int = 0,
        support_key: str | None = SUPPORT,
        iteration_update: Callable[[Engine, Any], Any] | None = None,
    ) -> None:
        if isinstance(attack, Mapping) and "loss" in attack:
            raise ConfigError("TRADES ascends its own divergence: leave the attack's loss out")
        super().__init__(attack, head, seed, support_key, iteration_update)
        if type(self.attack) is not PGD or not self.attack.random_start or not ends_where_it_stands(self.attack):
            raise ConfigError(
                "TRADES ascends a divergence that has no gradient at the clean image: it needs pgd with one random "
                f"start, got {self.attack!r}"
            )
        self.beta = _weight("beta", beta)

    def _needs_pair(self) -> bool:
        return self.beta > 0

    def _companions(self, engine: SupervisedTrainer, image: Tensor, label: Tensor, support: Tensor | None) -> Tensor:
        victim, generator = training_victim(engine, self.head), numbers(engine, self.seed)
        chosen = changeable(self.attack.threat, image, support).nonzero().flatten()
        whole = plain(image).clone()
        if len(chosen):
            attack, part = copy.copy(self.attack), whole[chosen]
            mask = None if support is None else support[chosen]
            with torch.no_grad():
                attack.loss = Divergence(victim(part))
            whole[chosen] = craft(attack, victim, part, plain(label)[chosen], generator=generator, support=mask)
        return whole

    def _loss(
        self, loss: nn.Module | Callable[..., Tensor], clean: Tensor, adversarial: Tensor, label: Tensor
    ) -> Tensor:
        divergence = kl_divergence(plain(clean).float(), adversarial.float(), self.head).mean()
        return loss(clean, label).mean() + self.beta * divergence


class VAFTIteration(PairedIteration):
    """Frequency adversarial training: ``L(clean) + L(adversarial) + weight |DCT clean - DCT adv|_1 / |DCT clean|_1``.

    The companion is made by the frequency attack :class:`monai_adv.attacks.VAFA`; the last term keeps the cosine
    transforms of the two predictions together. L is the engine's loss; the paper's is Dice.

    Reference:
        Hanif et al., Frequency domain adversarial training for robust volumetric medical segmentation, MICCAI 2023.

    Args:
        attack: a VAFA, or its options; every step costs a forward and a backward pass.
        weight: of the frequency term, >= 0.
        dct_block: side in voxels of the blocks of logits that are transformed; the whole patch if None.
        head: see :class:`PairedIteration`, as the others.
        seed: see :class:`PairedIteration`.
        support_key: see :class:`PairedIteration`.
        iteration_update: see :class:`PairedIteration`.
    """

    name = "VAFT"

    def __init__(
        self,
        attack: Attack | Mapping[str, Any] | None = None,
        weight: float = 1.0,
        dct_block: int | None = None,
        head: str | Head = "softmax",
        seed: int = 0,
        support_key: str | None = SUPPORT,
        iteration_update: Callable[[Engine, Any], Any] | None = None,
    ) -> None:
        super().__init__({"name": "vafa"} if attack is None else attack, head, seed, support_key, iteration_update)
        if not isinstance(self.attack, VAFA):
            raise ConfigError(f"frequency adversarial training attacks with vafa, not with {self.attack.name}")
        self.weight = _weight("weight", weight)
        self.dct_block = dct_block

    def _companions(self, engine: SupervisedTrainer, image: Tensor, label: Tensor, support: Tensor | None) -> Tensor:
        victim, generator = training_victim(engine, self.head), numbers(engine, self.seed)
        chosen = changeable(self.attack.threat, image, support).nonzero().flatten()
        whole = plain(image).clone()
        if len(chosen):
            mask = None if support is None else support[chosen]
            part, truth = whole[chosen], plain(label)[chosen]
            whole[chosen] = plain(self.attack(victim, part, truth, support=mask, generator=generator).image)
        return whole

    def _loss(
        self, loss: nn.Module | Callable[..., Tensor], clean: Tensor, adversarial: Tensor, label: Tensor
    ) -> Tensor:
        distance = frequency_distance(plain(clean).float(), adversarial.float(), self.dct_block)
        return loss(clean, label).mean() + loss(adversarial, label).mean() + self.weight * distance


def _weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be a finite number >= 0, got {value!r}")
    return float(value)
