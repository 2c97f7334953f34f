"""The parts of ALMAProx: penalty, multipliers and proximal steps (Rony et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_adv.attacks.counted import fooled, resistance, without_hardest
from monai_adv.attacks.run import Run

_TOLERANCE = 1e-4  # a margin of exactly 0 is a tie, not a success
_TAU, _GAMMA, _EVERY = 0.95, 2.0, 10  # a constraint that shrank by less in so many steps has its penalty multiplied
_ALPHA = 0.8  # memory of the moving averages
_SCALES, _SCALE_RATE = (0.1, 1.0), 0.02  # of the constraints
_MULTIPLIERS = (1e-12, 100.0)
_DECAY = 0.25  # share of the steps after which all of the hardest voxels are left out
_LARGEST_RHO = 1e6  # ours: so that no float overflows in a long search


def penalty(y: Tensor, mu: Tensor, rho: Tensor) -> Tensor:
    """Penalty of a constraint ``y <= 0`` with multiplier ``mu``: its derivative at 0 is ``mu``, on both sides.

    ``mu y + mu rho y^2 + rho^2 y^3 / 6`` for ``y >= 0`` and ``mu y / (1 - max(1, rho) y)`` below.

    Example:
        >>> one = torch.ones(3)
        >>> penalty(torch.tensor([-1.0, 0.0, 1.0]), one, one)
        tensor([-0.5000,  0.0000,  2.1667])
    """
    above = y.clamp_min(0)
    below = y.clamp_max(0)
    violated = mu * above + mu * rho * above**2 + rho**2 * above**3 / 6
    return torch.where(y >= 0, violated, mu * below / (1 - rho.clamp_min(1) * below))


def penalty_slope(y: Tensor, mu: Tensor, rho: Tensor) -> Tensor:
    """Derivative of :func:`penalty` by ``y``: the next multiplier."""
    above, below = y.clamp_min(0), y.clamp_max(0)
    violated = mu + 2 * mu * rho * above + rho**2 * above**2 / 2
    return torch.where(y >= 0, violated, mu / (1 - rho.clamp_min(1) * below) ** 2)


class Lagrangian:
    """Multipliers and penalties of one constraint per counted voxel (bit): that it is fooled.

    The constraint is the logit margin; with three classes or more it is divided by the distance of the first to the
    third logit (as in DLR, the divisor without a gradient), which makes it free of the logits' scale. The hardest
    voxels are left out, from none at the first step to ``1 - nu`` after a quarter of them.

    Args:
        run: the attack on a batch.
        counted: ``(B, 1, *spatial)``.
        nu: share that has to be fooled.
        steps: of the search.
    """

    def __init__(self, run: Run, counted: Tensor, nu: float, steps: int) -> None:
        self.run, self.counted, self.nu, self.steps = run, counted, nu, steps
        shape = run.label.shape
        self.mu = torch.ones(shape, dtype=torch.float64, device=run.clean.device)
        self.rho = torch.full_like(self.mu, 0.01)
        self.kept = counted.expand(shape)
        self._scale = torch.ones(len(run.clean), dtype=torch.float64, device=run.clean.device)
        self._before = torch.zeros_like(self.mu)
        self._was_fooled = torch.zeros(shape, dtype=torch.bool, device=run.clean.device)

    def constraint(self, logits: Tensor) -> Tensor:
        """What has to be at most 0, scaled, float64 of the label's shape."""
        margin = resistance(self.run, logits)
        if self.run.head.exclusive and logits.shape[1] >= 3:
            first = logits.detach().topk(3, dim=1).values
            margin = margin / (first[:, :1] - first[:, 2:]).clamp_min(torch.finfo(logits.dtype).eps)
        return (margin.double() + _TOLERANCE) * self._scale.view(-1, *[1] * (margin.dim() - 1))

    def follow(self, logits: Tensor, met: Tensor, step: int) -> None:
        """Adapt scale, mask, penalties and multipliers to an iterate.

        Args:
            logits: of the iterate, without a graph.
            met: samples whose criterion it reaches, ``(B,)``.
            step: from 0.
        """
        rate = torch.where(met, 1 + _SCALE_RATE, 1 - _SCALE_RATE).double()
        self._scale = (self._scale / rate).clamp(*_SCALES)
        constraint = self.constraint(logits)
        left_out = (1 - self.nu) * min(1.0, step / max(1, _DECAY * self.steps))
        self.kept = without_hardest(resistance(self.run, logits), self.counted, left_out)
        self._was_fooled |= fooled(self.run, self.run.head.predict(logits))
        if step == 0:
            self._before = constraint
            return
        if (step + 1) % _EVERY == 0:
            improved = torch.where(self.kept, constraint, torch.zeros_like(constraint)) <= _TAU * self._before
            grown = (_GAMMA * self.rho).clamp_max(_LARGEST_RHO)
            self.rho = torch.where(self._was_fooled | improved, self.rho, grown)
            self._before = constraint
            self._was_fooled = torch.zeros_like(self._was_fooled)
        slope = torch.where(self.kept, penalty_slope(constraint, self.mu, self.rho), torch.zeros_like(self.mu))
        self.mu = torch.lerp(slope, self.mu, _ALPHA).clamp(*_MULTIPLIERS)

    def penalty(self, logits: Tensor) -> Tensor:
        """Sum over the voxels that are kept, ``(B,)``."""
        values = penalty(self.constraint(logits), self.mu, self.rho)
        return torch.where(self.kept, values, torch.zeros_like(values)).flatten(1).sum(1)


def prox_linf(u: Tensor, amount: Tensor, metric: Tensor) -> Tensor:
    """The point that minimises ``sum metric (p - u)^2 / 2 + amount max|p|``, per sample.

    It is ``u`` cut at the height ``t`` above which ``metric (|u| - t)`` sums to ``amount``: Newton's steps from below
    reach the root of that piecewise linear, convex function after finitely many.

    Args:
        u: ``(B, ...)``.
        amount: ``(B,)``, > 0.
        metric: positive weights, shape of ``u``.

    Example:
        >>> prox_linf(torch.tensor([[3.0, 1.0, -2.0]]), torch.tensor([2.0]), torch.ones(1, 3))
        tensor([[ 1.5000,  1.0000, -1.5000]])
    """
    cut = []
    for values, weights, pull in zip(u, metric, amount.tolist()):
        height, heights, weight = 0.0, values.abs().flatten(), weights.flatten()
        while True:
            above = heights > height
            heights, weight = heights[above], weight[above]
            mass = float(weight.sum(dtype=torch.float64))
            if mass == 0:
                break
            higher = (float((weight.double() * heights).sum()) - pull) / mass
            if higher <= height:
                break
            height = higher
        cut.append(values.clamp(-height, height))
    return torch.stack(cut)


def prox_l2(u: Tensor, amount: Tensor, metric: Tensor) -> Tensor:
    """The point that minimises ``sum metric (p - u)^2 / 2 + amount |p|`` (Euclidean), per sample.

    It is ``metric r u / (metric r + amount)`` with its own length ``r``, the root of ``1 / |metric u / (metric r +
    amount)| = 1``; the left side is concave, so Newton's steps from 0 approach it from below.

    Args:
        u: ``(B, ...)``.
        amount: ``(B,)``, > 0.
        metric: positive weights, shape of ``u``.

    Example:
        >>> prox_l2(torch.tensor([[3.0, 4.0]]), torch.tensor([2.5]), torch.ones(1, 2))
        tensor([[1.5000, 2.0000]])
    """
    found = []
    for values, weights, pull in zip(u, metric, amount.tolist()):
        moved = values != 0
        v, weight = values[moved].double(), weights[moved].double()
        force, length = weight * v, 0.0
        while len(v):
            below = weight * length + pull
            shares = force / below
            inverse = 1 / float(shares.norm())
            if inverse >= 1 - 1e-12:
                break
            slope = inverse**3 * float((shares.square() * weight / below).sum())
            step = (1 - inverse) / slope
            length += step
            if step <= 1e-12 * length:
                break
        point = torch.zeros_like(values)
        if length > 0:
            point[moved] = (length * force / (weight * length + pull)).to(values.dtype)
        found.append(point)
    return torch.stack(found)
