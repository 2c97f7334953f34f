"""What the processes of one evaluation have to know of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ignite.engine import Engine
from torch import distributed
from torch.utils.data import DistributedSampler

from monai_adv.errors import ConfigError


def processes() -> int:
    """Number of processes of the default group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Index of this process in the default group."""
    return distributed.get_rank() if processes() > 1 else 0


def gathered(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks; all processes must call it."""
    count = processes()
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    distributed.all_gather_object(values, value)
    return values


def check_sampler(engine: Engine) -> None:
    """Refuse a sampler that gives some cases to two processes, or to none.

    Raises:
        ConfigError: says what to do instead.
    """
    sampler = getattr(getattr(engine, "data_loader", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or not hasattr(sampler.dataset, "__len__"):
        return
    cases = len(sampler.dataset)
    if sampler.total_size != cases:
        what = "repeats some" if sampler.total_size > cases else "leaves some out"
        raise ConfigError(
            f"the sampler deals {sampler.total_size} cases from {cases} to {sampler.num_replicas} processes and so "
            f"{what}: a duplicated case is a wrong p-value. Use monai.data.DistributedSampler(..., shuffle=False, "
            "even_divisible=False) or monai.data.partition_dataset(..., even_divisible=False)"
        )


def check_parts(parts: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Refuse units that two processes recorded.

    Args:
        parts: (subject, setting) of every row, per process.

    Raises:
        ConfigError: names the subjects.
    """
    owner: dict[tuple[str, str], int] = {}
    twice = []
    for index, part in enumerate(parts):
        for unit in dict.fromkeys(part):
            if owner.setdefault(unit, index) != index:
                twice.append(unit[0])
    if twice:
        raise ConfigError(
            f"several processes recorded {', '.join(dict.fromkeys(twice))}: a duplicated case is a wrong p-value. Give "
            "every process its own cases (monai.data.DistributedSampler(..., even_divisible=False)); the rows of each "
            "process are kept in its own file"
        )
