"""One sliding-window pass, remembered window batch by window batch, and the exact gradient of its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from monai_adv.errors import ConfigError

from .logits import logits_of
from .memory import available_memory, graph_bytes, graph_leaves
from .replay import NetworkState, Snapshot

__all__ = ["Batch", "WindowPass", "stitch"]

Window = tuple[slice, ...]  # (image, channels, *spatial), as MONAI's tiler passes it


class _Enter(torch.autograd.Function):
    """Makes a window batch the start of a graph without a copy, and not a leaf: networks may work in place on it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(window)
        return window

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> Any:  # pragma: no cover - gradients are captured before it
        return None, None


@dataclass
class _Graph:
    """A window batch's forward pass that can be differentiated."""

    start: GradientEdge | None
    logits: torch.Tensor


@dataclass
class Batch:
    """One window batch of the pass."""

    windows: list[Window]
    snapshot: Snapshot
    graph: _Graph | None = None


class WindowPass:
    """The predictor MONAI's tiler is given: runs the network, and remembers what the gradient will need.

    Graphs of window batches are kept while ``keep`` allows it. The first batch always runs with a graph: it tells
    what the network depends on and how large a graph is, and where it stays the only one nothing is recomputed.

    Args:
        network: called as ``network(window, *args, **kwargs)``, or with MONAI's coordinates as second argument.
        volume: (B, C, \\*spatial), not smaller than a window.
        sw_batch_size: most windows of one call.
        keep: number of window batches whose graphs are kept, or "auto".
        with_coord: whether the network takes the coordinates.
        condition: a second volume that is windowed along and handed on as ``condition``.
        sw_device: where the windows are computed; None is where the volume is.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        volume: torch.Tensor,
        sw_batch_size: int,
        keep: int | str,
        with_coord: bool = False,
        condition: torch.Tensor | None = None,
        sw_device: torch.device | str | None = None,
    ) -> None:
        self.network = network
        self.sw_batch_size = sw_batch_size
        self.keep = keep
        self.with_coord = with_coord
        self.condition = condition
        self.graphs = torch.is_grad_enabled()
        self.wants_input = volume.requires_grad
        self.sw_device = torch.device(sw_device or volume.device)
        self.state = NetworkState(network, [volume.device, self.sw_device])
        self.leaves: list[torch.Tensor] = [p for p in self.state.parameters if p.requires_grad]
        self.batches: list[Batch] = []
        self.window_shape: tuple[int, ...] = ()
        self.logits_shape: tuple[int, ...] = ()
        self._own = {id(p) for p in self.state.parameters}
        self._known = {id(p) for p in self.leaves}
        self._anchor = torch.zeros((), requires_grad=True)
        self._storage = volume.untyped_storage().data_ptr()
        self._args: tuple[Any, ...] = ()
        self._kwargs: dict[str, Any] = {}
        self._volume_bytes = volume.numel() * volume.element_size()
        self._free = available_memory(self.sw_device) if keep == "auto" else 0
        self._graph_bytes = 0
        self._depends = False  # whether any logits came with a graph
        self._closed = False  # once a graph was not kept no later one is

    # ------------------------------------------------------------------------------------------------ forward
    def __call__(self, window: torch.Tensor, windows: list[list[slice]], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs one window batch; the result is MONAI's to change in place."""
        first = not self.batches
        condition = kwargs.pop("condition", None)
        if first:
            self._args, self._kwargs = args, kwargs
            self.window_shape = tuple(window.shape[2:])
        elif len(self.batches) == 1 and not self._room(0):
            self.batches[0].graph = None
        if window.untyped_storage().data_ptr() == self._storage:
            window = window.clone()  # a view of the volume, which no network shall write into
        with self.state.observe() as snapshot:
            batch = Batch([tuple(w) for w in windows], snapshot)  # a copy: MONAI changes its own when it buffers
            if self.graphs and (first or self._room(len(self.batches))):
                batch.graph = self._run(window, batch.windows, condition)
                logits = batch.graph.logits
                self._learn(logits)
            else:
                with torch.no_grad():
                    logits = logits_of(self._call(window, batch.windows, condition), window)
        if first:
            self.logits_shape = tuple(logits.shape[2:])
            if self.keep == "auto":
                self._graph_bytes = graph_bytes(logits, exclude=self.leaves)
        self.batches.append(batch)
        return logits.detach().clone()

    def _call(self, window: torch.Tensor, windows: Sequence[Window], condition: torch.Tensor | None) -> Any:
        coordinates = ([list(w) for w in windows],) if self.with_coord else ()
        extra = {} if condition is None else {"condition": condition}
        return self.network(window, *coordinates, *self._args, **self._kwargs, **extra)

    def _run(self, window: torch.Tensor, windows: Sequence[Window], condition: torch.Tensor | None) -> _Graph:
        """One window batch with its graph; ``window`` is used up."""
        with torch.enable_grad():
            start = None
            if self.wants_input:
                window = _Enter.apply(self._anchor, window)
                start = get_gradient_edge(window)
            return _Graph(start, logits_of(self._call(window, windows, condition), window))

    def _strangers(self, logits: torch.Tensor) -> list[torch.Tensor]:
        """Leaves the logits depend on that are not known yet: of no module that was found."""
        return [t for t in graph_leaves(logits) if t is not self._anchor and id(t) not in self._known]

    def _learn(self, logits: torch.Tensor) -> None:
        strangers = self._strangers(logits)
        self.leaves += strangers
        self._known.update(id(t) for t in strangers)
        self._depends = self._depends or logits.requires_grad

    def _room(self, index: int) -> bool:
        """Whether the graph of window batch ``index`` is kept."""
        if self._closed:
            return False
        if self.keep == "auto":
            # a quarter of what was free stays free, besides one graph to come and the volume's own tensors
            spare = self._free // 4 + 2 * self._graph_bytes + 4 * self._volume_bytes
            room = available_memory(self.sw_device) > spare
        else:
            room = index < int(self.keep)
        self._closed = not room
        return room

    # ----------------------------------------------------------------------------------------------- backward
    def gradient(
        self,
        upstream: torch.Tensor,
        volume: torch.Tensor,
        importance: torch.Tensor,
        support: torch.Tensor | None,
        wants_input: bool,
        wants_leaves: Sequence[bool],
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """The gradient of ``sum(upstream * logits)``: every window's share of it through the network.

        Args:
            upstream: gradient of the loss with respect to the stitched logits (B, K, \\*spatial).
            volume: the volume of the pass.
            importance: MONAI's weight of a window's voxels (1, 1, \\*window).
            support: where the input's gradient is wanted (B, 1 or C, \\*spatial), bool; it is zero elsewhere.
            wants_input: whether the volume's gradient is asked for.
            wants_leaves: the same for each of ``leaves``.

        Returns:
            The volume's gradient and those of the leaves; None for what is not wanted or was not used.
        """
        leaves = [leaf for leaf, wanted in zip(self.leaves, wants_leaves) if wanted]
        total: torch.Tensor | None = torch.zeros_like(volume) if wants_input else None
        sums: list[torch.Tensor | None] = [None] * len(leaves)
        weight, count = self._weights(upstream, importance)
        ran = False
        with self.state.replay() as restore:
            for windows, batch in self._groups(upstream, None if leaves else support):
                ran = True
                graph, batch.graph = batch.graph, None
                if graph is None:
                    restore(batch.snapshot)
                    graph = self._recompute(volume, windows)
                if graph.logits.requires_grad:  # else this window's result was a constant
                    share = [self._share(upstream, w, weight, count) for w in windows]
                    self._pull(graph, share, windows, total, leaves, sums)
                del graph  # before the next one is built
        if ran and not self._depends:
            raise ConfigError(
                "no window's logits depend on the input or the parameters in a differentiable way (argmax, detach or "
                "torch.no_grad inside the network?), so there is no gradient to take"
            )
        if total is not None and support is not None:
            total.masked_fill_(~support, 0)
        if not ran:
            sums = [torch.zeros_like(leaf) for leaf in leaves]
        found_iter = iter(sums)
        return total, [next(found_iter) if wanted else None for wanted in wants_leaves]

    def _pull(
        self,
        graph: _Graph,
        share: list[torch.Tensor],
        windows: Sequence[Window],
        total: torch.Tensor | None,
        leaves: Sequence[torch.Tensor],
        sums: list[torch.Tensor | None],
    ) -> None:
        """Adds one window batch's gradient to the volume's and the leaves'."""
        self._depends = True
        sought: list[Any] = ([graph.start] if total is not None else []) + list(leaves)
        # where no module owns a leaf, graphs of several windows may meet in a part computed before the pass
        shared = any(id(leaf) not in self._own for leaf in self.leaves)
        upstream = torch.cat(share).to(graph.logits)
        share.clear()
        found = list(torch.autograd.grad(graph.logits, sought, upstream, allow_unused=True, retain_graph=shared))
        if total is not None and (parts := found.pop(0)) is not None:
            for window, part in zip(windows, parts.to(total)):
                total[window] += part
        for k, addend in enumerate(found):
            so_far = sums[k]
            if addend is not None:  # out of place: gradients of different leaves may share their memory
                sums[k] = addend if so_far is None else so_far + addend

    def _recompute(self, volume: torch.Tensor, windows: list[Window]) -> _Graph:
        batch = torch.cat([volume[w] for w in windows]).to(self.sw_device)
        condition = self.condition
        if condition is not None:
            condition = torch.cat([condition[w] for w in windows]).to(self.sw_device)
        with self.state.autocast():
            graph = self._run(batch, windows, condition)
        if strangers := self._strangers(graph.logits):
            raise ConfigError(
                f"the network depends on {len(strangers)} tensor(s) that need a gradient and that neither belong to a "
                f"module nor were used by the first window, e.g. of shape {tuple(strangers[0].shape)}: hand the "
                "inferer the module itself, or detach them"
            )
        return graph

    def _groups(self, upstream: torch.Tensor, support: torch.Tensor | None) -> Iterator[tuple[list[Window], Batch]]:
        """The window batches that a gradient passes through, without those it does not."""

        def counts(window: Window) -> bool:
            if support is not None and not _any(support[(window[0], slice(None), *window[2:])]):
                return False
            return _any(upstream[self._place(window)])

        waiting: list[Window] = []
        for batch in self.batches:
            live = [w for w in batch.windows if counts(w)]
            if batch.graph is not None or not self.state.independent:
                if live:
                    yield batch.windows, batch
                else:
                    batch.graph = None
                continue
            waiting += live
            while len(waiting) >= self.sw_batch_size:
                yield waiting[: self.sw_batch_size], batch
                waiting = waiting[self.sw_batch_size :]
        if waiting:
            yield waiting, self.batches[-1]

    def _place(self, window: Window) -> Window:
        """Where MONAI puts a window's logits in the stitched volume."""
        spatial = window[2:]
        if self.logits_shape != self.window_shape:
            zoom = [o / float(i) for o, i in zip(self.logits_shape, self.window_shape)]
            spatial = tuple(slice(int(s.start * z), int(s.stop * z)) for s, z in zip(spatial, zoom))
        return (window[0], slice(None), *spatial)

    def _weights(self, upstream: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A window's weights at the logits' resolution, and their sum over all windows of an image."""
        if self.logits_shape != self.window_shape:
            importance = F.interpolate(importance, self.logits_shape, mode="nearest-exact")
        importance = importance.to(upstream.device)
        count = torch.zeros((1, 1, *upstream.shape[2:]), dtype=importance.dtype, device=upstream.device)
        for window in self._windows():
            if window[0].start == 0:
                count[(slice(None), *self._place(window)[1:])] += importance
        return importance, count

    def _windows(self) -> Iterable[Window]:
        """Every window that is stitched into the logits, those of all images."""
        return (window for batch in self.batches for window in batch.windows)

    def _share(self, upstream: torch.Tensor, window: Window, weight: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        place = self._place(window)
        return upstream[place] / count[(slice(None), *place[1:])] * weight


def _any(values: torch.Tensor) -> bool:
    """``values.any()``; nearly always a few of the voxels tell, and the whole of a strided view is slow to read."""
    few = values[(slice(None), slice(None), *(slice(None, None, 7) for _ in values.shape[2:]))]
    return bool(few.any()) or bool(values.any())


class _Stitch(torch.autograd.Function):
    """Hands out the stitched logits of a pass that has been run, and the gradient of that pass."""

    @staticmethod
    def forward(
        ctx: Any,
        run: WindowPass,
        logits: list[torch.Tensor],
        importance: Callable[[], torch.Tensor],
        support: torch.Tensor | None,
        volume: torch.Tensor,
        *leaves: torch.Tensor,
    ) -> torch.Tensor:
        ctx.run, ctx.importance, ctx.support = run, importance, support
        ctx.save_for_backward(volume, *leaves)
        return logits.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        volume, *_ = ctx.saved_tensors  # also raises where one was changed in place since
        wants = [_wanted(node) for node in ctx.nodes]
        total, sums = ctx.run.gradient(upstream, volume, ctx.importance(), ctx.support, wants[0], wants[1:])
        return None, None, None, None, total, *sums


def _wanted(node: Any) -> bool:
    """Whether the backward pass under way goes on to a node: the needs_input_grad of a Function does not tell."""
    if node is None:
        return False
    asked = getattr(torch._C, "_will_engine_execute_node", None)
    try:
        return True if asked is None else bool(asked(node))
    except RuntimeError:  # an engine that cannot say: compute it
        return True


def stitch(
    run: WindowPass,
    logits: torch.Tensor,
    volume: torch.Tensor,
    importance: Callable[[], torch.Tensor],
    support: torch.Tensor | None,
) -> torch.Tensor:
    """Connects the stitched logits of a pass to the volume and the parameters they came from.

    Args:
        run: the pass, which MONAI's tiler has gone through.
        logits: its result (B, K, \\*spatial), without a graph.
        volume: the volume (B, C, \\*spatial).
        importance: gives the weights of a window (1, 1, \\*window).
        support: where the volume's gradient is wanted (B, 1 or C, \\*spatial), bool; None is everywhere.

    Returns:
        The logits, differentiable once.
    """
    # as views, so that a backward pass can be asked whether it needs them: only the image's gradient is the usual case
    sources = [t.view_as(t) for t in (volume, *run.leaves)]
    out = _Stitch.apply(run, [logits], importance, support, *sources)
    if out.grad_fn is not None:
        out.grad_fn.nodes = [source.grad_fn for source in sources]
    return out
