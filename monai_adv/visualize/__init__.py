"""Figures and the self-contained HTML report."""

from __future__ import annotations

from .ablation import ablation_figure
from .curves import curve_table, dice_curves
from .heatmap import drop_heatmap, drop_table
from .montage import montage
from .notebook import volume_view
from .paired import paired_plot, paired_table, verdict_text
from .report import LIMITATIONS, write_report
from .slices import AxialView, most_changed_slice
from .study_report import write_study_report
from .style import save_figure
from .synthesis import synthesis_figure
from .viewer import Drawn, ViewerContent, viewer_content

__all__ = [
    "LIMITATIONS",
    "AxialView",
    "Drawn",
    "ViewerContent",
    "ablation_figure",
    "curve_table",
    "dice_curves",
    "drop_heatmap",
    "drop_table",
    "montage",
    "most_changed_slice",
    "paired_plot",
    "paired_table",
    "save_figure",
    "synthesis_figure",
    "verdict_text",
    "viewer_content",
    "volume_view",
    "write_report",
    "write_study_report",
]
