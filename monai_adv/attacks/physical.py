"""Worst cases of physical changes: gradient ascent in their parameters, with a random control of equal magnitude."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from monai_adv.attacks.base import Attack, positive
from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses import AttackLoss
from monai_adv.threats import Threat
from monai_adv.transforms.physics import BiasField, Effect, Gamma
from monai_adv.transforms.physics.effect import Parameters


class PhysicalAttack(Attack):
    """Sign ascent in the parameters of a physical effect, from a random start inside the magnitude.

    The threat's eps is the effect's magnitude in its physical units. The label moves with the image where anatomy
    moves, and ``result.label`` is what the prediction has to be scored against. ``result.parameters`` are what the
    effect's transform takes.

    Args:
        threat: a :class:`monai_adv.threats.Parametric` threat.
        effect: the effect.
        loss: what is ascended.
        steps: gradient steps per restart.
        step_size: step as a share of the magnitude; None is ``2.5 / steps``.
        restarts: independent random starts.
        control: search nothing and draw random parameters of the full magnitude instead, ``restarts`` times; with
            one draw the control that a table shows beside the attack.
        **options: see :class:`Attack`.
    """

    norms: ClassVar[tuple[str, ...]] = ("parameter",)
    effect_class: ClassVar[type[Effect]]

    def __init__(
        self,
        threat: Threat,
        effect: Effect,
        /,
        loss: str | AttackLoss = "dice_ce",
        steps: int = 10,
        step_size: float | None = None,
        restarts: int = 1,
        control: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(threat, loss, **options)
        self.effect = effect
        self.steps = positive("steps", steps)
        if step_size is not None and not (isinstance(step_size, (int, float)) and 0 < step_size <= 1):
            raise ConfigError(f"step_size must be a share of the magnitude in (0, 1], got {step_size!r}")
        self.step_size = step_size
        self.restarts = positive("restarts", restarts)
        self.control = bool(control)
        if effect.geometric and threat.channels is not None:
            raise ConfigError(f"{self.name} moves the anatomy, so all modalities move: leave channels out")

    def _search(self, run: Run) -> None:
        magnitude = run.ball.eps
        if self.effect.positive and bool((run.clean < 0).any()):
            raise ConfigError(
                f"{self.name} needs magnitude images without negative values: attack in scanner units with the "
                "normalisation inside the victim"
            )
        for restart in range(self.restarts):
            draw = self.effect.control if self.control else self.effect.random
            parameters = self._free(run, draw(run.clean, run.spacing, magnitude, run.generator))
            for _ in range(0 if self.control else self.steps):
                parameters = self._step(run, parameters, magnitude, restart)
            run.consider(
                self._image(run, parameters), restart=restart, warp=self._warp(run, parameters), parameters=parameters
            )  # fmt: skip
        best = run.best_parameters
        run.details["magnitude"] = self.effect.size(best).tolist()

    def _step(self, run: Run, parameters: Parameters, magnitude: float, restart: int) -> Parameters:
        leaves = {k: v.detach().requires_grad_(True) for k, v in parameters.items()}
        with torch.enable_grad():
            image = self._image(run, leaves)
        # the chain rule by hand: first down to the image in the memory of one window batch, then to the parameters
        gradient = run.gradient(
            image, restart=restart, warp=self._warp(run, parameters), parameters=parameters
        )  # fmt: skip
        slopes = torch.autograd.grad(image, list(leaves.values()), gradient)
        return self._free(run, self.effect.step(parameters, dict(zip(leaves, slopes)), self._share(), magnitude))

    def _share(self) -> float:
        """Length of a step as a share of the magnitude."""
        return self.step_size if self.step_size is not None else min(1.0, 2.5 / self.steps)

    def _image(self, run: Run, parameters: Parameters) -> Tensor:
        changed = self.effect.apply(run.clean, parameters, run.spacing, run.ball.mask)
        return run.ball.project(changed)

    def _warp(self, run: Run, parameters: Parameters) -> Callable[[Tensor], Tensor] | None:
        if not self.effect.geometric:
            return None
        fixed = {k: v.detach() for k, v in parameters.items()}
        return lambda mask: self.effect.warp_label(mask, fixed, run.spacing)

    def _free(self, run: Run, parameters: Parameters) -> Parameters:
        """Parameters of modalities that may not change are zero."""
        if self.effect.geometric:
            return parameters
        moving = run.ball.mask.flatten(2).any(2)
        return {k: torch.where(moving.view(*moving.shape, *[1] * (v.dim() - 2)), v, 0.0) for k, v in parameters.items()}


class BiasFieldAttack(PhysicalAttack):
    """Worst-case coil shading: a smooth multiplicative bias field per modality.

    Reference:
        Chen et al., Enhancing MR image segmentation with realistic adversarial data augmentation (AdvChain), Medical
        Image Analysis 2022. Parametrisation and defaults are ours.

    Args:
        threat: eps is the largest relative change, e.g. .3 for factors between 1 / 1.3 and 1.3.
        knot_mm: distance of the field's control points in mm.
        **options: see :class:`PhysicalAttack`.
    """

    name: ClassVar[str] = "bias_field"
    reference: ClassVar[str] = "Chen et al. 2022"
    units: ClassVar[str] = BiasField.units
    default_eps: ClassVar[tuple[float, ...]] = (BiasField.default_magnitude,)
    effect_class: ClassVar[type[Effect]] = BiasField

    def __init__(self, threat: Threat, knot_mm: float = 60.0, **options: Any) -> None:
        super().__init__(threat, BiasField(knot_mm), **options)
        self.knot_mm = knot_mm


class GammaAttack(PhysicalAttack):
    """Worst-case monotone contrast: one exponent per modality over the support's own intensity range.

    Reference:
        Chen et al., AdvChain, Medical Image Analysis 2022, names intensity changes; formula and defaults are ours.

    Args:
        threat: eps limits the exponent, e.g. .5 for 1 / 1.5 to 1.5.
        **options: see :class:`PhysicalAttack`.
    """

    name: ClassVar[str] = "gamma"
    reference: ClassVar[str] = "intensity change, ours"
    units: ClassVar[str] = Gamma.units
    default_eps: ClassVar[tuple[float, ...]] = (Gamma.default_magnitude,)
    effect_class: ClassVar[type[Effect]] = Gamma

    def __init__(self, threat: Threat, **options: Any) -> None:
        super().__init__(threat, Gamma(), **options)
