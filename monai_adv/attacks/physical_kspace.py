"""Worst cases of the acquisition: motion, ghosting and truncation in k-space, Rician noise. Anatomy stays."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from monai_adv.attacks.physical import PhysicalAttack
from monai_adv.attacks.run import Run
from monai_adv.threats import Threat
from monai_adv.transforms.physics import Effect, Ghosting, Gibbs, Motion, Rician
from monai_adv.transforms.physics.effect import Parameters


class MotionAttack(PhysicalAttack):
    """Worst-case rigid motion of the head between the segments of k-space, per modality.

    Reference:
        Shaw et al., A k-space model of movement artefacts, IEEE TMI 2020, for the model of the acquisition. The search
        and the defaults are ours.

    Args:
        threat: eps limits every translation in mm and every rotation in degrees.
        segments: of the acquisition; the one at the centre of k-space does not move.
        axis: phase-encoding axis; 1 is anterior-posterior in arrays in RAS order.
        rotate: whether the head rotates too; without, a step is several times as fast.
        **options: see :class:`PhysicalAttack`.
    """

    name: ClassVar[str] = "motion"
    reference: ClassVar[str] = "model of Shaw et al. 2020"
    units: ClassVar[str] = Motion.units
    default_eps: ClassVar[tuple[float, ...]] = (Motion.default_magnitude,)
    effect_class: ClassVar[type[Effect]] = Motion

    def __init__(self, threat: Threat, segments: int = 7, axis: int = 1, rotate: bool = True, **options: Any) -> None:
        super().__init__(threat, Motion(segments, axis, rotate), **options)
        self.segments, self.axis, self.rotate = segments, axis, rotate


class GhostingAttack(PhysicalAttack):
    """Worst-case ghosts along the phase-encoding axis: every n-th line of k-space is weighted, per modality.

    Reference:
        The effect is textbook MRI; formula, search and defaults are ours.

    Args:
        threat: eps is the largest relative change of a line, e.g. .3.
        period: every how many lines of k-space.
        axis: phase-encoding axis; 1 is anterior-posterior in arrays in RAS order.
        **options: see :class:`PhysicalAttack`.
    """

    name: ClassVar[str] = "ghosting"
    reference: ClassVar[str] = "k-space ghosting, ours"
    units: ClassVar[str] = Ghosting.units
    default_eps: ClassVar[tuple[float, ...]] = (Ghosting.default_magnitude,)
    effect_class: ClassVar[type[Effect]] = Ghosting

    def __init__(self, threat: Threat, period: int = 2, axis: int = 1, **options: Any) -> None:
        super().__init__(threat, Ghosting(period, axis), **options)
        self.period, self.axis = period, axis


class GibbsAttack(PhysicalAttack):
    """Worst-case truncation of k-space along each axis: coarse resolution and Gibbs ringing, per modality.

    Reference:
        The effect is textbook MRI; formula, search and defaults are ours.

    Args:
        threat: eps is the largest share of k-space cut along an axis, at most 1.
        taper: width of the window's edge as a share of k-space, over which the search has a slope.
        **options: see :class:`PhysicalAttack`.
    """

    name: ClassVar[str] = "gibbs"
    reference: ClassVar[str] = "k-space truncation, ours"
    units: ClassVar[str] = Gibbs.units
    default_eps: ClassVar[tuple[float, ...]] = (Gibbs.default_magnitude,)
    effect_class: ClassVar[type[Effect]] = Gibbs

    def __init__(self, threat: Threat, taper: float = 0.1, **options: Any) -> None:
        super().__init__(threat, Gibbs(taper), **options)
        self.taper = taper


class RicianAttack(PhysicalAttack):
    """Worst-case noise in a magnitude image: both receiver components searched at a given signal-to-noise ratio.

    Images must not have negative values: attack in scanner units, with the normalisation inside the victim. The
    control of this attack is true Rician noise of the same ratio.

    Reference:
        Gudbjartsson and Patz, The Rician distribution of noisy MRI data, MRM 1995, for the noise. The search and the
        defaults are ours.

    Args:
        threat: eps is 1 / SNR, e.g. .1 for an SNR of 10: the noise's root mean square over the support.
        peak: largest value of a component in multiples of eps.
        **options: see :class:`PhysicalAttack`.
    """

    name: ClassVar[str] = "rician"
    reference: ClassVar[str] = "noise of Gudbjartsson and Patz 1995"
    units: ClassVar[str] = Rician.units
    default_eps: ClassVar[tuple[float, ...]] = (Rician.default_magnitude,)
    effect_class: ClassVar[type[Effect]] = Rician

    def __init__(self, threat: Threat, peak: float = 6.0, **options: Any) -> None:
        super().__init__(threat, Rician(peak), **options)
        self.peak = peak

    def _free(self, run: Run, parameters: Parameters) -> Parameters:
        """Noise outside the support changes nothing and must not count in its root mean square."""
        inside = {"noise": torch.where(run.ball.mask.unsqueeze(2), parameters["noise"], 0.0)}
        return self.effect.project(inside, run.ball.eps)
