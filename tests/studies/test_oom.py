from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer, ResampledInferer
from monai_adv.studies import read_records, run_study, study_from
from monai_adv.studies.oom import Ladder, out_of_memory
from monai_adv.studies.units import read_checked
from monai_adv.victims import Victim, load_victim


class _Small(nn.Module):
    """A network in a memory of so many windows with a graph, or one more without."""

    def __init__(self, network: nn.Module, room: int) -> None:
        super().__init__()
        self.network, self.room = network, room

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return self.network(x)


@pytest.fixture
def small(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A study whose network has room for one window, and that gives it four."""

    def load(*args: Any, **kwargs: Any) -> Any:
        victim = load_victim(*args, **kwargs)
        victim.network = _Small(victim.network, 1)
        return victim

    monkeypatch.setattr("monai_adv.studies.victims.load_victim", load)
    subjects = {**content["data"], "subjects": ["BraTS2021_00000"]}
    return {**content, "data": subjects, "victims": [{**content["victims"][0], "sw_batch_size": 4}]}


def test_steps_are_taken_and_recorded_and_change_no_result(
    small: dict[str, Any], content: dict[str, Any], tmp_path: Path
) -> None:
    result = run_study(study_from({**small, "on_oom": ["sw_batch_size", "recompute"]}))
    assert (result.computed, result.problems) == (7, [])
    for path in (tmp_path / "run" / "units").rglob("*.json"):
        stored = read_checked(path)
        assert stored is not None
        assert stored["oom_steps"] == ["sw_batch_size 2", "sw_batch_size 1"]
    easy = {**content, "data": small["data"], "output": str(tmp_path / "easy")}
    run_study(study_from({**easy, "victims": [{**content["victims"][0], "sw_batch_size": 1}]}))
    one, other = (read_records(tmp_path / name).drop(columns="seconds") for name in ("run", "easy"))
    assert one.equals(other)
    assert not any("oom_steps" in (read_checked(p) or {}) for p in (tmp_path / "easy" / "units").rglob("*.json"))


def test_without_leave_memory_that_ran_out_is_the_result(small: dict[str, Any], tmp_path: Path) -> None:
    result = run_study(study_from(small))
    assert (result.computed, len(result.problems)) == (0, 1)
    assert set(read_records(tmp_path / "run")["status"]) == {"oom"}
    again = run_study(study_from({**small, "on_oom": ["recompute"]}), retry_failed=True)
    assert again.computed == 0  # that does not help here
    assert run_study(study_from({**small, "on_oom": ["sw_batch_size"]}), retry_failed=True).computed == 7


def test_an_unknown_step_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="on_oom"):
        study_from({**content, "on_oom": ["smaller_window"]})


def test_the_ladder_changes_what_it_says_and_puts_it_back() -> None:
    inner = GradientSlidingWindowInferer((8, 8, 8), sw_batch_size=3, overlap=0.5)
    victim = Victim(nn.Conv3d(4, 4, 1), ResampledInferer(inner, (1, 1, 1), (1, 1, 2)))
    with Ladder(victim, ["sw_batch_size", "recompute", "stitch_cpu", "cpu"], "cpu") as ladder:
        steps = 0
        while ladder.down():
            steps += 1
            assert (inner.roi_size, inner.overlap) == ((8, 8, 8), 0.5)
        assert ladder.taken == ["sw_batch_size 1", "recompute"]  # it is on the CPU already
        assert (steps, inner.sw_batch_size, inner.keep_windows) == (2, 1, 0)
    assert (inner.sw_batch_size, inner.keep_windows) == (3, "auto")
    whole = Victim(nn.Conv3d(4, 4, 1))
    with Ladder(whole, ["sw_batch_size", "recompute", "stitch_cpu"], "cuda") as ladder:
        assert not ladder.down()  # a network that sees the volume whole has no windows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_step_on_a_gpu(content: dict[str, Any], tmp_path: Path) -> None:
    from monai_adv.studies import oom

    content["data"]["subjects"] = ["BraTS2021_00000"]
    before = read_records(run_study(study_from({**content, "output": str(tmp_path / "cpu")})).folder)
    kept = oom.Ladder.__enter__
    for number, step in enumerate(["stitch_cpu", "cpu"]):

        def entered(self: Ladder) -> Ladder:
            assert self.down()
            return kept(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(oom.Ladder, "__enter__", entered)
            gpu = {**content, "device": "cuda", "on_oom": [step], "output": str(tmp_path / f"{number}")}
            result = run_study(study_from(gpu))
        assert result.problems == []
        after = read_records(result.folder)
        clean = after["attack"] == "clean"
        assert (after.loc[clean, "dice"] - before.loc[clean, "dice"]).abs().max() < 0.02


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)  # the CPU's own message
    assert out_of_memory(caught.value)
    assert out_of_memory(torch.OutOfMemoryError(""))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes differ"))
