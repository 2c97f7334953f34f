"""Dense adversary generation: every voxel is pushed towards a wrong class until nearly all are there."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from monai_adv.attacks.base import Attack, positive
from monai_adv.attacks.counted import check_region, check_share, counted_voxels, fooled, fooled_share
from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses import Margin
from monai_adv.threats import Ball, Threat


class DAG(Attack):
    """Dense adversary generation: raises wrong logits and lowers the true ones at all voxels not yet fooled.

    At every step the voxels that are still predicted as their label (targeted: not yet as the target) are active; the
    sum of ``z_adv - z_true`` over them is ascended by ``gamma g / max|g|``, so the largest change of a step is
    ``gamma``. A sample is done when the share fooled reaches ``nu``.

    The paper's are the active set, the random wrong class of each class, the max-norm step and its accumulation; it
    knows no budget (``eps=inf`` here), counts all voxels, and its ``gamma`` of .5 belongs to intensities in [0, 255].
    Ours are the budget, the default step, the lesion as the set that is attacked and counted (where 98 % of the voxels
    are background, 99 % of all says nothing), the best iterate by the metric, and sigmoid heads, where the wrong value
    of a bit is the other one.

    Reference:
        Xie et al., Adversarial examples for semantic segmentation and object detection, ICCV 2017.

    Args:
        threat: what may change; unbounded for the paper's mode.
        steps: at most.
        gamma: largest change of a voxel per step, in the threat's units; None is ``eps / 20``, or .1 without a budget.
        nu: share of the counted voxels (bits) that has to be fooled; in (0, 1].
        adversarial: wrong class of every voxel: "permutation" (of the classes, without fixed points, drawn once per
            sample; the paper's) or "runner_up" (the best wrong class of the clean logits). A target overrules it:
            then the target's logit is raised and the strongest other one lowered, which is the label's to begin with
            (and no other class gets in between). A bit has one wrong value only.
        counts: voxels that are attacked and counted: "lesion" (not background in the label, the clean prediction or
            the target) or "all" (the paper's); always within the weight.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "dag"
    reference: ClassVar[str] = "Xie et al. 2017"
    fixed_loss: ClassVar[bool] = True

    def __init__(
        self,
        threat: Threat,
        steps: int = 150,
        gamma: float | None = None,
        nu: float = 0.99,
        adversarial: str = "permutation",
        counts: str = "lesion",
        **options: Any,
    ) -> None:
        super().__init__(threat, Margin(), **options)
        self.steps = positive("steps", steps)
        if gamma is not None and not (isinstance(gamma, (int, float)) and 0 < gamma < math.inf):
            raise ConfigError(f"gamma must be > 0 and finite, got {gamma!r}")
        self.gamma = gamma
        self.nu = check_share("nu", nu)
        if adversarial not in ("permutation", "runner_up"):
            raise ConfigError(f"adversarial {adversarial!r} is unknown: use 'permutation' or 'runner_up'")
        self.adversarial = adversarial
        self.counts = check_region("counts", counts)

    def _search(self, run: Run) -> None:
        counted = counted_voxels(run, self.counts)
        wrong = self._wrong_classes(run) if run.head.exclusive and run.target is None else None
        gamma = self.gamma or (0.1 if math.isinf(run.ball.eps) else run.ball.eps / 20)
        stopped: list[int | None] = [None] * len(run.clean)
        seen: list[Tensor] = []

        def objective(logits: Tensor) -> Tensor:
            seen.append(logits.detach())
            return self._objective(run, logits, counted, wrong)

        image = run.clean
        for step in range(self.steps + 1):
            if step < self.steps:
                gradient = run.gradient(image, loss=objective, candidate=step > 0)
            else:
                run.consider(image, loss=objective)
            if step:  # the clean image is no result, however wrong its prediction is
                share = fooled_share(run, run.head.predict(torch.stack(seen).mean(0)), counted)
                stopped = [
                    step if at is None and reached else at for at, reached in zip(stopped, (share >= self.nu).tolist())
                ]
            seen.clear()
            if step == self.steps or all(at is not None for at in stopped):
                break
            going = torch.tensor([at is None for at in stopped], device=image.device)
            going = going.view(-1, *[1] * (image.dim() - 1))
            image = torch.where(going, run.ball.project(image + _largest_is(gamma, gradient, run.ball)), image)
        run.details["fooled"] = fooled_share(run, run.best_prediction, counted).tolist()
        run.details["stopped"] = list(stopped)

    def _wrong_classes(self, run: Run) -> Tensor:
        """The class that every voxel is pushed to, ``(B, 1, *spatial)``."""
        if self.adversarial == "runner_up":
            return run.clean_logits.scatter(1, run.label, float("-inf")).argmax(1, keepdim=True)
        classes = run.clean_logits.shape[1]
        tables = [_derangement(classes, run.generator) for _ in run.label]
        return torch.stack([table.to(label.device)[label] for table, label in zip(tables, run.label)])

    @staticmethod
    def _objective(run: Run, logits: Tensor, counted: Tensor, wrong: Tensor | None) -> Tensor:
        """Sum of ``z_adv - z_true`` over the active voxels, ``(B,)``."""
        seen = logits.detach()
        active = counted & ~fooled(run, run.head.predict(seen))
        if not run.head.exclusive:
            wanted = run.target if run.target is not None else ~run.label
            difference = torch.where(wanted, logits, -logits)
        elif wrong is not None:
            difference = logits.gather(1, wrong) - logits.gather(1, run.label)
        else:
            assert run.target is not None
            rival = seen.scatter(1, run.target, float("-inf")).argmax(1, keepdim=True)
            difference = logits.gather(1, run.target) - logits.gather(1, rival)
        return torch.where(active, difference, torch.zeros_like(difference)).flatten(1).sum(1)


def _derangement(classes: int, generator: Generator) -> Tensor:
    """A random permutation of ``0 .. classes - 1`` that leaves none where it is."""
    if classes < 2:
        raise ConfigError("dag needs a wrong class: a softmax head of one class has none")
    while True:  # at least a third of all permutations will do
        drawn = torch.randperm(classes, generator=generator, device=generator.device)
        if bool((drawn != torch.arange(classes, device=drawn.device)).all()):
            return drawn


def _largest_is(gamma: float, gradient: Tensor, ball: Ball) -> Tensor:
    """The gradient as a step in image units whose largest entry is ``gamma`` units; none where there is no gradient."""
    # in units u = delta / scale the gradient is g * scale, and a step of u is scaled back
    step = ball.gradient_in_units(gradient)
    peak = step.abs().flatten(1).amax(1).view(-1, *[1] * (step.dim() - 1))
    return gamma * (step / torch.where(peak > 0, peak, torch.ones_like(peak))) * ball.scale
