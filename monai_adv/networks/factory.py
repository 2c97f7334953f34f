"""Segmentation networks by plain configuration: MONAI's own classes, named in YAML and in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.networks import nets
from torch import nn

from monai_adv.errors import ConfigError

NETWORKS = ("UNet", "BasicUNet", "SegResNet", "DynUNet", "AttentionUnet", "UNETR", "SwinUNETR", "VNet")

BASELINE: dict[str, Any] = {
    "name": "UNet",
    "spatial_dims": 3,
    "in_channels": 4,
    "out_channels": 4,
    "channels": [16, 32, 64, 128],
    "strides": [2, 2, 2],
    "num_res_units": 0,
    "norm": "INSTANCE",
}
"""The baseline victim: a 3D U-Net of .5 M parameters with instance normalisation."""


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """Build one of MONAI's networks from its class name and arguments.

    Args:
        config: ``{"name": class name in NETWORKS, **arguments}``, plain data.

    Raises:
        ConfigError: for an unknown name or arguments the class does not take.

    Example:
        >>> sum(p.numel() for p in build_network(BASELINE).parameters())
        489322
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in NETWORKS:
        raise ConfigError(f"network {name!r} is unknown: use one of {', '.join(NETWORKS)}")
    try:
        return getattr(nets, name)(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"network {name} cannot be built from {arguments}: {error}") from error


def baseline_unet(head: str = "softmax", **changes: Any) -> dict[str, Any]:
    """Configuration of the baseline U-Net: four MRI in; four classes (softmax) or TC, WT, ET (sigmoid) out.

    Args:
        head: "softmax" or "sigmoid".
        **changes: arguments of ``monai.networks.nets.UNet`` to replace.
    """
    return {**BASELINE, "out_channels": {"softmax": 4, "sigmoid": 3}[head], **changes}
