"""The command ``monai-adv score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from monai_adv import cli_options as options

Rules = Literal["GLI", "SSA", "PED", "MEN", "MET"]
SHOWN = [
    "subject", "region", "dice", "hd95", "lesion_dice", "lesion_hd95", "lesions_found", "lesions_missed",
    "lesions_invented",
]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(score)


def score(
    predictions: Annotated[Path, typer.Argument(metavar="PRED_DIR", help="Folder of predicted segmentations.")],
    truths: Annotated[Path, typer.Argument(metavar="TRUTH_DIR", help="BraTS or MSD folder, or label files alone.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the tables go.", show_default="printed only"),
    ] = None,
    scheme: options.SchemeName = None,
    prediction_scheme: Annotated[
        options.Scheme | None,
        typer.Option(metavar="SCHEME", case_sensitive=False, help="Of the predictions.", show_default="the truth's"),
    ] = None,
    files: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help='Name of a prediction, * for the subject: "*_adversarial_prediction.nii.gz".',
            show_default="begins with the subject",
        ),
    ] = None,
    rules: Annotated[Rules, typer.Option(help="BraTS 2023 challenge whose rules for lesions hold.")] = "GLI",
    ignore_affine: Annotated[
        bool, typer.Option("--ignore-affine", help="Take voxels to correspond where the shapes agree.")
    ] = False,
) -> None:
    """Score predictions on disk as BraTS 2023 does.

    Dice and HD95, for the whole region and lesion by lesion, per region and subject. Such tables of two folders are
    compared by `monai-adv compare`. Exit code 1 if a subject could not be scored.
    """
    from monai_adv import cli
    from monai_adv.studies.scoring import LESIONS, SCORES, score_folders, summarise_scores

    with cli._interruptible(), cli._bar("score") as update:
        scored = score_folders(
            predictions,
            truths,
            scheme=scheme,
            prediction_scheme=prediction_scheme,
            files=files,
            rules=rules,
            ignore_affine=ignore_affine,
            output=output,
            on_progress=lambda done, total, subject: update(done / total, subject),
        )
    for problem in scored.problems:
        cli.err.print(f"[red]{cli._escape(problem)}[/]", highlight=False, soft_wrap=True)
    if len(scored.scores):
        cli._print_frame(scored.scores[SHOWN], "subjects")
        summary = summarise_scores(scored.scores).set_index("region").T.rename_axis("over subjects").reset_index()
        cli._print_frame(summary, f"lesions by the rules of BraTS-{rules}")
        if output is not None:
            for name in (SCORES, LESIONS, "summary.csv"):
                cli.out.print(f"written: {output / name}", highlight=False, soft_wrap=True)
    if scored.problems or not len(scored.scores):
        raise typer.Exit(1)
