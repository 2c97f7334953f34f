"""Learned synthesis: smooth changes of anatomy and appearance that lower Dice by the amount that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from monai_adv.attacks.base import positive
from monai_adv.attacks.physical_geometry import GeometricAttack
from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses import Dice
from monai_adv.losses.region_dice import (
    PRESENT,
    check_region,
    counted_regions,
    region_bits,
    region_dice,
    region_probabilities,
)
from monai_adv.networks.synthesis import effect_arguments
from monai_adv.networks.synthesis_checkpoint import load_generator
from monai_adv.threats import Threat
from monai_adv.transforms.physics import Effect, Synthesis, jacobian_determinant
from monai_adv.transforms.physics.effect import Parameters
from monai_adv.victims import guard

_START = 0.05  # of the threat's eps: how far the fields start from nothing where no generator gives them
_SHRINK = 0.8
_SHRINKS = 20  # down to a hundredth, where no field within its limits folds


@dataclass
class _Aim:
    """What is asked for, per sample, and what every evaluated image had; all tensors ``(B,)``."""

    clean: Tensor  # region Dice of the clean image
    target: Tensor
    scale: Tensor  # of the image that is evaluated next
    folds: Tensor
    final: bool = False  # whether it is the control, which is returned whatever it does
    drawn: list[Tensor] = field(default_factory=list)  # its region Dice, one per draw
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # step -> region Dice, scale

    def take(self) -> Tensor:
        """The Dice of the image just evaluated."""
        dice = torch.stack(self.drawn).mean(0)
        self.drawn = []
        return dice

    def at(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Region Dice and scale of every sample at its own step."""
        found = [[values[b] for values in self.seen[int(k)]] for b, k in enumerate(step)]
        dice, scale = zip(*found)
        return torch.stack(dice), torch.stack(scale)


class SynthesisAttack(GeometricAttack):
    """Learned synthesis: moved anatomy and changed appearance that lower Dice by the amount asked for, no more.

    A trained generator gives smooth fields in one forward pass (or gradient steps find them, case by case); they are
    applied by :class:`monai_adv.transforms.Synthesis`. Then one number per case, the fields' scale, is searched so that
    the Dice against the moved truth lies at ``clean - drop``, or at 0 if that is negative: on a grid from small to
    large, then by bisection between the first two neighbours that bracket it. The image nearest to it is returned; if
    none comes near, ``details`` say how far it got. Images whose deformation folds are refused.

    ``result.success`` is what it is for every attack (``goal``, mean Dice over all regions); whether the drop was hit
    is ``details["hit"]``. ``details``, per sample: ``requested_drop``, ``drop`` and ``dice`` (of the chosen regions,
    against ``result.label``), ``clean_dice``, ``hit`` (drop within ``tolerance``), ``scale``, ``magnitude`` (size of
    the parameters in limits), ``min_jacobian`` (> 0: no folding), ``max_displacement_mm``, ``max_bias`` (relative
    change) and ``max_residual`` (standard deviations).

    Reference:
        Chen et al., Intelligent image synthesis to attack a segmentation CNN using adversarial learning, SASHIMI 2019:
        anatomical variation and appearance change, learned adversarially, with a drop of Dice chosen by the user.
        Nothing more is published; networks, fields, search, control and defaults are ours.

    Args:
        threat: eps is the share of the effect's limits that the parameters may use, 1 for all of them, however far the
            fields are scaled: what grows beyond is cut.
        generator: checkpoint written by :func:`monai_adv.networks.save_generator`, or a
            :class:`monai_adv.networks.SynthesisGenerator`; None optimises from small random fields.
        drop: how much the Dice shall fall, in (0, 1].
        optimize: refine the fields of every case by gradient until the drop is reached; without a generator
            there is no other way.
        steps: gradient steps of ``optimize``, at most.
        region: whose Dice: "present", the mean over the regions the moved truth has, or a region's name.
        samples: codes (random starts) that are tried until the drop is hit; what is nearest to it is returned.
        s_max: largest scale of the fields.
        tolerance: of the drop; the search stops there.
        grid: scales on the coarse grid.
        bisections: of the interval that brackets the drop.
        control: search as ever, then return random fields of the same root mean square over the foreground, each of the
            fields by itself, evaluated once: what equal strength does by chance. They may use more than eps, and are
            weakened only where they would fold.
        effect: arguments of :class:`monai_adv.transforms.Synthesis`, without a generator; a generator brings its own.
        label_source: see :class:`Attack`.
        goal: see :class:`Attack`.
        seed: see :class:`Attack`.
        draws: see :class:`Attack`.

    Raises:
        ConfigError: for options that cannot be, and without a generator unless ``optimize``.
        CheckpointError: for a file that holds no generator.
    """

    name: ClassVar[str] = "synthesis"
    reference: ClassVar[str] = "idea of Chen et al. 2019"
    modes: ClassVar[str] = "untargeted"
    units: ClassVar[str] = Synthesis.units
    default_eps: ClassVar[tuple[float, ...]] = (Synthesis.default_magnitude,)
    effect_class: ClassVar[type[Effect]] = Synthesis
    fixed_loss: ClassVar[bool] = True
    white_box: ClassVar[bool] = False  # a drop that was asked for says nothing about the worst case
    effect: Synthesis

    def __init__(
        self,
        threat: Threat,
        generator: str | Path | nn.Module | None = None,
        drop: float = 0.3,
        optimize: bool = False,
        steps: int = 20,
        region: str = PRESENT,
        samples: int = 1,
        s_max: float = 4.0,
        tolerance: float = 0.01,
        grid: int = 8,
        bisections: int = 8,
        control: bool = False,
        effect: Mapping[str, Any] | None = None,
        label_source: str = "truth",
        goal: float = 0.5,
        seed: int = 0,
        draws: int = 1,
    ) -> None:
        for name, value, most in (("drop", drop, 1.0), ("tolerance", tolerance, 1.0), ("s_max", s_max, 100.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
                raise ConfigError(f"{name} must be a number in (0, {most:g}], got {value!r}")
        if generator is None and not optimize:
            raise ConfigError(
                "synthesis needs a generator, e.g. generator: generator.pt, or optimize: true, which finds the fields "
                "of every case by gradient"
            )
        if generator is not None and effect is not None:
            raise ConfigError("effect belongs to the generator, which was trained for its own: leave it out")
        self.generator, self._own = generator, isinstance(generator, (str, Path))
        self._network = load_generator(generator) if isinstance(generator, (str, Path)) else generator
        arguments = effect if self._network is None else getattr(self._network, "effect", None)
        if self._network is not None and not (isinstance(self._network, nn.Module) and isinstance(arguments, Mapping)):
            raise ConfigError(f"generator must be a file or a SynthesisGenerator, got {type(generator).__name__}")
        self._arguments = effect_arguments(arguments)
        super().__init__(
            threat, Synthesis(**self._arguments), Dice(), steps=steps, control=control,
            label_source=label_source, goal=goal, seed=seed, draws=draws,
        )  # fmt: skip
        self.drop, self.s_max, self.tolerance = float(drop), float(s_max), float(tolerance)
        self.optimize, self.region = bool(optimize), region
        self.samples, self.grid = positive("samples", samples), positive("grid", grid)
        self.bisections = positive("bisections", bisections)

    def parameters(self) -> dict[str, Any]:
        unused = ("loss", "step_size", "restarts")  # of the base class, which searches in another way
        found = {k: v for k, v in super().parameters().items() if k not in unused}
        if self.generator is not None:
            found["generator"] = str(self.generator) if self._own else type(self.generator).__name__
        return {**found, "effect": dict(self._arguments)}

    # ---------------------------------------------------------------------------------------------------- the search
    def _search(self, run: Run) -> None:
        check_region(run.head, self.region)
        aim = run.shared["aim"] = self._aim(run)
        for sample in range(self.samples):
            found = self._fields(run)
            if self.optimize and run.ball.eps > 0:
                found = self._refined(run, found, sample)
            if bool(self._scaled_to_hit(run, found, sample).all()):
                break
        scale = aim.at(run.best_step)[1]
        if self.control:
            aim.final = True
            self._evaluate(run, self._alike(run, run.best_parameters), scale, self.samples)
        self._tell(run, aim, scale)

    def _aim(self, run: Run) -> _Aim:
        nothing = torch.zeros(len(run.clean), dtype=torch.float64, device=run.clean.device)
        aim = _Aim(nothing, nothing, nothing, nothing.bool())
        run.shared["aim"] = aim  # where the clean image's Dice arrives
        value = partial(self._value, run, warp=_still)
        if self.draws == 1:
            value(run.clean_logits)
        else:  # the mean of the draws' Dice, as for every other image, not the Dice of their mean
            run.consider(run.clean, loss=value, candidate=False)
        aim.clean = aim.take()
        aim.target = (aim.clean - self.drop).clamp_min(0)
        return aim

    def _value(self, run: Run, logits: Tensor, warp: Callable[[Tensor], Tensor]) -> Tensor:
        """How near the Dice is to its target: the hard one's distance, with the soft one's slope."""
        aim: _Aim = run.shared["aim"]
        truth, weight = region_bits(run.head, warp(run.label)), run._moved_weight(warp)
        counted = counted_regions(run.head, truth, self.region)
        dice = region_dice(region_bits(run.head, run.victim.discretise(logits)), truth, counted, weight)
        aim.drawn.append(dice)
        if logits.requires_grad:
            soft = region_dice(region_probabilities(run.head, logits), truth, counted, weight)
            dice = soft + (dice - soft).detach()
        return -(dice - aim.target).abs()

    def _rank(self, run: Run, image: Tensor, prediction: Tensor, score: Tensor, objective: Tensor) -> Tensor:
        """What does not fold comes first, then what is nearest to the drop; the control is above all."""
        aim: _Aim = run.shared["aim"]
        dice = aim.take()
        aim.seen[run.trace[-1]["step"]] = dice, aim.scale
        control = torch.full_like(dice, float(aim.final))
        return torch.stack([control, (~aim.folds).to(dice), -(dice - aim.target).abs()], dim=1)

    def _fields(self, run: Run) -> Parameters:
        """Parameters at scale 1: the generator's, or small random ones to start from."""
        if self._network is None:
            return self.effect.random(run.clean, run.spacing, _START * run.ball.eps, run.generator)
        network = self._network.to(run.clean.device) if self._own else self._network
        weight = next(network.parameters(), run.clean)
        drop = torch.full((len(run.clean),), self.drop, dtype=weight.dtype, device=weight.device)
        with guard(network), torch.no_grad():
            raw = network(run.clean.to(weight), drop, generator=run.generator)
        return self.effect.from_unit({k: raw[k] for k in self.effect.unit_limits() if k in raw}, run.clean, run.spacing)

    def _refined(self, run: Run, parameters: Parameters, sample: int) -> Parameters:
        """Gradient steps, ever shorter ones, until the Dice is at its target or below: no field grows for nothing."""
        aim: _Aim = run.shared["aim"]
        parameters = self.effect.project(parameters, run.ball.eps)
        for step in range(self.steps):
            aim.scale, aim.folds = torch.ones_like(aim.clean), self._folds(run, parameters)
            slopes = self._slopes(run, parameters, sample)
            short = aim.seen[run.trace[-1]["step"]][0] > aim.target
            if not bool(short.any()):
                break
            share = self._share() * (1 - step / self.steps)
            stepped = self.effect.step(parameters, slopes, share, run.ball.eps)
            parameters = {k: torch.where(_flat(short, v), v, parameters[k]) for k, v in stepped.items()}
        return parameters

    def _scaled_to_hit(self, run: Run, found: Parameters, sample: int) -> Tensor:
        """Search the scale of the fields, every sample for itself; which samples are hit, ``(B,)`` bool."""
        aim: _Aim = run.shared["aim"]
        most = self._largest(run, found)
        low, high = torch.zeros_like(most), most
        tried, halved = (torch.zeros_like(most, dtype=torch.long) for _ in range(2))
        bracketed = torch.zeros_like(most, dtype=torch.bool)
        last = most
        known = bracketed
        if aim.seen:  # by what came before; that image stands for these samples, so that they stay as they are
            dice, last = aim.at(run.best_step)
            known = self._near(dice, aim)
        done = known
        while not bool(done.all()):
            scale = torch.where(bracketed, (low + high) / 2, most * (tried + 1) / self.grid)
            last = torch.where(done, last, scale)  # whoever is done is evaluated again as it is, beside the others
            parameters = self._at(run, found, last)
            if bool(known.any()):
                parameters = {k: torch.where(_flat(known, v), run.best_parameters[k], v) for k, v in parameters.items()}
            dice = self._evaluate(run, parameters, last, sample)
            below = dice <= aim.target
            tried, halved = tried + (~bracketed).long(), halved + bracketed.long()
            bracketed = bracketed | below
            low, high = torch.where(below, low, last), torch.where(below, last, high)
            spent = torch.where(bracketed, halved >= self.bisections, tried >= self.grid)
            done = done | self._near(dice, aim) | spent | (run.ball.eps == 0)
        return self._near(aim.at(run.best_step)[0], aim)

    def _near(self, dice: Tensor, aim: _Aim) -> Tensor:
        return (dice - aim.target).abs() <= self.tolerance

    def _evaluate(self, run: Run, parameters: Parameters, scale: Tensor, sample: int) -> Tensor:
        """Region Dice of the image of these parameters, which is considered as the result."""
        aim: _Aim = run.shared["aim"]
        field = self.effect.displacement(parameters, run.clean.shape[2:], run.spacing)
        aim.scale, aim.folds = scale, self._smallest_volume(run, field) <= 0
        warp = self._warp(run, parameters, field)
        entry = run.consider(
            self._image(run, parameters, field), loss=partial(self._value, run, warp=warp), restart=sample, warp=warp,
            parameters=parameters,
        )  # fmt: skip
        return aim.seen[entry["step"]][0]

    # --------------------------------------------------------------------------------------------------- the fields
    def _at(self, run: Run, found: Parameters, scale: Tensor) -> Parameters:
        return self.effect.project(self.effect.scaled(found, scale), run.ball.eps)

    def _largest(self, run: Run, found: Parameters) -> Tensor:
        """The largest scale that is tried: ``s_max``, or less where the deformation would fold."""
        scale = torch.full((len(run.clean),), self.s_max, dtype=torch.float64, device=run.clean.device)
        for _ in range(_SHRINKS):
            folds = self._folds(run, self._at(run, found, scale))
            if not bool(folds.any()):
                break
            scale = torch.where(folds, _SHRINK * scale, scale)
        return scale

    def _folds(self, run: Run, parameters: Parameters) -> Tensor:
        if "velocity" not in parameters:
            return torch.zeros(len(run.clean), dtype=torch.bool, device=run.clean.device)
        return self._jacobian(run, parameters) <= 0

    def _jacobian(self, run: Run, parameters: Parameters) -> Tensor:
        return self._smallest_volume(run, self.effect.displacement(parameters, run.clean.shape[2:], run.spacing))

    def _smallest_volume(self, run: Run, field: Tensor) -> Tensor:
        return jacobian_determinant(field, run.spacing).flatten(1).amin(1)

    def _natural(self, run: Run, parameters: Parameters) -> dict[str, Tensor]:
        """The fields at full resolution, in the units of their parameters."""
        fields = self.effect.splines(run.clean, parameters, run.spacing)
        if "velocity" in parameters:
            fields["velocity"] = self.effect.displacement(parameters, run.clean.shape[2:], run.spacing)
        return fields

    def _strength(self, run: Run, parameters: Parameters) -> dict[str, Tensor]:
        """Root mean square of every field over the foreground, ``(B,)`` float64."""
        inside = run.ball.mask & (run.clean != 0)
        found = {}
        for name, values in self._natural(run, parameters).items():
            where = inside.any(1, keepdim=True) if name == "velocity" else inside
            total = torch.where(where, values.square(), 0.0).flatten(1).sum(1, dtype=torch.float64)
            found[name] = (total / where.expand_as(values).flatten(1).sum(1)).sqrt()
        return found

    def _alike(self, run: Run, found: Parameters) -> Parameters:
        """Random parameters whose fields have the root mean square of the found ones'."""
        wanted = self._strength(run, found)
        drawn = self.effect.random(run.clean, run.spacing, 1.0, run.generator)
        for _ in range(4):  # a displacement is not quite proportional to its velocity
            factor = {k: wanted[k] / torch.where(v > 0, v, 1.0) for k, v in self._strength(run, drawn).items()}
            drawn = {k: v * _flat(factor[k], v).to(v) for k, v in drawn.items()}
        for _ in range(_SHRINKS):
            folds = self._folds(run, drawn)
            if not bool(folds.any()):
                break
            drawn["velocity"] = drawn["velocity"] * _flat(torch.where(folds, _SHRINK, 1.0), drawn["velocity"])
        return drawn

    def _tell(self, run: Run, aim: _Aim, scale: Tensor) -> None:
        best, dice = run.best_parameters, aim.at(run.best_step)[0]
        fields = self._natural(run, best)
        nothing = torch.zeros_like(dice)

        def largest(name: str) -> Tensor:
            if name not in fields:
                return nothing
            values = fields[name]
            values = torch.linalg.vector_norm(values, dim=1) if name == "velocity" else values.abs()
            return values.flatten(1).amax(1)

        drop = aim.clean - dice
        told = {
            "requested_drop": torch.full_like(dice, self.drop),
            "drop": drop,
            "dice": dice,
            "clean_dice": aim.clean,
            "hit": (drop - self.drop).abs() <= self.tolerance,
            "scale": scale,
            "magnitude": self.effect.size(best),
            "min_jacobian": self._jacobian(run, best),
            "max_displacement_mm": largest("velocity"),
            "max_bias": torch.expm1(largest("log_bias")),
            "max_residual": largest("residual"),
        }
        run.details |= {name: values.tolist() for name, values in told.items()}


def _still(mask: Tensor) -> Tensor:
    return mask


def _flat(values: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` viewed so that it goes with ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))
