"""Clean and adversarial volume of a case as an ipyniivue widget: linked planes, overlays, a choice of modality."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import Any

import nibabel as nib
import numpy as np
from monai.utils import optional_import

from .montage import _colour, _unit, _window
from .shown import Masks, Shown
from .viewer import KEPT_FIRST, _box, _change, _image, _look_at, _nifti

_HEIGHT = 320  # pixels of a widget's canvas
_CHANGE = {"R": [60, 0, 0, 200, 255], "G": [190, 90, 0, 60, 220], "B": [255, 230, 0, 20, 90],
           "A": [255, 190, 0, 190, 255], "I": [0, 64, 128, 192, 255]}  # fmt: skip
"""Colours of a perturbation over an image: blue darker, yellow brighter, transparent where nothing changes."""


def planes_widget(shown: Shown) -> Any:
    """Clean and adversarial image in ipyniivue's linked planes, with choices above them."""
    niivue, _ = optional_import("ipyniivue")
    widgets, _ = optional_import("ipywidgets")
    box = _box(shown.clean, np.any(list((shown.truth or {"": np.zeros(shown.clean.shape[1:])}).values()), axis=0))
    affine = np.eye(4) if shown.affine is None else shown.affine.copy()
    if shown.affine is None:
        affine[:2, :2] *= -1  # the axes are L, P, S, as for figures
    affine[:3, 3] += affine[:3, :3] @ [s.start for s in box]
    sides = _sides_of(shown)
    names = list(dict.fromkeys(name for _, _, masks in sides for name in masks))
    if shown.adversarial is not None:
        names.append("perturbation")
    first = "prediction" if "prediction" in names else (names or ["none"])[0]
    order = [m for m in dict.fromkeys([*KEPT_FIRST, *shown.modalities]) if m in shown.modalities]
    modality = widgets.Dropdown(options=order, description="modality")
    overlay = widgets.Dropdown(options=[*names, "none"], value=first, description="overlay")
    opacity = widgets.FloatSlider(value=0.5, min=0.0, max=1.0, step=0.05, description="opacity")
    viewers = [niivue.NiiVue(height=_HEIGHT, **_options(niivue)) for _ in sides]
    for viewer in viewers:
        viewer.add_colormap("change", _CHANGE)
        viewer.broadcast_to([other for other in viewers if other is not viewer], {"2d": True, "3d": True})
        viewer.scene.crosshair_pos = _crosshair(shown, box, affine)

    def visible(name: str) -> float:
        return float(opacity.value) if name == overlay.value else 0.0

    def load(_: Any = None) -> None:
        for viewer, (_title, image, masks) in zip(viewers, sides):
            channel = list(shown.modalities).index(modality.value)
            inside = shown.clean[channel][shown.clean[channel] != 0]
            volumes = [_grey(niivue, image[channel][box], affine, _window(inside))]
            volumes += [_labels(niivue, name, here, box, affine, visible(name)) for name, here in masks.items()]
            if shown.adversarial is not None:
                change = _change((shown.adversarial - shown.clean)[channel][box], affine, _unit(inside, shown.units))
                volumes.append(_coloured(niivue, change, visible("perturbation")))
            viewer.load_volumes(volumes)

    def show(_: Any = None) -> None:
        for viewer in viewers:
            for volume in viewer.volumes[1:]:
                volume.opacity = visible(volume.name.removesuffix(".nii.gz"))

    modality.observe(load, names="value")
    overlay.observe(show, names="value")
    opacity.observe(show, names="value")
    load()
    panes = [
        widgets.VBox([widgets.Label(title), viewer], layout=widgets.Layout(flex="1 1 0", min_width="0"))
        for viewer, (title, _image_of, _masks_of) in zip(viewers, sides)
    ]
    words = widgets.HTML(_words(shown))
    return widgets.VBox([widgets.HBox([modality, overlay, opacity]), widgets.HBox(panes), words])


def _sides_of(shown: Shown) -> list[tuple[str, np.ndarray, dict[str, Masks]]]:
    """Title, image and segmentations of each canvas."""

    def known(**masks: Masks | None) -> dict[str, Masks]:
        return {name.replace("_", " "): found for name, found in masks.items() if found is not None}

    sides = [("clean", shown.clean, known(ground_truth=shown.truth, prediction=shown.prediction))]
    if shown.adversarial is not None:
        truth = shown.truth if shown.moved_truth is None else shown.moved_truth
        masks = known(ground_truth=truth, prediction=shown.adversarial_prediction)
        sides.append(("adversarial", shown.adversarial, masks))
    return sides


def _options(niivue: Any) -> dict[str, Any]:
    """Options of a canvas: three planes, no rendering, the patient's right on the left as in every figure."""
    return {
        "slice_type": niivue.SliceType.MULTIPLANAR, "multiplanar_show_render": niivue.ShowRender.NEVER,
        "is_radiological_convention": True, "is_nearest_interpolation": True, "drag_and_drop_enabled": False,
        "crosshair_width": 0.5, "crosshair_gap": 3.0, "crosshair_color": (1.0, 0.85, 0.2, 0.7), "show_legend": False,
        "loading_text": "", "log_level": "error", "tile_margin": 2.0,
    }  # fmt: skip


def _crosshair(shown: Shown, box: tuple[slice, ...], affine: np.ndarray) -> list[float]:
    """Where the planes cross at first, as shares of the cropped volume along R, A, S."""
    nothing = {"": np.zeros(shown.clean.shape[1:], bool)}
    before, after, truth = (
        np.stack(list((masks or nothing).values())).astype(np.int64)[(slice(None), *box)].sum(axis=0)
        for masks in (shown.prediction, shown.adversarial_prediction, shown.truth)
    )
    changed = shown.prediction is not None and shown.adversarial_prediction is not None
    at = _look_at(before if changed else truth, after if changed else truth, truth, affine)
    voxel = nib.affines.apply_affine(np.linalg.inv(affine), at)
    shares = (voxel + 0.5) / np.array(before.shape)
    place = nib.orientations.io_orientation(affine)
    found = [0.5, 0.5, 0.5]
    for axis, (towards, direction) in enumerate(place):
        found[int(towards)] = float(shares[axis] if direction > 0 else 1 - shares[axis])
    return found


def _grey(niivue: Any, values: np.ndarray, affine: np.ndarray, window: tuple[float, float]) -> Any:
    packed = _image(values, affine, window)
    low, high = packed["window"]
    return niivue.Volume(
        data=base64.b64decode(packed["file"]), name="image.nii.gz", colormap="gray", cal_min=low, cal_max=high,
        colorbar_visible=False,
    )  # fmt: skip


def _coloured(niivue: Any, change: Mapping[str, Any], opacity: float) -> Any:
    return niivue.Volume(
        data=base64.b64decode(change["file"]), name="perturbation.nii.gz", colormap="change", opacity=opacity,
        cal_min=-change["scale"], cal_max=change["scale"], colorbar_visible=False,
    )  # fmt: skip


def _labels(niivue: Any, name: str, masks: Masks, box: tuple[slice, ...], affine: np.ndarray, opacity: float) -> Any:
    """Regions as one label volume: smaller ones over larger ones, each in its colour."""
    regions = list(masks)
    values = np.zeros(next(iter(masks.values()))[box].shape, np.uint8)
    for region in sorted(regions, key=lambda region: -int(masks[region].sum())):
        values[masks[region][box]] = 1 + regions.index(region)
    rgb = [(0, 0, 0), *(tuple(int(_colour(r, regions)[at : at + 2], 16) for at in (1, 3, 5)) for r in regions)]
    volume = niivue.Volume(data=base64.b64decode(_nifti(values, affine)), name=f"{name}.nii.gz", opacity=opacity)
    table: dict[str, Any] = {letter: [colour[at] for colour in rgb] for at, letter in enumerate("RGB")}
    table |= {"A": [0, *[255] * len(regions)], "I": list(range(len(rgb))), "labels": ["", *regions]}
    volume.set_colormap_label(table)
    return volume


def _words(shown: Shown) -> str:
    """Title, colours and Dice below the canvases."""
    regions = list(shown.truth or shown.prediction or {})
    colours = ", ".join(f'<span style="color:{_colour(r, regions)}">&#9632;</span> {html.escape(r)}' for r in regions)
    dice = ", ".join(f"{html.escape(r)} {a:.3f} &rarr; {b:.3f}" for r, (a, b) in (shown.dice() or {}).items())
    parts = [f"<b>{html.escape(shown.title)}</b>", colours]
    if shown.adversarial is not None:
        parts.append("perturbation: blue darker, yellow brighter than the clean image")
    if dice:
        parts.append(f"Dice, clean &rarr; adversarial: {dice}")
    return ". ".join(part for part in parts if part)
