"""Sliding-window inference with an exact gradient in the memory of one window batch."""

from __future__ import annotations

from .convert import differentiable
from .resampled import ResampledInferer
from .slices import SlicewiseInferer
from .sliding_window import GradientSlidingWindowInferer

__all__ = ["GradientSlidingWindowInferer", "ResampledInferer", "SlicewiseInferer", "differentiable"]
