"""A deployed ``Compose`` as the differentiable preprocessing of a victim."""

from monai_adv.transforms.differentiable.compose import DifferentiableCompose, make_differentiable
from monai_adv.transforms.differentiable.members import MemberReport

__all__ = ["DifferentiableCompose", "MemberReport", "make_differentiable"]
