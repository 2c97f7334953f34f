"""MONAI workflows: training a victim, attacking a batch inside any engine."""

from monai_adv.engines.attack import AttackEvaluator, AttackIteration, AttackKeys
from monai_adv.engines.robust import (
    METHODS,
    AdversarialIteration,
    DistillationIteration,
    FreeIteration,
    RobustTrainer,
    TradesIteration,
    VAFTIteration,
    create_method,
)
from monai_adv.engines.training import TrainConfig, train

__all__ = [
    "METHODS",
    "AdversarialIteration",
    "AttackEvaluator",
    "AttackIteration",
    "AttackKeys",
    "DistillationIteration",
    "FreeIteration",
    "RobustTrainer",
    "TradesIteration",
    "TrainConfig",
    "VAFTIteration",
    "create_method",
    "train",
]
