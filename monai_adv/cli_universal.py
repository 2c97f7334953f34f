"""The command ``monai-adv universal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monai_adv import cli_options as options


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(universal)


def universal(
    root: options.Labelled,
    checkpoint: options.Checkpoint,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where perturbations, records and tables go.")
    ],
    eps: Annotated[float, typer.Option(metavar="EPS", help=options.EPS, callback=options.above_zero)] = 0.1,
    units: Annotated[options.Units, typer.Option(help=options.UNITS, case_sensitive=False)] = "std",
    norm: Annotated[options.Norm, typer.Option(help=options.NORM, case_sensitive=False)] = "linf",
    mode: Annotated[
        options.UniversalMode, typer.Option(help="Away from the truth; to one mask; or to a rule per subject.")
    ] = "untargeted",
    target: options.Target = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODALITY", help="T1, T1c, T2, FLAIR or all at once; may be repeated.", show_default="the five",
            autocompletion=options.complete_modality,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Updates of each perturbation.")] = 40,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Subjects per update.")] = 2,
    step_size: Annotated[
        float | None, typer.Option(metavar="SIZE", help="Of an update, in --units.", show_default="2.5 eps / steps")
    ] = None,
    loss: Annotated[
        options.Loss, typer.Option(metavar="LOSS", help=f"What is driven up: {options.LOSSES}.")
    ] = "dice_ce",
    hold_out: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="Test on every n-th subject by name, from the first; train on the rest."),
    ] = 5,
    test_every: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also test after every n updates; 0 only at the end.")
    ] = 0,
    seed: options.Seed = 0,
    scheme: options.SchemeName = None,
) -> None:  # fmt: skip
    """Train one perturbation for a whole cohort.

    One for each modality and one for all of them at once; Dice is reported on subjects they were not made of.
    """
    from monai_adv import cli
    from monai_adv.data import MODALITIES
    from monai_adv.studies.plain_yaml import parse_yaml
    from monai_adv.studies.universal import ALL, study_universal

    aim = None if target is None else parse_yaml(target, "--target")
    with cli._bar("universal") as update:
        result = study_universal(
            root, checkpoint, output, eps=eps, units=units, norm=norm, mode=mode,
            target=aim, modalities=modality or (*MODALITIES, ALL),
            hold_out=hold_out, test_every=test_every, scheme=scheme, seed=seed, on_progress=update, steps=steps,
            batch=batch, step_size=step_size, loss=loss,
        )  # fmt: skip
    shown = ["modality", "region", "n", "clean_mean", "noise_mean", "universal_mean", "universal_median",
             "training_universal_mean"]  # fmt: skip
    cli._print_frame(result.table[[c for c in shown if c in result.table.columns]], "Dice of the subjects left out")
    cli.out.print(f"perturbations, records and tables: {result.folder}", highlight=False, soft_wrap=True)
    cli._complain(result.problems)
