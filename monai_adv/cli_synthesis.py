"""The command ``monai-adv train-synthesis``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monai_adv import cli_options as options
from monai_adv.errors import ConfigError

if TYPE_CHECKING:
    from monai_adv.engines import SynthesisPreview


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(train_synthesis)


LIMITS = "Limits of a change"


def train_synthesis(
    root: options.Labelled,
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Generator to write.")] = Path(
        "generator.pt"
    ),
    hold_out: options.HoldOut = 5,
    steps: options.Steps = 1000,
    minutes: options.Minutes = None,
    patch: Annotated[
        int | None,
        typer.Option(min=16, metavar="VOXELS", help="Side of the crops.", show_default="64, or 96 of a 2D network"),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Crops per step.", show_default="2, or 4 of a 2D network"),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(metavar="RATE", help="Learning rate of the generator and of the critic.")
    ] = 5e-4,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="TERM=VALUE", help="Weight of a term of the loss; may be repeated.", show_default=False),
    ] = None,
    critic: Annotated[bool, typer.Option("--critic/--no-critic", help="A critic for realism.")] = True,
    max_mm: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="MM", help="Of the deformation; 0 for none.", show_default="8", rich_help_panel=LIMITS
        ),
    ] = None,
    max_bias: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="SHARE", help="Of the bias field, as a share of the signal; 0 for none.",
            show_default="0.5", rich_help_panel=LIMITS,
        ),
    ] = None,
    max_residual: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="STD", help="Of the residual, in the brain's standard deviations; 0 for none.",
            show_default="0.5", rich_help_panel=LIMITS,
        ),
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where TensorBoard reads.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="State of the training; where it exists, the training goes on from it."),
    ] = None,
    seed: options.Seed = 0,
    scheme: options.SchemeName = None,
) -> None:  # fmt: skip
    """Train a generator of examples that lower Dice.

    One asks for the amount. A 2D network is attacked on axial slices. After every epoch the checkpoint is written, and
    a picture of one crop to the folder beside it that ends in `_epochs`.
    """
    from monai_adv import cli
    from monai_adv.cli_attacks import parse_options
    from monai_adv.cli_train import axes_of
    from monai_adv.engines import SynthesisConfig
    from monai_adv.engines import train_synthesis as train
    from monai_adv.studies.cases import select

    limits = {"max_mm": max_mm, "max_bias": max_bias, "max_residual": max_residual}
    _, items, errors = select(root, scheme)
    held = items[::hold_out] if hold_out else []
    kept = [item for item in items if item not in held]
    if not kept:
        raise ConfigError(f"nothing to train on in {root}: {len(held)} subjects held out")
    config = SynthesisConfig(
        batch=batch, steps=steps, minutes=minutes, seed=seed, learning_rate=learning_rate,
        critic_learning_rate=learning_rate,
        weights={**parse_options(weight, "--weight"), **({} if critic else {"critic": 0.0})},
        effect={name: limit for name, limit in limits.items() if limit is not None},
        patch=None if patch is None else (patch,) * axes_of(checkpoint),
    )  # fmt: skip
    folder = output.with_name(f"{output.stem}_epochs")
    with cli._bar("training") as update:

        def on_step(done: float, terms: dict[str, float]) -> None:
            update(done, f"drop {terms['drop_reached']:.2f} of {terms['drop_asked']:.2f}, loss {terms['loss']:.3f}")

        generator, _ = train(
            kept, checkpoint, output, config, state=state, log_dir=log_dir, on_step=on_step,
            preview=lambda shown: _picture(shown, folder),
            provenance={"command": cli._command(), "held_out": [item["subject"] for item in held]},
        )  # fmt: skip
    _report(generator.training_info)
    cli.out.print(f"generator: {output}", highlight=False, soft_wrap=True)
    cli.out.print(f"pictures: {folder}", highlight=False, soft_wrap=True)
    cli._complain([*map(str, errors), *generator.training_info["problems"]])


def _picture(shown: SynthesisPreview, folder: Path) -> None:
    """Draw what the generator makes of its crop, ``epoch_000.png``."""
    import numpy as np

    from monai_adv.data.files import write_atomic
    from monai_adv.visualize.style import figure_bytes
    from monai_adv.visualize.synthesis import synthesis_figure

    spacing = shown.spacing
    figure = synthesis_figure(
        shown.image, shown.synthetic, shown.truth, shown.moved_truth, shown.fields["displacement"], spacing,
        title=f"epoch {shown.epoch}: drop {shown.reached:.2f} of the soft Dice, asked for {shown.drop:.2f}",
        affine=np.diag([*spacing, *[1.0] * (4 - len(spacing))]),
    )  # fmt: skip
    write_atomic(folder / f"epoch_{shown.epoch:03d}.png", figure_bytes(figure))


def _report(information: dict[str, Any]) -> None:
    """The means of the last steps as a table."""
    import pandas as pd

    from monai_adv import cli

    final = pd.DataFrame([information["final"]])
    cli._print_frame(
        final, f"mean of the last steps, of {information['steps']} on {len(information['subjects'])} subjects"
    )
