"""A bundle in the form of the model zoo's BraTS bundle, attacked without a change to it."""

from __future__ import annotations

import json
import tempfile
from configparser import ConfigParser as ConfigParserIni
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Activations, Activationsd, AsDiscrete, AsDiscreted, Compose

from monai_adv.attacks import create
from monai_adv.bundle import OVERLAYS, PurifiedInferer, attack_overlay, find_head, head_kind, overlay_path
from monai_adv.defenses import Purify
from monai_adv.errors import ConfigError
from monai_adv.victims import Head

NETWORK = {"_target_": "torch.nn.Conv3d", "in_channels": 4, "out_channels": 3, "kernel_size": 3, "padding": 1}
EVALUATE = {
    "imports": ["$import torch", "$import monai"],
    "network_def": NETWORK,
    "validate": {
        "dataset": {"_target_": "Dataset", "data": "$@cases"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@validate#dataset", "batch_size": 1},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "$torch.device('cpu')",
            "val_data_loader": "@validate#dataloader",
            "network": "@network_def",
            "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [6, 6, 6], "sw_batch_size": 2, "overlap": 0.5},
            "postprocessing": {
                "_target_": "Compose",
                "transforms": [
                    {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
                    {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
                ],
            },
            "key_val_metric": {
                "val_mean_dice": {
                    "_target_": "MeanDice",
                    "include_background": True,
                    "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
                }
            },
        },
    },
}


def cases() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = torch.nn.Conv3d(4, 3, 3, padding=1)
    made = []
    for _ in range(2):
        image = torch.randn(4, 9, 8, 7, generator=generator)
        with torch.no_grad():
            made.append({"image": image, "label": (net(image[None])[0] > 0).float()})
    return made


def evaluate(files: list[Path]) -> float:
    parser = ConfigParser()
    parser.read_config([str(f) for f in files])
    parser["cases"] = cases()
    parser.parse(True)
    torch.manual_seed(0)
    evaluator = parser.get_parsed_content("validate#evaluator")
    evaluator.run()
    return float(np.asarray(evaluator.state.metrics["val_mean_dice"]))


def test_an_unmodified_bundle_is_attacked_by_one_more_file(tmp_path: Path) -> None:
    bundle, overlay = tmp_path / "evaluate.json", tmp_path / "attack.json"
    bundle.write_text(json.dumps(EVALUATE))
    overlay.write_text(json.dumps(attack_overlay({"name": "fgsm", "eps": 0.3, "loss": "ce"})))
    clean, attacked = evaluate([bundle]), evaluate([bundle, overlay])
    assert clean > 0.9
    assert attacked < clean - 0.1


def test_a_wrong_attack_is_refused_when_the_overlay_is_made() -> None:
    with pytest.raises(ConfigError, match="unknown"):
        attack_overlay({"name": "fgms"})


def merged(*overlays: str, **overrides: Any) -> ConfigParser:
    content = json.loads(json.dumps(EVALUATE))
    validate = content["validate"]
    for part in ("inferer", "postprocessing"):  # where the model zoo has them
        validate[part], validate["evaluator"][part] = validate["evaluator"][part], f"@validate#{part}"
    parser = ConfigParser()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "evaluate.json"
        bundle.write_text(json.dumps(content))
        parser.read_config([str(bundle), *(str(overlay_path(name)) for name in overlays)])
    parser["cases"] = cases()
    parser.update(pairs=overrides)
    parser.parse(True)
    return parser


def dice_of(parser: ConfigParser) -> float:
    torch.manual_seed(0)
    evaluator = parser.get_parsed_content("validate#evaluator")
    evaluator.run()
    return float(np.asarray(evaluator.state.metrics["val_mean_dice"]))


def test_the_shipped_overlay_attacks_with_what_the_user_says() -> None:
    clean = dice_of(merged())
    weak = dice_of(merged("attack", **{"attack#eps": 0.01, "attack#steps": 2}))
    strong = dice_of(merged("attack", **{"attack#eps": 0.3, "attack#steps": 2}))
    assert clean > 0.9
    assert strong < weak - 0.1 < clean


def test_the_overlay_takes_the_head_from_the_postprocessing_or_from_the_user() -> None:
    iteration = merged("attack", attack_regions=["a", "b", "c"]).get_parsed_content(
        "validate#evaluator#iteration_update"
    )
    assert iteration.head == Head("sigmoid", ("a", "b", "c"))
    assert iteration.attack.name == "pgd"
    softmax = merged("attack", attack_head="softmax").get_parsed_content("validate#evaluator#iteration_update")
    assert softmax.head == "softmax"


def test_the_purifying_overlay_is_attacked_adaptively() -> None:
    options = {"attack#eps": 0.3, "attack#steps": 2, "purify#sigma": 0.7}
    defended = merged("defend")
    inferer = defended.get_parsed_content("validate#evaluator#inferer")
    assert isinstance(inferer, PurifiedInferer)
    network = defended.get_parsed_content("network_def")
    image = cases()[0]["image"][None]
    image[..., :2] = 0
    plain_inferer = defended.get_parsed_content("validate#inferer")
    expected = plain_inferer(Purify("gaussian")(image), network)
    torch.testing.assert_close(inferer(image, network), expected)
    leaf = image.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(inferer(leaf, network).square().sum(), leaf)
    (truth,) = torch.autograd.grad(plain_inferer(Purify("gaussian")(leaf), network).square().sum(), leaf)
    torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-5)
    meta = inferer(MetaTensor(image, affine=torch.diag(torch.tensor([2.0, 1, 1, 1]))), network)
    assert isinstance(meta, MetaTensor)
    assert float(meta.affine[0, 0]) == 2
    clean = dice_of(merged("defend", **{"purify#sigma": 0.7}))
    assert dice_of(merged("defend", "attack", **options)) < clean


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_ship_with_the_package(name: str) -> None:
    content = json.loads(overlay_path(name).read_text())
    options = content.get("attack") or content.get("robust_attack")
    assert options is None or create(**options)
    metadata = ConfigParserIni()
    metadata.read(Path(__file__).parents[2] / "setup.cfg")
    assert "*.json" in metadata["options.package_data"]["monai_adv.bundle"]


def test_an_unknown_overlay_is_refused() -> None:
    with pytest.raises(ConfigError, match="attack, defend, robust_train"):
        overlay_path("atack")


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        ([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)], "sigmoid"),
        ([Activationsd("pred", softmax=True), AsDiscreted("pred", argmax=True, to_onehot=3)], "softmax"),
        ([Compose([AsDiscreted(["pred", "label"], argmax=[True, False], to_onehot=3)])], "softmax"),
        ([Activations(sigmoid=True), AsDiscrete(threshold=0.5)], "sigmoid"),
    ],
)
def test_what_a_postprocessing_tells(steps: list[Any], kind: str) -> None:
    assert head_kind(Compose(steps)) == kind
    head = find_head(Compose(steps))
    assert head.kind == kind
    if kind == "softmax":
        assert head.regions == {"class 1": (1,), "class 2": (2,)}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "neither"),
        ([AsDiscreted("pred", threshold=0.5)], "neither"),
        ([AsDiscreted("label", argmax=True)], "neither"),
        ([Activationsd("pred", sigmoid=True), AsDiscreted("pred", argmax=True)], "and"),
        ([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.3)], "0.3"),
    ],
)
def test_a_postprocessing_that_does_not_tell_is_an_error(steps: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head_kind(Compose(steps))
    assert find_head(Compose(steps), head="sigmoid").kind == "sigmoid"
