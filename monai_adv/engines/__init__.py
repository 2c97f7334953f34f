"""MONAI workflows: training a victim, attacking a batch inside any engine."""

from monai_adv.engines.attack import AttackEvaluator, AttackIteration, AttackKeys
from monai_adv.engines.training import TrainConfig, train

__all__ = ["AttackEvaluator", "AttackIteration", "AttackKeys", "TrainConfig", "train"]
