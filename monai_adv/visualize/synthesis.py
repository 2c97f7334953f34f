"""An image that was synthesised from another: what moved, by how many mm, and where the truth is now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contourpy
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.ndimage import map_coordinates

from monai_adv.data import along_axes, load_case, load_displacement
from monai_adv.data.files import write_atomic
from monai_adv.studies.export import Exported

from .montage import _brain_box, _contour, _sides, _symmetric_scale, _window
from .slices import AxialView, as_array
from .style import RC, NotebookFigure, figure_bytes

PANELS = ("clean", "synthetic", "difference", "deformed grid", "truth")
BEFORE, AFTER = "#56B4E9", "#FF6A3D"
# without its darkest end, which is lost on black
_LENGTHS = LinearSegmentedColormap.from_list("lengths", matplotlib.colormaps["plasma"](np.linspace(0.25, 1, 256)))
_LINES = 16  # of the grid, along the longer side
_WIDTH, _GAP, _LEFT, _RIGHT, _BOTTOM = 2.35, 0.06, 0.1, 0.1, 0.86


def synthesis_figure(
    image: Any,
    synthetic: Any,
    truth: Any,
    moved_truth: Any,
    displacement: Any,
    spacing: Sequence[float] | None,
    *,
    title: str | None = None,
    affine: Any = None,
    channel: int = -1,
) -> Figure:
    """Draw one synthesised image beside its source at the axial slice with the most tumour.

    Panels: the clean image, the synthetic one in the same grey window, their difference, a regular grid that moved with
    the anatomy over the synthetic image (colour: by how many mm, in three dimensions), and the outline of the truth
    before and after over the synthetic image. Radiological orientation, as in :func:`monai_adv.visualize.montage`.

    The grid is exact: a line is where ``p + u(p)`` has one coordinate, so it runs through the anatomy it ran through
    in the clean image. Motion out of the slice shows in the colour only.

    Args:
        image: clean ``(C, X, Y, Z)`` or ``(C, X, Y)``; array or tensor.
        synthetic: the same shape and units.
        truth: tumour before, bool ``(*spatial)`` or ``(1, *spatial)``.
        moved_truth: tumour after.
        displacement: ``u``, ``(dims, *spatial)`` in mm along the array's own axes: where each voxel comes from.
        spacing: mm along each spatial axis; from the affine if None.
        title: what stands on top.
        affine: 4 x 4, voxel to RAS mm; the axes are L, P, S if None.
        channel: which modality is shown; FLAIR, the last of BraTS, by default.

    Returns:
        A figure that belongs to no window; save it with `save_figure`.

    Raises:
        ValueError: if shapes or spacing do not fit.
    """
    x, y = (as_array(a).astype(np.float64) for a in (image, synthetic))
    if x.shape != y.shape or x.ndim not in (3, 4):
        raise ValueError(
            f"Images of shapes {x.shape} and {y.shape}; expected twice the same (C, X, Y, Z) or (C, X, Y)."
        )
    spatial = x.shape[1:]
    before, after = (_mask(mask, spatial, name) for mask, name in ((truth, "truth"), (moved_truth, "moved truth")))
    field = as_array(displacement).astype(np.float64)
    if field.shape != (len(spatial), *spatial):
        raise ValueError(f"The displacement has shape {field.shape}; expected {(len(spatial), *spatial)}.")
    view = AxialView.of(spatial, affine)
    height, width = view.pixel(spacing, affine)
    index = _most(before | after, view)
    inside = (x != 0).any(axis=0) | (y != 0).any(axis=0)
    box = _brain_box(view.picture(inside, index))

    def cut(volume: np.ndarray) -> np.ndarray:
        return view.picture(volume, index)[box]

    window = _window(x[channel][x[channel] != 0])
    delta = cut(y[channel] - x[channel])
    aspect = height / width
    show: dict[str, Any] = {"aspect": aspect, "interpolation": "nearest"}
    with matplotlib.rc_context(RC):
        sheet = _Row(len(PANELS), aspect * delta.shape[0] / delta.shape[1], 0.64 if title else 0.32)
        panels = [sheet.panel(column, name) for column, name in enumerate(PANELS)]
        for axes, volume in zip(panels, (x, y, None, y, y)):
            if volume is not None:
                axes.imshow(cut(volume[channel]), cmap="gray", vmin=window[0], vmax=window[1], **show)
        _sides(panels[0])
        scale, clipped = _symmetric_scale(delta)
        colours = panels[2].imshow(delta, cmap="RdBu_r", vmin=-scale, vmax=scale, **show)
        bar = sheet.figure.colorbar(
            colours, cax=sheet.bar(2), orientation="horizontal", extend="both" if clipped else "neither"
        )
        bar.set_ticks([-scale, 0.0, scale], labels=[f"{-scale:+.3g}", "0", f"{scale:+.3g}"])
        bar.set_label("change in the image's units", fontsize=8)
        length = np.linalg.norm(field, axis=0)
        limit = max(float(length[inside].max()) if inside.any() else 0.0, 1e-3)
        lines = _grid(panels[3], view, field, (height, width), index, box, cut(length), limit)
        bar = sheet.figure.colorbar(lines, cax=sheet.bar(3), orientation="horizontal")
        bar.set_ticks([0.0, limit / 2, limit], labels=["0", f"{limit / 2:.2g}", f"{limit:.2g}"])
        bar.set_label("displacement in mm", fontsize=8)
        _contour(panels[4], cut(before), BEFORE, width=1.4)
        _contour(panels[4], cut(after), AFTER, width=1.4)
        handles = [
            Line2D([], [], color=colour, linewidth=2.5, label=name)
            for colour, name in ((BEFORE, "before"), (AFTER, "after"))
        ]
        place = sheet.bar(4)
        place.set_axis_off()
        place.legend(handles=handles, loc="upper center", ncols=2, borderaxespad=0, fontsize=8, handlelength=1.4)
        where = f"axial slice {index} of 0-{view.slices - 1}, " if view.slices > 1 else ""
        sheet.words(title or "", f"{where}pixel {height:.3g} x {width:.3g} mm")
    return sheet.figure


def write_exported_figure(done: Exported) -> Path:
    """Write :func:`synthesis_figure` of the files of a subject as ``<subject>_synthesis.png`` beside them.

    Args:
        done: a subject whose anatomy :func:`monai_adv.studies.export.attack_files` moved (``done.displacement`` is a
            file).

    Returns:
        The path written.

    Raises:
        ValueError: if nothing was moved.
        DataError: if a file cannot be read or written.
    """
    if done.displacement is None:
        raise ValueError(f"{done.subject}: no displacement was written, so there is nothing to draw.")
    clean, moved = load_case(done.source), load_case(done.written)
    vectors, affine = load_displacement(done.displacement)
    figure = synthesis_figure(
        clean["image"],
        moved["image"],
        as_array(clean["label"]) > 0,
        as_array(moved["label"]) > 0,
        along_axes(vectors, affine),
        None,
        title=done.subject,
        affine=affine,
    )
    path = done.displacement.with_name(done.displacement.name.replace("_displacement.nii.gz", "_synthesis.png"))
    write_atomic(path, figure_bytes(figure))
    return path


def _mask(mask: Any, spatial: tuple[int, ...], name: str) -> np.ndarray:
    found = as_array(mask).astype(bool)
    found = found[0] if found.ndim == len(spatial) + 1 and len(found) == 1 else found
    if found.shape != spatial:
        raise ValueError(f"The {name} has shape {found.shape}, the image's spatial shape is {spatial}.")
    return found


def _most(mask: np.ndarray, view: AxialView) -> int:
    """The slice with the most voxels of a mask, the middle one without any."""
    if mask.ndim == 2:
        return 0
    counts = mask.sum(axis=tuple(axis for axis in range(3) if axis != view.axis))
    return int(counts.argmax()) if counts.any() else view.slices // 2


def _grid(
    axes: Axes,
    view: AxialView,
    field: np.ndarray,
    pixel: tuple[float, float],
    index: int,
    box: tuple[slice, slice],
    length: np.ndarray,
    limit: float,
) -> ScalarMappable:
    """Draw the grid that moved with the anatomy; colours of displacements in mm."""
    colours = ScalarMappable(Normalize(0.0, limit), _LENGTHS)
    shape = length.shape
    step = max(shape[0] * pixel[0], shape[1] * pixel[1]) / _LINES  # mm between lines
    for towards, mm in enumerate(pixel):  # down the rows, then along the columns
        # the array's axis that runs along this side of the picture, and whether it runs backwards
        axis = int(np.flatnonzero(view.orientation[:, 0] == 1 - towards)[0])
        moved = view.picture(field[axis], index)[box] * view.orientation[axis, 1]
        place = np.arange(shape[towards]) * mm
        source = (place[:, None] if towards == 0 else place[None, :]) + moved
        lines = contourpy.contour_generator(z=source)
        for level in np.arange(step / 2, place[-1], step):
            for points in lines.lines(level):
                ends = np.asarray(points, dtype=np.float64)  # (n, 2): column, row
                if len(ends) < 2:
                    continue
                centres = (ends[1:] + ends[:-1]) / 2
                strip = LineCollection(list(np.stack([ends[:-1], ends[1:]], axis=1)), linewidths=0.9, capstyle="round")
                mm_there = map_coordinates(length, centres.T[::-1], order=1, mode="nearest")
                strip.set_color(list(colours.to_rgba(mm_there)))
                axes.add_collection(strip, autolim=False)
    return colours


class _Row:
    """Places panels of one size beside each other, in inches, each with room for a colour bar below."""

    def __init__(self, columns: int, height_to_width: float, top: float) -> None:
        self.tall = _WIDTH * height_to_width
        self.width = _LEFT + columns * (_WIDTH + _GAP) - _GAP + _RIGHT
        self.height = top + self.tall + _BOTTOM
        self.figure = NotebookFigure(figsize=(self.width, self.height))

    def _add(self, x: float, y: float, width: float, height: float) -> Axes:
        box = (x / self.width, y / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def panel(self, column: int, title: str) -> Axes:
        """An axes for a picture without ticks and frame."""
        axes = self._add(_LEFT + column * (_WIDTH + _GAP), _BOTTOM, _WIDTH, self.tall)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_title(title, pad=4)
        return axes

    def bar(self, column: int) -> Axes:
        """An axes for the colour bar of a panel, below it."""
        margin = 0.12 * _WIDTH
        return self._add(_LEFT + column * (_WIDTH + _GAP) + margin, _BOTTOM - 0.22, _WIDTH - 2 * margin, 0.11)

    def words(self, title: str, note: str) -> None:
        """Title above everything and a note below."""
        if title:
            self.figure.suptitle(title, y=1 - 0.1 / self.height, va="top", fontsize=12, fontweight="bold")
        self.figure.text(
            _LEFT / self.width, 0.1 / self.height, note, ha="left", va="bottom", fontsize=8, color="#555555"
        )
