"""The transforms of anatomy by name: array and dictionary, and their random twins."""

from __future__ import annotations

from typing import ClassVar

from monai_adv.transforms.physics.effect import Effect
from monai_adv.transforms.physics.geometry import Affine, Deformation
from monai_adv.transforms.physics.transforms import (
    PhysicalTransform,
    PhysicalTransformd,
    RandPhysicalTransform,
    RandPhysicalTransformd,
)


# -------------------------------------------------------------------------------------------- deformation
class PhysicalDeformation(PhysicalTransform):
    """Smooth invertible warp of a given velocity: ``PhysicalDeformation(velocity=..., knot_mm=40)``.

    See :class:`Deformation`; a label is moved by ``warp_label(label, image)``.

    Example:
        >>> import torch
        >>> velocity = torch.zeros(2, 4, 4)
        >>> velocity[1] = 1.0  # every value comes from 1 mm further along the last axis
        >>> PhysicalDeformation(velocity=velocity)(torch.arange(4.0).expand(1, 3, 4))[0, 1].tolist()
        [1.0, 2.0, 3.0, 3.0]
    """

    effect_class: ClassVar[type[Effect]] = Deformation


class PhysicalDeformationd(PhysicalTransformd):
    """Dictionary twin of :class:`PhysicalDeformation`; ``label_keys`` move along."""

    transform_class: ClassVar[type[PhysicalTransform]] = PhysicalDeformation


class RandPhysicalDeformation(RandPhysicalTransform):
    """Random smooth invertible warp; magnitude is the largest displacement in mm."""

    effect_class: ClassVar[type[Effect]] = Deformation


class RandPhysicalDeformationd(RandPhysicalTransformd):
    """Dictionary twin of :class:`RandPhysicalDeformation`; ``label_keys`` move along."""

    transform_class: ClassVar[type[RandPhysicalTransform]] = RandPhysicalDeformation


# ------------------------------------------------------------------------------------------------- affine
class PhysicalAffine(PhysicalTransform):
    """Given rotation (degrees), translation (mm) and log scale about the centre; see :class:`Affine`.

    Example:
        >>> import torch
        >>> shift = PhysicalAffine(rotation=[0.0], translation=[0.0, 1.0], log_scale=[0.0, 0.0])
        >>> shift(torch.arange(4.0).expand(1, 3, 4))[0, 1].round().tolist()  # by 1 mm along the last axis
        [0.0, 0.0, 1.0, 2.0]
    """

    effect_class: ClassVar[type[Effect]] = Affine


class PhysicalAffined(PhysicalTransformd):
    """Dictionary twin of :class:`PhysicalAffine`; ``label_keys`` move along."""

    transform_class: ClassVar[type[PhysicalTransform]] = PhysicalAffine


class RandPhysicalAffine(RandPhysicalTransform):
    """Random affine motion; a magnitude of 1 allows every parameter its limit."""

    effect_class: ClassVar[type[Effect]] = Affine


class RandPhysicalAffined(RandPhysicalTransformd):
    """Dictionary twin of :class:`RandPhysicalAffine`; ``label_keys`` move along."""

    transform_class: ClassVar[type[RandPhysicalTransform]] = RandPhysicalAffine
