"""The command ``monai-adv train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from monai_adv import cli_options as options
from monai_adv.cli_attacks import parse_options
from monai_adv.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(train)


NETWORK, ROBUST = "Network", "Robust training"


def train(
    root: options.Labelled,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="CHECKPOINT", help="Checkpoint to write.")
    ] = Path("victim.pt"),
    hold_out: options.HoldOut = 5,
    steps: options.Steps = 4000,
    minutes: options.Minutes = None,
    patch: Annotated[
        int, typer.Option(min=16, metavar="VOXELS", help="Side of patches and of the sliding window.")
    ] = 64,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Patches per step.")] = 2,
    learning_rate: options.LearningRate = 2e-3,
    init: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Train its network further.", show_default="a new network")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the weights in 16 bits.")] = False,
    seed: options.Seed = 0,
    scheme: options.SchemeName = None,
    head: Annotated[
        options.HeadKind,
        typer.Option(help="4 classes, or TC, WT, ET.", case_sensitive=False, rich_help_panel=NETWORK),
    ] = "softmax",
    network: Annotated[
        options.Network | None,
        typer.Option(
            metavar="NETWORK", case_sensitive=False, show_default="UNet, or that of --init", rich_help_panel=NETWORK,
            help=f"MONAI's {options.NETWORKS}; UNet is the baseline.",
        ),
    ] = None,
    network_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Argument of the network's MONAI class; may be repeated.", show_default=False,
            rich_help_panel=NETWORK,
        ),
    ] = None,
    dims: Annotated[
        int | None,
        typer.Option(
            min=2, max=3, metavar="AXES", help="2 trains on axial slices, 3 on volumes.",
            show_default="3, or that of --init", rich_help_panel=NETWORK,
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Channels of the U-Net's levels.", show_default="16,32,64,128",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    res_units: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="Residual units per level of the U-Net.", show_default="0",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    method: Annotated[
        options.Method | None,
        typer.Option(
            metavar="METHOD", show_default="plain", rich_help_panel=ROBUST,
            help=f"{options.METHODS}.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Option of the method; may be repeated. Budgets in std of the brain.",
            show_default=False, rich_help_panel=ROBUST,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Train a network, plainly or robustly.

    Its Dice and HD95 on the subjects left out are reported. `--minutes` is the time of the training alone.
    """
    from monai_adv import cli
    from monai_adv.studies.training import train_and_score

    if option and method is None:
        raise ConfigError("--option belongs to a method: give it too, e.g. --method pgd_at")
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
    name: str | None, arguments: list[str] | None, channels: str | None, res_units: int | None, init: Path | None
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
        return {"name": name, **parse_options(arguments, "--network-option")}
    if init is not None and name is None and not widths and not arguments:
        return {}
    levels = _levels(channels or "16,32,64,128")
    described = {"channels": levels, "strides": [2] * (len(levels) - 1), "num_res_units": res_units or 0}
    return {**described, **parse_options(arguments, "--network-option")}


def _levels(text: str) -> list[int]:
    """Channels of the levels, ``16,32,64``.

    Raises:
        ConfigError: for what is no such list.
    """
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if len(levels) < 2 or min(levels) < 1:
        raise ConfigError(f"--channels {text!r} must be whole numbers, two or more: --channels 16,32,64,128")
    return levels


def axes_of(checkpoint: Path | None) -> int:
    """Axes of a checkpoint's network; 3 for a new one."""
    if checkpoint is None:
        return 3
    from monai_adv.networks import spatial_dims
    from monai_adv.victims import read_checkpoint

    return spatial_dims(read_checkpoint(checkpoint)[1].network)
