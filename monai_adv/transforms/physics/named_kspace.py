"""The acquisition's transforms by name: array and dictionary, and their random twins."""

from __future__ import annotations

from typing import ClassVar

from monai_adv.transforms.physics.effect import Effect
from monai_adv.transforms.physics.kspace import Ghosting, Gibbs, Motion
from monai_adv.transforms.physics.noise import Rician
from monai_adv.transforms.physics.transforms import (
    PhysicalTransform,
    PhysicalTransformd,
    RandPhysicalTransform,
    RandPhysicalTransformd,
)


# --------------------------------------------------------------------------------------------------------- motion
class PhysicalMotion(PhysicalTransform):
    """Given poses of the segments of an acquisition: ``PhysicalMotion(translation=..., rotation=..., segments=7)``.

    See :class:`Motion`.
    """

    effect_class: ClassVar[type[Effect]] = Motion


class PhysicalMotiond(PhysicalTransformd):
    """Dictionary twin of :class:`PhysicalMotion`."""

    transform_class: ClassVar[type[PhysicalTransform]] = PhysicalMotion


class RandPhysicalMotion(RandPhysicalTransform):
    """Random motion between segments of k-space; magnitude limits mm and degrees."""

    effect_class: ClassVar[type[Effect]] = Motion


class RandPhysicalMotiond(RandPhysicalTransformd):
    """Dictionary twin of :class:`RandPhysicalMotion`."""

    transform_class: ClassVar[type[RandPhysicalTransform]] = RandPhysicalMotion


# ------------------------------------------------------------------------------------------------------- ghosting
class PhysicalGhosting(PhysicalTransform):
    """Given ghosts along the phase-encoding axis: ``PhysicalGhosting(ghost=..., period=2)``; see :class:`Ghosting`.

    Example:
        >>> import torch
        >>> point = torch.tensor([[8.0, 0, 0, 0], [0, 0, 0, 0]]).view(1, 2, 4)
        >>> PhysicalGhosting(ghost=[[0.5]])(point, torch.ones(1, 2, 4))[0, 0].tolist()  # half a field of view away
        [10.0, 0.0, -2.0, 0.0]
    """

    effect_class: ClassVar[type[Effect]] = Ghosting


class PhysicalGhostingd(PhysicalTransformd):
    """Dictionary twin of :class:`PhysicalGhosting`."""

    transform_class: ClassVar[type[PhysicalTransform]] = PhysicalGhosting


class RandPhysicalGhosting(RandPhysicalTransform):
    """Random ghosts; magnitude is the largest relative change of a line of k-space."""

    effect_class: ClassVar[type[Effect]] = Ghosting


class RandPhysicalGhostingd(RandPhysicalTransformd):
    """Dictionary twin of :class:`RandPhysicalGhosting`."""

    transform_class: ClassVar[type[RandPhysicalTransform]] = RandPhysicalGhosting


# -------------------------------------------------------------------------------------------------- Gibbs ringing
class PhysicalGibbs(PhysicalTransform):
    """Given truncation of k-space: ``PhysicalGibbs(cut=..., taper=0.1)``; see :class:`Gibbs`."""

    effect_class: ClassVar[type[Effect]] = Gibbs


class PhysicalGibbsd(PhysicalTransformd):
    """Dictionary twin of :class:`PhysicalGibbs`."""

    transform_class: ClassVar[type[PhysicalTransform]] = PhysicalGibbs


class RandPhysicalGibbs(RandPhysicalTransform):
    """Random truncation of k-space; magnitude is the largest share cut along an axis."""

    effect_class: ClassVar[type[Effect]] = Gibbs


class RandPhysicalGibbsd(RandPhysicalTransformd):
    """Dictionary twin of :class:`RandPhysicalGibbs`."""

    transform_class: ClassVar[type[RandPhysicalTransform]] = RandPhysicalGibbs


# --------------------------------------------------------------------------------------------------- Rician noise
class PhysicalRician(PhysicalTransform):
    """Rician noise of given components: ``PhysicalRician(noise=...)``; see :class:`Rician`."""

    effect_class: ClassVar[type[Effect]] = Rician


class PhysicalRiciand(PhysicalTransformd):
    """Dictionary twin of :class:`PhysicalRician`."""

    transform_class: ClassVar[type[PhysicalTransform]] = PhysicalRician


class RandPhysicalRician(RandPhysicalTransform):
    """Random Rician noise; magnitude is 1 / SNR."""

    effect_class: ClassVar[type[Effect]] = Rician


class RandPhysicalRiciand(RandPhysicalTransformd):
    """Dictionary twin of :class:`RandPhysicalRician`."""

    transform_class: ClassVar[type[RandPhysicalTransform]] = RandPhysicalRician
