"""How much memory is free, and how much a graph holds: what ``keep_windows="auto"`` decides by."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["available_memory", "graph_bytes", "graph_leaves"]


def _read_int(path: Path) -> int | None:
    """The number a kernel file holds; None where there is no file, or no number ("max" is no limit)."""
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):
        return None


def _cgroup_folders() -> Iterator[Path]:
    """Every memory control group this process is in, from its own up to the root (versions 1 and 2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, tail = line.partition(":")
        controllers, _, name = tail.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
        folder = root / name.strip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent == root or root in parent.parents)


def _cgroup_free() -> int | None:
    """The least that any control group still allows, in bytes; None where none sets a limit."""
    free = []
    for folder in _cgroup_folders():
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _read_int(folder / limit_name), _read_int(folder / usage_name)
            if limit is None or usage is None:
                continue
            try:  # the page cache counts as usage, but the kernel gives it back before it kills
                rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                usage -= int(rows.get("inactive_file", rows.get("total_inactive_file", 0)))
            except (OSError, ValueError):
                pass
            free.append(max(limit - usage, 0))
    return min(free, default=None)


def _host_free() -> int:
    """Free memory of the machine in bytes; 0 where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def available_memory(device: torch.device | str = "cpu") -> int:
    """Memory a new tensor on ``device`` can still take.

    On the CPU it is the least of what the machine and the process's control groups (containers, batch systems)
    leave; on a CUDA device what the driver has free plus what PyTorch's allocator holds unused.

    Args:
        device: where the memory is wanted.

    Returns:
        Bytes; 0 for a device that does not tell.

    Example:
        >>> available_memory("cpu") > 0
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return 0
    host, group = _host_free(), _cgroup_free()
    return host if group is None else min(host, group)


def _nodes(tensor: torch.Tensor) -> Iterator[Any]:
    """Every node of the graph that made ``tensor``, each once."""
    stack = [tensor.grad_fn]
    seen: set[Any] = set()  # holding the nodes keeps their Python identity stable during the walk
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def graph_leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The leaf tensors that ``tensor`` was computed from and that a gradient would reach.

    Args:
        tensor: any tensor; one without a graph has no leaves.

    Returns:
        The leaves, each once.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> graph_leaves((weight * 3).sum())[0] is weight
        True
    """
    return [node.variable for node in _nodes(tensor) if hasattr(node, "variable")]


def graph_bytes(tensor: torch.Tensor, exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the tensors that the graph of ``tensor`` keeps alive.

    Args:
        tensor: the result of the graph; counted itself.
        exclude: tensors that live anyway, such as parameters.

    Returns:
        Bytes over distinct storages.

    Example:
        >>> x = torch.ones(256, requires_grad=True)
        >>> graph_bytes(x.exp(), exclude=[x])  # float32: exp keeps its result, 4 bytes each
        1024
    """
    storages: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, tuple | list):
            for entry in value:
                count(entry)

    count(tensor)
    for node in _nodes(tensor):
        names = [name for name in dir(node) if name.startswith("_saved_")] or ["saved_tensors"]
        for name in names:
            try:
                count(getattr(node, name, None))
            except RuntimeError:  # already freed, or changed in place since: nothing to count, the backward will say so
                continue
    for leaf in exclude:
        storages.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(storages.values())
