"""A notebook shows a case and an attack: the figure's numbers and slice, and the widget's volumes and choices."""

from __future__ import annotations

import gzip
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from monai.data import MetaTensor

import monai_adv.visualize
from monai_adv import attacks
from monai_adv.errors import ConfigError
from monai_adv.victims import Head, Victim
from monai_adv.visualize import volume_view

SHAPE = (14, 16, 9)
LPS = np.diag([-2.0, -2.0, 3.0, 1.0])
CHANGED = 6  # the axial slice in which the prediction fails
needs_niivue = pytest.mark.skipif(find_spec("ipyniivue") is None, reason="ipyniivue is not installed")


@pytest.fixture
def shown() -> dict[str, Any]:
    """A case, an adversarial image that is 5 brighter in T1 in one place, and predictions with batch axes."""
    rng = np.random.default_rng(0)
    brain = np.zeros(SHAPE, bool)
    brain[2:12, 3:14, 1:8] = True
    image = torch.tensor((100 + 10 * rng.standard_normal((4, *SHAPE))) * brain, dtype=torch.float32)
    label = torch.zeros((1, *SHAPE), dtype=torch.uint8)
    label[0, 4:10, 5:11, 2:8] = 2
    label[0, 5:9, 6:10, 3:8] = 1
    label[0, 6:8, 7:9, 3:8] = 3
    failed = label.clone()
    failed[..., CHANGED] = 0
    adversarial = image.clone()
    adversarial[0, 6, 7, 5] += 5
    return {
        "case": {"image": MetaTensor(image, affine=LPS), "label": MetaTensor(label, affine=LPS), "subject": "phantom"},
        "adversarial": adversarial[None],
        "prediction": label[None].long(),
        "adversarial_prediction": failed[None].long(),
    }


def view(shown: dict[str, Any], **changes: Any) -> Any:
    options = {"interactive": False, **shown, **changes}
    return volume_view(options.pop("case"), **options)


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts) + "\n".join(
        text.get_text() for text in [*figure.texts, *filter(None, [figure._suptitle, figure._supxlabel])]
    )


def outlines(figure: Figure) -> dict[str, int]:
    """Title of a panel -> number of outlines in it."""
    return {a.get_title(): sum(isinstance(c, ContourSet) for c in a.collections) for a in figure.axes if a.images}


def overlap(shown: dict[str, Any], classes: tuple[int, ...]) -> float:
    a, b = (torch.isin(shown[n], torch.tensor(classes)) for n in ("prediction", "adversarial_prediction"))
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_the_figure_shows_the_slice_that_failed_and_the_dice_of_the_whole_volume(shown: dict[str, Any]) -> None:
    figure = view(shown, title="one failure")
    text = words(figure)
    assert "one failure" in text
    assert f"axial slice {CHANGED} of 0-{SHAPE[2] - 1}" in text
    for region, classes in (("WT", (1, 2, 3)), ("TC", (1, 3)), ("ET", (3,))):
        assert re.search(rf"{region}\s+1.00\s+{overlap(shown, classes):.2f}", text), text


def test_bits_of_a_sigmoid_head_are_drawn_like_the_classes_they_mean(shown: dict[str, Any]) -> None:
    head = Head("sigmoid")
    bits = {name: head.label_from_classes(shown[name]) for name in ("prediction", "adversarial_prediction")}
    one, other = view(shown), view(shown, **bits)
    assert bits["prediction"].shape[1] == 3
    assert sorted(words(one).split()) == sorted(words(other).split())
    assert one._repr_png_().startswith(b"\x89PNG")
    assert outlines(one) == outlines(other)


def test_regions_of_an_own_head(shown: dict[str, Any]) -> None:
    figure = view(shown, head=Head("softmax", {"lesion": (1, 2, 3), "core": (1, 3)}))
    text = words(figure)
    assert f"{overlap(shown, (1, 2, 3)):.2f}" in re.search(r"lesion\s.*", text).group()
    assert "WT" not in text


@pytest.mark.parametrize("known", [(), ("label",), ("label", "prediction")], ids=["image", "truth", "prediction"])
def test_a_case_without_an_attack_shows_what_is_known(shown: dict[str, Any], known: tuple[str, ...]) -> None:
    case = {key: value for key, value in shown["case"].items() if key != "label" or "label" in known}
    figure = volume_view(case, prediction=shown["prediction"] if "prediction" in known else None, interactive=False)
    expected = dict.fromkeys(("T1", "T1c", "T2", "FLAIR"), 0)
    expected |= {"ground truth, over FLAIR": 3} if "label" in known else {}
    expected |= {"prediction, over FLAIR": 3} if "prediction" in known else {}
    assert outlines(figure) == expected
    assert "phantom" in words(figure)
    assert any(axes.get_legend() for axes in figure.axes) == bool(known)


def test_an_attack_result_is_taken_as_it_is(shown: dict[str, Any]) -> None:
    torch.manual_seed(0)
    victim = Victim(torch.nn.Conv3d(4, 4, 1))
    image, label = shown["case"]["image"][None], shown["case"]["label"][None].long()
    result = attacks.create("fgsm", eps=0.1)(victim, image, label)
    text = words(volume_view(shown["case"], result, prediction=victim.predict(image), interactive=False))
    dice = 2 * ((result.prediction > 0) & (label > 0)).sum() / ((result.prediction > 0).sum() + (label > 0).sum())
    assert re.search(rf"WT\s+\d.\d\d\s+{float(dice):.2f}", text)
    assert "moved" not in "".join(outlines(volume_view(shown["case"], result, interactive=False)))


def test_a_truth_that_the_attack_moved_is_the_one_that_is_drawn_and_scored(shown: dict[str, Any]) -> None:
    torch.manual_seed(0)
    victim = Victim(torch.nn.Conv3d(4, 4, 1))
    image, label = shown["case"]["image"][None], shown["case"]["label"][None].long()
    result = attacks.create("affine", eps=1, steps=1)(victim, image, label)
    result.prediction = result.label.clone()  # a perfect segmenter of the moved anatomy
    assert not torch.equal(result.label, label)
    figure = volume_view(shown["case"], result, prediction=label, interactive=False)
    assert "ground truth, moved" in outlines(figure)
    assert re.search(r"WT\s+1.00\s+1.00", words(figure))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"case": {"label": 1}}, "image"),
        ({"case": {"image": np.zeros((1, 4, *SHAPE))}}, "without a batch axis"),
        ({"adversarial": np.zeros((4, 3, 3, 3))}, "adversarial image has shape"),
        ({"prediction": np.zeros((2, 1, *SHAPE))}, "expected one case"),
        ({"prediction": np.zeros((1, 3, 3, 3))}, "spatial shape"),
        ({"modalities": ("T1",)}, "1 modality names"),
    ],
)
def test_what_does_not_belong_together_is_refused(shown: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        view(shown, **changes)


@pytest.mark.skipif(find_spec("ipyniivue") is not None, reason="ipyniivue is installed")
def test_a_widget_that_cannot_be_had_is_refused_and_not_replaced_by_a_figure(shown: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pip install ipyniivue"):
        view(shown, interactive=True)
    assert isinstance(view(shown, interactive=None), Figure)


def test_every_figure_of_the_package_shows_itself_in_a_notebook() -> None:
    for path in Path(monai_adv.visualize.__file__).parent.glob("*.py"):
        assert not re.search(r"(?<![A-Za-z])Figure\(\w+=", path.read_text()), f"{path.name}: use NotebookFigure"


def volumes(widget: Any) -> list[dict[str, Any]]:
    """Volumes of each canvas by name."""
    return [
        {v.name.removesuffix(".nii.gz"): v for v in pane.children[1].volumes} for pane in widget.children[1].children
    ]


def values(volume: Any) -> np.ndarray:
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(volume.data)).dataobj)


@needs_niivue
def test_the_widget_holds_clean_and_adversarial_volumes_with_their_overlays(shown: dict[str, Any]) -> None:
    widget = view(shown, interactive=None, title="a <b>title</b>")
    modality, overlay, opacity = widget.children[0].children
    assert modality.options == ("FLAIR", "T1c", "T2", "T1")
    assert overlay.value == "prediction"
    modality.value = "T1"
    clean, adversarial = volumes(widget)
    names = ["image", "ground truth", "prediction", "perturbation"]
    assert list(clean) == list(adversarial) == names
    assert np.count_nonzero(values(clean["image"]) != values(adversarial["image"])) == 1
    change = values(adversarial["perturbation"])
    assert np.count_nonzero(change) == 1
    assert change.max() == pytest.approx(5, rel=0.01)
    assert np.count_nonzero(values(clean["prediction"])) > np.count_nonzero(values(adversarial["prediction"]))
    assert set(np.unique(values(clean["prediction"]))) == {0, 1, 2, 3}
    overlay.value, opacity.value = "perturbation", 0.75
    assert {name: v.opacity for name, v in adversarial.items() if name != "image"} == {
        "ground truth": 0.0, "prediction": 0.0, "perturbation": 0.75,
    }  # fmt: skip
    modality.value = "FLAIR"  # new volumes keep the choice
    assert [v["perturbation"].opacity for v in volumes(widget)] == [0.75, 0.75]
    assert not values(volumes(widget)[1]["perturbation"]).any()
    assert "&lt;b&gt;title" in widget.children[2].value
    assert "Dice" in widget.children[2].value


@needs_niivue
@pytest.mark.parametrize("affine", [LPS, np.diag([2.0, 2.0, 3.0, 1.0]), None], ids=["LPS", "RAS", "none"])
def test_the_planes_cross_where_the_prediction_failed(shown: dict[str, Any], affine: np.ndarray | None) -> None:
    image = shown["case"]["image"].as_tensor()
    shown["case"]["image"] = image if affine is None else MetaTensor(image, affine=affine)
    widget = view(shown, interactive=True)
    viewer = widget.children[1].children[0].children[1]
    data = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(gzip.decompress(viewer.volumes[0].data)))
    place = nib.affines.apply_affine(
        data.affine, np.floor(np.array(viewer.scene.crosshair_pos) * data.shape[:3])
    )  # mm of the voxel under the crosshair
    own = np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine
    voxel = np.rint(nib.affines.apply_affine(np.linalg.inv(own), place)).astype(int)
    assert voxel[2] == CHANGED
    assert shown["prediction"][0, 0][tuple(voxel)] > 0


@needs_niivue
def test_a_clean_case_is_one_canvas(shown: dict[str, Any]) -> None:
    (only,) = volumes(volume_view(shown["case"], interactive=True))
    assert list(only) == ["image", "ground truth"]


def test_the_truth_is_counted_as_the_head_counts_it() -> None:
    from monai_adv.victims import Head

    decathlon = Head("softmax", {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)})  # 1 oedema, 2 necrosis
    image, label = np.zeros((4, 8, 8, 8)), np.zeros((1, 8, 8, 8), int)
    image[:, 1:7, 1:7, 1:7] = 100.0
    label[:, 2:4, 2:6, 2:6], label[:, 4:6, 2:6, 2:6] = 1, 2  # necrosis and oedema in the order of BraTS
    prediction = np.where(label == 1, 2, np.where(label == 2, 1, 0))  # the same in the network's order
    case = {"image": image, "label": label}
    figure = volume_view(
        case, prediction=prediction, adversarial=image + 1.0, adversarial_prediction=prediction, head=decathlon,
        interactive=False,
    )  # fmt: skip
    texts = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
    assert texts.count("1.00") >= 4, texts  # Dice of WT and TC, before and after
