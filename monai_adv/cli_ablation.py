"""The command ``monai-adv ablation``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from monai_adv import cli_options as options


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(ablation)


def ablation(
    root: options.Labelled,
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where tables and figures go.")],
    target: options.TargetOrNext = "next",
    mode: Annotated[
        options.MaskMode, typer.Option(help="Step sizes and weights: ours, or the paper's.")
    ] = "calibrated",
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Gradient steps of every method.", show_default="50; paper 2501"),
    ] = None,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            metavar="EPS",
            help=f"{options.EPS} Of targeted PGD; may be repeated.",
            show_default="0.1",
            callback=options.above_zero,
        ),
    ] = None,
    units: Annotated[options.Units, typer.Option(help=options.UNITS, case_sensitive=False)] = "std",
    option: options.Options = None,
    subject: options.Subjects = None,
    figures: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Subjects to draw.", show_default="all")
    ] = None,
    scheme: options.SchemeName = None,
) -> None:
    """SSM, ASM, ASMA and targeted PGD side by side.

    The ablation of the segmentation-mask attack (Ozbulak et al. 2019): tables over subjects and a figure of each.
    """
    from monai_adv import cli
    from monai_adv.cli_attacks import parse_options
    from monai_adv.studies.ablation import ablate, check_ablation_folder, summarise_ablation, write_ablation
    from monai_adv.studies.plain_yaml import parse_yaml
    from monai_adv.studies.units import safe_name
    from monai_adv.visualize import ablation_figure, save_figure

    chosen, aim = parse_options(option), parse_yaml(target, "--target")
    check_ablation_folder(output)
    rows, problems = [], []
    with cli._bar("ablation") as update:
        for done in ablate(
            root, checkpoint, target=aim, mode=mode, steps=steps, eps=eps or [0.1], units=units,
            options=chosen, subjects=subject, scheme=scheme, figures=figures, on_progress=update,
        ):  # fmt: skip
            if done.error:
                problems.append(done.error)
                continue
            rows += done.rows
            write_ablation(output, rows)  # after every subject: an interruption costs one
            for row in done.rows:
                cli.out.print(_line(done.subject, row), highlight=False)
            if done.view is not None:
                heading = f"{done.subject}, target: {done.rows[0]['target']}"
                figure = ablation_figure(done.view, units=units, title=heading)
                save_figure(figure, output / "figures" / f"ablation_{safe_name(done.subject)}")
    if rows:
        import pandas as pd

        cli._print_frame(summarise_ablation(pd.DataFrame(rows)), "mean and SD over subjects")
        cli.out.print(f"tables and figures: {output}", highlight=False, soft_wrap=True)
    cli._complain(problems)


def _line(subject: str, row: Mapping[str, Any]) -> str:
    return (
        f"{subject} {row['method']}: L2 {row['l2']:.3f}, L-inf {row['linf']:.3f}, IoU {row['iou']:.3f}, "
        f"pixel accuracy {row['pixel_accuracy']:.4f}, {row['seconds']:.0f} s"
    )
