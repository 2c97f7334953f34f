"""Give the inferer of an existing pipeline an exact gradient, or spread its windows over processes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from monai.inferers import Inferer, SlidingWindowInferer

from monai_adv.errors import ConfigError

from .distributed import DistributedSlidingWindowInferer
from .sliding_window import GradientSlidingWindowInferer

_ARGUMENTS = (
    "roi_size", "sw_batch_size", "overlap", "mode", "sigma_scale", "padding_mode", "cval", "sw_device", "device",
    "progress", "cpu_thresh", "buffer_steps", "buffer_dim", "with_coord",
)  # fmt: skip


def differentiable(inferer: Inferer, keep_windows: int | str = "auto") -> Inferer:
    """The same inference with gradients in the memory of one window batch.

    Args:
        inferer: a plain ``SlidingWindowInferer`` is replaced by a :class:`GradientSlidingWindowInferer` with its
            settings; any other inferer (subclasses included) is returned as it is.
        keep_windows: see :class:`GradientSlidingWindowInferer`.
    """
    if type(inferer) is not SlidingWindowInferer:
        return inferer
    result = GradientSlidingWindowInferer(
        **{name: getattr(inferer, name) for name in _ARGUMENTS}, keep_windows=keep_windows
    )
    result.roi_weight_map = inferer.roi_weight_map
    return result


def spread_windows(inferer: Inferer, process_group: torch.distributed.ProcessGroup | None = None) -> Inferer:
    """The same inference with the windows of each volume spread over a ``torch.distributed`` group.

    Args:
        inferer: a ``SlidingWindowInferer`` or a :class:`GradientSlidingWindowInferer`, which is replaced by a
            :class:`DistributedSlidingWindowInferer` with its settings, or an inferer that holds such a one in its
            attribute ``inferer`` (:class:`ResampledInferer`, ...), of which a copy is changed.
        process_group: the group; the default group if None.

    Raises:
        ConfigError: if there is no sliding window in it.

    Example:
        >>> spread_windows(SlidingWindowInferer(roi_size=(8, 8), overlap=0.5)).overlap
        0.5
    """
    result: Any
    if isinstance(inner := getattr(inferer, "inferer", None), Inferer):
        result = copy.copy(inferer)
        result.inferer = spread_windows(inner, process_group)
        return result
    if type(inferer) not in (SlidingWindowInferer, GradientSlidingWindowInferer, DistributedSlidingWindowInferer):
        raise ConfigError(
            f"a {type(inferer).__name__} has no windows that could be spread over processes: use a "
            "GradientSlidingWindowInferer"
        )
    arguments = {name: getattr(inferer, name) for name in _ARGUMENTS}
    keep = getattr(inferer, "keep_windows", "auto")
    result = DistributedSlidingWindowInferer(**arguments, keep_windows=keep, process_group=process_group)
    result.roi_weight_map = getattr(inferer, "roi_weight_map", None)
    return result
