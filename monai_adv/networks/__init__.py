"""Networks: the baseline 3D U-Net and MONAI's others, by configuration."""

from monai_adv.networks.factory import BASELINE, NETWORKS, baseline_unet, build_network

__all__ = ["BASELINE", "NETWORKS", "baseline_unet", "build_network"]
