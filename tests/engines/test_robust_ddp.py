"""Robust training in DistributedDataParallel: two processes train what one does with the doubled batch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from robust import batches
from robust_ddp_worker import COMPARED, METHODS, OPTIMISER_STEPS, train
from two_processes import run_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    root = tmp_path_factory.mktemp("two")
    worker, tests = Path(__file__).with_name("robust_ddp_worker.py"), Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), *sys.path])
    run_two(worker, root, timeout=120, environment={"PYTHONPATH": path})
    return root


def load(folder: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", METHODS)
def test_both_processes_hold_the_same_weights_after_one_reduction_per_step(folder: Path, name: str) -> None:
    first, second = (load(folder, name, rank)["weights"] for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    counts = [json.loads((folder / f"counts{rank}.json").read_text())[name] for rank in (0, 1)]
    steps = OPTIMISER_STEPS.get(name, 2)
    assert counts == [[steps, steps]] * 2  # of the one bucket of this small network; the attack goes past the wrapper


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_equal_one_with_the_doubled_batch(folder: Path, name: str) -> None:
    one, _, images = train(name)
    for key, value in one.state_dict().items():
        assert torch.allclose(load(folder, name, 0)["weights"][key], value, atol=1e-6)
    if name == "pgd_at":
        both = torch.cat([load(folder, name, rank)["images"] for rank in (0, 1)])
        assert torch.allclose(both, images[0], atol=1e-6)


def test_processes_draw_numbers_of_their_own(folder: Path) -> None:
    clean = batches(2, 2)[0]["image"]
    made = [load(folder, "noise", rank)["images"] - clean[2 * rank : 2 * rank + 2] for rank in (0, 1)]
    assert made[0].std() > 0.05
    assert (made[0] - made[1]).std() > 0.05
