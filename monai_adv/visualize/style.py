"""What all figures share: fonts, colours that colour-blind readers tell apart, and how a figure is saved."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from monai_adv.data.files import atomic_file

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), without its yellow, which is lost on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A")
CONTROL = "#6b6b6b"
"""Grey of the noise control."""
CLEAN = "#111111"
REGION_COLOURS = {"WT": "#56B4E9", "TC": "#F0E442", "ET": "#FF6A3D"}
"""Contour colours over grey images: sky blue, yellow, vermilion (one step brighter than the palette's)."""
NOTEBOOK_DPI = 80
"""Resolution of a figure in a notebook."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "monai_adv",  # the same figure gives the same file
    "text.parse_math": False,  # a name with dollars is no formula, and one that is none stops the drawing
}


class NotebookFigure(Figure):
    """A figure that shows itself as the last expression of a notebook's cell, whether or not pyplot was imported."""

    def _repr_png_(self) -> bytes:
        return figure_bytes(self, "png", NOTEBOOK_DPI)


def is_control(attack: str) -> bool:
    """Whether an attack is the random control rather than an attack."""
    return str(attack).lower().startswith("noise")


def in_order(attacks: Sequence[str]) -> list[str]:
    """Distinct attacks in the order a reader expects: clean, the controls, then the others as they came."""
    distinct = list(dict.fromkeys(str(attack) for attack in attacks))
    return sorted(distinct, key=lambda attack: (attack != "clean", not is_control(attack), distinct.index(attack)))


def attack_styles(attacks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give colour, marker and line style for each attack: controls grey and dashed, the others from the palette.

    From the eighth attack on colours repeat with another line style, so that no two attacks look the same.
    """
    styles: dict[str, dict[str, Any]] = {}
    controls = coloured = 0
    for attack in in_order(attacks):
        if attack == "clean":
            styles[attack] = {"color": CLEAN, "marker": "o", "linestyle": "-"}
        elif is_control(attack):
            styles[attack] = {"color": CONTROL, "marker": MARKERS[controls % len(MARKERS)], "linestyle": "--"}
            controls += 1
        else:
            turn, index = divmod(coloured, len(PALETTE))
            styles[attack] = {
                "color": PALETTE[index],
                "marker": MARKERS[(index + turn) % len(MARKERS)],
                "linestyle": ("-", "-.", ":")[turn % 3],
            }
            coloured += 1
    return styles


def figure_bytes(figure: Figure, kind: str = "png", dpi: int = 160) -> bytes:
    """Draw a figure into bytes, the same for the same figure (no date inside).

    Args:
        figure: any matplotlib figure.
        kind: ``"png"`` or ``"svg"``.
        dpi: resolution of a PNG.
    """
    metadata: dict[str, Any] = {"Software": None} if kind == "png" else {"Date": None, "Creator": "monai_adv"}
    buffer = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 160) -> tuple[Path, Path]:
    """Write a figure as PNG and as SVG, each complete or not at all.

    Args:
        figure: any matplotlib figure.
        path: where to, with or without one of the endings .png and .svg; missing folders are made.
        dpi: resolution of the PNG.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        DataError: if a file cannot be written.
    """
    base = Path(path)
    if base.suffix.lower() in (".png", ".svg"):
        base = base.with_suffix("")
    written = []
    for kind in ("png", "svg"):
        target = base.with_name(f"{base.name}.{kind}")
        content = figure_bytes(figure, kind, dpi)
        with atomic_file(target) as stream:
            stream.write(content)
        written.append(target)
    return written[0], written[1]
