"""The command ``monai-adv convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(convert)


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of a DICOM series, or an NRRD, MetaImage or NIfTI file.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="NIfTI file to write, .nii.gz or .nii.")
    ],
    series: Annotated[
        str | None, typer.Option(metavar="UID", help="Series to take, where the folder holds several.")
    ] = None,
) -> None:
    """Write a DICOM series, NRRD or MetaImage as NIfTI.

    No voxel is moved, and no text of the patient is written.
    """
    import numpy as np

    from monai_adv import cli
    from monai_adv.data.convert import convert_volume
    from monai_adv.data.headers import read_header

    header = read_header(convert_volume(source, output, series=series))
    spacing = " x ".join(f"{edge:.4g}" for edge in header.spacing)
    what = f"{header.shape}, {header.dtype}, {spacing} mm, {header.orientation}"
    axes = header.affine[:3, :3] / header.spacing
    if abs(axes.T @ axes - np.eye(3)).max() > 1e-3:
        note = "the axes are not at right angles (gantry tilt): viewers made with ITK do not open such NIfTI"
        cli.err.print(f"[yellow]note: {note}[/]", highlight=False, soft_wrap=True)
    cli.out.print(f"written: {output} {cli._escape(what)}", highlight=False, soft_wrap=True)
