"""How a perturbation is searched: one class per method and a registry of names."""

from monai_adv.attacks.base import Attack
from monai_adv.attacks.registry import ATTACKS, available, create, option_names
from monai_adv.attacks.result import AttackResult, Cost
from monai_adv.attacks.run import Run
from monai_adv.attacks.sign import FGSM, IFGSM, PGD, Noise, TargetedIFGSM

__all__ = [
    "ATTACKS",
    "FGSM",
    "IFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "Cost",
    "Noise",
    "Run",
    "TargetedIFGSM",
    "available",
    "create",
    "option_names",
]
