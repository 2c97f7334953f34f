"""Adversarial training by augmentation: a share of each batch is attacked, or gets noise of the same size."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.utils import CommonKeys
from torch import Generator, Tensor

from monai_adv.attacks import Attack
from monai_adv.data.meta import like, plain
from monai_adv.defenses.crafting import changeable, craft, ends_where_it_stands
from monai_adv.engines.attack import AttackIteration
from monai_adv.engines.robust.step import SUPPORT, checked_seed, numbers, support_of, training_batch, training_victim
from monai_adv.errors import ConfigError
from monai_adv.victims import Head

BUDGETS = ("uniform", "fixed")


class AdversarialIteration(AttackIteration):
    """An ``iteration_update`` that attacks a share of every batch with a random budget, and trains on all of it.

    The attack sees the network in evaluation mode with frozen parameters, outside ``DistributedDataParallel``, and the
    true labels; then the engine's own iteration takes its step on the mixed batch. Searches of the sign family (fgsm,
    ifgsm, pgd, mifgsm, segpgd, cospgd; noise) go to their last iterate at K passes for K steps
    (:func:`monai_adv.defenses.craft`); any other attack is run as it is. Random numbers depend on seed, process and
    iteration only. Samples without a voxel that may change stay clean.

    With ``{"name": "noise", "kind": "gaussian"}`` it is the control: noise whose standard deviation is the drawn eps,
    the RMS of a perturbation that moves every voxel by eps.

    Reference:
        Goodfellow et al. 2015; Kurakin et al. 2017 (a share of the batch, random budgets); Madry et al. 2018; Liu et
        al. 2019 (arXiv 1908.00656).

    Args:
        attack: an attack, or its options for :func:`monai_adv.attacks.create`; its eps is the largest. Batches are
            usually normalised already, so that ``units="absolute"`` are standard deviations of the brain.
        head: head of the engine's network.
        iteration_update: what runs on the mixed batch; the engine's own ``_iteration`` if None.
        share: share of the samples to attack, on average, in (0, 1].
        budget: "uniform" (eps ~ U(0, eps of the attack) for every batch) or "fixed".
        seed: of share, budget and attack; the attack's own if None.
        support_key: key of a mask ``(B, 1 or C, *spatial)`` of the voxels that may change, where the batch has one;
            augmentation may leave no background of exact zeros. A threat with ``support="all"`` does not ask.
        image_key: key of the image in the batch dictionary.
        label_key: key of the label, which moves with the image where the attack moves anatomy.
        preprocessing: see :class:`monai_adv.engines.AttackIteration`.

    Example:
        ``SupervisedTrainer(..., iteration_update=AdversarialIteration({"name": "pgd", "eps": 0.1, "steps": 3}))``
    """

    steps_per_batch = 1

    def __init__(
        self,
        attack: Attack | Mapping[str, Any],
        head: str | Head = "softmax",
        iteration_update: Callable[[Engine, Any], Any] | None = None,
        share: float = 0.5,
        budget: str = "uniform",
        seed: int | None = None,
        support_key: str | None = SUPPORT,
        image_key: str = CommonKeys.IMAGE,
        label_key: str = CommonKeys.LABEL,
        preprocessing: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(
            attack, head, iteration_update, share, image_key=image_key, label_key=label_key, preprocessing=preprocessing
        )
        if budget not in BUDGETS:
            raise ConfigError(f"budget {budget!r} is unknown: use one of {', '.join(BUDGETS)}")
        self.budget = budget
        self.seed = checked_seed(self.attack.seed if seed is None else seed)
        self.support_key = support_key

    def _attacked(
        self, engine: SupervisedEvaluator | SupervisedTrainer, batchdata: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        trainer, image, label = training_batch(engine, batchdata, "adversarial training")
        generator = numbers(trainer, self.seed)
        threat = self.attack.threat
        support = support_of(batchdata, self.support_key, threat, image)
        count = int(self.share * len(image) + float(torch.rand(1, generator=generator)))
        eps = threat.eps
        if self.budget == "uniform" and math.isfinite(eps):
            eps = eps * float(torch.rand(1, generator=generator, dtype=torch.float64))
        chosen = changeable(threat, image, support)[:count].nonzero().flatten()
        if not len(chosen):
            return image, None
        victim = training_victim(trainer, self.head, self.preprocessing)
        part, truth = plain(image), plain(label)
        if len(chosen) == len(image):  # no copies
            images, moved = self._part(victim, part, truth, eps, generator, support)
            return like(images, image), None if moved is None else like(moved.to(truth.dtype), label)
        mask = None if support is None else support[chosen]
        images, moved = self._part(victim, part[chosen], truth[chosen], eps, generator, mask)
        whole = part.index_copy(0, chosen, images.to(part.dtype))
        if moved is None:
            return like(whole, image), None
        return like(whole, image), like(truth.index_copy(0, chosen, moved.to(truth.dtype)), label)

    def _part(
        self, victim: Any, image: Tensor, label: Tensor, eps: float, generator: Generator, support: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The attacked samples, and their labels if the attack moves anatomy."""
        attack, size = self.attack, getattr(self.attack, "step_size", None)
        if size is not None and math.isfinite(attack.threat.eps) and attack.threat.eps > 0:
            attack = copy.copy(attack)  # a step is a share of the largest budget, and of a smaller one the same
            attack.step_size = size * eps / attack.threat.eps  # type: ignore[attr-defined]
        if ends_where_it_stands(attack):
            return craft(attack, victim, image, label, eps=eps, generator=generator, support=support), None
        found = self.result = attack.curve(victim, image, label, [eps], generator=generator, support=support)[0]
        return plain(found.image), found.label if attack.moves_voxels else None
