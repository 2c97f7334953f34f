"""MONAI workflows: training a victim, attacking a batch inside any engine."""

from monai_adv.engines.attack import AttackEvaluator, AttackIteration, AttackKeys
from monai_adv.engines.robust import (
    METHODS,
    AdversarialIteration,
    DistillationIteration,
    FreeIteration,
    PairedIteration,
    RobustTrainer,
    SynthesisIteration,
    TradesIteration,
    VAFTIteration,
    create_method,
)
from monai_adv.engines.synthesis import SynthesisTrainer, loss_terms
from monai_adv.engines.synthesis_training import SynthesisConfig, SynthesisPreview, train_synthesis
from monai_adv.engines.training import TrainConfig, train

__all__ = [
    "METHODS",
    "AdversarialIteration",
    "AttackEvaluator",
    "AttackIteration",
    "AttackKeys",
    "DistillationIteration",
    "FreeIteration",
    "PairedIteration",
    "RobustTrainer",
    "SynthesisConfig",
    "SynthesisIteration",
    "SynthesisPreview",
    "SynthesisTrainer",
    "TradesIteration",
    "TrainConfig",
    "VAFTIteration",
    "create_method",
    "loss_terms",
    "train",
    "train_synthesis",
]
