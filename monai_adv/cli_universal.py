"""The command ``monai-adv universal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(universal)


def universal(
    root: Annotated[Path, typer.Argument(help="Folder of images with labels.")],
    checkpoint: Annotated[Path, typer.Option(help="Victim's checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for perturbations, records and tables.")],
    eps: Annotated[float, typer.Option(help="Budget.")] = 0.1,
    units: Annotated[str, typer.Option(help="std, range or absolute.")] = "std",
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    mode: Annotated[
        str, typer.Option(help="untargeted, static (one mask) or dynamic (a rule per subject).")
    ] = "untargeted",
    target: Annotated[
        str | None,
        typer.Option(help="Target as YAML: '{hide: ET}' or background; static: '{subject: ID}', '{file: PATH}'."),
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option(help="T1, T1c, T2, FLAIR or all; may be repeated; the five if left out.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates of each perturbation.")] = 40,
    batch: Annotated[int, typer.Option(min=1, help="Subjects per update.")] = 2,
    step_size: Annotated[float | None, typer.Option(help="In units; 2.5 eps / steps if left out.")] = None,
    loss: Annotated[str, typer.Option(help="Loss by name.")] = "dice_ce",
    hold_out: Annotated[
        int, typer.Option(min=2, help="Test every n-th subject by name, from the first, as `train` leaves out.")
    ] = 5,
    test_every: Annotated[int, typer.Option(min=0, help="Also test after every n updates; 0 only at the end.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the order of the subjects and of the noise.")] = 0,
    scheme: Annotated[str | None, typer.Option(help="Label scheme, where the names do not settle it.")] = None,
) -> None:
    """Train universal perturbations on some subjects and report Dice on others, per modality and for all.

    Example: monai-adv universal BraTS2021 --checkpoint unet.pt -o universal --eps 0.1 --steps 40
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
