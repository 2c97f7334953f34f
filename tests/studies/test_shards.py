from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_adv.errors import ConfigError
from monai_adv.studies.shards import WHOLE_SUBJECT, Shard, assign, process_device

COSTS = st.lists(st.lists(st.floats(0, 1e6), min_size=1, max_size=6), min_size=1, max_size=20)


@settings(deadline=None, max_examples=100)
@given(costs=COSTS, count=st.integers(1, 7))
def test_every_group_is_dealt_once_and_evenly(costs: list[list[float]], count: int) -> None:
    found = assign(costs, count)
    assert [len(groups) for groups in found] == [len(groups) for groups in costs]
    assert all(0 <= shard < count for groups in found for shard in groups)
    assert found == assign([list(groups) for groups in costs], count)
    loads = [0.0] * count
    for groups, shards in zip(costs, found):
        for cost, shard in zip(groups, shards):
            loads[shard] += cost
    share = sum(loads) / count
    largest = max([c for groups in costs for c in groups] + [WHOLE_SUBJECT * share])
    assert max(loads) <= share + largest + 1e-6 * sum(loads)


def test_a_subject_is_loaded_by_one_shard_unless_it_is_too_much() -> None:
    found = assign([[1.0, 2.0 + k % 3, 3.0 + k % 5] for k in range(40)], 4)
    assert all(len(set(groups)) == 1 for groups in found)
    assert {groups[0] for groups in found} == {0, 1, 2, 3}
    assert set(assign([[1.0, 1.0, 1.0, 1.0]], 4)[0]) == {0, 1, 2, 3}


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "2", "WORLD_SIZE": "4"}, "3-of-4"),
        ({"RANK": "2"}, None),
        (ARRAY, "3-of-4"),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"}, "1-of-2"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_STEP": "2"}, "3-of-4"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "2-of-2"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({**ARRAY, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "6-of-8"),  # each task of the array is two processes
        ({**ARRAY, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "3-of-4"),
        ({"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "4-of-4"),  # torchrun under srun
    ],
)
def test_the_shard_that_a_launcher_gave(environment: dict[str, str], name: str | None) -> None:
    found = Shard.from_environment(environment)
    assert (None if found is None else found.name) == name


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 of WORLD_SIZE=4"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK='x' is not a number"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "12"}, "use --array=0-3"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_STEP": "2"}, "use --array=0-3"),
    ],
)
def test_variables_that_contradict_each_other(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Shard.from_environment(environment)


def test_shards_by_hand() -> None:
    assert Shard.parse(" 2/3 ").name == "2-of-3"
    assert Shard.parse("1/1").whole
    for text in ("3/2", "0/2", "2", "a/b", "-1/2", "1/0"):
        with pytest.raises(ConfigError, match="shard"):
            Shard.parse(text)


def test_one_gpu_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert process_device("cuda", {"LOCAL_RANK": "3"}) == "cuda:3"
    assert process_device("cuda", {"SLURM_LOCALID": "1"}) == "cuda:1"
    assert process_device("cuda", {}) == "cuda"
    assert process_device("cuda:2", {"LOCAL_RANK": "3"}) == "cuda:2"
    assert process_device("cpu", {"LOCAL_RANK": "3"}) == "cpu"
    with pytest.raises(ConfigError, match="has no GPU of its own"):
        process_device("cuda", {"LOCAL_RANK": "4"})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert process_device("cuda", {"LOCAL_RANK": "3"}) == "cuda:0"
