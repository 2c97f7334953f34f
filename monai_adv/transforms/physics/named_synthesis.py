"""The synthesis' transforms by name: array and dictionary, and their random twins."""

from __future__ import annotations

from typing import ClassVar

from monai_adv.transforms.physics.effect import Effect
from monai_adv.transforms.physics.synthesis import Synthesis
from monai_adv.transforms.physics.transforms import (
    PhysicalTransform,
    PhysicalTransformd,
    RandPhysicalTransform,
    RandPhysicalTransformd,
)


class PhysicalSynthesis(PhysicalTransform):
    """Given warp and appearance: ``PhysicalSynthesis(velocity=..., log_bias=..., residual=...)``.

    See :class:`Synthesis`; a label is moved by ``warp_label(label, image)``.

    Example:
        >>> import torch
        >>> shading = PhysicalSynthesis(log_bias=torch.full((1, 4, 4), 0.1), max_mm=0, max_residual=0)
        >>> round(float(shading(torch.ones(1, 8, 8)).mean()), 4)  # exp(.1)
        1.1052
    """

    effect_class: ClassVar[type[Effect]] = Synthesis


class PhysicalSynthesisd(PhysicalTransformd):
    """Dictionary twin of :class:`PhysicalSynthesis`; ``label_keys`` move along."""

    transform_class: ClassVar[type[PhysicalTransform]] = PhysicalSynthesis


class RandPhysicalSynthesis(RandPhysicalTransform):
    """Random warp and appearance; a magnitude of 1 allows every parameter its limit."""

    effect_class: ClassVar[type[Effect]] = Synthesis


class RandPhysicalSynthesisd(RandPhysicalTransformd):
    """Dictionary twin of :class:`RandPhysicalSynthesis`; ``label_keys`` move along."""

    transform_class: ClassVar[type[RandPhysicalTransform]] = RandPhysicalSynthesis
