"""Windows of one volume over two processes: logits, gradients and attacks of one process, and no rank left alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import nn
from two_processes import run_two
from windows_worker import EXACT, FAILURES, OPTIONS, Result, all_cases, checkpoint

from monai_adv.defenses import Purify, purified
from monai_adv.errors import ConfigError
from monai_adv.inferers import (
    DistributedSlidingWindowInferer,
    GradientSlidingWindowInferer,
    ResampledInferer,
    SlicewiseInferer,
    spread_windows,
)
from monai_adv.victims import MirrorInferer, Victim

pytestmark = pytest.mark.slow

TOLERANCE = 1e-12
OTHERS = ["support", "halved", "condition", "attack pgd", "attack mirrored", "attack slices"]
CASES = [f"exact {case}" for case in EXACT] + [f"options {name}" for name in OPTIONS] + OTHERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, which start once for all cases."""
    root = tmp_path_factory.mktemp("windows")
    checkpoint(root)
    worker = Path(__file__).with_name("windows_worker.py")
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    run_two(worker, root, timeout=150, environment={"PYTHONPATH": path})
    return root


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Result]]:
    return [torch.load(folder / f"results{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, tuple[str, str]]]:
    """Name and text of what was raised on each rank in every failing case."""
    return [torch.load(folder / f"said{rank}.pt", weights_only=True) for rank in (0, 1)]


def tensors(result: Result) -> dict[str, torch.Tensor]:
    flat = {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}
    return flat | {f"gradient {k}": value for k, value in enumerate(result["gradients"])}


def assert_as_one(found: list[Result], truth: Result, tolerance: float) -> None:
    """The same bits on both ranks, and one process's values; a parameter's gradient on the scale of the largest."""
    first, second, expected = tensors(found[0]), tensors(found[1]), tensors(truth)
    assert list(first) == list(second) == list(expected)
    largest = max(float(value.norm()) for value in truth["gradients"])
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        scale = largest if name.startswith("gradient") and name != "gradient 0" else float(value.norm())
        assert float((first[name] - value).norm()) <= tolerance * scale, name
        assert float(value.norm()) > 0 or name.startswith("gradient"), name


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(name: str, two: list[dict[str, Result]], folder: Path) -> None:
    assert_as_one([results[name] for results in two], all_cases(folder)[name](False), TOLERANCE)


def test_two_ranks_are_one_process_in_single_precision(two: list[dict[str, Result]], folder: Path) -> None:
    assert_as_one([results["single"] for results in two], all_cases(folder)["single"](False), 1e-6)


# those that keep all graphs: with others recomputed windows are among the calls
@pytest.mark.parametrize("case", [case for case in EXACT if case[-1] == "auto"], ids=str)
def test_each_window_is_computed_by_one_rank_and_the_shares_are_even(
    case: tuple[Any, ...], two: list[dict[str, Result]], folder: Path
) -> None:
    sw_batch_size = case[3]
    calls = [results[f"exact {case}"]["calls"] for results in two]
    total = sum(all_cases(folder)[f"exact {case}"](False)["calls"])
    assert sum(map(sum, calls)) == total
    assert abs(sum(calls[0]) - sum(calls[1])) <= 1
    assert all(size == sw_batch_size for shares in calls for size in shares[:-1])


def test_few_windows_are_shared_out_even_if_they_fit_one_call(two: list[dict[str, Result]]) -> None:
    assert [results["options two windows, one call"]["calls"] for results in two] == [[1], [1]]
    assert [results["options one window"]["calls"] for results in two] == [[1], []]


def test_no_rank_recomputes_a_window_without_support(two: list[dict[str, Result]]) -> None:
    assert [results["support"]["calls"] for results in two] == [[1, 1, 1], [1]]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("forward", "RankError", "forward pass: rank 1 of 2 failed, so all stop: ValueError: out of luck"),
        ("first window", "RankError", "forward pass: rank 1 of 2 failed, so all stop: ValueError: out of luck"),
        ("without a gradient", "RankError", "forward pass: rank 1 of 2 failed, so all stop: ValueError: out of luck"),
        ("backward", "RankError", "backward pass: rank 1 of 2 failed, so all stop: ValueError: out of luck"),
        ("non-finite", "NonFiniteError", "rank 1 of 2 failed, so all stop: NonFiniteError: not a number"),
        ("everywhere", "RuntimeError", "expected input[1, 2, 8, 8] to have 5 channels"),  # as in one process
        ("image", "ConfigError", "the image differs between rank 1 and rank 0: every rank must hold the same image"),
        ("seeds", "ConfigError", "the image differs between rank 1 and rank 0"),
        ("shape", "ConfigError", "the image's shape is (1, 2, 8, 32) on rank 1 and (1, 2, 8, 24) on rank 0"),
        ("weights", "ConfigError", "the network's weights (a probe) is"),
        ("upstream", "ConfigError", "backward pass: the upstream gradient differs between rank 1 and rank 0"),
        ("training", "ConfigError", "call eval()"),
        ("dropout", "ConfigError", "the network draws random numbers"),
        ("nan", "", "the network gave NaN or infinite logits"),
    ],
)
def test_what_fails_on_one_rank_is_an_error_of_both(
    name: str, kind: str, message: str, said: list[dict[str, tuple[str, str]]]
) -> None:
    for rank in said:
        assert rank[name][0] == kind
        assert message in rank[name][1]


def test_failures_leave_the_group_in_step(said: list[dict[str, tuple[str, str]]]) -> None:
    assert list(said[0])[-1] == list(FAILURES)[-1] == "after all"
    assert said[0]["after all"] == said[1]["after all"]
    assert said[0]["after all"][0] == ""


def test_a_group_of_other_processes(said: list[dict[str, tuple[str, str]]]) -> None:
    assert said[0]["group"] == said[0]["after all"]  # a group of one is one process
    assert said[1]["group"][0] == "ConfigError"
    assert "a torch.distributed group that this process is not of" in said[1]["group"][1]


def test_without_a_group_an_error_says_how_to_start() -> None:
    inferer = DistributedSlidingWindowInferer(roi_size=8)
    with pytest.raises(ConfigError, match="torchrun"):
        inferer(torch.zeros(1, 1, 8, 8), nn.Conv2d(1, 2, 1))


GIVEN: dict[str, Any] = {
    "roi_size": (8, 8),
    "sw_batch_size": 3,
    "overlap": 0.3,
    "mode": "gaussian",
    "padding_mode": "reflect",
}


@pytest.mark.parametrize("kind", [SlidingWindowInferer, GradientSlidingWindowInferer, DistributedSlidingWindowInferer])
def test_spread_windows_keeps_the_settings(kind: type[SlidingWindowInferer]) -> None:
    more = {} if kind is SlidingWindowInferer else {"keep_windows": 2}
    before = kind(**GIVEN, **more, cache_roi_weight_map=True)
    after = spread_windows(before)
    assert type(after) is DistributedSlidingWindowInferer
    assert {name: getattr(after, name) for name in GIVEN} == {name: getattr(before, name) for name in GIVEN}
    assert after.keep_windows == more.get("keep_windows", "auto")
    assert after.roi_weight_map is before.roi_weight_map
    assert after is not before


def test_spread_windows_goes_into_what_holds_an_inferer() -> None:
    inner = GradientSlidingWindowInferer(**GIVEN)
    outer = MirrorInferer(ResampledInferer(SlicewiseInferer(inner), (1, 1), (2, 2)))
    spread: Any = spread_windows(outer)
    assert type(spread.inferer.inferer.inferer) is DistributedSlidingWindowInferer
    assert outer.inferer.inferer.inferer is inner


def test_a_victim_without_windows_cannot_be_spread() -> None:
    with pytest.raises(ConfigError, match="a SimpleInferer has no windows"):
        Victim(nn.Conv2d(1, 2, 1), SimpleInferer()).distributed()


def test_a_defended_victim_is_spread_with_its_undefended_one() -> None:
    victim = purified(Victim(nn.Conv2d(1, 2, 1), GradientSlidingWindowInferer(**GIVEN)), Purify("median"))
    spread: Any = victim.distributed()
    assert type(spread) is type(victim)
    for one in (spread, spread.undefended):
        assert type(one.inferer) is DistributedSlidingWindowInferer
    assert type(victim.inferer) is GradientSlidingWindowInferer
