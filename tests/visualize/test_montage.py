"""The montage shows what it says: the right slice, orientation, scales, contours and numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.text import Text
from monai.data import MetaTensor

from monai_adv.visualize import montage
from monai_adv.visualize.style import REGION_COLOURS

SHAPE = (16, 20, 9)
RAS = np.diag([2.0, 2.0, 3.0, 1.0])


@pytest.fixture
def subject() -> dict[str, Any]:
    """A brain-like box, a tumour of all classes, a prediction that fails in slice 6 and L-inf noise of 0.1 std."""
    rng = np.random.default_rng(0)
    brain = np.zeros(SHAPE, bool)
    brain[2:14, 3:17, 1:8] = True
    image = (100 + 10 * rng.standard_normal((4, *SHAPE))) * brain
    std = np.array([channel[brain].std() for channel in image])[:, None, None, None]
    sign = np.where(rng.random(image.shape) < 0.5, -1.0, 1.0)
    truth = np.zeros(SHAPE, np.uint8)
    truth[4:10, 5:12, 2:8] = 2
    truth[5:9, 6:11, 3:8] = 1
    truth[6:8, 7:9, 3:8] = 3
    failed = truth.copy()
    failed[..., 6] = 0
    failed[10:13, 12:15, 6] = 2
    return {
        "image": image,
        "adversarial": image + 0.1 * std * sign * brain,
        "truth": truth,
        "prediction": truth,
        "adversarial_prediction": failed,
    }


def panels(figure: Figure) -> list[Axes]:
    """Axes that hold a picture, in order of drawing, without the colour bar."""
    return [axes for axes in figure.axes if axes.images]


def panel(figure: Figure, row: int, column: int) -> Axes:
    """The picture in a row and column of the sheet, by its place."""
    tops = sorted({round(axes.get_position().y0, 4) for axes in panels(figure)}, reverse=True)
    lefts = sorted({round(axes.get_position().x0, 4) for axes in panels(figure)})
    wanted = (tops[row], lefts[column])
    return next(a for a in panels(figure) if (round(a.get_position().y0, 4), round(a.get_position().x0, 4)) == wanted)


def contours(axes: Axes) -> dict[str, np.ndarray]:
    """Colour -> bounds (left, top, right, bottom) of a contour."""
    found = {}
    for drawn in axes.collections:
        if isinstance(drawn, ContourSet):
            points = np.concatenate([path.vertices for path in drawn.get_paths()])
            found[to_hex(drawn.get_edgecolor()[0]).upper()] = np.array([*points.min(axis=0), *points.max(axis=0)])
    return found


def words(figure: Figure) -> str:
    """All text of a figure."""
    return "\n".join(str(text.get_text()) for text in figure.findobj(Text))


def test_layout_titles_and_labels(subject: dict[str, Any]) -> None:
    before = set(Gcf.figs)
    figure = montage(**subject, title="case 7, I-FGSM", affine=RAS, dice={"WT": (0.95, 0.21), "ET": (1.0, 0.0)})
    assert len(panels(figure)) == 4 * 3 + 3 * 2
    assert [panel(figure, 0, column).get_title() for column in range(4)] == ["T1", "T1c", "T2", "FLAIR"]
    labels = [panel(figure, row, 0).get_ylabel() for row in range(5)]
    assert labels == ["clean", "perturbation", "adversarial", "over FLAIR", "over T1c"]
    titles = [panel(figure, 3, column).get_title() for column in range(3)]
    assert titles == ["ground truth", "prediction, clean", "prediction, adversarial"]
    text = words(figure)
    for expected in ("case 7, I-FGSM", "axial slice 6 of 0-8", "pixel 2 x 2 mm", "standard deviations", "whole tumour"):
        assert expected in text
    assert "WT      0.95   0.21" in text
    assert set(Gcf.figs) == before  # no window was made


def test_pictures_are_upright_and_from_the_changed_slice(subject: dict[str, Any]) -> None:
    """RAS storage: columns go from the patient's right (high index) to the left, rows from anterior (high index)."""
    figure = montage(**subject, affine=RAS)
    shown = np.asarray(panel(figure, 0, 1).images[0].get_array())
    expected = subject["image"][1, ::-1, ::-1, 6].T
    # cut to the brain with three pixels of air: x 2-13, y 3-16 of the array
    np.testing.assert_allclose(shown, expected[0:20, 0:16][20 - 17 - 3 : 20, :])
    assert [t.get_text() for t in panel(figure, 0, 0).texts] == ["R", "L"]
    assert panel(figure, 0, 0).texts[0].get_position()[0] < panel(figure, 0, 0).texts[1].get_position()[0]


def test_the_air_around_the_brain_is_cut_off(subject: dict[str, Any]) -> None:
    padded = {
        key: np.pad(value, [(0, 0)] * (value.ndim - 3) + [(20, 20), (20, 20), (0, 0)]) for key, value in subject.items()
    }
    shown = panel(montage(**padded), 0, 0).images[0].get_array()
    assert shown.shape == (14 + 6, 12 + 6)


def test_perturbation_is_shown_in_its_unit_on_one_scale(subject: dict[str, Any]) -> None:
    figure = montage(**subject)
    for column in range(4):
        picture = panel(figure, 1, column).images[0]
        values = np.unique(np.round(np.asarray(picture.get_array()), 6))
        np.testing.assert_allclose(values, [-0.1, 0.0, 0.1], atol=1e-6)
        assert picture.get_clim() == pytest.approx((-0.1, 0.1))
    bar = next(axes for axes in figure.axes if axes.get_title(loc="left") == "std")
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["-0.1", "-0.05", "0", "+0.05", "+0.1"]
    spread = np.subtract(*np.percentile(subject["image"][0][subject["image"][0] != 0], (99.5, 0.5)))
    delta = np.abs((subject["adversarial"] - subject["image"])[0]).max()
    for units, size in (("range", spread), ("absolute", 1.0)):
        shown = np.abs(np.asarray(panel(montage(**subject, units=units), 1, 0).images[0].get_array())).max()
        assert shown == pytest.approx(delta / size)


def test_single_large_changes_do_not_hide_the_others(subject: dict[str, Any]) -> None:
    subject["adversarial"][0, 8, 8, 6] += 1e4
    figure = montage(**subject)
    assert panel(figure, 1, 1).images[0].get_clim()[1] == pytest.approx(0.1)
    assert any(axes.get_title(loc="left") == "std" for axes in figure.axes)


def test_clean_and_adversarial_share_their_window(subject: dict[str, Any]) -> None:
    figure = montage(**subject)
    for column in range(4):
        inside = subject["image"][column][subject["image"][column] != 0]
        window = panel(figure, 0, column).images[0].get_clim()
        assert window == pytest.approx(tuple(np.percentile(inside, (0.5, 99.5))))
        assert panel(figure, 2, column).images[0].get_clim() == window
    background = np.asarray(panel(figure, 3, 2).images[0].get_array())
    np.testing.assert_array_equal(background, np.asarray(panel(figure, 2, 3).images[0].get_array()))


def test_contours_outline_the_regions(subject: dict[str, Any]) -> None:
    figure = montage(**subject)  # L, P, S: x to the right, y downwards; the crop starts at (0, 0)
    truth = contours(panel(figure, 3, 0))
    np.testing.assert_allclose(truth[REGION_COLOURS["WT"].upper()], [3.5, 4.5, 9.5, 11.5])
    np.testing.assert_allclose(truth[REGION_COLOURS["TC"].upper()], [4.5, 5.5, 8.5, 10.5])
    np.testing.assert_allclose(truth[REGION_COLOURS["ET"].upper()], [5.5, 6.5, 7.5, 8.5])
    assert contours(panel(figure, 4, 1)).keys() == truth.keys()
    # the failed prediction has no core left in this slice
    failed = contours(panel(figure, 3, 2))
    assert failed.keys() == {REGION_COLOURS["WT"].upper()}
    np.testing.assert_allclose(failed[REGION_COLOURS["WT"].upper()], [9.5, 11.5, 12.5, 14.5])
    bottom, top = panel(figure, 3, 0).get_ylim()
    assert bottom > top  # rows run downwards after contours too


def test_pixels_have_the_shape_that_the_spacing_says(subject: dict[str, Any]) -> None:
    figure = montage(**subject, spacing=(1.0, 2.5, 3.0))
    assert panel(figure, 0, 0).get_aspect() == 2.5
    box = panel(figure, 0, 0).get_position()
    width, height = figure.get_size_inches()
    rows, columns = panel(figure, 0, 0).images[0].get_array().shape
    assert box.height * height / (box.width * width) == pytest.approx(2.5 * rows / columns)


def test_two_dimensions(subject: dict[str, Any]) -> None:
    flat = {key: value[..., 6] for key, value in subject.items()}
    figure = montage(**flat, spacing=(1.0, 1.0))
    whole = montage(**subject, slice_index=6, spacing=(1.0, 1.0, 3.0))
    assert len(panels(figure)) == 18
    for row, column in ((0, 2), (3, 0)):
        shown = [np.asarray(panel(f, row, column).images[0].get_array()) for f in (figure, whole)]
        np.testing.assert_array_equal(*shown)
    assert "axial slice" not in words(figure)


def test_meta_tensors_bring_their_affine_and_masks_are_taken(subject: dict[str, Any]) -> None:
    image = MetaTensor(torch.from_numpy(subject["image"]), affine=torch.from_numpy(RAS))
    regions = {"WT": subject["truth"] > 0, "cavity": np.zeros(SHAPE, bool)}
    figure = montage(
        image,
        torch.from_numpy(subject["adversarial"]),
        None,
        regions,
        {"WT": torch.from_numpy(subject["adversarial_prediction"]) > 0, "cavity": regions["cavity"]},
    )
    same = montage(**subject, affine=RAS)
    shown = [np.asarray(panel(f, 0, 0).images[0].get_array()) for f in (figure, same)]
    np.testing.assert_array_equal(*shown)
    assert [panel(figure, 3, column).get_title() for column in range(2)] == [
        "prediction, clean",
        "prediction, adversarial",
    ]
    assert "cavity" in words(figure)


def test_an_attack_that_did_nothing(subject: dict[str, Any]) -> None:
    subject |= {"adversarial": subject["image"], "adversarial_prediction": subject["prediction"]}
    figure = montage(**subject)
    assert panel(figure, 1, 0).images[0].get_clim() == (-1.0, 1.0)
    assert "axial slice" in words(figure)


def test_nothing_to_see(subject: dict[str, Any]) -> None:
    """An empty image and empty predictions still make a picture."""
    zeros = {key: np.zeros_like(value) for key, value in subject.items()}
    assert len(panels(montage(**zeros))) == 18


def test_other_modalities(subject: dict[str, Any]) -> None:
    two = subject | {"image": subject["image"][:2], "adversarial": subject["adversarial"][:2]}
    figure = montage(**two, modalities=("CT", "PET"))
    assert [panel(figure, 0, column).get_title() for column in range(2)] == ["CT", "PET"]
    assert panel(figure, 3, 0).get_ylabel() == "over PET"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adversarial": np.zeros((4, 3, 3, 3))}, "shapes"),
        ({"modalities": ("T1",)}, "modality names"),
        ({"units": "percent"}, "units"),
        ({"slice_index": 9}, "does not exist"),
        ({"truth": np.zeros((3, 3, 3), int)}, "ground truth"),
        ({"support": np.ones((3, 3, 3), bool)}, "support"),
        ({"spacing": (1.0, 1.0)}, "spacing"),
    ],
)
def test_bad_input_is_refused(subject: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        montage(**(subject | change))
