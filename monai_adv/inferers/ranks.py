"""What the processes of a ``torch.distributed`` group say to each other around one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import distributed

from monai_adv import errors
from monai_adv.errors import ConfigError, MonaiAdvError, RankError

__all__ = ["Checksum", "Ranks"]

_DRIFT = 1e-6  # of the sum of absolute values: rounding of another device is below, another image far above


class Checksum:
    """The sums of a volume's slices along its last axis, equal to those of another rank up to rounding.

    One sum of all would not do: normalised images have that of zero in common.

    Args:
        tensor: what every rank should hold alike, at least two axes.

    Example:
        >>> image = torch.arange(4.0).view(2, 2)
        >>> Checksum(image) == Checksum(image + 1e-8), Checksum(image) == Checksum(image.flip(1))
        (True, False)
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        others = tuple(range(tensor.dim() - 1))
        self.sums: list[float] = tensor.sum(others, dtype=torch.float64).tolist()
        self.scales: list[float] = torch.linalg.vector_norm(tensor, 1, others, dtype=torch.float64).tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Checksum) or len(self.sums) != len(other.sums):
            return False
        pairs = zip(self.sums, other.sums, (max(s) for s in zip(self.scales, other.scales)))
        return all(abs(a - b) <= _DRIFT * scale or not math.isfinite(a + b) for a, b, scale in pairs)


class Ranks:
    """The processes a pass is spread over.

    Args:
        group: of ``torch.distributed``; None is the default group.

    Raises:
        ConfigError: where there is no group, or this process is not of it.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        if not distributed.is_available() or not distributed.is_initialized():
            raise ConfigError(
                "windows are to be spread over a torch.distributed group, but none is initialised: start the script "
                "with torchrun and call torch.distributed.init_process_group() first"
            )
        self.group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        if self.rank < 0:
            raise ConfigError("windows are to be spread over a torch.distributed group that this process is not of")

    def agree(self, where: str, facts: dict[str, Any], failure: Exception | None) -> list[dict[str, Any]]:
        """Exchange how it went before any data are exchanged, so that a failure of one rank holds up no other.

        Args:
            where: the pass, for messages; must be the same on every rank.
            facts: what must be the same on every rank; a name that starts with "_" may differ.
            failure: what was raised here, if anything.

        Returns:
            The facts of every rank.

        Raises:
            RankError: if something failed on a rank; a ``MonaiAdvError`` is raised as its own class, and what failed
                on every rank is raised as it is.
            ConfigError: if the facts differ.
        """
        said = None if failure is None else (type(failure).__name__, str(failure), isinstance(failure, MonaiAdvError))
        told: list[Any] = [None] * self.size
        distributed.all_gather_object(told, (where, facts, said), group=self.group)
        kinds = {failed[0] if failed is not None else None for _, _, failed in told}
        if failure is not None and len(kinds) == 1:
            raise failure  # of all ranks alike, as in one process
        for rank, (_, _, failed) in enumerate(told):
            if failed is not None:
                name, text, ours = failed
                kind = getattr(errors, name, RankError) if ours else RankError
                raise kind(f"{where}: rank {rank} of {self.size} failed, so all stop: {name}: {text}") from failure
        for rank, (place, others, _) in enumerate(told):
            first_place, first, _ = told[0]
            if place != first_place:
                raise ConfigError(f"rank {rank} is in the {place} while rank 0 is in the {first_place}: {_SAME}")
            for name, value in first.items():
                if not name.startswith("_") and others[name] != value:
                    apart = f"is {others[name]} on rank {rank} and {value} on rank 0"
                    if isinstance(value, Checksum):
                        apart = f"differs between rank {rank} and rank 0"
                    raise ConfigError(f"{where}: {name} {apart}: {_SAME}")
        return [facts for _, facts, _ in told]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, the same bits on each; ``tensor`` is used up."""
        tensor = tensor.contiguous()
        distributed.all_reduce(tensor, group=self.group)
        return tensor


_SAME = "every rank must hold the same image, network and settings and take the same steps (the same seeds)"
