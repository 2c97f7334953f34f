"""The command ``monai-adv certify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(certify)


def certify(
    root: Annotated[Path, typer.Argument(help="Folder of images with labels.")],
    checkpoint: Annotated[Path, typer.Option(help="Victim's checkpoint, best trained with the noise.")],
    sigma: Annotated[float, typer.Option(help="Noise on the network's input, in its units (std after a z-score).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for segmentations and records.")],
    tau: Annotated[float, typer.Option(help="Probability a certified voxel exceeds, in [0.5, 1).")] = 0.75,
    samples: Annotated[int, typer.Option(min=1, help="Noisy passes that are tested.")] = 100,
    draws0: Annotated[int, typer.Option(min=1, help="Noisy passes before, which choose the class.")] = 100,
    alpha: Annotated[float, typer.Option(help="Family-wise error over all voxels.")] = 1e-3,
    correction: Annotated[str, typer.Option(help="holm or bonferroni.")] = "holm",
    batch: Annotated[int, typer.Option(min=1, help="Noisy images per call.")] = 2,
    subject: Annotated[list[str] | None, typer.Option(help="Subject; may be repeated; all if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    resample: Annotated[bool, typer.Option(help="Run the network at the spacing it was trained at.")] = False,
    scheme: Annotated[str | None, typer.Option(help="Label scheme, where the names do not settle it.")] = None,
) -> None:
    """Certify segmentations by randomized smoothing: NIfTI (255 abstains), certified Dice, abstention, radius.

    Example: monai-adv certify BraTS2021 --checkpoint noise.pt --sigma 0.25 --tau 0.75 -o certified
    """
    import pandas as pd

    from monai_adv import cli
    from monai_adv.studies.certify import certify_files

    problems, rows = [], []
    with cli._bar("certify") as update:
        for done in certify_files(
            root, checkpoint, output, subject, scheme, seed=seed, resample=resample, on_progress=update, sigma=sigma,
            tau=tau, samples=samples, draws0=draws0, alpha=alpha, correction=correction, batch=batch,
        ):  # fmt: skip
            if done.error:
                problems.append(done.error)
                continue
            rows += done.rows
            cli.out.print(f"{done.subject}: {done.certificate}", highlight=False, soft_wrap=True)
    if rows:
        shown = ["subject", "region", "dice", "smoothed_dice", "certified_dice", "abstained_true"]
        cli._print_frame(pd.DataFrame(rows)[shown], f"L2 radius {rows[0]['radius']:.3g} on the network's input")
        cli.out.print(f"segmentations and records: {output}", highlight=False, soft_wrap=True)
    cli._complain(problems)
