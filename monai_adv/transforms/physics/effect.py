"""A physical change with explicit parameters: one formula for the transform, its random twin and the attack."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor

from monai_adv.errors import ConfigError

Parameters = dict[str, Tensor]


class Effect(ABC):
    """What happens to a batch of images ``(B, C, *spatial)``, differentiable in its parameters ``(B, ...)``.

    Parameters of zero change nothing, bit for bit (and may have no gradient there: searches start elsewhere). The
    *magnitude* limits them, in the effect's physical ``units``.
    Parameters of effects on intensities have a channel axis, ``(B, C, ...)``: every sequence is acquired for itself.

    Class attributes:
        name: of the effect and of its attack.
        units: of the magnitude.
        default_magnitude: a strong but plausible one (ours).
        geometric: whether anatomy moves; then all channels move together and labels move with them.
        positive: whether images must not be negative (magnitude MRI).
    """

    name: ClassVar[str]
    units: ClassVar[str]
    default_magnitude: ClassVar[float]
    geometric: ClassVar[bool] = False
    positive: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter for one sample, without the batch.

        Args:
            image: ``(B, C, *spatial)``.
            spacing: voxel size in mm.
        """

    @abstractmethod
    def apply(
        self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], support: Tensor
    ) -> Tensor:
        """The changed image.

        Args:
            image: ``(B, C, *spatial)``.
            parameters: see :meth:`shapes`, batch first.
            spacing: voxel size in mm.
            support: ``(B, C, *spatial)`` bool; effects on intensities change nothing outside it.
        """

    def warp_label(self, label: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float]) -> Tensor:
        """Labels, bits or masks ``(B, K, *spatial)`` moved with the image by nearest neighbour."""
        return label

    def fields(
        self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], support: Tensor
    ) -> dict[str, Tensor]:
        """What the parameters do to every voxel, for files and figures; empty where there is no such picture.

        Args: as :meth:`apply`.

        Returns:
            Of these, what the effect has: ``displacement`` ``(B, dims, *spatial)`` in mm along the image's own axes,
            where each voxel's value comes from; ``bias`` ``(B, C, *spatial)``, what values are multiplied by;
            ``residual`` ``(B, C, *spatial)``, what is added, in the image's units.
        """
        return {}

    def zeros(self, image: Tensor, spacing: Sequence[float]) -> Parameters:
        """Parameters that change nothing."""
        return {k: image.new_zeros((len(image), *shape)) for k, shape in self.shapes(image, spacing).items()}

    def random(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        """Random parameters inside the magnitude: uniform in the box, projected."""
        limit = self.limit(magnitude)
        drawn = {
            k: draw((len(image), *shape), generator, image) * limit for k, shape in self.shapes(image, spacing).items()
        }
        return self.project(drawn, magnitude)

    def control(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        """Random parameters that use the whole magnitude: the control beside the attack. Every one is at its limit."""
        drawn = self.random(image, spacing, 1.0, generator)
        limit = self.limit(magnitude)
        return self.project({k: torch.where(v < 0, -limit, limit).to(v) for k, v in drawn.items()}, magnitude)

    def limit(self, magnitude: float) -> float:
        """Largest absolute value of a parameter under a magnitude."""
        return magnitude

    def project(self, parameters: Mapping[str, Tensor], magnitude: float) -> Parameters:
        """The nearest allowed parameters; those already allowed stay, bit for bit."""
        limit = self.limit(magnitude)
        return {k: v.clamp(-limit, limit) for k, v in parameters.items()}

    def step(
        self, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor], share: float, magnitude: float
    ) -> Parameters:
        """Steepest ascent by a share of the magnitude, projected."""
        length = share * self.limit(magnitude)
        return self.project({k: v + length * gradient[k].sign() for k, v in parameters.items()}, magnitude)

    def size(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The smallest magnitude that allows these parameters, ``(B,)``."""
        return torch.stack([v.abs().flatten(1).amax(1) for v in parameters.values()]).amax(0)


def draw(shape: Sequence[int], generator: Generator, like: Tensor, kind: str = "uniform") -> Tensor:
    """Random numbers in [-1, 1] ("uniform") or standard normal, from a generator of any device, like a tensor."""
    values = torch.empty(tuple(shape), dtype=like.dtype, device=generator.device)
    if kind == "normal":
        values.normal_(generator=generator)
    else:
        values.uniform_(-1, 1, generator=generator)
    return values.to(like.device)


def bspline_matrix(size: int, spacing: float, knot_mm: float, like: Tensor) -> Tensor:
    """Weights ``(size, controls)`` of a uniform cubic B-spline along one axis; rows sum to 1 and are not negative.

    So a field made from control values never leaves their range. An axis of one voxel has one control.

    Args:
        size: voxels.
        spacing: mm per voxel.
        knot_mm: wanted distance of control points in mm; the axis is divided evenly.
        like: dtype and device.
    """
    if size == 1:
        return like.new_ones(1, 1)
    # voxel sizes read from single precision affines must not add a knot by their rounding
    intervals = max(1, math.ceil((size - 1) * spacing / knot_mm - 1e-6))
    position = torch.arange(size, dtype=torch.float64) * (intervals / (size - 1))
    index = position.floor().clamp_max(intervals - 1)
    t = (position - index).unsqueeze(1)
    weights = torch.cat(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=1
    ) / 6  # fmt: skip
    matrix = torch.zeros(size, intervals + 3, dtype=torch.float64)
    matrix.scatter_(1, index.long().unsqueeze(1) + torch.arange(4), weights)
    return matrix.to(like)


def bspline_field(control: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Smooth field ``(B, C, *spatial)`` of control values ``(B, C, *controls)``, one matrix per axis."""
    field = control
    for axis, matrix in enumerate(matrices):
        field = torch.movedim(torch.movedim(field, 2 + axis, -1) @ matrix.T, -1, 2 + axis)
    return field


def rowwise(values: Tensor, dims: int) -> Tensor:
    """``(B, C)`` viewed so that it multiplies ``(B, C, *spatial)``."""
    return values.view(*values.shape, *[1] * dims)


def above_zero(name: str, value: float) -> float:
    """A finite option above zero.

    Raises:
        ConfigError: names the option.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a number > 0, got {value!r}")
    return float(value)
