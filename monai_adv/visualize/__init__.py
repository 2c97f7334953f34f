"""Figures and the self-contained HTML report."""

from __future__ import annotations

from .ablation import ablation_figure
from .curves import dice_curves
from .montage import montage
from .paired import paired_plot, verdict_text
from .report import LIMITATIONS, write_report
from .slices import AxialView, most_changed_slice
from .style import save_figure
from .synthesis import synthesis_figure

__all__ = [
    "LIMITATIONS",
    "AxialView",
    "ablation_figure",
    "dice_curves",
    "montage",
    "most_changed_slice",
    "paired_plot",
    "save_figure",
    "synthesis_figure",
    "verdict_text",
    "write_report",
]
