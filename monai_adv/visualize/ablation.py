"""One subject of the ablation: source, target, perturbation, the adaptive mask over time, final prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from monai_adv.data.labels import MODALITIES
from monai_adv.studies.ablation import METHODS, View

from .montage import _brain_box, _colour, _contour, _legend, _sides, _symmetric_scale, _unit, _window
from .slices import AxialView, most_changed_slice
from .style import PALETTE, RC, NotebookFigure

_MASK = ListedColormap([PALETTE[4]])
_CELL, _HEAD, _GAP = 1.75, 0.24, 0.05  # inches


def ablation_figure(
    view: View,
    *,
    units: str = "std",
    title: str = "",
    modality: str = "FLAIR",
    modalities: Sequence[str] = MODALITIES,
    slice_index: int | None = None,
) -> Figure:
    """Draw one subject of the ablation at one axial slice, one row per method.

    The first row shows the source with the ground truth, the clean prediction and the target. In every other row
    stand the perturbation (a colour scale of its own, its end beside it), the voxels that still counted in the loss
    at some steps (with their number in the whole volume), and the prediction on the adversarial image.

    Args:
        view: what :func:`monai_adv.studies.ablation.ablate` kept.
        units: unit of the perturbation: "std", "range" or "absolute".
        title: what stands on top.
        modality: the channel that is shown; the last one if the image has no such channel.
        modalities: name of each channel.
        slice_index: position along the array's axial axis; where the target asks for most changes if None.

    Returns:
        A figure that belongs to no window; save it with `save_figure`.

    Raises:
        ValueError: if the slice does not exist.
    """
    image = np.asarray(view.image, dtype=np.float64)
    axial = AxialView.of(image.shape[1:], view.affine)
    if slice_index is None:
        slice_index = most_changed_slice(view.prediction, view.target, view.affine)
    if not 0 <= slice_index < axial.slices:
        raise ValueError(f"Slice {slice_index} does not exist; the volume has {axial.slices} axial slices.")
    channel = list(modalities).index(modality) if modality in modalities else len(image) - 1
    clean = image[channel]
    inside = clean != 0
    box = _brain_box(axial.picture((image != 0).any(0), slice_index))
    height, width = axial.pixel(view.spacing, view.affine)
    at = _Slice(axial, slice_index, box, height / width, _window(clean[inside]))
    most = max((len(shown.masks) for shown in view.methods.values()), default=0)
    rows, columns = at.cut(clean).shape
    sheet = _Sheet(1 + len(view.methods), max(4, 2 + most), at.aspect * rows / columns)
    with matplotlib.rc_context(RC):
        tops = (("source, ground truth", view.label), ("source, prediction", view.prediction), ("target", view.target))
        for column, (name, regions) in enumerate(tops):
            axes = sheet.panel(0, column, name, label=modality if column == 0 else "")
            at.picture(axes, clean, regions)
            if column == 0:
                _sides(axes)
        _legend(sheet.panel(0, 3), list(view.label), None)
        for row, (method, shown) in enumerate(view.methods.items(), start=1):
            adversarial = np.asarray(shown.image[channel], dtype=np.float64)
            scale = at.perturbation(axes := sheet.panel(row, 0), (adversarial - clean) / _unit(clean[inside], units))
            axes.set_title(f"perturbation, ±{scale:.2g} {units}", fontsize=8.5, pad=3)
            axes.set_ylabel(method.upper() if method in METHODS else method.replace("pgd", "PGD", 1), fontsize=10)
            for column, (step, mask) in enumerate(zip(shown.steps, shown.masks), start=1):
                axes = sheet.panel(row, column, f"step {step}: {int(mask.sum())} voxels")
                at.picture(axes, clean, {})
                at.highlight(axes, mask)
            if not shown.masks and most:
                text = "every voxel\nat every step" if method == "ssm" else "no mask"
                sheet.panel(row, 1).text(0.5, 0.5, text, ha="center", va="center", color="#555555")
            axes = sheet.panel(row, 1 + most, "prediction")
            at.picture(axes, adversarial, shown.prediction)
            axes.set_xlabel(shown.note, fontsize=7.5, labelpad=2)
        where = f"axial slice {slice_index} of 0-{axial.slices - 1}, " if axial.slices > 1 else ""
        note = f"{where}pixel {height:g} x {width:g} mm; perturbation of {modality}; orange: voxels that still count"
        sheet.words(title, note)
    return sheet.figure


@dataclass(frozen=True)
class _Slice:
    """One axial slice of volumes of one geometry, and how it is drawn."""

    view: AxialView
    index: int
    box: tuple[slice, slice]
    aspect: float
    window: tuple[float, float]

    def cut(self, volume: np.ndarray) -> np.ndarray:
        return self.view.picture(volume, self.index)[self.box]

    def _show(self, axes: Axes, picture: np.ndarray, **how: Any) -> None:
        axes.imshow(picture, aspect=self.aspect, interpolation="nearest", **how)

    def picture(self, axes: Axes, volume: np.ndarray, regions: dict[str, np.ndarray]) -> None:
        """Grey values with contours."""
        self._show(axes, self.cut(volume), cmap="gray", vmin=self.window[0], vmax=self.window[1])
        for order, (region, mask) in enumerate(regions.items()):
            _contour(axes, self.cut(mask), _colour(region, list(regions)), width=max(0.9, 1.9 - 0.5 * order))

    def perturbation(self, axes: Axes, delta: np.ndarray) -> float:
        """Diverging colours; returns the end of their scale."""
        drawn = self.cut(delta)
        scale, _ = _symmetric_scale(drawn)
        self._show(axes, drawn, cmap="RdBu_r", vmin=-scale, vmax=scale)
        return scale

    def highlight(self, axes: Axes, mask: np.ndarray) -> None:
        """Colour over the voxels of a mask."""
        self._show(axes, np.ma.masked_equal(self.cut(mask).astype(float), 0), cmap=_MASK, alpha=0.85)


class _Sheet:
    """Places panels of one size, in inches, each with a heading."""

    left, top, bottom = 0.35, 0.4, 0.5

    def __init__(self, rows: int, columns: int, height_to_width: float) -> None:
        self.tall = _CELL * height_to_width
        self.step = self.tall + _HEAD + 0.18
        self.width = self.left + columns * (_CELL + _GAP) + 0.35
        self.height = self.top + rows * self.step + self.bottom
        self.figure = NotebookFigure(figsize=(self.width, self.height))

    def panel(self, row: int, column: int, title: str = "", label: str = "") -> Axes:
        """An axes without ticks and frame."""
        below = self.top + row * self.step + _HEAD + self.tall
        place = (self.left + column * (_CELL + _GAP)) / self.width, 1 - below / self.height
        axes = self.figure.add_axes((*place, _CELL / self.width, self.tall / self.height))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.patch.set_visible(False)
        axes.set_title(title, fontsize=8.5, pad=3)
        axes.set_ylabel(label, fontsize=10)
        return axes

    def words(self, title: str, note: str) -> None:
        """Title above everything and a note below."""
        if title:
            self.figure.suptitle(title, y=1 - 0.1 / self.height, va="top", fontsize=12, fontweight="bold")
        self.figure.text(0.5, 0.1 / self.height, note, ha="center", va="bottom", fontsize=8, color="#555555")
