"""A bundle shaped like the model zoo's BraTS one, small, on a few built subjects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import brain_volumes, case_file, make_cohort
from monai.networks.nets import SegResNet
from torch import Tensor

from monai_adv.transforms import NormalizeNonzero

CHANNELS = ("T1c", "T1", "T2", "FLAIR")
REGIONS = {"tc": (1, 3), "wt": (1, 2, 3), "et": (3,)}
NETWORK = {"blocks_down": [1, 1], "blocks_up": [1], "init_filters": 8, "in_channels": 4, "out_channels": 3,
           "dropout_prob": 0.2}  # fmt: skip
LOAD = [
    {"_target_": "LoadImaged", "keys": ["image", "label"]},
    {"_target_": "ConvertToMultiChannelBasedOnBratsClassesd", "keys": "label"},
    {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
]
DISCRETE = [
    {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
    {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
]
SPLIT = {"_target_": "SplitDimd", "keys": ["pred", "label"], "output_postfixes": list(REGIONS)}
INVERT = {"_target_": "Invertd", "keys": "pred", "transform": "@validate#preprocessing", "orig_keys": "image",
          "nearest_interp": False, "to_tensor": True, "device": "@validate#evaluator#device"}  # fmt: skip


def dice(name: str) -> dict[str, Any]:
    postfix = "" if name == "val_mean_dice" else "_" + name.rsplit("_", 1)[1]
    keys = [f"pred{postfix}", f"label{postfix}"]
    return {"_target_": "MeanDice", "include_background": True,
            "output_transform": f"$monai.handlers.from_engine({keys})"}  # fmt: skip


# fmt: off
def train_config(data: Path) -> dict[str, Any]:
    listed = "$monai.data.load_decathlon_datalist(@data_list_file_path, data_list_key={!r}, base_dir=@dataset_dir)"
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "ckpt_dir": "$@bundle_root + '/models'",
        "output_dir": "$@bundle_root + '/eval'",
        "data_list_file_path": "$@bundle_root + '/configs/datalist.json'",
        "dataset_dir": str(data),
        "train_datalist": listed.format("training"),
        "val_datalist": listed.format("validation"),
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "epochs": 1,
        "amp": True,
        "network_def": {"_target_": "SegResNet", **NETWORK},
        "network": "$@network_def.to(@device)",
        "loss": {"_target_": "DiceLoss", "smooth_nr": 0, "smooth_dr": 1e-05, "to_onehot_y": False, "sigmoid": True},
        "optimizer": {"_target_": "torch.optim.Adam", "params": "$@network.parameters()", "lr": 0.0001},
        "train": {
            "preprocessing": {"_target_": "Compose", "transforms": LOAD},
            "dataset": {"_target_": "Dataset", "data": "@train_datalist", "transform": "@train#preprocessing"},
            "dataloader": {"_target_": "DataLoader", "dataset": "@train#dataset", "batch_size": 1, "num_workers": 0},
            "inferer": {"_target_": "SimpleInferer"},
            "postprocessing": {"_target_": "Compose", "transforms": DISCRETE},
            "handlers": [{"_target_": "CheckpointSaver", "save_dir": "@output_dir", "save_dict": {"model": "@network"},
                          "save_final": True, "final_filename": "trained.pt"}],
            "trainer": {
                "_target_": "SupervisedTrainer", "max_epochs": "@epochs", "device": "@device",
                "train_data_loader": "@train#dataloader", "network": "@network", "loss_function": "@loss",
                "optimizer": "@optimizer", "inferer": "@train#inferer", "postprocessing": "@train#postprocessing",
                "train_handlers": "@train#handlers", "amp": "@amp",
            },
        },
        "validate": {
            "preprocessing": {"_target_": "Compose", "transforms": LOAD},
            "dataset": {"_target_": "Dataset", "data": "@val_datalist", "transform": "@validate#preprocessing"},
            "dataloader": {"_target_": "DataLoader", "dataset": "@validate#dataset", "batch_size": 1,
                           "shuffle": False, "num_workers": 0},
            "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [8, 8, 8], "sw_batch_size": 2, "overlap": 0.5},
            "postprocessing": {"_target_": "Compose", "transforms": [*DISCRETE, SPLIT]},
            "handlers": [],
            "key_metric": {"val_mean_dice": dice("val_mean_dice")},
            "additional_metrics": {f"val_mean_dice_{r}": dice(f"val_mean_dice_{r}") for r in REGIONS},
            "evaluator": {
                "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@validate#dataloader",
                "network": "@network", "inferer": "@validate#inferer",
                "postprocessing": "@validate#postprocessing", "key_val_metric": "@validate#key_metric",
                "additional_metrics": "@validate#additional_metrics", "val_handlers": "@validate#handlers",
                "amp": "@amp",
            },
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@train#trainer.run()"],
    }
# fmt: on


EVALUATE = {
    "validate#postprocessing": {"_target_": "Compose", "transforms": [DISCRETE[0], INVERT, DISCRETE[1], SPLIT]},
    "validate#handlers": [
        {"_target_": "CheckpointLoader", "load_path": "$@ckpt_dir + '/model.pt'", "load_dict": {"model": "@network"}},
        {"_target_": "MetricsSaver", "save_dir": "@output_dir", "metrics": ["val_mean_dice"],
         "metric_details": ["val_mean_dice"], "batch_transform": "$lambda x: [xx['image'].meta for xx in x]",
         "summary_ops": "*"},
    ],
    "run": ["$@validate#evaluator.run()"],
}  # fmt: skip
METADATA = {
    "version": "0.5.0",
    "monai_version": "1.6.1",
    "name": "BraTS MRI segmentation",
    "task": "Multimodal Brain Tumor segmentation",
    "network_data_format": {
        "inputs": {"image": {"num_channels": 4, "channel_def": dict(zip("0123", CHANNELS))}},
        "outputs": {"pred": {"num_channels": 3,
                             "channel_def": {"0": "Tumor core", "1": "Whole tumor", "2": "Enhancing tumor"}}},
    },
}  # fmt: skip


@cache
def weights() -> dict[str, Tensor]:
    """A network that is good at the built subjects after a second of training."""
    volumes = brain_volumes()
    order = {"T1": 0, "T1c": 1, "T2": 2, "FLAIR": 3}
    image = torch.from_numpy(np.stack([volumes[m] for m in order]).astype(np.float32))
    image = NormalizeNonzero()(image)[[order[c] for c in CHANNELS]][None]
    label = torch.from_numpy(volumes["label"].astype(np.int64))
    bits = torch.stack([torch.isin(label, torch.tensor(c)) for c in REGIONS.values()])[None].float()
    # windows as they are deployed: the statistics of group normalisation are those of a window
    windows = [data[..., i : i + 8, j : j + 8, k : k + 8] for i in (0, 3, 6) for j in (0, 4, 8) for k in (0, 4)
               for data in (image, bits)]  # fmt: skip
    image, bits = torch.cat(windows[0::2]), torch.cat(windows[1::2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SegResNet(**NETWORK).eval()  # no dropout: fewer steps are enough
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(network(image), bits).backward()
            optimizer.step()
    return network.state_dict()


def make_bundle(root: Path, subjects: int = 2) -> Path:
    """Write data and bundle below ``root``; returns the bundle's folder."""
    data, bundle = root / "data", root / "brats_mri_segmentation"
    names = make_cohort(data, subjects)
    items = [
        {"image": [str(case_file(data, n, c).relative_to(data)) for c in CHANNELS],
         "label": str(case_file(data, n, "label").relative_to(data))}
        for n in names
    ]  # fmt: skip
    (bundle / "configs").mkdir(parents=True)
    (bundle / "models").mkdir()
    contents = {"train": train_config(data), "evaluate": EVALUATE, "metadata": METADATA,
                "datalist": {"training": items, "validation": items}}  # fmt: skip
    for name, content in contents.items():
        (bundle / "configs" / f"{name}.json").write_text(json.dumps(content, indent=4))
    torch.save({"model": weights()}, bundle / "models" / "model.pt")
    return bundle


def monai_bundle(bundle: Path, *files: str | Path, **overrides: Any) -> subprocess.CompletedProcess[str]:
    """``python -m monai.bundle run`` in the bundle's folder, as its users call it."""
    paths = [str(f) if isinstance(f, Path) else f"configs/{f}.json" for f in files]
    options = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    return subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(paths), *options],
        cwd=bundle,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
