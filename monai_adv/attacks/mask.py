"""Segmentation-mask attacks: a static mask, the adaptive mask, and its dynamic perturbation multiplier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from monai_adv.attacks.base import Attack, Target, positive
from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses.target_logits import TargetLogits
from monai_adv.threats import Ball, Threat
from monai_adv.victims import Head

TAU, BETA = 1e-7, 1e-6  # Ozbulak et al.'s, for summed logits of an un-normalised 2D network on [0, 1]
STEPS = {"calibrated": 50, "paper": 2501}
L2_WEIGHT = {"calibrated": 0.02, "paper": 1.0}
FIRST_STEP = 0.1


class SSM(Attack):
    """Static segmentation mask: ascend the target's logits of all voxels, those already at the target included.

    The ablation of :class:`ASM` without its indicator. Modes:

    - ``paper``: x <- clip(x + tau grad L) with L = sum_v z_target(v) - ||x - x_clean||_2^2 in the image's own units;
      raw gradients, no sign, no normalisation; the last iterate is returned. The published constants have units: they
      belong to summed logits of a 2D network on [0, 1], and their L2 term does next to nothing. The iterate is kept
      in float64, as steps of 1e-7 are lost in float32.
    - ``calibrated`` (ours): everything is measured in the threat's units, and the sum of the logits is multiplied
      once per sample by the constant with which the first step has the max norm ``first_step``
      (``details["scale"]`` says which); the best iterate is returned, by IoU with the target, then (with a ``kappa``)
      by the voxels short of the margin, then by L2.

    Unbounded by default; with a finite eps every step is projected.

    Reference:
        Ozbulak et al., Impact of adversarial examples on deep learning models for biomedical image segmentation,
        MICCAI 2019.

    Args:
        threat: what may change; a finite budget, bounds and support are kept in every step.
        target: rule of the target, see :func:`monai_adv.losses.make_target`; a mask may be given in the call.
        mode: "calibrated" or "paper".
        steps: gradient steps; None is 50 (calibrated) or 2501 (paper).
        first_step: max norm of the first step in the threat's units; calibrated mode only, None is .1.
        l2_weight: weight of the L2 term. Paper mode: as in L above, None is 1. Calibrated mode: against a logit term
            whose first gradient has max norm 1, None is .02; a step never pulls a voxel beyond its clean value.
        tau: step size of paper mode, None is 1e-7.
        **options: see :class:`Attack`.
    """

    name: ClassVar[str] = "ssm"
    reference: ClassVar[str] = "Ozbulak et al. 2019"
    modes: ClassVar[str] = "targeted"
    default_eps: ClassVar[tuple[float, ...] | None] = (math.inf,)
    fixed_loss: ClassVar[bool] = True
    loss: TargetLogits

    def __init__(
        self,
        threat: Threat,
        target: Target = "background",
        mode: str = "calibrated",
        steps: int | None = None,
        first_step: float | None = None,
        l2_weight: float | None = None,
        tau: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(threat, TargetLogits(adaptive=False), target=target, **options)
        if mode not in STEPS:
            raise ConfigError(f"mode {mode!r} is unknown: use 'calibrated' or 'paper'")
        if mode == "paper" and first_step is not None:
            raise ConfigError("first_step belongs to mode 'calibrated'; the step of mode 'paper' is tau")
        if mode == "calibrated" and tau is not None and not isinstance(self, ASMA):
            raise ConfigError("tau belongs to mode 'paper'; the step of mode 'calibrated' is first_step")
        self.mode = mode
        self.steps = positive("steps", STEPS[mode] if steps is None else steps)
        self.l2_weight = _number("l2_weight", L2_WEIGHT[mode] if l2_weight is None else l2_weight, zero=True)
        self.first_step = None if mode == "paper" else _number("first_step", _given(first_step, FIRST_STEP))
        self.tau = None if mode == "calibrated" and not isinstance(self, ASMA) else _number("tau", _given(tau, TAU))

    def _search(self, run: Run) -> None:
        wanted = self._snapshot_steps()
        masks: dict[int, Tensor] = {}
        peak = torch.zeros(len(run.clean), dtype=torch.float64, device=run.clean.device)
        image = run.clean.double() if self.mode == "paper" else run.clean
        for step in range(self.steps):
            objective = self._objective(run, image, peak, masks if step in wanted else None)
            # the start is not a result: a failed attack must not return the clean image
            gradient = run.gradient(image.to(run.clean.dtype), loss=objective, candidate=step > 0)
            gradient = torch.where(run.ball.mask, gradient, torch.zeros_like(gradient))
            multiplier = self._multiplier(run.trace[-1].get("iou", torch.zeros_like(peak)))  # the start: a_0 = tau
            if self.mode == "calibrated":
                gradient = gradient * run.ball.scale  # per unit
                largest = gradient.flatten(1).abs().amax(1).double()
                peak = torch.where(peak > 0, peak, largest)  # once per sample: of its first gradient
            image = run.ball.project(image + self._step(run.ball, image - run.clean, gradient, multiplier, peak))
        image = image.to(run.clean.dtype)
        run.consider(image, loss=self._objective(run, image, peak))
        self._report(run, peak, masks)

    def _step(self, ball: Ball, delta: Tensor, gradient: Tensor, multiplier: Tensor, peak: Tensor) -> Tensor:
        """The change of one iteration, in image units."""

        def flat(values: Tensor) -> Tensor:
            return values.to(delta.dtype).view(-1, *[1] * (delta.dim() - 1))

        if self.first_step is None:
            return flat(multiplier) * (gradient - 2 * self.l2_weight * delta)
        size = self.first_step * multiplier
        # the gradient over its first peak comes first: a peak may be so small that its inverse overflows
        ascent = gradient / flat(torch.where(peak > 0, peak, torch.ones_like(peak)))
        return flat(size) * ascent * ball.scale - flat((2 * self.l2_weight * size).clamp_max(1)) * delta

    def _multiplier(self, iou: Tensor) -> Tensor:
        """Step size of paper mode, or what the first step's size is multiplied by in calibrated mode, ``(B,)``."""
        return torch.full_like(iou, 1.0 if self.tau is None else self.tau)

    def _objective(
        self, run: Run, image: Tensor, peak: Tensor, masks: dict[int, Tensor] | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Equation 2 at ``image``; the L2 term is a constant of the logits, its gradient is added by the step.

        The mask of the voxels that count is put into ``masks`` under the number of the step.
        """
        assert run.target is not None
        target = run.target
        length = _length(run.ball, image, units=self.mode == "calibrated")
        penalty = self.l2_weight * length**2 * (peak if self.mode == "calibrated" else 1)

        step = len(run.trace)

        def objective(logits: Tensor) -> Tensor:
            if masks is not None or self.loss.kappa:
                active = self.loss.active(logits.detach(), target, run.head)
                active = active if run.weight is None else active & run.weight.bool()
                run.shared["short"] = active.flatten(1).sum(1).double()  # of their target, or of the margin to it
                if masks is not None:
                    masks[step] = active.cpu()
            return self.loss.towards(logits, target, run.head, run.weight) - penalty.to(logits)

        return objective

    def _snapshot_steps(self) -> set[int]:
        return set()

    def _rank(self, run: Run, image: Tensor, prediction: Tensor, score: Tensor, objective: Tensor) -> Tensor:
        assert run.target is not None
        entry = run.trace[-1]
        entry["iou"] = target_iou(prediction, run.target, run.head, run.weight)
        if self.mode == "paper":  # the last iterate
            return torch.full_like(entry["iou"], entry["step"])[:, None]
        columns = [entry["iou"], -_length(run.ball, image)]
        if self.loss.kappa:  # the margin that was asked for is part of the aim
            columns.insert(1, -run.shared["short"])
        return torch.stack(columns, dim=1)

    def _report(self, run: Run, peak: Tensor, masks: dict[int, Tensor]) -> None:
        assert run.target is not None
        image, prediction = run.best_image, run.best_prediction
        delta = image - run.clean
        scale = torch.full_like(peak, _given(self.tau, 0.0))
        if self.first_step is not None:  # 0 where there never was a gradient
            scale = torch.where(peak > 0, self.first_step / peak, torch.zeros_like(peak))
        found = {
            "scale": scale,
            "l2": _length(run.ball, image),
            "linf": _units(run.ball, delta).abs().flatten(1).amax(1),
            "l2_absolute": _length(run.ball, image, units=False),
            "linf_absolute": delta.abs().flatten(1).amax(1),
            "iou": target_iou(prediction, run.target, run.head, run.weight),
            "pixel_accuracy": target_accuracy(prediction, run.target, run.weight),
        }
        run.details |= {name: values.double().tolist() for name, values in found.items()}
        if masks:
            run.details["mask_steps"] = [list(masks)] * len(image)
            run.details["masks"] = [[mask[b].clone() for mask in masks.values()] for b in range(len(image))]


class ASM(SSM):
    """Adaptive segmentation mask: as SSM, but a voxel counts only while it is not at its target.

    L = sum_v z_target(v) [argmax z(v) != target(v)] - ||x - x_clean||_2^2; for a sigmoid head every bit for itself,
    with the logit's sign turned towards the target's bit. The modes ``paper`` and ``calibrated`` (ours) are those of
    :class:`SSM`.

    Voxels drop out the moment they flip, so that the result sits on the decision boundary and may not survive the
    rounding of a file: ``kappa`` (ours) asks for a margin.

    Reference:
        Ozbulak et al., Impact of adversarial examples on deep learning models for biomedical image segmentation,
        MICCAI 2019.

    Args:
        threat: what may change.
        target: rule of the target; a mask may be given in the call.
        kappa: a voxel counts until it is at its target by more than this, in logits; None is .1 (calibrated) or 0
            (paper).
        snapshots: keep the mask of voxels that count at this many steps, spaced geometrically, in
            ``details["masks"]`` (and ``details["mask_steps"]``).
        **options: mode, steps, first_step, l2_weight, tau of :class:`SSM`, and those of :class:`Attack`.
    """

    name: ClassVar[str] = "asm"

    def __init__(
        self,
        threat: Threat,
        target: Target = "background",
        kappa: float | None = None,
        snapshots: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(threat, target, **options)
        self.kappa = _number("kappa", _given(kappa, KAPPA[self.mode]), zero=True)
        self.snapshots = positive("snapshots", snapshots) if snapshots else 0
        self.loss = TargetLogits(adaptive=True, kappa=self.kappa)

    def _snapshot_steps(self) -> set[int]:
        if not self.snapshots:
            return set()
        # most of the mask is gone after a few steps
        return {round(float(step)) - 1 for step in np.geomspace(1, self.steps, min(self.snapshots, self.steps))}


KAPPA = {"calibrated": 0.1, "paper": 0.0}


class ASMA(ASM):
    """Adaptive segmentation mask attack: ASM whose step grows with the IoU between prediction and target.

    a_0 = tau, a_n = tau + beta IoU(argmax z(x_n), target) ("dynamic perturbation multiplier"). In calibrated mode
    (ours) the step is ``first_step (1 + beta / tau IoU)``, so that only the ratio of the two counts.

    Reference:
        Ozbulak et al., Impact of adversarial examples on deep learning models for biomedical image segmentation,
        MICCAI 2019.

    Args:
        threat: what may change.
        target: rule of the target; a mask may be given in the call.
        tau: None is 1e-7.
        beta: None is 1e-6.
        **options: kappa and snapshots of :class:`ASM`; mode, steps, first_step, l2_weight of :class:`SSM`; those of
            :class:`Attack`.
    """

    name: ClassVar[str] = "asma"

    def __init__(
        self,
        threat: Threat,
        target: Target = "background",
        tau: float | None = None,
        beta: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(threat, target, tau=tau, **options)
        self.beta = _number("beta", _given(beta, BETA), zero=True)

    def _multiplier(self, iou: Tensor) -> Tensor:
        assert self.tau is not None
        if self.mode == "paper":
            return self.tau + self.beta * iou
        return 1 + self.beta / self.tau * iou


def target_iou(prediction: Tensor, target: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
    """Intersection over union of a prediction and a target, ``(B,)`` float64.

    Softmax: the mean over the classes that are in the target or in the prediction, background included. Sigmoid: the
    mean over the regions that are in either. An empty union is skipped; if nothing is left the two agree, and it is 1.

    Args:
        prediction: ``(B, 1 or K, *spatial)`` as :meth:`Head.predict` gives it.
        target: same shape.
        head: their head.
        weight: voxels that count, ``(B, 1, *spatial)``; all if None.
    """
    if head.exclusive:
        classes = 1 + max(int(prediction.max()), int(target.max()))
        overlap = torch.zeros(len(target), classes, dtype=torch.float64, device=target.device)
        union = torch.zeros_like(overlap)
        joint = target * classes + prediction
        for sample, pairs in enumerate(joint):
            counted = pairs.flatten() if weight is None else pairs[weight[sample].bool()]
            counts = torch.bincount(counted, minlength=classes * classes).view(classes, classes).double()
            overlap[sample] = counts.diagonal()
            union[sample] = counts.sum(0) + counts.sum(1) - overlap[sample]
    else:
        a, b = prediction.bool(), target.bool()
        if weight is not None:
            a, b = a & weight.bool(), b & weight.bool()
        overlap, union = ((a & b).flatten(2).sum(2).double(), (a | b).flatten(2).sum(2).double())
    present = (union > 0).double()
    total = (overlap / union.clamp_min(1)).sum(1) / present.sum(1).clamp_min(1)
    return torch.where(present.any(1), total, torch.ones_like(total))


def target_accuracy(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Share of voxels that are at their target (for a sigmoid head with all their bits), ``(B,)`` float64.

    Args:
        prediction: ``(B, 1 or K, *spatial)``.
        target: same shape.
        weight: voxels that count, ``(B, 1, *spatial)``; all if None.
    """
    right = (prediction == target).all(1, keepdim=True)
    counted = torch.ones_like(right) if weight is None else weight.bool().expand_as(right)
    return (right & counted).flatten(1).sum(1).double() / counted.flatten(1).sum(1).double().clamp_min(1)


def _units(ball: Ball, delta: Tensor) -> Tensor:
    return delta / torch.where(ball.scale > 0, ball.scale, torch.ones_like(ball.scale))


def _length(ball: Ball, image: Tensor, units: bool = True) -> Tensor:
    """Euclidean length of the perturbation, ``(B,)`` float64."""
    delta = image - ball.clean
    return (_units(ball, delta) if units else delta).double().flatten(1).norm(dim=1)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _number(name: str, value: float, zero: bool = False) -> float:
    usable = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not usable or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{name} must be a finite number {'>=' if zero else '>'} 0, got {value!r}")
    return float(value)
