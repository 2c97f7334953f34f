"""Segmentation networks by plain configuration: MONAI's own classes, named in YAML and in checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from monai.networks import nets
from torch import Tensor, nn

from monai_adv.errors import ConfigError, did_you_mean

NETWORKS = ("UNet", "BasicUNet", "SegResNet", "DynUNet", "AttentionUnet", "UNETR", "SwinUNETR", "VNet")
"""Names of MONAI's networks that :func:`build_network` makes."""

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

_OUTPUTS = {"softmax": 4, "sigmoid": 3}


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """Build one of MONAI's networks from its class name and arguments.

    Args:
        config: ``{"name": class name in NETWORKS, **arguments}``, plain data. ``input_order`` brings the images'
            channels into the network's own order: for each of its inputs the place in T1, T1c, T2, FLAIR.

    Raises:
        ConfigError: for an unknown name, arguments the class does not take, or a package it needs (UNETR and SwinUNETR:
            einops).

    Example:
        >>> sum(p.numel() for p in build_network(BASELINE).parameters())
        489322
    """
    arguments = dict(config)
    name, order = arguments.pop("name", None), arguments.pop("input_order", None)
    network = _network_class(name)
    if order is not None and sorted(order) != list(range(len(order))):
        raise ConfigError(f"input_order {order} must hold every number from 0 to {len(order) - 1} once")
    try:
        built = network(**arguments)
    except ImportError as error:
        raise ConfigError(f"network {name} needs a package that is not installed: {_first_line(error)}") from error
    except (TypeError, ValueError) as error:
        known = [n for n in inspect.signature(network).parameters if n not in arguments]
        extra = [n for n in arguments if n not in inspect.signature(network).parameters]
        near = (did_you_mean(extra[0], known) or f"; it also takes {', '.join(known)}") if extra else ""
        raise ConfigError(f"network {name} cannot be built from {arguments}: {error}{near}") from error
    if order is not None:
        built.register_forward_pre_hook(_InOrder(order))
    return built


def baseline_unet(head: str = "softmax", **changes: Any) -> dict[str, Any]:
    """Configuration of the baseline U-Net: four MRI in; four classes (softmax) or TC, WT, ET (sigmoid) out.

    Args:
        head: "softmax" or "sigmoid".
        **changes: arguments of ``monai.networks.nets.UNet`` to replace.
    """
    return {**BASELINE, "out_channels": _OUTPUTS[head], **changes}


def trainable_network(head: str = "softmax", patch: Sequence[int] = (64, 64, 64), **arguments: Any) -> dict[str, Any]:
    """Configuration of a network to train: four MRI in, the head's channels out, as many axes as the patch.

    Args:
        head: "softmax" or "sigmoid".
        patch: training patch in voxels, two sides for a network of slices, three for one of volumes; networks of a
            fixed input size (``img_size``) get it.
        **arguments: ``name`` in NETWORKS ("UNet" if left out, with the arguments of the baseline) and arguments of the
            class, which go before what is filled in.

    Raises:
        ConfigError: for an unknown name, or a ``spatial_dims`` that is not that of the patch.

    Example:
        >>> trainable_network("sigmoid", (32, 32), name="SegResNet", init_filters=8)
        {'name': 'SegResNet', 'spatial_dims': 2, 'in_channels': 4, 'out_channels': 3, 'init_filters': 8}
    """
    dims = len(patch)
    if arguments.get("spatial_dims", dims) != dims:
        raise ConfigError(
            f"a network of spatial_dims {arguments['spatial_dims']} does not take patches of {tuple(patch)}: give the "
            "patch one side per axis"
        )
    name = arguments.pop("name", "UNet")
    if name == "UNet":
        return baseline_unet(head, spatial_dims=dims, **{k: v for k, v in arguments.items() if k != "spatial_dims"})
    filled = {"spatial_dims": dims, "in_channels": BASELINE["in_channels"], "out_channels": _OUTPUTS[head]}
    filled |= {"img_size": list(patch), "dropout_dim": dims}  # UNETR; VNet, whose default is that of volumes
    taken = inspect.signature(_network_class(name)).parameters
    return {"name": name, **{k: v for k, v in filled.items() if k in taken}, **arguments}


def spatial_dims(config: Mapping[str, Any]) -> int:
    """Spatial axes of the images that a configured network takes: 2 or 3."""
    return int(config.get("spatial_dims", 3))


class _InOrder:
    """Hands a network its input channels in the order it was trained with."""

    def __init__(self, order: Sequence[int]) -> None:
        self.order = [int(place) for place in order]

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0][:, self.order], *inputs[1:]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _network_class(name: Any) -> type[nn.Module]:
    if name not in NETWORKS:
        raise ConfigError(f"network {name!r} is unknown: use one of {', '.join(NETWORKS)}")
    found: type[nn.Module] = getattr(nets, name)
    return found
