"""Rician noise: what Gaussian noise in both receiver channels leaves in a magnitude image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor

from monai_adv.errors import ConfigError
from monai_adv.transforms.physics.effect import Effect, Parameters, above_zero, draw


class Rician(Effect):
    """Rician noise of a signal-to-noise ratio: ``x' = |x + s (n1 + i n2)|``, ``s`` the mean signal of the support.

    The magnitude is 1 / SNR: .1 is an SNR of 10. It limits the root mean square of ``n1`` and of ``n2``, the noise of
    either receiver channel, per sequence; noise of exactly 0 is left out of that mean, so that only what may change
    counts. Parameter ``noise``: ``(C, 2, *spatial)``, the two components in units of the mean signal. Random noise is
    Gaussian, so the image's is truly Rician; a search keeps the root mean square and gives up the distribution, but no
    value may leave what noise of that size reaches: without that limit it puts all its energy into a few voxels.

    Reference:
        Gudbjartsson and Patz, The Rician distribution of noisy MRI data, MRM 1995.

    Args:
        peak: largest absolute value of a component in multiples of the magnitude; Gaussian noise of a million voxels
            stays below 6.
    """

    name: ClassVar[str] = "rician"
    units: ClassVar[str] = "1/SNR"
    default_magnitude: ClassVar[float] = 0.1
    positive: ClassVar[bool] = True

    def __init__(self, peak: float = 6.0) -> None:
        self.peak = above_zero("peak", peak)
        if self.peak < 1:
            raise ConfigError(f"peak must be at least 1, the root mean square itself, got {peak!r}")

    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        return {"noise": (image.shape[1], 2, *image.shape[2:])}

    def apply(
        self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], support: Tensor
    ) -> Tensor:
        if bool((image < 0).any()):
            raise ConfigError(
                f"{self.name} needs a magnitude image without negative values (the smallest is "
                f"{float(image.min()):.4g}): add it before the normalisation"
            )
        axes = tuple(range(2, image.dim()))
        count = support.sum(axes, keepdim=True)
        total = torch.where(support, image, 0.0).sum(axes, keepdim=True, dtype=torch.float64)
        signal = (total / count.clamp_min(1)).to(image.dtype)
        first, second = (parameters["noise"].to(image) * signal.unsqueeze(2)).unbind(2)
        first = image + first
        changed = support & ((first != 0) | (second != 0))  # the length of (0, 0) has no slope
        length = torch.hypot(torch.where(changed, first, 1.0), torch.where(changed, second, 0.0))
        return torch.where(changed, length, torch.where(support, 0.0, image))

    def random(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        """Gaussian noise of the whole magnitude."""
        shape = (len(image), *self.shapes(image, spacing)["noise"])
        return self.project({"noise": _normalised(draw(shape, generator, image, "normal")) * magnitude}, magnitude)

    def control(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        return self.random(image, spacing, magnitude, generator)

    def project(self, parameters: Mapping[str, Tensor], magnitude: float) -> Parameters:
        limit = self.peak * magnitude
        noise = parameters["noise"].clamp(-limit, limit)
        size = root_mean_square(noise)
        inside = magnitude * (1 - 4 * torch.finfo(noise.dtype).eps)  # rounding leaves none too large
        factor = torch.where(size > magnitude, inside / torch.where(size > 0, size, 1.0), 1.0)
        return {"noise": noise * _wide(factor, noise)}

    def step(
        self, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor], share: float, magnitude: float
    ) -> Parameters:
        noise = parameters["noise"] + share * magnitude * _normalised(gradient["noise"])
        return self.project({"noise": noise}, magnitude)

    def size(self, parameters: Mapping[str, Tensor]) -> Tensor:
        noise = parameters["noise"]
        largest = noise.abs().flatten(1).amax(1) / self.peak
        return torch.maximum(root_mean_square(noise).flatten(1).amax(1).to(noise.dtype), largest)


def root_mean_square(noise: Tensor) -> Tensor:
    """Of the non-zero values of every component ``(B, C, 2, ...)``, ``(B, C, 2)`` in float64; 0 if there are none."""
    axes = tuple(range(3, noise.dim()))
    count = (noise != 0).sum(axes).clamp_min(1)
    return (noise.square().sum(axes, dtype=torch.float64) / count).sqrt()


def _normalised(noise: Tensor) -> Tensor:
    """Every component at a root mean square of 1; 0 stays 0."""
    peak = noise.abs().flatten(3).amax(3)  # slopes of a saturated network underflow when squared
    noise = noise / _wide(torch.where(peak > 0, peak, 1.0), noise)
    size = root_mean_square(noise)
    return noise / _wide(torch.where(size > 0, size, 1.0), noise)


def _wide(values: Tensor, noise: Tensor) -> Tensor:
    return values.to(noise.dtype).view(*values.shape, *[1] * (noise.dim() - 3))
