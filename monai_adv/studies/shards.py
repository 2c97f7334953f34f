"""Shards: which process computes which units, decided alike in every process and without a word between them."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai_adv.errors import ConfigError

WHOLE_SUBJECT = 0.25
"""A subject stays in one shard, so that it is loaded once, while it is at most this share of a shard's work."""


@dataclass(frozen=True)
class Shard:
    """One of several parts of a study.

    Args:
        index: which, from 1.
        count: of how many.
        source: what said so, for messages.

    Raises:
        ConfigError: if there is no such shard.

    Example:
        >>> Shard.parse("2/3").name
        '2-of-3'
    """

    index: int
    count: int
    source: str = "--shard"

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ConfigError(
                f"{self.source}: there is no shard {self.index} of {self.count}; the first one is 1/{self.count}, the "
                f"last {self.count}/{self.count}"
            )

    @property
    def name(self) -> str:
        """For names of files."""
        return f"{self.index}-of-{self.count}"

    @property
    def whole(self) -> bool:
        """Whether it is everything."""
        return self.count == 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from ``i/n``.

        Raises:
            ConfigError: if the text says no shard.
        """
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        if found is None:
            raise ConfigError(f"--shard {text!r}: write i/n, such as 2/3 for the second of three")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Shard | None:
        """The shard that a launcher gave this process, or None.

        torchrun's ``RANK`` and ``WORLD_SIZE``, else srun's ``SLURM_PROCID`` and ``SLURM_NTASKS``; within a job array
        each of its tasks (``SLURM_ARRAY_TASK_ID``, ``_COUNT``, ``_MIN``, ``_STEP``) is split further by them.

        Args:
            environment: of the process if None.

        Raises:
            ConfigError: if the variables contradict each other.

        Example:
            >>> Shard.from_environment({"RANK": "1", "WORLD_SIZE": "4"}).name
            '2-of-4'
        """
        known = os.environ if environment is None else environment
        index, count, said = 0, 1, []
        array = _numbers(known, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
        if array is not None and array[1] > 1:
            first = _number(known, "SLURM_ARRAY_TASK_MIN", 0)
            place, rest = divmod(array[0] - first, max(1, _number(known, "SLURM_ARRAY_TASK_STEP", 1)))
            if rest or not 0 <= place < array[1]:
                raise ConfigError(
                    f"SLURM_ARRAY_TASK_ID={array[0]} is none of {array[1]} numbers in even steps from {first}: use "
                    f"--array=0-{array[1] - 1}, or say --shard i/n"
                )
            index, count, said = place, array[1], ["SLURM_ARRAY_TASK_ID"]
        for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            found = _numbers(known, rank, world)
            if found is None:
                continue
            if found[1] > 1:
                if not 0 <= found[0] < found[1]:
                    raise ConfigError(f"{rank}={found[0]} of {world}={found[1]}: say --shard i/n")
                index, count = index * found[1] + found[0], count * found[1]
                said.append(rank)
            break  # torchrun started by srun: its ranks are those of all nodes
        return None if count == 1 else cls(index + 1, count, " and ".join(said))


def assign(costs: Sequence[Sequence[float]], count: int) -> list[list[int]]:
    """Deal groups of units to shards: the most expensive first, each to the shard that has least.

    A subject's groups stay together, so that it is loaded by one process only, unless they are so much work that the
    shards would be uneven.

    Args:
        costs: of every subject the cost of each of its groups.
        count: number of shards.

    Returns:
        For every subject and group its shard, from 0. The same for the same costs, in any process.

    Example:
        >>> assign([[1, 1], [1, 1], [9, 1]], 2)
        [[1, 1], [1, 1], [0, 1]]
    """
    share = sum(sum(groups) for groups in costs) / count
    blocks: list[tuple[float, int, list[int]]] = []
    for subject, groups in enumerate(costs):
        if sum(groups) <= WHOLE_SUBJECT * share:
            blocks.append((sum(groups), subject, list(range(len(groups)))))
        else:
            blocks += [(cost, subject, [group]) for group, cost in enumerate(groups)]
    blocks.sort(key=lambda block: (-block[0], block[1], block[2]))
    loads = [(0.0, shard) for shard in range(count)]  # a heap
    found = [[0] * len(groups) for groups in costs]
    for cost, subject, members in blocks:
        load, shard = heapq.heappop(loads)
        for group in members:
            found[subject][group] = shard
        heapq.heappush(loads, (load + cost, shard))
    return found


def process_device(device: str, environment: Mapping[str, str] | None = None) -> str:
    """The GPU of this process: with "cuda" the one of ``LOCAL_RANK`` or ``SLURM_LOCALID``, else the device as it is.

    Raises:
        ConfigError: if the machine has fewer GPUs than that.
    """
    known: Any = os.environ if environment is None else environment
    local = known.get("LOCAL_RANK", known.get("SLURM_LOCALID"))
    if device != "cuda" or local is None:
        return device
    import torch

    seen = torch.cuda.device_count()
    if seen == 1:
        return "cuda:0"  # the launcher shows each process its own GPU only
    index = _number({"rank": local}, "rank", 0)
    if seen and index >= seen:
        raise ConfigError(f"local process {index} has no GPU of its own: {seen} are visible; start {seen} processes")
    return f"cuda:{index}"


def usable_device(device: str) -> str:
    """The device, if this machine has it.

    Raises:
        ConfigError: says what torch says.
    """
    import torch

    try:
        torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if reason.startswith("Expected one of"):  # a list of all kinds that torch was ever made for
            reason = "torch knows no such kind"
        use = "cpu, cuda or cuda:0" if torch.cuda.is_available() else "cpu; PyTorch sees no GPU here"
        raise ConfigError(f"device {device!r} cannot be used here ({reason}): use {use}") from error
    return device


def _numbers(known: Mapping[str, str], *names: str) -> list[int] | None:
    """Whole numbers of variables, or None if one is not set."""
    return [_number(known, name, 0) for name in names] if all(known.get(name) for name in names) else None


def _number(known: Mapping[str, str], name: str, default: int) -> int:
    value = known.get(name) or str(default)
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"{name}={value!r} is not a number: say --shard i/n") from error
