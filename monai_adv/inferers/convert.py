"""Give the inferer of an existing pipeline an exact gradient."""

from __future__ import annotations

from monai.inferers import Inferer, SlidingWindowInferer

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
