"""The physical transforms by name: for every effect an array and a dictionary transform, and their random twins."""

from __future__ import annotations

from typing import ClassVar

from monai_adv.transforms.physics.effect import Effect
from monai_adv.transforms.physics.intensity import BiasField, Gamma
from monai_adv.transforms.physics.transforms import (
    PhysicalTransform,
    PhysicalTransformd,
    RandPhysicalTransform,
    RandPhysicalTransformd,
)


# -------------------------------------------------------------------------------------------- bias field
class PhysicalBiasField(PhysicalTransform):
    """Coil shading of given control values: ``PhysicalBiasField(log_field=..., knot_mm=60)``; see :class:`BiasField`.

    Example:
        >>> import torch
        >>> shading = PhysicalBiasField(log_field=torch.full((1, 4, 4), 0.1), knot_mm=60)
        >>> round(float(shading(torch.ones(1, 8, 8)).mean()), 4)  # exp(.1)
        1.1052
    """

    effect_class: ClassVar[type[Effect]] = BiasField


class PhysicalBiasFieldd(PhysicalTransformd):
    """Dictionary twin of :class:`PhysicalBiasField`."""

    transform_class: ClassVar[type[PhysicalTransform]] = PhysicalBiasField


class RandPhysicalBiasField(RandPhysicalTransform):
    """Random coil shading; magnitude is the largest relative change."""

    effect_class: ClassVar[type[Effect]] = BiasField


class RandPhysicalBiasFieldd(RandPhysicalTransformd):
    """Dictionary twin of :class:`RandPhysicalBiasField`."""

    transform_class: ClassVar[type[RandPhysicalTransform]] = RandPhysicalBiasField


# -------------------------------------------------------------------------------------------------- gamma
class PhysicalGamma(PhysicalTransform):
    """Monotone contrast of given exponents: ``PhysicalGamma(log_gamma=[...])``; see :class:`Gamma`."""

    effect_class: ClassVar[type[Effect]] = Gamma


class PhysicalGammad(PhysicalTransformd):
    """Dictionary twin of :class:`PhysicalGamma`."""

    transform_class: ClassVar[type[PhysicalTransform]] = PhysicalGamma


class RandPhysicalGamma(RandPhysicalTransform):
    """Random monotone contrast; magnitude limits the exponent."""

    effect_class: ClassVar[type[Effect]] = Gamma


class RandPhysicalGammad(RandPhysicalTransformd):
    """Dictionary twin of :class:`RandPhysicalGamma`."""

    transform_class: ClassVar[type[RandPhysicalTransform]] = RandPhysicalGamma
