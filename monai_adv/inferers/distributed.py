"""Sliding-window inference of one volume by several processes, with the gradient of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from monai.inferers import SlidingWindowInferer
from torch import distributed

from monai_adv.errors import ConfigError

from .ranks import Checksum, Ranks
from .sliding_window import GradientSlidingWindowInferer
from .windows import Window, WindowPass

__all__ = ["DistributedSlidingWindowInferer"]


class DistributedSlidingWindowInferer(GradientSlidingWindowInferer):
    """One volume's windows spread over the ranks of a ``torch.distributed`` group, logits and gradients on each.

    Every rank holds the same volume and network and calls this inferer at the same moment. Window k of MONAI's order,
    counted over the images of the batch, belongs to rank k modulo their number, so that no rank has more than one
    window more than another, and empty borders are shared out. The ranks' blended sums are added up in the forward pass
    and the gradients of their windows in the backward pass (two all-reduces): each rank gets the whole logits and the
    whole gradient, the same bits on all, and so takes the same step of an attack. The weights of the blending are
    known to every rank.

    The result is that of :class:`GradientSlidingWindowInferer` up to the order of additions. A rank without windows
    (there are more ranks than windows) takes part with zeros. Gradients of parameters are summed as well.

    Before any data each rank says whether its windows went well: an exception on one rank is raised on all, as
    :class:`monai_adv.errors.RankError` or as its own class if it is of this package, and a rank with another image,
    network weights or upstream gradient is an error of all. NaN logits spread by the addition, so that all ranks see
    them. A rank that dies or never calls the inferer is the business of the group's timeout and of the launcher.
    A network in training mode, or one that draws random numbers, depends on how its windows are shared and is refused.

    Args:
        *args: see :class:`GradientSlidingWindowInferer`, as are all but one keyword; ``keep_windows`` counts per rank.
        process_group: the group; the default group if None. It is looked up when the inferer is called.
        **kwargs: see ``args``.

    Raises:
        ConfigError: see :class:`GradientSlidingWindowInferer`.

    Example:
        >>> import torch.distributed as dist
        >>> store = dist.HashStore()  # one process; with torchrun: dist.init_process_group() alone
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> inferer = DistributedSlidingWindowInferer(roi_size=(8, 8), overlap=0.5)
        >>> inferer(torch.randn(1, 1, 12, 20), torch.nn.Conv2d(1, 2, 3, padding=1).eval()).shape
        torch.Size([1, 2, 12, 20])
        >>> dist.destroy_process_group()
    """

    _own_tiling = True

    def __init__(self, *args: Any, process_group: distributed.ProcessGroup | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def _start(
        self, network: Callable[..., Any], volume: torch.Tensor, with_coord: bool, condition: torch.Tensor | None
    ) -> WindowPass:
        return SharedPass(
            Ranks(self.process_group),
            network,
            volume,
            self.sw_batch_size,
            self.keep_windows,
            with_coord,
            condition,
            self.sw_device,
        )

    def _tile(self, volume: torch.Tensor, run: WindowPass, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert isinstance(run, SharedPass)
        stitched, failure = None, None
        kwargs.pop("condition", None)  # the pass cuts it, as it cuts the volume: only its own windows
        # MONAI's tiler sees the grid alone: a volume that takes no memory
        grid = volume.new_zeros(1).expand(volume.shape[0], 1, *volume.shape[2:])
        tiler = copy.copy(self)
        tiler.sw_batch_size = 1
        try:
            run.plan(self._grid_of_windows(tiler, grid))
            if run.mine:
                run.volume = volume
                stitched = cast(torch.Tensor, SlidingWindowInferer.__call__(tiler, grid, run, *args, **kwargs))
                run.finish()
        except Exception as error:  # whatever it is, the others must hear of it
            failure = error
        run.meet(volume, failure)
        if stitched is None:
            stitched = cast(torch.Tensor, SlidingWindowInferer.__call__(tiler, grid, run, *args, **kwargs))
        return run.ranks.sum(stitched)

    @staticmethod
    def _grid_of_windows(tiler: DistributedSlidingWindowInferer, grid: torch.Tensor) -> list[Window]:
        """The windows in MONAI's order: from its tiler itself, with a network that does nothing."""
        found: list[Window] = []

        def note(window: torch.Tensor, windows: Sequence[list[slice]]) -> torch.Tensor:
            found.extend(tuple(w) for w in windows)
            return window.clone()

        planner = copy.copy(tiler)
        planner.progress = False
        SlidingWindowInferer.__call__(planner, grid, note)
        return found


class SharedPass(WindowPass):
    """The windows of a pass that are this rank's; for all others it hands MONAI's tiler zeros.

    Args:
        ranks: among whom the windows are shared.
        *args: see :class:`WindowPass`, as are ``kwargs``.
    """

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = ranks
        self.windows: list[Window] = []
        self.mine: list[Window] = []
        self.volume: torch.Tensor | None = None  # for the length of the forward pass
        self._computed: list[torch.Tensor] = []  # logits of own windows the tiler has not come to
        self._begun = self._given = 0  # own windows computed, and handed out
        self._zeros: torch.Tensor | None = None

    def plan(self, windows: list[Window]) -> None:
        """Choose this rank's of all windows, which are in the order of the tiler."""
        self.windows = windows
        self.mine = windows[self.ranks.rank :: self.ranks.size]
        self.window_shape = tuple(s.stop - s.start for s in windows[0][2:])

    def _windows(self) -> Iterable[Window]:
        return self.windows

    # ------------------------------------------------------------------------------------------------ forward
    def __call__(self, window: torch.Tensor, windows: list[list[slice]], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The logits of one window, or zeros for another rank's; ``window`` itself is of the empty grid."""
        if self._zeros is None:  # what a foreign window's logits look like, own ones tell
            self._compute(*args, **kwargs)
        if self._given == len(self.mine) or tuple(windows[0]) != self.mine[self._given]:
            assert self._zeros is not None
            return self._zeros  # MONAI's weights, in place, leave it zero
        if not self._computed:
            self._compute(*args, **kwargs)
        self._given += 1
        return self._computed.pop(0)

    def _compute(self, *args: Any, **kwargs: Any) -> None:
        """The next window batch of this rank."""
        assert self.volume is not None
        batch = self.mine[self._begun : self._begun + self.sw_batch_size]
        if self.condition is not None:
            kwargs["condition"] = self._cut(self.condition, batch)
        logits = super().__call__(self._cut(self.volume, batch), [list(w) for w in batch], *args, **kwargs)
        self._begun += len(batch)
        self._computed = list(logits.split(1))
        if self._zeros is None:
            self._zeros = torch.zeros_like(logits[:1])

    def _cut(self, data: torch.Tensor, windows: Sequence[Window]) -> torch.Tensor:
        return torch.cat([data[w] for w in windows]).to(self.sw_device)

    def finish(self) -> None:
        """Own windows are done: refuse a network whose result depends on who shares a window batch or a generator."""
        self.volume = None
        if any(training and not list(module.children()) for module, training in self.state.modes):
            raise ConfigError(
                "a network in training mode gives other results when its windows are spread over ranks: call eval()"
            )
        if self.state.draws:
            raise ConfigError(
                "the network draws random numbers, which would differ between ranks: use "
                "GradientSlidingWindowInferer in one process"
            )

    def meet(self, volume: torch.Tensor, failure: Exception | None) -> None:
        """Make sure that all ranks have done the same, and learn what the logits look like if no window told.

        Args:
            volume: of the pass.
            failure: what was raised on this rank.

        Raises:
            MonaiAdvError: see :meth:`Ranks.agree`.
        """
        like = None if self._zeros is None else (tuple(self._zeros.shape), self._zeros.dtype)
        facts = {
            "the image's shape": tuple(volume.shape),
            "the image's dtype": volume.dtype,
            "the image": Checksum(volume),
            "the network's weights (a probe)": _probe(self.state.parameters),
            "the number of windows": len(self.windows),
            "the window": self.window_shape,
            "whether a gradient is wanted": (self.graphs, self.wants_input),
            "the number of tensors that need a gradient": len(self.leaves),
            "_logits": like,
        }
        told = self.ranks.agree("forward pass", facts, failure)
        seen = [other["_logits"] for other in told if other["_logits"] is not None]
        if any(other != seen[0] for other in seen):
            raise ConfigError(
                f"the logits of a window differ in shape or dtype between ranks: {sorted(map(str, seen))}"
            )
        if self._zeros is None:
            shape, dtype = seen[0]
            self._zeros = torch.zeros(shape, dtype=dtype, device=self.sw_device)
            self.logits_shape = tuple(shape[2:])

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
        """The gradient of :meth:`WindowPass.gradient`, summed over the windows of all ranks."""
        total: torch.Tensor | None = None
        sums: list[torch.Tensor | None] = [None] * len(wants_leaves)
        failure: Exception | None = None
        try:
            total, sums = super().gradient(upstream, volume, importance, support, wants_input, wants_leaves)
        except Exception as error:
            failure = error
        facts = {
            "the upstream gradient's shape": tuple(upstream.shape),
            "the upstream gradient": Checksum(upstream),
            "the support": None if support is None else int(support.sum()),
            "what a gradient is asked for": (wants_input, tuple(wants_leaves)),
            "_used": [addend is not None for addend in sums],
        }
        told = self.ranks.agree("backward pass", facts, failure)
        if total is not None:
            total = self.ranks.sum(total)
        for k, leaf in enumerate(self.leaves):  # a rank's windows may not use what those of another do
            if any(other["_used"][k] for other in told):
                addend = sums[k]
                sums[k] = self.ranks.sum(torch.zeros_like(leaf) if addend is None else addend)
        return total, sums


def _probe(parameters: Sequence[torch.Tensor]) -> float:
    """One number of every parameter, added up: other weights, another number."""
    values = [p.detach().flatten()[:1].to("cpu", torch.float64) for p in parameters]
    return float(torch.cat(values).sum()) if values else 0.0
