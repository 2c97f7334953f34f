"""The command ``monai-adv ablation``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(ablation)


def ablation(
    root: Annotated[Path, typer.Argument(help="Folder of images with labels.")],
    checkpoint: Annotated[Path, typer.Option(help="Victim's checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables and figures.")],
    target: Annotated[
        str,
        typer.Option(
            help="'next' (the next subject's mask), background, permute, least_likely, or YAML: '{hide: ET}', "
            "'{subject: ID}', '{file: PATH, scheme: brats2021}'."
        ),
    ] = "next",
    mode: Annotated[str, typer.Option(help="calibrated (ours) or paper.")] = "calibrated",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Gradient steps of every method; 50 or 2501 by the mode.")
    ] = None,
    eps: Annotated[
        list[float] | None, typer.Option(help="Budget of targeted PGD; may be repeated; 0.1 if left out.")
    ] = None,
    units: Annotated[str, typer.Option(help="std, range or absolute.")] = "std",
    option: Annotated[
        list[str] | None, typer.Option(help="Option of ssm, asm, asma as key=value, e.g. first_step=0.05.")
    ] = None,
    subject: Annotated[list[str] | None, typer.Option(help="Subject; may be repeated; all if left out.")] = None,
    figures: Annotated[int | None, typer.Option(min=0, help="Subjects to draw; all if left out.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Label scheme, where the names do not settle it.")] = None,
) -> None:
    """The ablation of the segmentation-mask attack (SSM, ASM, ASMA) with targeted PGD beside it: tables and figures.

    Example: monai-adv ablation BraTS2021 --checkpoint unet.pt -o ablation --steps 100
    """
    from monai_adv import cli
    from monai_adv.cli_attacks import parse_options
    from monai_adv.studies.ablation import ablate, check_ablation_folder, summarise_ablation, write_ablation
    from monai_adv.studies.plain_yaml import parse_yaml
    from monai_adv.studies.units import safe_name
    from monai_adv.visualize import ablation_figure, save_figure

    options, aim = parse_options(option), parse_yaml(target, "--target")
    check_ablation_folder(output)
    rows, problems = [], []
    with cli._bar("ablation") as update:
        for done in ablate(
            root, checkpoint, target=aim, mode=mode, steps=steps, eps=eps or [0.1], units=units,
            options=options, subjects=subject, scheme=scheme, figures=figures, on_progress=update,
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
