"""What is attacked: the head, the deployed pipeline, the guard, and checkpoints of victims."""

from monai_adv.transforms import StraightThrough
from monai_adv.victims.checkpoint import (
    VictimConfig,
    build_victim,
    load_victim,
    read_checkpoint,
    save_checkpoint,
)
from monai_adv.victims.guard import guard
from monai_adv.victims.head import Head, as_head, mean_dice
from monai_adv.victims.imported import import_weights
from monai_adv.victims.nnunet import NnUNetPreprocessing, RegionConversion, nnunet_victim
from monai_adv.victims.tta import KeepLargest, MirrorInferer
from monai_adv.victims.victim import Victim, plain_tensor

__all__ = [
    "Head",
    "KeepLargest",
    "MirrorInferer",
    "NnUNetPreprocessing",
    "RegionConversion",
    "StraightThrough",
    "Victim",
    "VictimConfig",
    "as_head",
    "build_victim",
    "guard",
    "import_weights",
    "load_victim",
    "mean_dice",
    "nnunet_victim",
    "plain_tensor",
    "read_checkpoint",
    "save_checkpoint",
]
