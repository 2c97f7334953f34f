"""The command ``monai-adv certify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monai_adv import cli_options as options


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(certify)


def certify(
    root: options.Labelled,
    checkpoint: options.Checkpoint,
    sigma: Annotated[
        float,
        typer.Option(metavar="SIGMA", help="Noise on the network's input, in its units (std after a z-score), > 0."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where segmentations and records go.")
    ],
    tau: Annotated[
        float, typer.Option(metavar="TAU", help="Probability that a certified voxel exceeds, from .5 to below 1.")
    ] = 0.75,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Noisy passes that are tested.")] = 100,
    draws0: Annotated[int, typer.Option(min=1, metavar="N", help="Noisy passes before, which choose the class.")] = 100,
    alpha: Annotated[
        float, typer.Option(metavar="ALPHA", help="Family-wise error over all voxels of a scan, in (0, 1).")
    ] = 1e-3,
    correction: Annotated[
        options.Correction, typer.Option(help="For testing every voxel.", case_sensitive=False)
    ] = "holm",
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Noisy images per call.")] = 2,
    subject: options.Subjects = None,
    seed: options.Seed = 0,
    resample: options.Resample = False,
    scheme: options.SchemeName = None,
) -> None:
    """Certify segmentations by randomized smoothing.

    Writes NIfTI in which 255 abstains, certified Dice, the share of abstention and the certified L2 radius. The victim
    is best one trained with the noise: `monai-adv train --method noise`.
    """
    import pandas as pd

    from monai_adv import cli
    from monai_adv.studies.certify import certify_files

    if not resample:
        cli._note_spacing(checkpoint, root, scheme)
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
