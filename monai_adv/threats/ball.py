"""A threat bound to an image: projection, steepest step, random start and size, per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor

from monai_adv.errors import ConfigError
from monai_adv.threats.levels import Levels


@dataclass
class Ball(ABC):
    """The set of images allowed around ``clean``; every operation is per sample.

    Args:
        clean: ``(B, C, *spatial)``.
        mask: voxels that may change, same shape, bool.
        scale: one unit in image units per sample and channel, ``(B, C, 1, ...)``.
        eps: budget in units.
        low: lower bound per channel, or None.
        high: upper bound per channel, or None.
        levels: the values the image's file can hold, or None for any.
    """

    clean: Tensor
    mask: Tensor
    scale: Tensor
    eps: float
    low: Tensor | None = None
    high: Tensor | None = None
    levels: Levels | None = None

    def with_eps(self, eps: float) -> Ball:
        """The same set with another budget."""
        return replace(self, eps=eps)

    @abstractmethod
    def project(self, image: Tensor) -> Tensor:
        """Bring an image inside budget and bounds, and back to ``clean`` outside the support.

        The budget comes first and the bounds after it, which only shortens the perturbation; for L-inf that is the
        nearest allowed image.
        """

    @abstractmethod
    def step(self, image: Tensor, gradient: Tensor, size: float | Tensor) -> Tensor:
        """Move along the steepest ascent direction of this norm by ``size`` (in units, or ``(B,)``) and project."""

    @abstractmethod
    def random(self, generator: Generator | None = None) -> Tensor:
        """A random allowed image, uniform in the ball before the bounds are applied."""

    @abstractmethod
    def noise(self, kind: str, generator: Generator | None = None) -> Tensor:
        """A random image whose perturbation uses the whole budget: the control beside every attack.

        Args:
            kind: "sign" (every voxel of the support moves by plus or minus the same) or "gaussian".
            generator: source of the numbers.
        """

    @abstractmethod
    def size(self, image: Tensor) -> Tensor:
        """Norm of ``image - clean`` in units, ``(B,)``."""

    def store(self, image: Tensor) -> Tensor:
        """An allowed image as its file would hold it: rounded to the levels, still inside; itself without levels."""
        if self.levels is None:
            return image
        number = torch.clamp(self.levels.number(image).round(), *self._level_range)
        stored = torch.where(number == self._clean_number, self.clean, self.levels.value(number).to(image.dtype))
        return torch.where(self.mask, stored, self.clean)

    @cached_property
    def _clean_number(self) -> Tensor:
        assert self.levels is not None
        return self.levels.number(self.clean).round()

    @cached_property
    def _level_range(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest stored number that is allowed."""
        assert self.levels is not None
        return self.levels.range(self.low, self.high)

    def gradient_in_units(self, gradient: Tensor) -> Tensor:
        """Gradient by the perturbation in units from that by the image; zero where nothing may change."""
        return torch.where(self.mask, gradient * self.scale, torch.zeros_like(gradient))

    def _bounded(self, image: Tensor) -> Tensor:
        # the clean image lies within the bounds, so clipping only shortens the perturbation
        if self.low is not None:
            image = torch.maximum(image, self.low)
        if self.high is not None:
            image = torch.minimum(image, self.high)
        return torch.where(self.mask, image, self.clean)

    def _flat(self, values: Tensor) -> Tensor:
        """Reshape ``(B,)`` so that it multiplies images: one trailing one per other dimension."""
        return values.view(-1, *[1] * (self.clean.dim() - 1))

    def _units(self, delta: Tensor) -> Tensor:
        """A perturbation in units; a channel without a scale cannot change and counts as it is."""
        return delta / torch.where(self.scale > 0, self.scale, torch.ones_like(self.scale))

    def _length(self, delta: Tensor) -> Tensor:
        """Euclidean length per sample in units, summed in float64."""
        return self._units(delta).double().flatten(1).norm(dim=1)

    def _finite(self) -> float:
        if self.eps == float("inf"):
            raise ConfigError("a random start or noise of an unbounded threat has no size: give eps")
        return self.eps

    def _draw(self, kind: str, generator: Generator | None) -> Tensor:
        device = generator.device if generator is not None else self.clean.device
        values = torch.empty(self.clean.shape, dtype=self.clean.dtype, device=device)
        if kind == "gaussian":
            values.normal_(generator=generator)
        else:
            values.uniform_(-1, 1, generator=generator)
        return values.to(self.clean.device)

    def _noise_direction(self, kind: str, generator: Generator | None) -> Tensor:
        if kind == "gaussian":
            return self._draw("gaussian", generator)
        if kind == "sign":
            drawn = self._draw("uniform", generator)
            return torch.where(drawn < 0, -torch.ones_like(drawn), torch.ones_like(drawn))
        raise ValueError(f"noise kind {kind!r} is unknown: use 'sign' or 'gaussian'")


class LInfBall(Ball):
    """Images that differ from ``clean`` by at most ``eps`` units at every voxel."""

    @cached_property
    def _box(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest allowed image: budget, bounds and support in one box, so that projecting is one pass."""
        # a channel that cannot change has scale 0, and inf * 0 is no radius
        radius = torch.where(self.scale > 0, self.eps * self.scale, torch.zeros_like(self.scale))
        return self._bounded(self.clean - radius), self._bounded(self.clean + radius)

    @cached_property
    def _level_range(self) -> tuple[Tensor, Tensor]:
        assert self.levels is not None
        return self.levels.range(*self._box)

    def project(self, image: Tensor) -> Tensor:
        return torch.clamp(image, *self._box)

    def step(self, image: Tensor, gradient: Tensor, size: float | Tensor) -> Tensor:
        if isinstance(size, Tensor):
            size = self._flat(size).to(self.scale)
        return self.project(torch.addcmul(image, gradient.sign(), size * self.scale))

    def random(self, generator: Generator | None = None) -> Tensor:
        return self.project(self.clean + self._draw("uniform", generator) * (self._finite() * self.scale))

    def noise(self, kind: str, generator: Generator | None = None) -> Tensor:
        # Gaussian noise of standard deviation eps has the RMS of sign noise; it is unbounded, so not projected to eps
        direction = self._noise_direction(kind, generator)
        return self._bounded(self.clean + direction * (self._finite() * self.scale))

    def size(self, image: Tensor) -> Tensor:
        return self._units(image - self.clean).abs().flatten(1).amax(1)


class L2Ball(Ball):
    """Images whose difference from ``clean``, in units, has Euclidean length at most ``eps``."""

    def project(self, image: Tensor) -> Tensor:
        delta = torch.where(self.mask, image - self.clean, torch.zeros_like(image))
        length = self._length(delta)
        # a point inside the ball stays where it is, bit for bit
        factor = (self.eps / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)
        shrunk = self.clean + delta * self._flat(factor).to(delta.dtype)
        return self._bounded(torch.where(self._flat(length > self.eps), shrunk, image))

    def store(self, image: Tensor) -> Tensor:
        stored = super().store(image)
        if self.levels is None:
            return stored
        # rounding may lengthen the perturbation beyond the budget; cut towards the clean image it cannot
        cut = (self.levels.number(image) - self._clean_number).trunc() + self._clean_number
        shorter = super().store(self.levels.value(cut).to(image.dtype))
        return torch.where(self._flat(self.size(stored) > self.eps), shorter, stored)

    def step(self, image: Tensor, gradient: Tensor, size: float | Tensor) -> Tensor:
        # in units u = delta / scale the gradient is g * scale, and a step of u is scaled back
        gradient = self.gradient_in_units(gradient)
        # largest entry 1: the gradient of a saturated network is so small that size / length overflows float32
        peak = gradient.abs().flatten(1).amax(1)
        gradient = gradient / self._flat(torch.where(peak > 0, peak, torch.ones_like(peak)))
        factor = size / gradient.double().flatten(1).norm(dim=1).clamp_min(1)
        return self.project(image + gradient * self.scale * self._flat(factor).to(image.dtype))

    def random(self, generator: Generator | None = None) -> Tensor:
        direction = torch.where(self.mask, self._draw("gaussian", generator), torch.zeros_like(self.clean))
        count = self.mask.flatten(1).sum(1).double()
        uniform = torch.rand(
            len(count), dtype=torch.float64, device=generator.device if generator else None, generator=generator
        ).to(count.device)
        return self._scaled(direction, self._finite() * uniform ** (1 / count))

    def noise(self, kind: str, generator: Generator | None = None) -> Tensor:
        direction = torch.where(self.mask, self._noise_direction(kind, generator), torch.zeros_like(self.clean))
        return self._scaled(direction, torch.full((len(direction),), self._finite(), dtype=torch.float64))

    def size(self, image: Tensor) -> Tensor:
        return self._length(image - self.clean)

    def _scaled(self, direction: Tensor, length: Tensor) -> Tensor:
        norm = direction.double().flatten(1).norm(dim=1)
        factor = self._flat(length.to(norm.device) / norm).to(direction.dtype)
        return self.project(self.clean + direction * factor * self.scale)


class ParametricBall(Ball):
    """Images made by a change whose parameters are limited: only support and bounds are kept here."""

    def project(self, image: Tensor) -> Tensor:
        return self._bounded(image)

    def step(self, image: Tensor, gradient: Tensor, size: float | Tensor) -> Tensor:
        raise NotImplementedError("a parametric threat is searched in its parameters, not in voxels")

    def random(self, generator: Generator | None = None) -> Tensor:
        raise NotImplementedError("a parametric threat is searched in its parameters, not in voxels")

    def noise(self, kind: str, generator: Generator | None = None) -> Tensor:
        raise NotImplementedError("noise of a parametric threat are random parameters: use the attack's own control")

    def size(self, image: Tensor) -> Tensor:
        return (image - self.clean).abs().flatten(1).amax(1)
