"""Sliding-window inference with an exact gradient in the memory of one window batch."""

from __future__ import annotations

from .convert import differentiable, spread_windows
from .distributed import DistributedSlidingWindowInferer
from .resampled import ResampledInferer
from .slices import SlicewiseInferer
from .sliding_window import GradientSlidingWindowInferer

__all__ = [
    "DistributedSlidingWindowInferer",
    "GradientSlidingWindowInferer",
    "ResampledInferer",
    "SlicewiseInferer",
    "differentiable",
    "spread_windows",
]
