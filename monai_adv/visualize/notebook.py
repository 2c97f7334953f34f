"""Volumes in a notebook: linked planes to click through where ipyniivue is installed, a figure otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from monai_adv.attacks import AttackResult
from monai_adv.data.labels import MODALITIES
from monai_adv.errors import ConfigError
from monai_adv.victims import Head

from .montage import _brain_box, _colour, _contour, _legend, _sides, _window, montage
from .planes import planes_widget
from .shown import Masks, Shown
from .slices import AxialView, most_changed_slice
from .style import RC, NotebookFigure
from .viewer import KEPT_FIRST


def volume_view(
    case: Mapping[str, Any],
    result: AttackResult | None = None,
    *,
    prediction: Any = None,
    adversarial: Any = None,
    adversarial_prediction: Any = None,
    head: Head | None = None,
    modalities: Sequence[str] = MODALITIES,
    units: str = "std",
    interactive: bool | None = None,
    title: str = "",
) -> Any:
    """Show a case, and what an attack made of it, as the last expression of a notebook's cell.

    With ipyniivue it is a widget: the clean and the adversarial image side by side in three planes with one crosshair
    for both, a choice of the modality, and truth, prediction or perturbation laid over them. Without it, it is a
    figure of the axial slice that changed most (:func:`monai_adv.visualize.montage`; of a case without an attack, its
    modalities and outlines). Where the truth and both predictions are known, Dice before and after stand beside them.

    Args:
        case: what :func:`monai_adv.data.load_case` gives: ``"image"`` (C, *spatial), in image units; if there,
            ``"label"`` (1, *spatial) of canonical class indices, ``"subject"``, and the affine of the image.
        result: what an attack returned for this case alone (a batch of one).
        prediction: of the clean image, as :meth:`monai_adv.victims.Victim.predict` gives it: class indices
            (1, *spatial) or bits (K, *spatial), with or without the batch axis.
        adversarial: adversarial image (C, *spatial) or (1, C, *spatial), where there is no ``result``.
        adversarial_prediction: prediction on the adversarial image, where there is no ``result``.
        head: the victim's head; if None, one channel is read as BraTS classes, several as MONAI's TC, WT, ET.
        modalities: name of each channel.
        units: of the perturbation's colour scale: "std", "range" or "absolute".
        interactive: True asks for the widget, False for the figure; None takes the widget where ipyniivue is installed.
        title: what stands on top; the subject if empty.

    Returns:
        A widget (``ipywidgets.VBox``), or a figure that shows itself in a notebook.

    Raises:
        ConfigError: if shapes do not belong together, both a ``result`` and an adversarial image are given, or a widget
            is asked for without ipyniivue.

    Example:
        >>> image = np.zeros((4, 12, 12, 6)); image[:, 2:10, 2:10, 1:5] = 100.0
        >>> volume_view({"image": image, "subject": "phantom"}, interactive=False).get_suptitle()
        'phantom'
    """
    shown = Shown.of(case, result, prediction, adversarial, adversarial_prediction, head, modalities, units, title)
    installed = find_spec("ipyniivue") is not None
    if interactive and not installed:
        raise ConfigError("interactive=True needs ipyniivue: pip install ipyniivue, or leave interactive out")
    if (installed if interactive is None else interactive) and shown.clean.ndim == 4:
        return planes_widget(shown)
    return _figure(shown)


def _figure(shown: Shown) -> Figure:
    """The figure: a montage of an attack, or what is known of a clean case."""
    if shown.adversarial is None:
        return _clean_figure(shown)
    drawn = [masks for masks in (shown.prediction, shown.adversarial_prediction, shown.truth) if masks is not None]
    before, after = (drawn[0], drawn[min(1, len(drawn) - 1)]) if drawn else (shown.clean[0], shown.clean[0])
    if shown.prediction is None or shown.adversarial_prediction is None:
        after = before  # nothing to compare: the slice with the most foreground
    return montage(
        shown.clean,
        shown.adversarial,
        shown.truth,
        shown.prediction,
        shown.adversarial_prediction,
        affine=shown.affine,
        slice_index=most_changed_slice(before, after, shown.affine),
        modalities=shown.modalities,
        title=shown.title,
        units=shown.units,
        dice=shown.dice(),
        moved_truth=shown.moved_truth,
    )


def _clean_figure(shown: Shown) -> Figure:
    """Modalities of one axial slice, below them the outlines of truth and prediction."""
    known = {"ground truth": shown.truth, "prediction": shown.prediction}
    outlines = {name: masks for name, masks in known.items() if masks is not None}
    view = AxialView.of(shown.clean.shape[1:], shown.affine)
    brain = np.asarray(shown.clean.any(axis=0))
    first: Masks = next(iter(outlines.values()), {"image": brain})
    voxels = np.stack(list(first.values())).sum(axis=0)  # inner regions count more than once
    across = tuple(axis for axis in range(voxels.ndim) if axis != view.axis)
    index = int(voxels.sum(axis=across).argmax()) if voxels.ndim == 3 and voxels.any() else view.slices // 2
    box = _brain_box(view.picture(brain, index))
    height, width = view.pixel(None, shown.affine)
    cells: list[tuple[str, str, Masks]] = [(name, name, {}) for name in shown.modalities]
    background = next((name for name in KEPT_FIRST if name in shown.modalities), shown.modalities[-1])
    cells += [(f"{name}, over {background}", background, masks) for name, masks in outlines.items()]
    count = len(cells) + bool(outlines)  # the last one holds the legend
    columns = 4 if count > 6 else 3 if count > 4 else count
    rows = -(-count // columns)
    with matplotlib.rc_context(RC):
        figure = NotebookFigure(figsize=(2.3 * columns, 2.7 * rows + 0.4), layout="constrained")
        figure.suptitle(shown.title, fontweight="bold")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (name, modality, masks) in zip(panels, cells):
            channel = shown.clean[list(shown.modalities).index(modality)]
            low, high = _window(channel[channel != 0])
            axes.imshow(
                view.picture(channel, index)[box], cmap="gray", vmin=low, vmax=high,
                aspect=height / width, interpolation="nearest",
            )  # fmt: skip
            axes.set_title(name)
            for region, mask in masks.items():
                _contour(axes, view.picture(mask, index)[box], _colour(region, list(masks)), width=1.3)
        for axes in panels:
            axes.set_axis_off()
        _sides(panels[0])
        if outlines:
            _legend(panels[len(cells)], list(first), None)
        figure.supxlabel(f"axial slice {index} of 0-{view.slices - 1}, pixel {height:g} x {width:g} mm", fontsize=8)
    return figure
