"""The command ``monai-adv victim``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from monai_adv import cli_options as options
from monai_adv.errors import ConfigError

Preprocessing = Literal["zscore_nonzero", "zscore_nonzero_slices", "none"]
Blending = Literal["gaussian", "constant"]
PIPELINE, TRY = "How it is deployed", "Try it"
LOW = 0.5
"""Mean Dice under which something said about the weights is more likely wrong than the network bad."""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(victim)


def victim(
    weights: Annotated[
        Path, typer.Argument(metavar="WEIGHTS", help="State dict that was trained elsewhere: .pt, .pth, .safetensors.")
    ],
    network: Annotated[
        options.Network,
        typer.Option(metavar="NETWORK", case_sensitive=False, help=f"MONAI's {options.NETWORKS}."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="CHECKPOINT", help="Checkpoint to write.")
    ] = Path("victim.pt"),
    network_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Argument of the network's MONAI class; may be repeated.", show_default=False
        ),
    ] = None,
    head: Annotated[
        options.HeadKind | None,
        typer.Option(
            case_sensitive=False, help="Classes that exclude each other, or regions.", show_default="what fits"
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Modalities in the network's order.", show_default="T1,T1c,T2,FLAIR"),
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Regions, or classes after the background, in the network's order.",
            show_default="TC,WT,ET or NCR,ED,ET",
        ),
    ] = None,
    preprocessing: Annotated[
        Preprocessing,
        typer.Option(help="Of the images: z-scores of the brain, of each slice, or none.", rich_help_panel=PIPELINE),
    ] = "zscore_nonzero",
    window: Annotated[
        str, typer.Option(metavar="N[,N,N]", help="Sides of the sliding window in voxels.", rich_help_panel=PIPELINE)
    ] = "128",
    overlap: Annotated[
        float, typer.Option(min=0.0, max=0.99, metavar="SHARE", help="Of windows.", rich_help_panel=PIPELINE)
    ] = 0.5,
    mode: Annotated[Blending, typer.Option(help="Of windows that overlap.", rich_help_panel=PIPELINE)] = "gaussian",
    sw_batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Windows per forward.", rich_help_panel=PIPELINE)
    ] = 2,
    spacing: Annotated[
        float | None,
        typer.Option(
            min=0.1, metavar="MM", help="Voxel size it was trained at, for `resample`.", show_default="not known",
            rich_help_panel=PIPELINE,
        ),
    ] = None,
    on: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Score it on the first subjects of this folder.", rich_help_panel=TRY),
    ] = None,
    subjects: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many of them.", rich_help_panel=TRY)
    ] = 1,
    scheme: options.SchemeName = None,
) -> None:  # fmt: skip
    """Make a victim of weights that were trained elsewhere.

    Every other command takes the checkpoint it writes. Nothing in the file of weights is executed. With `--on` its
    clean Dice shows whether what was said about it is right.
    """
    from monai_adv import cli
    from monai_adv.cli_attacks import parse_options
    from monai_adv.victims import build_victim, import_weights, save_checkpoint

    described: dict[str, Any] = {"name": network, **parse_options(network_option, "--network-option")}
    try:
        sides = [int(side) for side in window.split(",")]
    except ValueError as error:
        raise ConfigError(f"--window {window!r} must be whole numbers: 128, or 128,128,96") from error
    dims = int(described.get("spatial_dims", 3))
    built, config = import_weights(
        weights,
        described,
        head=head,
        inputs=None if inputs is None else inputs.split(","),
        outputs=None if outputs is None else outputs.split(","),
        preprocessing=preprocessing,
        roi_size=sides * dims if len(sides) == 1 else sides,
        overlap=overlap,
        mode=mode,
        sw_batch_size=sw_batch_size,
        spacing=None if spacing is None else [spacing] * dims,
        training={"imported": weights.name, "command": cli._command()},
    )
    save_checkpoint(output, built, config)
    names = config.regions or {"sigmoid": "TC, WT, ET", "softmax": "NCR, ED, ET"}[config.head]
    cli.out.print(
        f"written: {output}: {network} with a {config.head} head ({cli._escape(str(names))})", highlight=False,
        soft_wrap=True,
    )  # fmt: skip
    if on is not None:
        cli._note_spacing(output, on, scheme)
        _try(build_victim(built, config), on, subjects, scheme)


def _try(found: Any, folder: Path, subjects: int, scheme: str | None) -> None:
    """Print the clean scores of the first subjects, and what to look at where they are low."""
    from monai_adv import cli
    from monai_adv.data import brats_datalist
    from monai_adv.studies.config import DataConfig
    from monai_adv.studies.training import score

    items = brats_datalist(folder, scheme)[:subjects]
    table = score(found, items, DataConfig(root=folder, scheme=scheme))
    cli._print_frame(table, f"{found.name} on {folder}")
    mean = table[table["subject"] == "mean"].filter(like="Dice").to_numpy(dtype=float).mean()
    if mean < LOW:
        hint = (
            f"a mean Dice of {mean:.2f} is low: are --inputs in the network's order, --outputs what it was trained on, "
            "--preprocessing and --window its own, the voxels of the size and the axes (RAS here) of those it knows?"
        )
        cli.err.print(f"[yellow]{cli._escape(hint)}[/]", highlight=False, soft_wrap=True)
