"""Robust training: iterations for MONAI's ``iteration_update`` slot, and a trainer built from plain data."""

from monai_adv.engines.robust.adversarial import AdversarialIteration
from monai_adv.engines.robust.distillation import DistillationIteration
from monai_adv.engines.robust.free import FreeIteration
from monai_adv.engines.robust.methods import METHODS, create_method
from monai_adv.engines.robust.paired import TradesIteration, VAFTIteration
from monai_adv.engines.robust.step import PairedIteration
from monai_adv.engines.robust.synthesis import SynthesisIteration
from monai_adv.engines.robust.trainer import RobustTrainer

__all__ = [
    "METHODS",
    "AdversarialIteration",
    "DistillationIteration",
    "FreeIteration",
    "PairedIteration",
    "RobustTrainer",
    "SynthesisIteration",
    "TradesIteration",
    "VAFTIteration",
    "create_method",
]
