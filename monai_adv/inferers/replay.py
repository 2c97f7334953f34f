"""Running a network a second time exactly as it ran the first time: mode, buffers, random numbers, autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from monai_adv.errors import ConfigError

__all__ = ["NetworkState", "Snapshot", "modules_of"]

_MOST_ENTRIES = 64  # of a container that is searched for modules: a callable may also hold a data set


def modules_of(network: Any) -> list[nn.Module]:
    """The modules a callable runs: itself, or those its closure, arguments or attributes hold.

    Args:
        network: a module, a bound method, a ``functools.partial``, a function or any callable object.

    Returns:
        The outermost modules found, each once.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> modules_of(lambda x: layer(x)) == [layer]
        True
    """
    found: list[nn.Module] = []
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if depth > 4 or id(value) in seen or isinstance(value, torch.Tensor | str | bytes | type):
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, functools.partial):
            for entry in (value.func, *value.args, *value.keywords.values()):
                visit(entry, depth + 1)
        elif isinstance(value, list | tuple):
            for entry in value[:_MOST_ENTRIES]:
                visit(entry, depth + 1)
        elif isinstance(value, dict):
            for entry in list(value.values())[:_MOST_ENTRIES]:
                visit(entry, depth + 1)
        elif callable(value):
            visit(getattr(value, "__self__", None), depth + 1)
            visit(getattr(value, "__wrapped__", None), depth + 1)
            for cell in getattr(value, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    visit(cell.cell_contents, depth + 1)
            visit(list(getattr(value, "__defaults__", None) or ()), depth + 1)
            code, names = getattr(value, "__code__", None), getattr(value, "__globals__", {})
            for name in code.co_names if code is not None else ():
                if isinstance(names.get(name), nn.Module):
                    visit(names[name], depth + 1)
            visit(getattr(value, "__dict__", None), depth + 1)

    visit(network, 0)
    return found


@dataclass
class Snapshot:
    """What a run of the network depended on beyond its input: ``None`` or empty where it did not."""

    random: tuple[torch.Tensor, tuple[list[int], list[torch.Tensor]]] | None
    buffers: list[torch.Tensor]


class NetworkState:
    """Remembers how a network stood at a forward pass, and puts it back for the time of a recomputation.

    A recomputed forward must be the one that was run, and must leave no second trace: batch normalisation in
    training mode would move its running statistics twice, dropout would draw another mask, and a guard that has
    switched ``train`` / ``eval`` or ``requires_grad`` back in the meantime would change the function.

    Args:
        network: the callable that is run.
        devices: those whose random numbers and autocast count, besides the CPU.
    """

    def __init__(self, network: Callable[..., Any], devices: Sequence[torch.device]) -> None:
        self.roots = modules_of(network)
        modules = {id(m): m for root in self.roots for m in root.modules()}.values()
        self.modes = [(module, module.training) for module in modules]
        self.parameters = list({id(p): p for root in self.roots for p in root.parameters()}.values())
        self.requires_grad = [p.requires_grad for p in self.parameters]
        others = {device for device in devices if device.type != "cpu"}
        self._probes = [torch.empty(0, device=device) for device in sorted(others, key=str)]
        # only modules in training mode change their buffers; which of them do is known after the first run
        self._buffers = [b for module, training in self.modes if training for b in module.buffers(recurse=False)]
        self._initial: list[torch.Tensor] | None = [b.clone() for b in self._buffers]
        self.draws = False
        kinds = {"cpu"} | {device.type for device in others}
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]
        self._autocast_cache = torch.is_autocast_cache_enabled()

    @property
    def independent(self) -> bool:
        """Whether windows may be batched differently: all in eval mode, and no random number was drawn."""
        return bool(self.roots) and not self.draws and not any(training for _, training in self.modes)

    def _random(self) -> tuple[torch.Tensor, tuple[list[int], list[torch.Tensor]]]:
        return torch.get_rng_state(), get_device_states(*self._probes)

    @contextlib.contextmanager
    def observe(self) -> Iterator[Snapshot]:
        """Around a first run of one window batch; the snapshot is complete once the block has ended."""
        random, snapshot = self._random(), Snapshot(None, [])
        if self._initial is None:
            snapshot.buffers = [b.clone() for b in self._buffers]
        yield snapshot
        if self._initial is not None:
            moved = [not torch.equal(b, old) for b, old in zip(self._buffers, self._initial)]
            snapshot.buffers = [old for old, has_moved in zip(self._initial, moved) if has_moved]
            self._buffers = [b for b, has_moved in zip(self._buffers, moved) if has_moved]
            self._initial = None
        now = self._random()
        if not torch.equal(now[0], random[0]) or any(
            not torch.equal(a, b) for a, b in zip(now[1][1], random[1][1], strict=True)
        ):
            self.draws, snapshot.random = True, random

    def _set(self, snapshot: Snapshot) -> None:
        if snapshot.random is not None:
            torch.set_rng_state(snapshot.random[0])
            set_device_states(*snapshot.random[1])
        for buffer, value in zip(self._buffers, snapshot.buffers):
            buffer.data.copy_(value)  # .data: graphs kept by the caller must not see a new version

    def _set_flags(self, flags: Sequence[bool]) -> None:
        for parameter, flag in zip(self.parameters, flags):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

    @contextlib.contextmanager
    def replay(self) -> Iterator[Callable[[Snapshot], None]]:
        """For the time of the recomputations, the network as it was; gives the function that sets one snapshot."""
        current = {id(p) for root in self.roots for p in root.parameters()}
        if current != {id(p) for p in self.parameters}:
            raise ConfigError(
                "the network holds other parameters in the backward pass than it held in the forward pass, so its "
                "windows cannot be recomputed: take the gradient before they are swapped (also inside "
                "torch.func.functional_call), or keep every graph with MONAI's own SlidingWindowInferer"
            )
        now = [(module, module.training) for module, _ in self.modes]
        flags = [p.requires_grad for p in self.parameters]
        after = Snapshot(self._random() if self.draws else None, [b.clone() for b in self._buffers])
        try:
            for module, training in self.modes:
                module.training = training
            self._set_flags(self.requires_grad)
            yield self._set
        finally:
            for module, training in now:
                module.training = training
            self._set_flags(flags)
            self._set(after)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The autocast state of the forward pass."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.amp.autocast(kind, dtype, enabled, self._autocast_cache))
            yield
