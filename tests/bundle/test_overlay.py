"""A bundle in the form of the model zoo's BraTS bundle, attacked without a change to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from monai_adv.bundle import attack_overlay
from monai_adv.errors import ConfigError

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
