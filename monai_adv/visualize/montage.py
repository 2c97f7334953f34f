"""One subject before and after: modalities, perturbation and contours at the slice that changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from monai_adv.data.labels import MODALITIES

from .slices import AxialView, as_array, masks_of, most_changed_slice
from .style import RC, REGION_COLOURS, NotebookFigure

_UNIT_NAMES = {
    "std": "standard deviations of the support",
    "range": "share of the robust range (0.5-99.5 percentile)",
    "absolute": "units of the image",
}
_SHORT_UNITS = {"std": "std", "range": "share of range", "absolute": "image units"}
_REGION_NAMES = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}
_FALLBACK_COLOURS = ("#56B4E9", "#F0E442", "#FF6A3D", "#00E0A4", "#FF9BE0", "#FFFFFF")
_BACKGROUNDS = ("FLAIR", "T1c")
_MARGIN = 3  # pixels of air around the brain


def montage(
    image: Any,
    adversarial: Any,
    truth: Any,
    prediction: Any,
    adversarial_prediction: Any,
    *,
    spacing: Sequence[float] | None = None,
    affine: Any = None,
    support: Any = None,
    slice_index: int | None = None,
    modalities: Sequence[str] = MODALITIES,
    title: str = "",
    units: str = "std",
    dice: Mapping[str, tuple[float, float]] | None = None,
    moved_truth: Any = None,
) -> Figure:
    """Draw one subject at one axial slice: what the network saw and what it made of it.

    Columns are the modalities; rows are the clean image, the perturbation (one diverging colour scale for all
    modalities, its unit beside it) and the adversarial image, clean and adversarial with the same window (0.5-99.5
    percentile of the support). Below, contours of the ground truth, the prediction on the clean and the prediction
    on the adversarial image over FLAIR and T1c. Radiological orientation: anterior up, the patient's right (R) on
    the left.

    Args:
        image: clean image (C, X, Y, Z) or (C, X, Y); array, tensor or MetaTensor.
        adversarial: the same shape and intensity units.
        truth: canonical class indices ``(*spatial)`` or ``(1, *spatial)``, or region name -> mask; None if unknown.
        prediction: the same for the clean image.
        adversarial_prediction: the same for the adversarial image.
        spacing: mm along each spatial axis; from the affine if None.
        affine: 4 x 4, voxel to RAS mm; taken from a MetaTensor image; else the axes are L, P, S.
        support: boolean mask, ``(*spatial)``, ``(1, *spatial)`` or ``(C, *spatial)``: intensities are scaled by the
            voxels in it; where a modality is not zero if None.
        slice_index: position along the array's axial axis; `most_changed_slice` of the predictions if None.
        modalities: name of each channel.
        title: what stands on top, as a rule subject, attack and budget.
        units: unit of the perturbation's colour scale: ``"std"``, ``"range"`` or ``"absolute"``.
        dice: region -> (Dice on the clean, Dice on the adversarial image) of the whole volume, for the legend.
        moved_truth: the truth that belongs to the adversarial image, where an attack moved the anatomy; it is drawn
            over that image instead of ``truth``.

    Returns:
        A figure that belongs to no window; save it with `save_figure`.

    Raises:
        ValueError: if shapes, names, units or the slice index do not fit.
    """
    if affine is None:
        affine = getattr(image, "affine", None)
    x, y = as_array(image).astype(np.float64), as_array(adversarial).astype(np.float64)
    spatial = x.shape[1:]
    if x.shape != y.shape or x.ndim not in (3, 4):
        raise ValueError(
            f"Images of shapes {x.shape} and {y.shape}; expected twice the same (C, X, Y, Z) or (C, X, Y)."
        )
    if len(modalities) != len(x):
        raise ValueError(f"{len(modalities)} modality names {tuple(modalities)} for {len(x)} channels.")
    if units not in _UNIT_NAMES:
        raise ValueError(f"Unknown units {units!r}; choose one of {', '.join(_UNIT_NAMES)}.")
    view = AxialView.of(spatial, affine)
    if slice_index is None:
        slice_index = most_changed_slice(prediction, adversarial_prediction, affine)
    if not 0 <= slice_index < view.slices:
        raise ValueError(f"Slice {slice_index} does not exist; the volume has {view.slices} axial slices.")
    sides = [
        (name, masks_of(segmentation, spatial, name), background)
        for name, segmentation, background in (
            ("ground truth", truth, x) if moved_truth is None else ("ground truth, moved", moved_truth, y),
            ("prediction, clean", prediction, x),
            ("prediction, adversarial", adversarial_prediction, y),
        )
        if segmentation is not None
    ]
    height, width = view.pixel(spacing, affine)
    inside = _support(support, x)
    box = _brain_box(view.picture(np.asarray(inside.any(axis=0)), slice_index))

    def cut(volume: np.ndarray) -> np.ndarray:
        return view.picture(volume, slice_index)[box]

    windows = [_window(channel[mask]) for channel, mask in zip(x, inside)]
    delta = np.stack([cut(b - a) / _unit(a[mask], units) for a, b, mask in zip(x, y, inside)])  # (C, rows, columns)

    backgrounds = [modalities.index(name) for name in _BACKGROUNDS if name in modalities] or [len(x) - 1]
    aspect = height / width
    sheet = _Sheet(3 + len(backgrounds), max(4, len(x)), aspect * delta.shape[1] / delta.shape[2])
    show: dict[str, Any] = {"aspect": aspect, "interpolation": "nearest"}
    scale, clipped = _symmetric_scale(delta)
    with matplotlib.rc_context(RC):
        for column, (name, (low, high)) in enumerate(zip(modalities, windows)):
            for row, volume, label in ((0, x, "clean"), (2, y, "adversarial")):
                axes = sheet.panel(row, column, title=name if row == 0 else "", label=label)
                axes.imshow(cut(volume[column]), cmap="gray", vmin=low, vmax=high, **show)
                if row == column == 0:
                    _sides(axes)
            axes = sheet.panel(1, column, label="perturbation")
            colours = axes.imshow(delta[column], cmap="RdBu_r", vmin=-scale, vmax=scale, **show)
        bar = sheet.figure.colorbar(colours, cax=sheet.bar(1), extend="both" if clipped else "neither")
        bar.set_ticks(list(np.linspace(-scale, scale, 5)))
        bar.ax.set_yticklabels([f"{tick:+.2g}" if tick else "0" for tick in np.linspace(-scale, scale, 5)])
        bar.ax.set_title(_SHORT_UNITS[units], fontsize=9, loc="left", pad=12 if clipped else 6)
        for row, channel in enumerate(backgrounds, start=3):
            low, high = windows[channel]
            for column, (name, masks, volume) in enumerate(sides):
                axes = sheet.panel(row, column, title=name if row == 3 else "", label=f"over {modalities[channel]}")
                axes.imshow(cut(volume[channel]), cmap="gray", vmin=low, vmax=high, **show)
                for order, (region, mask) in enumerate(masks.items()):
                    _contour(axes, cut(mask), _colour(region, list(masks)), width=max(0.9, 1.9 - 0.5 * order))
        _legend(sheet.panel(3, 3), list(sides[-1][1]), dice)
        where = f"axial slice {slice_index} of 0-{view.slices - 1}, " if view.slices > 1 else ""
        note = f"{where}pixel {height:g} x {width:g} mm, perturbation in {_UNIT_NAMES[units]}"
        sheet.words(title, note)
    return sheet.figure


class _Sheet:
    """Places panels of one size, in inches: rows 0-2 pictures of all modalities, from row 3 on contours."""

    cell, gap, left, right, top, bottom, heading = 2.05, 0.04, 0.3, 0.85, 0.62, 0.32, 0.26

    def __init__(self, rows: int, columns: int, height_to_width: float) -> None:
        self.tall = self.cell * height_to_width
        self.width = self.left + columns * (self.cell + self.gap) + self.right
        self.height = self.top + rows * (self.tall + self.gap) + self.heading + self.bottom
        self.figure = NotebookFigure(figsize=(self.width, self.height))

    def _add(self, row: int, x: float, width: float) -> Axes:
        below = self.top + row * (self.tall + self.gap) + (self.heading if row >= 3 else 0.0) + self.tall
        box = (x / self.width, 1 - below / self.height, width / self.width, self.tall / self.height)
        return self.figure.add_axes(box)

    def panel(self, row: int, column: int, *, title: str = "", label: str = "") -> Axes:
        """An axes for a picture without ticks and frame; the label stands beside the first column only."""
        axes = self._add(row, self.left + column * (self.cell + self.gap), self.cell)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        if title:
            axes.set_title(title, pad=4)
        if label and column == 0:
            axes.set_ylabel(label)
        return axes

    def bar(self, row: int) -> Axes:
        """An axes for the colour bar at the right end of a row."""
        return self._add(row, self.width - self.right + 0.06, 0.13)

    def words(self, title: str, note: str) -> None:
        """Title above everything and a note below."""
        middle = (self.left + self.width - self.right) / 2 / self.width
        if title:
            self.figure.suptitle(title, x=middle, y=1 - 0.1 / self.height, va="top", fontsize=12, fontweight="bold")
        self.figure.text(middle, 0.1 / self.height, note, ha="center", va="bottom", fontsize=8, color="#555555")


def _support(support: Any, image: np.ndarray) -> np.ndarray:
    """Support per channel, ``(C, *spatial)``."""
    if support is None:
        return image != 0
    mask = as_array(support).astype(bool)
    mask = mask[None] if mask.ndim == image.ndim - 1 else mask
    try:
        return np.broadcast_to(mask, image.shape)
    except ValueError:
        raise ValueError(f"The support has shape {mask.shape}, the image {image.shape}.") from None


def _brain_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Box around the brain in a picture with a margin of air; everything where there is no brain."""
    if not mask.any():
        return slice(None), slice(None)
    found = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
    rows, columns = (slice(max(0, int(f[0]) - _MARGIN), int(f[-1]) + 1 + _MARGIN) for f in found)
    return rows, columns


def _window(values: np.ndarray) -> tuple[float, float]:
    """Grey window of a modality: its robust range."""
    if values.size == 0:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, (0.5, 99.5)))
    return (low, high) if high > low else (low, low + 1.0)


def _unit(values: np.ndarray, units: str) -> float:
    """Size of one unit of the perturbation; 1 where a modality has no spread."""
    if units == "absolute" or values.size == 0:
        return 1.0
    size = float(values.std()) if units == "std" else float(np.subtract(*np.percentile(values, (99.5, 0.5))))
    return size or 1.0


def _symmetric_scale(delta: np.ndarray) -> tuple[float, bool]:
    """End of the colour scale, and whether changes go beyond it (more than twice the 99.5 percentile)."""
    changed = np.abs(delta[delta != 0])
    if changed.size == 0:
        return 1.0, False
    largest, robust = float(changed.max()), float(np.percentile(changed, 99.5))
    return (robust, True) if largest > 2 * robust else (largest, False)


def _sides(axes: Axes) -> None:
    """Say on which side the patient's right is."""
    for position, letter, align in ((0.02, "R", "left"), (0.98, "L", "right")):
        axes.text(position, 0.97, letter, transform=axes.transAxes, color="white", ha=align, va="top", fontsize=8)


def _colour(region: str, regions: Sequence[str]) -> str:
    if region in REGION_COLOURS:
        return REGION_COLOURS[region]
    return _FALLBACK_COLOURS[list(regions).index(region) % len(_FALLBACK_COLOURS)]


def _contour(axes: Axes, mask: np.ndarray, colour: str, width: float) -> None:
    """Outline a mask; nothing where it is empty."""
    if mask.any():
        # a border of air closes outlines that touch the picture's edge
        padded = np.pad(mask.astype(float), 1)
        columns, rows = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
        outline = axes.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=width)
        outline.set_path_effects(
            [patheffects.Stroke(linewidth=width + 0.9, foreground="black", alpha=0.6), patheffects.Normal()]
        )
        axes.set_xlim(-0.5, mask.shape[1] - 0.5)
        axes.set_ylim(mask.shape[0] - 0.5, -0.5)


def _legend(axes: Axes, regions: Sequence[str], dice: Mapping[str, tuple[float, float]] | None) -> None:
    """Region colours and, where known, Dice before and after."""
    handles = [
        Line2D([], [], color=_colour(region, regions), linewidth=3, label=f"{region}  {_REGION_NAMES.get(region, '')}")
        for region in regions
    ]
    for handle in handles:
        handle.set_path_effects([patheffects.Stroke(linewidth=4, foreground="black"), patheffects.Normal()])
    axes.legend(handles=handles, loc="upper left", title="contours", alignment="left", fontsize=9, borderaxespad=0.2)
    if dice:
        lines = [f"{'Dice':<6}{'clean':>6}{'adv.':>7}"]
        lines += [f"{region:<6}{before:>6.2f}{after:>7.2f}" for region, (before, after) in dice.items()]
        text = "\n".join(lines) + "\n(whole volume)"
        axes.text(0.02, 0.6, text, transform=axes.transAxes, va="top", family="DejaVu Sans Mono", fontsize=9)
