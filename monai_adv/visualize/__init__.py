"""Figures and the self-contained HTML report."""

from __future__ import annotations

from .montage import montage
from .slices import AxialView, most_changed_slice
from .style import save_figure

__all__ = ["AxialView", "montage", "most_changed_slice", "save_figure"]
