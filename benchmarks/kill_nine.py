"""Kill a small study at random moments, go on, and compare its tables with those of an uninterrupted run.

    python benchmarks/kill_nine.py --kills 50

Exit code 1 if a table differs by a byte.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from monai_adv.networks import build_network
from monai_adv.studies import run_study, study_from
from monai_adv.victims import VictimConfig, save_checkpoint

TABLES = ("records.csv", "records.parquet")
SHAPE = (12, 12, 12)


def tiny_victim(path: Path) -> Path:
    """A small network with random weights."""
    torch.manual_seed(0)
    network = {"name": "UNet", "spatial_dims": 3, "in_channels": 4, "out_channels": 4, "channels": [4, 8],
               "strides": [2], "num_res_units": 0, "norm": "INSTANCE"}  # fmt: skip
    config = VictimConfig(network=network, head="softmax", roi_size=[8, 8, 8], overlap=0.25)
    return save_checkpoint(path, build_network(network), config)


def tiny_cohort(root: Path, subjects: int) -> None:
    """Cases of noise with a ball as tumour, under BraTS's names."""
    for number in range(subjects):
        rng, name = np.random.default_rng(number), f"BraTS2021_{number:05d}"
        radius = np.linalg.norm(np.indices(SHAPE) - np.reshape(SHAPE, (3, 1, 1, 1)) / 2, axis=0)
        label = np.select([radius < 2, radius < 3, radius < 4], [1, 4, 2], 0).astype(np.uint8)
        (root / name).mkdir(parents=True)
        for ending in ("t1", "t1ce", "t2", "flair"):
            volume = np.where(radius < 6, 100 + 40 * label + rng.normal(0, 10, SHAPE), 0).astype(np.int16)
            nib.save(nib.Nifti1Image(volume, np.eye(4)), root / name / f"{name}_{ending}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), root / name / f"{name}_seg.nii.gz")


def content(folder: Path, output: Path) -> dict[str, Any]:
    """A study of 21 units."""
    return {
        "data": {"root": str(folder / "data"), "crop": 1},
        "victims": [{"name": "tiny", "checkpoint": str(folder / "tiny.pt")}],
        "attacks": [{"name": "noise"}, {"name": "fgsm"}, {"name": "pgd", "steps": 5}],
        "budgets": {"eps": [0.2, 0.8]},
        "figures": {"montages": 1},
        "output": str(output),
    }


def start(study: dict[str, Any]) -> int:
    """Run a study in a child; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = len(run_study(study_from(study)).problems)
    finally:
        os._exit(code)


def tables(output: Path) -> list[bytes]:
    """The bytes that must not depend on what happened."""
    return [(output / name).read_bytes() for name in TABLES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_cohort(folder / "data", 3)
        tiny_victim(folder / "tiny.pt")
        started = time.perf_counter()
        _, status = os.waitpid(start(content(folder, folder / "whole")), 0)
        assert status == 0, status
        took = time.perf_counter() - started
        wanted = tables(folder / "whole")
        output, kills, compared, wrong = folder / "killed", 0, 0, 0
        while kills < given.kills or compared == 0:
            child = start(content(folder, output))
            if kills < given.kills:
                time.sleep(draw.uniform(0, took))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                kills += 1
                continue
            assert status == 0, status
            compared += 1  # it was done before it was killed: compared, and from the beginning
            wrong += tables(output) != wanted
            shutil.rmtree(output)
    print(f"{kills} kills, {compared} finished runs compared, {wrong} differ; an uninterrupted run took {took:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
