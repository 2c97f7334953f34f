"""Changes of intensity: coil shading and monotone contrast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from monai_adv.transforms.physics.effect import Effect, above_zero, bspline_field, bspline_matrix, rowwise


class BiasField(Effect):
    """Smooth multiplicative shading of each sequence, as an imperfect coil makes it.

    ``x' = x exp(b)`` with ``b`` a cubic B-spline of control values; a magnitude of .3 keeps ``exp(b)`` within
    1 / 1.3 and 1.3. Parameter ``log_field``: ``(C, *controls)``, natural logarithms.

    Reference:
        Chen et al., AdvChain, Medical Image Analysis 2022 (adversarial bias fields).

    Args:
        knot_mm: distance of the control points in mm.
    """

    name: ClassVar[str] = "bias_field"
    units: ClassVar[str] = "share"
    default_magnitude: ClassVar[float] = 0.3

    def __init__(self, knot_mm: float = 60.0) -> None:
        self.knot_mm = above_zero("knot_mm", knot_mm)

    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        controls = tuple(m.shape[1] for m in self._matrices(image, spacing))
        return {"log_field": (image.shape[1], *controls)}

    def apply(
        self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], support: Tensor
    ) -> Tensor:
        field = bspline_field(parameters["log_field"].to(image), self._matrices(image, spacing))
        return torch.where(support, image * field.exp(), image)

    def fields(
        self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], support: Tensor
    ) -> dict[str, Tensor]:
        return {"bias": self.apply(torch.ones_like(image), parameters, spacing, support)}

    def limit(self, magnitude: float) -> float:
        return math.log1p(magnitude)

    def size(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return super().size(parameters).expm1()

    def _matrices(self, image: Tensor, spacing: Sequence[float]) -> list[Tensor]:
        return [bspline_matrix(n, s, self.knot_mm, image) for n, s in zip(image.shape[2:], spacing)]


class Gamma(Effect):
    """Monotone change of contrast of each sequence: its intensities, scaled to [0, 1], are raised to a power.

    The range is that of the support's own voxels, so that its darkest and brightest voxels stay. A magnitude of .5
    keeps the exponent within 1 / 1.5 and 1.5. Parameter ``log_gamma``: ``(C,)``, natural logarithms.
    """

    name: ClassVar[str] = "gamma"
    units: ClassVar[str] = "share"
    default_magnitude: ClassVar[float] = 0.5

    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        return {"log_gamma": (image.shape[1],)}

    def apply(
        self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], support: Tensor
    ) -> Tensor:
        axes, dims = tuple(range(2, image.dim())), image.dim() - 2
        inf = torch.full_like(image, math.inf)
        low = torch.where(support, image, inf).amin(axes, keepdim=True)
        span = torch.where(support, image, -inf).amax(axes, keepdim=True) - low
        usable = support & (span > 0) & torch.isfinite(span)
        low, span = torch.where(usable, low, 0.0), torch.where(usable, span, 1.0)
        # the logarithm of the darkest voxel is kept finite: 0 to any power is 0
        relative = ((image - low) / span).clamp_min(torch.finfo(image.dtype).tiny)
        log_gamma = rowwise(parameters["log_gamma"].to(image), dims)
        changed = torch.where(relative < 1, (relative.log() * log_gamma.exp()).exp() - relative, 0.0)
        return torch.where(usable & (log_gamma != 0), image + span * changed, image)

    def limit(self, magnitude: float) -> float:
        return math.log1p(magnitude)

    def size(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return super().size(parameters).expm1()
