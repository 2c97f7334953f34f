"""Array and dictionary transforms that pass a gradient, and attacks as transforms."""

from monai_adv.transforms.attack import Attackd, RandAttackd
from monai_adv.transforms.differentiable import DifferentiableCompose, MemberReport, make_differentiable
from monai_adv.transforms.filters import BitDepth, BitDepthd, FilterImage, FilterImaged
from monai_adv.transforms.normalize import (
    NormalizeNonzero,
    NormalizeNonzeroBatch,
    NormalizeNonzerod,
    NormalizeNonzeroSlices,
)
from monai_adv.transforms.physics import *  # noqa: F403
from monai_adv.transforms.physics import __all__ as _physics
from monai_adv.transforms.straight_through import StraightThrough

__all__ = [
    "Attackd",
    "BitDepth",
    "BitDepthd",
    "DifferentiableCompose",
    "FilterImage",
    "FilterImaged",
    "MemberReport",
    "NormalizeNonzero",
    "NormalizeNonzeroBatch",
    "NormalizeNonzeroSlices",
    "NormalizeNonzerod",
    "RandAttackd",
    "StraightThrough",
    "make_differentiable",
]
__all__ += _physics
