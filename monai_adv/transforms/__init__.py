"""Array and dictionary transforms that pass a gradient, and attacks as transforms."""

from monai_adv.transforms.attack import Attackd, RandAttackd
from monai_adv.transforms.normalize import NormalizeNonzero, NormalizeNonzeroBatch, NormalizeNonzerod
from monai_adv.transforms.physics import *  # noqa: F403
from monai_adv.transforms.physics import __all__ as _physics

__all__ = ["Attackd", "NormalizeNonzero", "NormalizeNonzeroBatch", "NormalizeNonzerod", "RandAttackd"]
__all__ += _physics
