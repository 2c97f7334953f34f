"""Minimum-norm attacks: the smallest perturbation that fools a share of the voxels or halves Dice."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from monai_adv.attacks.base import Attack, positive
from monai_adv.attacks.counted import (
    check_region,
    check_share,
    counted_voxels,
    fooled_share,
    resistance,
    without_hardest,
)
from monai_adv.attacks.lagrangian import Lagrangian, prox_l2, prox_linf
from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses import Margin
from monai_adv.threats import Ball, LInfBall, Threat

# of ALMAProx
_MEMORY = 0.8  # of the moving average of the squared gradient
_REDUCTION = 0.1  # last step size over the largest
_GROWTH = 16.0  # largest step size over the first, for samples without a success in half of the steps
_NORM = 0.01  # first weight of the norm over the sum of the violations it has to yield to
_RATE = 1.5  # by which that weight grows at successes and falls, after the first, at failures


class MinimumNorm(Attack):
    """What attacks for the smallest perturbation share: what counts as fooled, and the smallest success as the best.

    Successes come before failures, smaller ones (in the threat's units) before larger; of failures the better score
    is kept. ``details`` of the result: ``size`` (of the smallest success, None without one) and ``fooled`` (share of
    the counted voxels, of the returned image).

    Args:
        threat: its norm is what is made small, its budget a cap on what is searched.
        steps: gradient steps.
        criterion: what has to be reached: "voxels" (share of the counted voxels or bits that is wrong, targeted: at
            the target) or "dice" (the attack's ``goal``: half of the clean mean Dice by default; targeted: the
            agreement with the target).
        nu: the share, in (0, 1]. The loss leaves the ``1 - nu`` hardest voxels alone, under either criterion.
        region: counted voxels: "lesion" (not background in the label, the clean prediction or the target) or "all".
        dilation: the lesion grows by so many mm.
        **options: see :class:`Attack`.
    """

    default_eps: ClassVar[tuple[float, ...] | None] = (math.inf,)
    fixed_loss: ClassVar[bool] = True

    def __init__(
        self,
        threat: Threat,
        steps: int,
        criterion: str,
        nu: float,
        region: str,
        dilation: float,
        **options: Any,
    ) -> None:
        super().__init__(threat, Margin(), **options)
        self.steps = positive("steps", steps)
        if criterion not in ("voxels", "dice"):
            raise ConfigError(f"criterion {criterion!r} is unknown: use 'voxels' or 'dice'")
        self.criterion = criterion
        self.nu = check_share("nu", nu)
        self.region = check_region("region", region)
        if isinstance(dilation, bool) or not isinstance(dilation, (int, float)) or not 0 <= dilation < math.inf:
            raise ConfigError(f"dilation must be a finite number of mm >= 0, got {dilation!r}")
        self.dilation = dilation

    def _counted(self, run: Run) -> Tensor:
        if "counted" not in run.shared:
            run.shared["counted"] = counted_voxels(run, self.region, self.dilation)
        return run.shared["counted"]

    def _met(self, run: Run, prediction: Tensor, score: Tensor) -> Tensor:
        """Whether the criterion is reached, ``(B,)`` bool."""
        if self.criterion == "dice":
            return run.reached(score)
        return fooled_share(run, prediction, self._counted(run)) >= self.nu

    def _rank(self, run: Run, image: Tensor, prediction: Tensor, score: Tensor, objective: Tensor) -> Tensor:
        met = self._met(run, prediction, score)
        among = torch.where(met, -run.ball.size(image).to(score), score if self.targeted else -score)
        return torch.stack([met.to(score), among, fooled_share(run, prediction, self._counted(run)).to(score)], dim=1)

    def _report(self, run: Run) -> None:
        """Details of the result."""
        met = self._met(run, run.best_prediction, run.score(run.best_prediction)).tolist()
        sizes = run.ball.size(run.best_image).tolist()
        run.details["size"] = [size if reached else None for size, reached in zip(sizes, met)]
        run.details["fooled"] = fooled_share(run, run.best_prediction, self._counted(run)).tolist()


class FMN(MinimumNorm):
    """Fast minimum-norm attack: the radius grows until the criterion is reached and shrinks while it is.

    The steps are projected to a radius: while nothing is found, the size plus the first-order distance to the
    boundary (remaining margins over the dual norm of their gradient); after that, ``1 - gamma`` times as much at a
    success and ``1 + gamma`` times at a failure, ``gamma`` annealed by a cosine.

    The paper's are that schedule and the logit margin as loss, for one decision; its step is absolute and Euclidean.
    Ours are the sum of the margins over the voxels that are not fooled by more than ``kappa``, less the hardest
    ``1 - nu``; the criterion; steepest steps of the norm (the sign for L-inf); and a step size in shares of the
    radius, which needs no scale.

    Reference:
        Pintor et al., Fast minimum-norm adversarial attacks through adaptive norm constraints, NeurIPS 2021.

    Args:
        threat: its norm is what is made small, its budget a cap on what is searched.
        steps: gradient steps.
        criterion: "voxels" or "dice", see :class:`MinimumNorm`.
        nu: share of the counted voxels that has to be fooled (or, under "dice", that the loss aims at), in (0, 1].
        region: counted voxels, "lesion" or "all".
        dilation: the lesion grows by so many mm.
        step_size: first step in shares of the radius; annealed to a hundredth of it by a cosine.
        gamma: first relative change of the radius, in (0, 1); annealed to a fiftieth of it.
        kappa: logits by which a voxel is pushed beyond its boundary, >= 0.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "fmn"
    reference: ClassVar[str] = "Pintor et al. 2021"

    def __init__(
        self,
        threat: Threat,
        steps: int = 100,
        criterion: str = "voxels",
        nu: float = 0.9,
        region: str = "lesion",
        dilation: float = 0.0,
        step_size: float = 0.2,
        gamma: float = 0.05,
        kappa: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(threat, steps, criterion, nu, region, dilation, **options)
        self.step_size = _between("step_size", step_size, 0, math.inf)
        self.gamma = _between("gamma", gamma, 0, 1)
        if not (isinstance(kappa, (int, float)) and 0 <= kappa < math.inf):
            raise ConfigError(f"kappa must be >= 0 and finite, got {kappa!r}")
        self.kappa = kappa

    def _search(self, run: Run) -> None:
        counted, ball = self._counted(run), run.ball
        seen: list[Tensor] = []

        def objective(logits: Tensor) -> Tensor:
            seen.append(logits.detach())
            kept, margins = self._margins(run, logits, counted, step)
            return -torch.where(kept, margins.clamp_min(-self.kappa), torch.zeros_like(margins)).flatten(1).sum(1)

        image = run.clean
        best = torch.full((len(image),), math.inf, dtype=torch.float64, device=image.device)
        radius = best
        for step in range(self.steps + 1):
            cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
            if step == self.steps:
                run.consider(image, loss=objective)
            else:
                gradient = run.gradient(image, loss=objective, candidate=step > 0)
            logits = torch.stack(seen).mean(0)
            seen.clear()
            met = self._met(run, run.victim.discretise(logits), run.trace[-1]["score"])
            size = ball.size(image).double()
            found = best.isfinite()
            best = torch.where(met & (size < best), size, best)
            if step == self.steps:
                break
            rate = self.gamma * (0.02 + 0.98 * cosine)
            ahead = size + self._distance(run, logits, gradient, counted, size, step)
            shrunk = torch.minimum(radius * (1 - rate), best)
            radius = torch.where(met, shrunk, torch.where(found, radius * (1 + rate), ahead))
            share = self.step_size * (0.01 + 0.99 * cosine)
            image = _within(ball, image + _steepest(ball, gradient, share * radius), radius)
        self._report(run)

    def _margins(self, run: Run, logits: Tensor, counted: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The voxels that are pushed, and all margins."""
        margins = resistance(run, logits)
        left_out = (1 - self.nu) * min(1.0, 2 * step / self.steps)
        return without_hardest(margins.detach(), counted, left_out), margins

    def _distance(self, run: Run, logits: Tensor, gradient: Tensor, counted: Tensor, size: Tensor, step: int) -> Tensor:
        """First-order distance to where the remaining margins are gone, in units, ``(B,)``."""
        kept, margins = self._margins(run, logits, counted, step)
        remaining = torch.where(kept, margins.clamp_min(0), torch.zeros_like(margins)).double().flatten(1).sum(1)
        dual = _dual_norm(run.ball, gradient)
        distance = torch.where(dual > 0, remaining / dual.clamp_min(torch.finfo(dual.dtype).tiny), 0)
        # later steps grow by gamma at least (the dual norm counts voxels that are pushed but have arrived), and double
        # at most (voxels that nothing moves would have the radius grow without end)
        return torch.where(size > 0, distance.clamp(self.gamma * size, size), distance)


class ALMAProx(MinimumNorm):
    """Proximal augmented Lagrangian: one multiplier per voxel that is not fooled yet, and a proximal step of the norm.

    Every counted voxel is a constraint; its violation is penalised with a multiplier and a penalty weight of its own,
    and the norm, which has no useful gradient, is made small by its proximity operator. The ``1 - nu`` hardest voxels
    are left out.

    The paper's are the L-inf norm, penalty, mask, scaled margins, moving averages, the diagonal metric and the decaying
    step. Ours are: the derivative of the penalty at 0 is the multiplier; the divisor of the margin has no gradient, and
    margins of two classes and of bits are plain; the hardest voxels are those of the largest plain margin, all of them
    left out after a quarter of the steps; the L2 norm; sizes counted in first-order distances of the clean image to the
    boundary, which needs no scale, and steps that grow until there is a success; a weight of the norm that grows at
    successes and falls at failures, so that 200 steps do where the paper takes 500; the criterion "dice".

    Reference:
        Rony et al., Proximal splitting adversarial attacks for semantic segmentation, CVPR 2023.

    Args:
        threat: its norm is what is made small, its budget a cap on what is searched.
        steps: gradient steps; the paper takes 500.
        criterion: "voxels" or "dice", see :class:`MinimumNorm`.
        nu: share of the counted voxels that has to be fooled (or, under "dice", that the penalties aim at), in (0, 1].
        region: counted voxels, "lesion" or "all".
        dilation: the lesion grows by so many mm.
        step_size: first step in the threat's units; None is a tenth of the first-order distance to the boundary. It
            grows up to sixteen-fold until the criterion is first reached, at most for half of the steps.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "alma_prox"
    reference: ClassVar[str] = "Rony et al. 2023"

    def __init__(
        self,
        threat: Threat,
        steps: int = 200,
        criterion: str = "voxels",
        nu: float = 0.9,
        region: str = "lesion",
        dilation: float = 0.0,
        step_size: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(threat, steps, criterion, nu, region, dilation, **options)
        self.step_size = None if step_size is None else _between("step_size", step_size, 0, math.inf)

    def _search(self, run: Run) -> None:
        ball = run.ball
        state = Lagrangian(run, self._counted(run), self.nu, self.steps)
        followed = -1
        met = torch.zeros(len(run.clean), dtype=torch.bool, device=run.clean.device)

        def objective(logits: Tensor) -> Tensor:
            nonlocal followed, met
            if followed < step:  # of several draws the first decides
                prediction = run.victim.discretise(logits)
                met = self._met(run, prediction, run.score(prediction))
                state.follow(logits.detach(), met, step)
                followed = step
            return -state.penalty(logits)

        image = run.clean
        u = torch.zeros_like(image)
        prox = prox_linf if isinstance(ball, LInfBall) else prox_l2
        average = torch.zeros_like(u)
        scale = torch.where(ball.scale > 0, ball.scale, torch.ones_like(ball.scale))
        best = torch.full((len(image),), math.inf, dtype=torch.float64, device=image.device)
        turned = torch.full_like(best, self.steps // 2)
        last = torch.zeros_like(best)
        for step in range(self.steps + 1):
            if step == self.steps:
                run.consider(image, loss=objective)
            else:
                gradient = -run.gradient(image, loss=objective, candidate=step > 0)
            size = ball.size(image).double()
            turned = torch.where(met & best.isinf() & (step < self.steps // 2), step, turned)
            best = torch.where(met & (size < best), size, best)
            if step == self.steps:
                break
            if step == 0:
                unit, pull = self._scales(run, gradient, state)
            # a norm that already goes the right way is left to: the weight would wind up
            harder, softer = met & (size >= last), ~met & best.isfinite() & (size <= last)
            pull = torch.where(harder, pull * _RATE, torch.where(softer, pull / _RATE, pull))
            last = size
            tangent = _REDUCTION / (1 - _REDUCTION) * (self.steps - turned)
            rate = (self.step_size or 0.1 * unit) / unit * tangent / ((step - turned).clamp_min(0) + tangent)
            rate = rate * _GROWTH ** (turned.clamp_max(step) / max(1, self.steps // 2))
            gradient = ball.gradient_in_units(gradient) * _per_sample(unit, gradient)
            average = _MEMORY * average + (1 - _MEMORY) * gradient.square()
            metric = (average / (1 - _MEMORY ** (step + 1))).sqrt().clamp_min(1e-8)
            u = u - _per_sample(rate, u) * gradient / metric
            image = ball.project(ball.clean + u * _per_sample(unit, u) * ball.scale)
            u = (image - ball.clean) / _per_sample(unit, u) / scale
            u = prox(u, rate * pull, metric)
            image = ball.project(ball.clean + u * _per_sample(unit, u) * ball.scale)
        self._report(run)

    def _scales(self, run: Run, gradient: Tensor, state: Lagrangian) -> tuple[Tensor, Tensor]:
        """First-order distance of the clean image to the boundary in units, and the weight of the norm, ``(B,)``."""
        violation = state.constraint(run.clean_logits).clamp_min(0)
        remaining = torch.where(state.kept, violation, torch.zeros_like(violation)).flatten(1).sum(1)
        dual = _dual_norm(run.ball, gradient)
        reachable = (dual > 0) & (remaining > 0)
        unit = torch.where(reachable, remaining / dual.clamp_min(torch.finfo(dual.dtype).tiny), 1.0)
        return unit, torch.where(reachable, remaining * _NORM, 1.0)


def _between(name: str, value: float, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        bounds = f"> {low:g} and finite" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ConfigError(f"{name} must be {bounds}, got {value!r}")
    return value


def _per_sample(values: Tensor, image: Tensor) -> Tensor:
    return values.to(image.dtype).view(-1, *[1] * (image.dim() - 1))


def _dual_norm(ball: Ball, gradient: Tensor) -> Tensor:
    """How fast the loss can grow per unit of the ball's norm, ``(B,)`` float64: L1 for L-inf, L2 for L2."""
    inside = ball.gradient_in_units(gradient).double().flatten(1)
    return inside.abs().sum(1) if isinstance(ball, LInfBall) else inside.norm(dim=1)


def _steepest(ball: Ball, gradient: Tensor, size: Tensor) -> Tensor:
    """A step of ``size`` units per sample along the steepest direction of the norm, in image units."""
    inside = ball.gradient_in_units(gradient)
    if isinstance(ball, LInfBall):
        return inside.sign() * _per_sample(size, inside) * ball.scale
    peak = inside.abs().flatten(1).amax(1)
    inside = inside / _per_sample(torch.where(peak > 0, peak, torch.ones_like(peak)), inside)
    length = inside.double().flatten(1).norm(dim=1).clamp_min(1)
    return inside * _per_sample(size / length, inside) * ball.scale


def _within(ball: Ball, image: Tensor, radius: Tensor) -> Tensor:
    """The image brought to a radius of its own per sample (in units), then into the ball."""
    delta = image - ball.clean
    if isinstance(ball, LInfBall):
        limit = _per_sample(radius, image) * ball.scale
        return ball.project(ball.clean + torch.clamp(delta, -limit, limit))
    factor = radius / ball.size(image).double().clamp_min(torch.finfo(torch.float64).tiny)
    return ball.project(ball.clean + delta * _per_sample(factor.clamp_max(1), image))
