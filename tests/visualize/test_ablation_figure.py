"""The figure of the ablation shows what it says."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from monai_adv.studies.ablation import Shown, View
from monai_adv.visualize import ablation_figure

SHAPE = (16, 20, 9)


@pytest.fixture
def view() -> View:
    """A tumour that the target moves in slice 5; the mask shrinks from 12 voxels to 2."""
    rng = np.random.default_rng(0)
    brain = np.zeros(SHAPE, bool)
    brain[2:14, 3:17, 1:8] = True
    image = ((100 + 10 * rng.standard_normal((4, *SHAPE))) * brain).astype(np.float32)
    truth, target = np.zeros((2, *SHAPE), bool)
    truth[4:8, 5:8, 5] = True
    target[8:12, 10:13, 5] = True
    late = np.zeros(SHAPE, bool)
    late[8, 10:12, 5] = True
    found = View(image, {"WT": truth}, {"WT": target}, {"WT": truth}, (1.0, 1.0, 2.0), np.diag([-1.0, -1, 2, 1]))
    for name, size in (("ssm", 3.0), ("asm", 1.5), ("pgd 0.1 std", 0.1)):
        masks = [truth, late] if name == "asm" else []
        found.methods[name] = Shown(
            image + size * brain, {"WT": target}, masks, [0, 7] if masks else [], f"L2 {size:g}"
        )
    return found


def pictures(figure: Figure) -> dict[tuple[int, int], Axes]:
    """Axes by row and column."""
    tops = sorted({round(a.get_position().y0, 4) for a in figure.axes}, reverse=True)
    lefts = sorted({round(a.get_position().x0, 4) for a in figure.axes})
    return {
        (tops.index(round(a.get_position().y0, 4)), lefts.index(round(a.get_position().x0, 4))): a for a in figure.axes
    }


def test_rows_and_columns(view: View) -> None:
    figure = ablation_figure(view, units="absolute", title="case 3")
    axes = pictures(figure)
    assert [axes[0, column].get_title() for column in range(3)] == [
        "source, ground truth", "source, prediction", "target",
    ]  # fmt: skip
    assert [axes[row, 0].get_ylabel() for row in (1, 2, 3)] == ["SSM", "ASM", "PGD 0.1 std"]
    assert [axes[2, column].get_title() for column in (1, 2)] == ["step 0: 12 voxels", "step 7: 2 voxels"]
    assert [axes[row, 3].get_xlabel() for row in (1, 2, 3)] == ["L2 3", "L2 1.5", "L2 0.1"]
    words = [str(t.get_text()) for t in figure.findobj(Text)]
    for text in ("case 3", "every voxel\nat every step", "no mask"):
        assert text in words
    assert any("axial slice 5 of 0-8" in w for w in words)


def test_perturbations_have_their_own_scale(view: View) -> None:
    axes = pictures(ablation_figure(view, units="absolute"))
    for row, size in ((1, 3.0), (2, 1.5), (3, 0.1)):
        shown = np.asarray(axes[row, 0].images[0].get_array())
        assert shown.max() == pytest.approx(size, rel=1e-3)
        assert axes[row, 0].images[0].get_clim() == pytest.approx((-size, size), rel=1e-3)
        assert f"±{size:g} absolute" in axes[row, 0].get_title()


def test_the_mask_is_drawn_over_the_source(view: View) -> None:
    axes = pictures(ablation_figure(view, slice_index=5))
    for column, count in ((1, 12), (2, 2)):
        assert len(axes[2, column].images) == 2
        drawn = axes[2, column].images[1].get_array()
        assert (~np.ma.getmaskarray(drawn)).sum() == count
    assert not (~np.ma.getmaskarray(pictures(ablation_figure(view, slice_index=4))[2, 1].images[1].get_array())).any()


def test_the_prediction_is_drawn_over_the_adversarial_image(view: View) -> None:
    axes = pictures(ablation_figure(view))
    clean, found = (np.asarray(axes[place].images[0].get_array()) for place in ((0, 0), (1, 3)))
    assert (found - clean).max() == pytest.approx(3.0, rel=1e-3)
    assert len(axes[1, 3].collections) == 1


def test_other_channels_and_slices(view: View) -> None:
    axes = pictures(ablation_figure(view, modality="PET", modalities=("a", "b", "c", "PET")))
    assert axes[0, 0].get_ylabel() == "PET"
    with pytest.raises(ValueError, match="does not exist"):
        ablation_figure(view, slice_index=9)
