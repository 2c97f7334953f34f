"""APGD, which finds its step size itself, and SEA, the worst case of APGD over four segmentation losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from monai_adv.attacks.base import Attack, positive
from monai_adv.attacks.run import Run
from monai_adv.attacks.sign import check_restarts
from monai_adv.errors import ConfigError
from monai_adv.losses import LOSSES, AttackLoss, as_loss, tracked
from monai_adv.threats import Ball, Threat

_logger = logging.getLogger(__name__)

ENOUGH_STEPS = 50
MOMENTUM = 0.25  # share of the last move in the next one
RADII = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))  # SEA: radius in eps, share of the steps


class APGD(Attack):
    """Auto-PGD: momentum steps from 2 eps on, halved per sample where the loss stops rising, always from the best.

    At each checkpoint the step size of a sample is halved, and its search goes back to the point of the highest loss,
    if fewer than ``rho`` of the steps since the last checkpoint raised the loss, or if neither step size nor highest
    loss changed since then. The checkpoints are at 22 % of the steps, then at intervals that shrink by 3 % to 6 %.

    Losses that count only voxels not fooled yet (masked ones) give the gradient, and the same loss over all voxels
    judges the progress: the masked one falls with every voxel that is fooled.

    Reference:
        Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks, ICML 2020. Theirs: L-inf and L2, rho .75, momentum .25. Ours: a return to the best point forgets the
        last move, and the result is the best iterate by the metric, not by the loss.

    Args:
        threat: what may change, L-inf or L2, with a finite budget.
        loss: what is ascended.
        steps: gradient steps per restart; below 50 the schedule has no room and a warning is logged.
        rho: share of the steps that must raise the loss, in [0, 1].
        random_start: start at a random point of the ball instead of the clean image.
        restarts: independent starts; per sample the best one is kept, as a whole.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "apgd"
    reference: ClassVar[str] = "Croce and Hein 2020"

    def __init__(
        self,
        threat: Threat,
        loss: str | AttackLoss = "dice_ce",
        steps: int = 50,
        rho: float = 0.75,
        random_start: bool = True,
        restarts: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, **options)
        _check_budget(self.name, threat.eps)
        self.steps = positive("steps", steps)
        self.rho = _check_rho(rho)
        self.random_start = bool(random_start)
        self.restarts = check_restarts(restarts, self.random_start)
        if self.steps < ENOUGH_STEPS:
            _logger.warning("apgd needs %d steps or more for its step size schedule, got %d", ENOUGH_STEPS, self.steps)

    def _search(self, run: Run) -> None:
        _check_budget(self.name, run.ball.eps)
        for restart in range(self.restarts):
            start = run.ball.random(run.generator) if self.random_start else run.clean
            ascend(run, start, run.ball, self.steps, tracked(self.loss), self.rho, restart=restart)


class SEA(Attack):
    """Segmentation ensemble attack: APGD on four losses, each from 2 eps down to eps; the worst case by Dice is kept.

    Each member runs 30 % of its steps in the ball of radius 2 eps, 30 % in that of 1.5 eps, starting from the best
    point by the metric of the ball before, projected, and 40 % in the ball of eps; only images inside eps may be
    returned. For a mean over cases, as Dice is here, the worst case per case is the worst case of the mean. All members
    start at the same point; ``details["winner"]`` says whose loss won.

    Cost: per member ``steps + 3`` forward and ``steps`` backward passes, so 413 and 400 with the defaults.

    Reference:
        Croce et al., Towards reliable evaluation and fast training of robust semantic segmentation models, 2023
        (arXiv 2306.12941). Theirs: these losses and radii, L-inf, untargeted; their released evaluation has 300 steps
        per loss. Ours: L2, sigmoid heads bit by bit, class frequencies of the sample, and 100 steps, since a step costs
        a whole volume here.

    Args:
        threat: what may change, L-inf or L2, with a finite budget.
        steps: gradient steps per member, >= 4.
        losses: the members, names of :data:`monai_adv.losses.LOSSES`.
        rho: see :class:`APGD`.
        random_start: start at a random point of the ball of 2 eps instead of the clean image.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "sea"
    reference: ClassVar[str] = "Croce et al. 2023"
    modes: ClassVar[str] = "untargeted"
    fixed_loss: ClassVar[bool] = True

    def __init__(
        self,
        threat: Threat,
        steps: int = 100,
        losses: Sequence[str] = ("masked_ce", "balanced_ce", "js", "spherical"),
        rho: float = 0.75,
        random_start: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(threat, "ce", **options)
        _check_budget(self.name, threat.eps)
        self.steps = positive("steps", steps)
        if self.steps < 4:
            raise ConfigError(f"steps of sea must be >= 4, one per radius, got {steps}")
        if isinstance(losses, str) or not losses or len(set(losses)) != len(losses) or not set(losses) <= set(LOSSES):
            raise ConfigError(f"losses of sea must be different ones of {', '.join(LOSSES)}, got {losses!r}")
        self.losses = list(losses)
        self.rho = _check_rho(rho)
        self.random_start = bool(random_start)

    def _search(self, run: Run) -> None:
        _check_budget(self.name, run.ball.eps)
        balls = [run.ball.with_eps(radius * run.ball.eps) for radius, _ in RADII]
        start = balls[0].random(run.generator) if self.random_start else run.clean
        winner = [self.losses[0]] * len(run.clean)
        for member, name in enumerate(self.losses):
            image, first = start, len(run.trace)
            for ball, steps in zip(balls, _shares(self.steps)):
                image = ascend(
                    run, ball.project(image), ball, steps, tracked(as_loss(name)), self.rho,
                    restart=member, fresh=ball is balls[0], candidates=ball is balls[-1],
                )  # fmt: skip
            for entry in run.trace[first:]:
                entry["member"] = [name] * len(run.clean)
            won = (run.best_step >= first).tolist()
            winner = [name if new else old for new, old in zip(won, winner)]
        run.details["winner"] = winner


def _shares(steps: int) -> list[int]:
    """Steps per radius; what does not divide goes to the last one."""
    counts = [int(share * steps) for _, share in RADII[:-1]]
    return [*counts, steps - sum(counts)]


def checkpoints(steps: int) -> list[int]:
    """Steps after which APGD looks at its step size.

    Example:
        >>> checkpoints(100)
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    percent, gap, marks = 22, 22, []
    while percent < 100:
        marks.append(-(-percent * steps // 100))
        gap = max(gap - 3, 6)
        percent += gap
    return sorted(set(marks))


def ascend(
    run: Run,
    start: Tensor,
    ball: Ball,
    steps: int,
    loss: AttackLoss,
    rho: float = 0.75,
    *,
    restart: int = 0,
    fresh: bool = True,
    candidates: bool = True,
) -> Tensor:
    """One search of APGD; every decision is taken per sample.

    Args:
        run: the attack.
        start: where it begins, inside the ball.
        ball: where it stays; may be larger than the run's.
        steps: gradient steps.
        loss: what is ascended, with values that tell its progress.
        rho: share of the steps that must raise the loss.
        restart: for the trace.
        fresh: whether the start is a mere start, the clean image or a random one, and no result of an attack.
        candidates: whether the images may be returned by the attack.

    Returns:
        The best image of the search by the metric; the loss decides between equal ones.
    """
    batch = len(start)
    size = torch.full((batch,), 2 * ball.eps, dtype=torch.float64, device=start.device)
    marks = {mark for mark in checkpoints(steps) if mark < steps}

    def rank() -> tuple[Tensor, Tensor]:
        entry = run.trace[-1]
        return (entry["score"] if run.attack.targeted else -entry["score"]), entry["loss"]

    gradient = run.gradient(start, loss=loss, restart=restart, candidate=candidates and not fresh)
    score, value = rank()
    image = previous = start
    top_image, top_gradient, top = start, gradient, value
    best_image, best_score, best_value = start, torch.full_like(score, -math.inf) if fresh else score, value
    rising = torch.zeros_like(size)
    last_mark, last_top, halved = 0, top, torch.ones_like(size, dtype=torch.bool)
    for step in range(1, steps + 1):
        target = ball.step(image, gradient, size)
        if step > 1:
            target = ball.project(image + (1 - MOMENTUM) * (target - image) + MOMENTUM * (image - previous))
        previous, image, before = image, target, value
        if step < steps:
            gradient = run.gradient(image, loss=loss, restart=restart, candidate=candidates)
        else:
            run.consider(image, loss=loss, restart=restart, candidate=candidates)
        score, value = rank()
        better = (score > best_score) | ((score == best_score) & (value > best_value))
        best_image = _choose(better, image, best_image)
        best_score, best_value = torch.where(better, score, best_score), torch.where(better, value, best_value)
        rising += value > before
        higher = value > top
        top = torch.where(higher, value, top)
        top_image, top_gradient = _choose(higher, image, top_image), _choose(higher, gradient, top_gradient)
        if step in marks:
            halved = (rising < rho * (step - last_mark)) | (~halved & (top <= last_top))
            size = torch.where(halved, size / 2, size)
            image, gradient = _choose(halved, top_image, image), _choose(halved, top_gradient, gradient)
            previous, value = _choose(halved, top_image, previous), torch.where(halved, top, value)
            rising, last_mark, last_top = torch.zeros_like(rising), step, top
    return best_image


def _choose(first: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Per sample ``a`` where ``first``, else ``b``."""
    if bool(first.all()):
        return a
    return torch.where(first.view(-1, *[1] * (a.dim() - 1)), a, b) if bool(first.any()) else b


def _check_budget(name: str, eps: float) -> None:
    if math.isinf(eps):
        raise ConfigError(f"{name} starts with steps of 2 eps and needs a finite eps")


def _check_rho(rho: float) -> float:
    if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0 <= rho <= 1:
        raise ConfigError(f"rho must be in [0, 1], got {rho!r}")
    return rho
