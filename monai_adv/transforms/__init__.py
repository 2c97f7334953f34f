"""Array and dictionary transforms that pass a gradient, and attacks as transforms."""

from monai_adv.transforms.attack import Attackd, RandAttackd
from monai_adv.transforms.normalize import NormalizeNonzero, NormalizeNonzeroBatch, NormalizeNonzerod

__all__ = ["Attackd", "NormalizeNonzero", "NormalizeNonzeroBatch", "NormalizeNonzerod", "RandAttackd"]
