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
from monai_adv.losses.region_dice import counted_regions, region_bits, region_dice, region_probabilities
from monai_adv.losses.target_logits import TargetLogits
from monai_adv.losses.targets import (
    EDITS,
    RULES,
    check_target_rule,
    hide,
    make_target,
    permute,
    target_agreement,
)
from monai_adv.losses.weighted import (
    BalancedCrossEntropy,
    CosPGDCrossEntropy,
    Focal,
    JensenShannon,
    MaskedCrossEntropy,
    SegPGDCrossEntropy,
    Spherical,
    Tracked,
    tracked,
)

__all__ = [
    "EDITS",
    "LOSSES",
    "RULES",
    "AttackLoss",
    "BalancedCrossEntropy",
    "CosPGDCrossEntropy",
    "CrossEntropy",
    "Dice",
    "DiceCrossEntropy",
    "Focal",
    "JensenShannon",
    "Margin",
    "MaskedCrossEntropy",
    "SegPGDCrossEntropy",
    "Spherical",
    "TargetLogits",
    "Tracked",
    "as_loss",
    "check_target_rule",
    "counted_regions",
    "hide",
    "logit_margin",
    "make_target",
    "permute",
    "region_bits",
    "region_dice",
    "region_probabilities",
    "target_agreement",
    "tracked",
]
