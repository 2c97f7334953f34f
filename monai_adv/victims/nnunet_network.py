"""The weights of nnU-Net's plain U-Net in MONAI's DynUNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from monai.networks.nets import DynUNet
from torch import Tensor, nn

from monai_adv.errors import CheckpointError, ConfigError

_HELP = "; build the network with nnU-Net and give the module itself as network="


def dynunet(settings: Mapping[str, Any], state: Mapping[str, Tensor], inputs: int, outputs: int) -> nn.Module:
    """MONAI's ``DynUNet`` of a configuration of nnU-Net's plans, with the weights of a ``PlainConvUNet``.

    The two are the same function: nnU-Net's convolutions have a bias in front of an instance normalisation, which
    takes it away again, so it is left out; the deep supervision heads are not used at inference.

    Args:
        settings: configuration of the plans.
        state: state dict of a ``PlainConvUNet``, or of a ``DynUNet``.
        inputs: number of channels.
        outputs: number of output channels.

    Raises:
        ConfigError: if the architecture is another one.
        CheckpointError: if the weights do not fit.
    """
    arguments = _arguments(settings)
    if "Plain" not in arguments["class"] or "InstanceNorm" not in arguments["norm"] or set(arguments["convs"]) != {2}:
        raise ConfigError(
            f"DynUNet is nnU-Net's PlainConvUNet with instance normalisation and two convolutions a stage, the plans "
            f"have {arguments['class']} with {arguments['norm']} and {arguments['convs']} convolutions{_HELP}"
        )
    network = DynUNet(
        len(settings["patch_size"]),
        inputs,
        outputs,
        kernel_size=arguments["kernels"],
        strides=arguments["strides"],
        upsample_kernel_size=arguments["strides"][1:],
        filters=arguments["features"],
        norm_name=("INSTANCE", {"affine": True, "eps": arguments["eps"]}),
        act_name=("leakyrelu", {"inplace": True, "negative_slope": arguments["slope"]}),
        trans_bias=any(name.startswith("decoder.transpconvs") and name.endswith("bias") for name in state)
        or any("transp_conv.conv.bias" in name for name in state),
    )
    own = any(name.startswith("input_block") for name in state)
    renamed = dict(state) if own else _renamed(state, len(arguments["features"]))
    # the same parameters under a second name
    expected = {k: tuple(v.shape) for k, v in network.state_dict().items() if not k.startswith("skip_layers")}
    given = {k: tuple(v.shape) for k, v in renamed.items() if not k.startswith("skip_layers")}
    if expected != given:
        differing = sorted(k for k in expected.keys() | given.keys() if expected.get(k) != given.get(k))
        details = ", ".join(f"{k}: {expected.get(k)} in the network, {given.get(k)} given" for k in differing[:3])
        raise CheckpointError(f"the weights do not fit the DynUNet of the plans ({details}){_HELP}")
    network.load_state_dict(renamed, strict=False)
    return network


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the plans say of the network, in either of their formats."""
    try:
        if "architecture" not in settings:  # plans written before version 2.4
            stages = len(settings["n_conv_per_stage_encoder"])
            base, most = settings["UNet_base_num_features"], settings["unet_max_num_features"]
            return {
                "class": settings["UNet_class_name"], "norm": "InstanceNorm", "eps": 1e-5, "slope": 0.01,
                "features": [min(base * 2**i, most) for i in range(stages)],
                "kernels": settings["conv_kernel_sizes"], "strides": settings["pool_op_kernel_sizes"],
                "convs": [*settings["n_conv_per_stage_encoder"], *settings["n_conv_per_stage_decoder"]],
            }  # fmt: skip
        architecture = settings["architecture"]
        given = architecture["arch_kwargs"]
        return {
            "class": architecture["network_class_name"].rsplit(".", 1)[-1],
            "norm": str(given["norm_op"]),
            "eps": float((given.get("norm_op_kwargs") or {}).get("eps", 1e-5)),
            "slope": float((given.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)),
            "features": list(given["features_per_stage"]),
            "kernels": given["kernel_sizes"],
            "strides": given["strides"],
            "convs": [*given.get("n_conv_per_stage", [0]), *given["n_conv_per_stage_decoder"]],
        }
    except (KeyError, TypeError) as error:
        raise ConfigError(f"the plans do not describe a U-Net: {error} is missing{_HELP}") from error


def _renamed(state: Mapping[str, Tensor], stages: int) -> dict[str, Tensor]:
    """Weights of a ``PlainConvUNet`` under the names of a ``DynUNet``."""
    last = stages - 2  # index of the highest resolution in the decoder
    blocks = {0: "input_block", stages - 1: "bottleneck"}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
        if "all_modules" in name or name.startswith("decoder.encoder"):
            continue  # second names of the same parameters
        if match := re.fullmatch(r"(encoder|decoder)\.stages\.(\d+)\.(?:0\.)?convs\.(\d+)\.(conv|norm)\.(\w+)", name):
            side, stage, number, part, what = match[1], int(match[2]), int(match[3]) + 1, match[4], match[5]
            if part == "conv" and what == "bias":
                continue  # the instance normalisation behind it subtracts it
            block = f"upsamples.{stage}.conv_block" if side == "decoder" else blocks.get(stage)
            block = block or f"downsamples.{stage - 1}"
            found[f"{block}.conv{number}.conv.{what}" if part == "conv" else f"{block}.norm{number}.{what}"] = value
        elif match := re.fullmatch(r"decoder\.transpconvs\.(\d+)\.(\w+)", name):
            found[f"upsamples.{match[1]}.transp_conv.conv.{match[2]}"] = value
        elif match := re.fullmatch(r"decoder\.seg_layers\.(\d+)\.(\w+)", name):
            if int(match[1]) == last:
                found[f"output_block.conv.conv.{match[2]}"] = value
        else:
            found[name] = value  # unknown: said when it does not fit
    return found
