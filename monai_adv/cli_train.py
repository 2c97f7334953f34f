"""The command ``monai-adv train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from monai_adv.cli_attacks import parse_options
from monai_adv.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(train)


def train(
    root: Annotated[Path, typer.Argument(help="Folder of images with labels.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint to write.")] = Path("victim.pt"),
    hold_out: Annotated[
        int, typer.Option(min=0, help="Leave out every n-th subject by name, from the first; 0 uses all.")
    ] = 5,
    head: Annotated[str, typer.Option(help="softmax (4 classes) or sigmoid (TC, WT, ET).")] = "softmax",
    network: Annotated[
        str | None,
        typer.Option(help="UNet (the baseline), BasicUNet, SegResNet, DynUNet, AttentionUnet, UNETR, SwinUNETR, VNet."),
    ] = None,
    network_option: Annotated[
        list[str] | None, typer.Option(help="Argument of the network's MONAI class as key=value (YAML value).")
    ] = None,
    dims: Annotated[
        int | None, typer.Option(min=2, max=3, help="2 trains on axial slices, 3 (or as --init) on volumes.")
    ] = None,
    channels: Annotated[str | None, typer.Option(help="Channels of the U-Net's levels; 16,32,64,128.")] = None,
    res_units: Annotated[int | None, typer.Option(min=0, help="Residual units per level of the U-Net; 0.")] = None,
    patch: Annotated[int, typer.Option(min=16, help="Side of patches and of the sliding window, in voxels.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Patches per step.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 4000,
    minutes: Annotated[float | None, typer.Option(help="Stop by the clock if steps are left.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, patches and augmentation.")] = 0,
    half: Annotated[bool, typer.Option(help="Store the weights in 16 bits.")] = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="noise, fgsm_at, pgd_at, free, trades, vafa_at, distillation, synthesis, offline; plain if left out."
        ),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Option of the method as key=value (YAML value).")] = None,
    init: Annotated[Path | None, typer.Option(help="Checkpoint whose network is trained further.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Label scheme, where the names do not settle it.")] = None,
) -> None:
    """Train a network of MONAI's, plainly or robustly, and report its Dice on the subjects left out.

    Budgets of the online methods are in standard deviations of the brain. Example: monai-adv train BraTS2021 -o at.pt
    --init unet.pt --method pgd_at --option eps=0.1 --option steps=3 --minutes 25
    """
    from monai_adv import cli
    from monai_adv.studies.training import train_and_score

    if option and method is None:
        raise ConfigError("--option belongs to a --method")
    described = _network(network, network_option, channels, res_units, init)
    recipe = {
        "head": head, "network": described, "patch": (patch,) * (dims or axes_of(init)), "batch": batch, "steps": steps,
        "minutes": minutes, "learning_rate": learning_rate, "seed": seed, "half": half,
        "init": None if init is None else str(init),
        "method": None if method is None else {"name": method, **parse_options(option)},
    }  # fmt: skip
    with cli._bar("training") as update:
        table, problems = train_and_score(
            root, output, recipe, hold_out=hold_out, scheme=scheme, command=cli._command(),
            on_step=lambda done, loss: update(done, f"loss {loss:.3f}"),
        )  # fmt: skip
    if table is not None:
        cli._print_frame(table, "Dice of the subjects left out")
    cli.out.print(f"checkpoint: {output}")
    cli._complain(problems)


def _network(
    name: str | None, options: list[str] | None, channels: str | None, res_units: int | None, init: Path | None
) -> dict[str, Any]:
    """The network as plain data; empty for that of a checkpoint.

    Raises:
        ConfigError: options of the U-Net with another network.
    """
    widths = channels is not None or res_units is not None
    if name not in (None, "UNet"):
        if widths:
            raise ConfigError(
                f"--channels and --res-units are the U-Net's: give the arguments of {name} by --network-option"
            )
        return {"name": name, **parse_options(options)}
    if init is not None and name is None and not widths and not options:
        return {}
    levels = [int(c) for c in (channels or "16,32,64,128").split(",")]
    described = {"channels": levels, "strides": [2] * (len(levels) - 1), "num_res_units": res_units or 0}
    return {**described, **parse_options(options)}


def axes_of(checkpoint: Path | None) -> int:
    """Axes of a checkpoint's network; 3 for a new one."""
    if checkpoint is None:
        return 3
    from monai_adv.networks import spatial_dims
    from monai_adv.victims import read_checkpoint

    return spatial_dims(read_checkpoint(checkpoint)[1].network)
