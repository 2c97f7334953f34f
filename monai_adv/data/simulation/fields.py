"""Seeded draws, smooth random fields and the Gaussian blur the simulation is made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

LATTICE_BOX = ((-90.0, 90.0), (-126.0, 98.0), (-80.0, 96.0))
"""World box (RAS mm) that the control points of a `SmoothField` cover; beyond it the field fades to zero."""

_FIELD_GAIN = 1 / 0.40  # control points of unit variance give a standard deviation of about 0.83 between the knots


def derive_seed(*parts: object) -> int:
    """A 32-bit seed from any printable parts; other parts, other seed (torch's CPU generator uses 32 bits)."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@contextmanager
def single_thread() -> Iterator[None]:
    """One torch thread inside the block: the order of a float sum, and so its last bits, depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Draws:
    """A stream of random numbers that belongs to one purpose of one subject.

    Streams of different purposes are independent, so that the number of voxels (noise) changes neither the anatomy
    nor the tumour: a seed is the same subject at every resolution.

    Args:
        seed: the subject's seed.
        purpose: name of the stream.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self.generator = torch.Generator().manual_seed(derive_seed("monai_adv.simulation", seed, purpose))

    def uniform(self, low: float, high: float) -> float:
        """One number, uniform in [low, high)."""
        return low + (high - low) * float(torch.rand(1, generator=self.generator))

    def normal(self, sd: float = 1.0) -> float:
        """One number, Gaussian around zero."""
        return sd * float(torch.randn(1, generator=self.generator))

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Independent standard Gaussian numbers, float32."""
        return torch.randn(tuple(shape), generator=self.generator)

    def field(self, step: float, channels: int = 1) -> SmoothField:
        """A smooth random field with knots every `step` mm."""
        return SmoothField(self, step, channels)


class SmoothField:
    """Gaussian random field in world space: a cubic B-spline over a lattice of random control points.

    Args:
        draws: where the control points come from.
        step: distance of the knots in mm; details are about twice as long.
        channels: number of independent fields.
    """

    def __init__(self, draws: Draws, step: float, channels: int = 1) -> None:
        self.step = step
        self.counts = [math.ceil((high - low) / step) + 4 for low, high in LATTICE_BOX]
        self.control = draws.noise([channels, *self.counts])

    def __call__(self, axes: Sequence[Tensor]) -> Tensor:
        """Values on a grid.

        Args:
            axes: world coordinates (mm) along each of the three axes, 1-D.

        Returns:
            (channels, X, Y, Z) float32 of zero mean and a standard deviation of about 0.83.
        """
        weights = [
            _cubic_bspline((a[:, None] - LATTICE_BOX[i][0]) / self.step + 1 - torch.arange(self.counts[i])[None])
            for i, a in enumerate(axes)
        ]
        values = torch.einsum("nabc,xa->nxbc", self.control, weights[0])
        values = torch.einsum("nxbc,yb->nxyc", values, weights[1])
        return torch.matmul(values, weights[2].T) * _FIELD_GAIN


def _cubic_bspline(t: Tensor) -> Tensor:
    t = t.abs()
    inner, outer = 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6
    return torch.where(t < 1, inner, torch.where(t < 2, outer, torch.zeros_like(t)))


def blur(volume: Tensor, sigma: Sequence[float]) -> Tensor:
    """Separable Gaussian blur of the last three axes with replicated borders.

    Args:
        volume: (..., X, Y, Z).
        sigma: standard deviations in voxels; below 0.2 an axis is left as it is.
    """
    for axis, s in zip((-3, -2, -1), sigma):
        if s < 0.2:
            continue
        radius = max(1, int(3 * s + 0.5))
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / s) ** 2)
        kernel = (kernel / kernel.sum()).to(volume)
        moved = volume.movedim(axis, -1)
        rows = functional.pad(moved.reshape(-1, 1, moved.shape[-1]), (radius, radius), mode="replicate")
        volume = functional.conv1d(rows, kernel[None, None]).reshape(moved.shape).movedim(-1, axis)
    return volume
