"""What is maximised, and what a targeted attack aims at."""

from monai_adv.losses.losses import (
    LOSSES,
    AttackLoss,
    CrossEntropy,
    Dice,
    DiceCrossEntropy,
    Margin,
    as_loss,
    logit_margin,
)
from monai_adv.losses.targets import RULES, hide, make_target, permute, target_agreement

__all__ = [
    "LOSSES",
    "RULES",
    "AttackLoss",
    "CrossEntropy",
    "Dice",
    "DiceCrossEntropy",
    "Margin",
    "as_loss",
    "hide",
    "logit_margin",
    "make_target",
    "permute",
    "target_agreement",
]
