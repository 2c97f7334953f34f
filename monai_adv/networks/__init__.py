"""Networks: the baseline 3D U-Net and MONAI's others, by configuration."""

from monai_adv.networks.factory import (
    BASELINE,
    NETWORKS,
    baseline_unet,
    build_network,
    spatial_dims,
    trainable_network,
)
from monai_adv.networks.synthesis import SynthesisCritic, SynthesisGenerator
from monai_adv.networks.synthesis_checkpoint import load_generator, save_generator

__all__ = [
    "BASELINE",
    "NETWORKS",
    "SynthesisCritic",
    "SynthesisGenerator",
    "baseline_unet",
    "build_network",
    "load_generator",
    "save_generator",
    "spatial_dims",
    "trainable_network",
]
