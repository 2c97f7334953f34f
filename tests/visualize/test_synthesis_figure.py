"""The figure of a synthesised image: its panels, the slice, and a grid that moves with the anatomy."""

from __future__ import annotations

import io
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import brain_volumes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from monai_adv.studies.export import Exported
from monai_adv.visualize import synthesis_figure
from monai_adv.visualize.style import figure_bytes
from monai_adv.visualize.synthesis import AFTER, BEFORE, PANELS, write_exported_figure

SHAPE = (20, 24, 12)


@pytest.fixture
def case() -> dict[str, Any]:
    """A brain that moved by 2 voxels (4 mm) to higher indices of the first axis (the patient's left)."""
    volumes = brain_volumes(SHAPE)
    image = np.stack([volumes[name] for name in ("T1", "T1c", "T2", "FLAIR")]).astype(np.float32)
    truth = volumes["label"] > 0
    field = np.zeros((3, *SHAPE), np.float32)
    field[0] = -4.0
    return {
        "image": image,
        "synthetic": np.roll(image, 2, axis=1),
        "truth": truth,
        "moved_truth": np.roll(truth, 2, axis=0),
        "displacement": field,
        "spacing": (2.0, 2.0, 3.0),
    }


def panel(figure: Figure, title: str):
    return next(axes for axes in figure.axes if axes.get_title() == title)


def segments(figure: Figure) -> np.ndarray:
    """All pieces of the grid's lines, (n, 2 ends, column and row)."""
    found = [c for c in panel(figure, "deformed grid").collections if isinstance(c, LineCollection)]
    return np.concatenate([np.stack(c.get_segments()) for c in found])


def outline(figure: Figure, colour: str) -> np.ndarray:
    for collection in panel(figure, "truth").collections:
        if to_hex(collection.get_edgecolor()[0]).upper() == colour.upper():
            return np.concatenate([path.vertices for path in collection.get_paths()])
    raise AssertionError(colour)


def test_five_panels_that_are_not_blank(case):
    figure = synthesis_figure(**case, title="case 3, drop 0.3")
    assert tuple(axes.get_title() for axes in figure.axes if axes.get_title()) == PANELS
    picture = imread(io.BytesIO(figure_bytes(figure, dpi=80)))[..., :3]
    height, width = picture.shape[:2]
    for title in PANELS:
        box = panel(figure, title).get_position()
        part = picture[
            int((1 - box.y1) * height) : int((1 - box.y0) * height), int(box.x0 * width) : int(box.x1 * width)
        ]
        assert part.std() > 0.1, title
    assert figure.get_suptitle() == "case 3, drop 0.3"
    labels = {axes.get_xlabel() for axes in figure.axes}
    assert {"displacement in mm", "change in the image's units"} <= labels


def test_the_slice_has_the_most_tumour_and_pictures_share_a_window(case):
    figure = synthesis_figure(**case)
    index = int((case["truth"] | case["moved_truth"]).sum((0, 1)).argmax())
    text = " ".join(t.get_text() for t in figure.texts)
    assert f"axial slice {index} of 0-{SHAPE[2] - 1}" in text
    assert "pixel 2 x 2 mm" in text
    shown = panel(figure, "clean").images[0], panel(figure, "synthetic").images[0]
    assert shown[0].get_clim() == shown[1].get_clim()
    rows = np.asarray(panel(figure, "difference").images[0].get_array())
    expected = (case["synthetic"] - case["image"])[3, :, :, index].T
    assert rows.max() == expected.max()
    low, high = panel(figure, "difference").images[0].get_clim()
    assert low == -high
    moved = outline(figure, AFTER)[:, 0].mean() - outline(figure, BEFORE)[:, 0].mean()
    assert moved == pytest.approx(2, abs=0.05)


def test_the_grid_moves_with_the_anatomy(case):
    """Two pixels to the right, as the image; the lines across stay."""
    still, moved = (
        segments(synthesis_figure(**{**case, "displacement": share * case["displacement"]})) for share in (0, 1)
    )

    def upright(lines: np.ndarray) -> np.ndarray:
        return np.unique(lines[np.ptp(lines[:, :, 0], axis=1) < 1e-6][:, 0, 0].round(3))

    def across(lines: np.ndarray) -> np.ndarray:
        return np.unique(lines[np.ptp(lines[:, :, 1], axis=1) < 1e-6][:, 0, 1].round(3))

    assert len(upright(still)) > 8
    inside = upright(still)[:-2] + 2  # the last ones have left the picture
    assert np.isin(inside.round(2), upright(moved).round(2)).all()
    assert np.array_equal(across(still), across(moved))


def test_lengths_are_colours_in_mm(case):
    figure = synthesis_figure(**case)
    bar = next(axes for axes in figure.axes if axes.get_xlabel() == "displacement in mm")
    assert [t.get_text() for t in bar.get_xticklabels()] == ["0", "2", "4"]


@pytest.mark.parametrize("axes", ["RAS", "ALI"])
def test_the_orientation_of_the_array_does_not_matter(case, axes):
    rng = np.random.default_rng(0)
    case["displacement"] = 1.5 * rng.normal(size=(3, 1, 1, 1)) * np.ones((3, *SHAPE)) + rng.normal(size=(3, *SHAPE)) / 4
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(axes)
    )  # fmt: skip

    def turned(volume: np.ndarray) -> np.ndarray:
        return nib.orientations.apply_orientation(volume, turn)

    order = np.argsort(turn[:, 0]).astype(int)
    other = {
        "image": np.stack([turned(c) for c in case["image"]]),
        "synthetic": np.stack([turned(c) for c in case["synthetic"]]),
        "truth": turned(case["truth"]),
        "moved_truth": turned(case["moved_truth"]),
        "displacement": np.stack([turned(case["displacement"][a]) * turn[a, 1] for a in order]),
        "spacing": None,
        "affine": affine @ nib.orientations.inv_ornt_aff(turn, SHAPE),
    }
    first, second = synthesis_figure(**case, affine=affine), synthesis_figure(**other)
    for title in ("clean", "synthetic", "difference"):
        shown = [np.asarray(panel(f, title).images[0].get_array()) for f in (first, second)]
        assert np.array_equal(*shown)
    assert np.allclose(segments(first), segments(second), atol=1e-6)


def test_two_dimensions_and_tensors(case):
    flat = {k: torch.from_numpy(v[..., 6].copy()) for k, v in case.items() if k != "spacing"}
    flat["displacement"] = flat["displacement"][:2]
    figure = synthesis_figure(**flat, spacing=(2.0, 2.0))
    assert tuple(axes.get_title() for axes in figure.axes if axes.get_title()) == PANELS
    assert not any("slice" in t.get_text() for t in figure.texts)


def test_an_empty_truth_and_no_motion_are_drawn(case):
    case |= {key: np.zeros(SHAPE, bool) for key in ("truth", "moved_truth")}
    case |= {"synthetic": case["image"], "displacement": 0 * case["displacement"]}
    figure = synthesis_figure(**case)
    assert not panel(figure, "truth").collections
    assert f"axial slice {SHAPE[2] // 2}" in " ".join(t.get_text() for t in figure.texts)


def test_errors_say_what_does_not_fit(case):
    with pytest.raises(ValueError, match="The displacement has shape"):
        synthesis_figure(**{**case, "displacement": case["displacement"][:2]})
    with pytest.raises(ValueError, match="The moved truth has shape"):
        synthesis_figure(**{**case, "moved_truth": case["truth"][1:]})
    with pytest.raises(ValueError, match="Images of shapes"):
        synthesis_figure(**{**case, "synthetic": case["image"][:, 1:]})
    with pytest.raises(ValueError, match="nothing to draw"):
        write_exported_figure(Exported("a"))
