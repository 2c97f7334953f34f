"""A deformation and an appearance change in one: what a learned synthesis applies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor

from monai_adv.errors import ConfigError
from monai_adv.transforms.physics.effect import (
    Parameters,
    above_zero,
    bspline_field,
    bspline_matrix,
    draw,
    rowwise,
)
from monai_adv.transforms.physics.geometry import Deformation, GeometricEffect, _moving, resample


class Synthesis(GeometricEffect):
    """Anatomy moves by a smooth invertible warp, then every sequence is shaded and changed smoothly.

    ``x' = warp(x) exp(b) + r std`` inside the moved foreground, ``y' = warp(y)``; background stays exactly 0. The warp
    is :class:`Deformation`'s; the log bias field ``b`` and the residual ``r`` are cubic B-splines, ``std`` the standard
    deviation of the channel's foreground. A channel without negative values stays so: the residual darkens no voxel
    beyond the channel's darkest, shaded as the voxel is, so that no brain turns into background.

    Parameters, in physical units: ``velocity`` ``(axes, *controls)`` in mm, see :class:`Deformation`; ``log_bias``
    ``(C, *controls)``, natural logarithms; ``residual`` ``(C, *controls)`` in standard deviations. A magnitude of 1
    allows each its limit. A limit of 0 takes its field away, parameter and all.

    Reference:
        Chen et al., Intelligent image synthesis to attack a segmentation CNN using adversarial learning, SASHIMI 2019,
        for anatomical variation and appearance change in one; parametrisation, formula and defaults are ours.

    Args:
        max_mm: limit of every control vector, and so of every displacement, in mm.
        max_bias: largest relative change by the bias field, e.g. .5 for factors between 1 / 1.5 and 1.5.
        max_residual: limit of the residual in standard deviations.
        knot_mm: distance of the velocity's control points in mm.
        bias_knot_mm: of the bias field's.
        residual_knot_mm: of the residual's.
        squarings: see :class:`Deformation`.

    Example:
        >>> effect, image = Synthesis(max_mm=0, max_residual=0), torch.full((1, 1, 4, 4), 2.0)
        >>> shading = {"log_bias": torch.full((1, 1, 4, 4), 0.1)}
        >>> round(float(effect.apply(image, shading, (1.0, 1.0), image != 0).mean()), 4)  # 2 exp(.1)
        2.2103
    """

    name: ClassVar[str] = "synthesis"
    units: ClassVar[str] = "limits"
    default_magnitude: ClassVar[float] = 1.0

    def __init__(
        self,
        max_mm: float = 8.0,
        max_bias: float = 0.5,
        max_residual: float = 0.5,
        knot_mm: float = 24.0,
        bias_knot_mm: float = 48.0,
        residual_knot_mm: float = 24.0,
        squarings: int = 7,
    ) -> None:
        limits = {"max_mm": max_mm, "max_bias": max_bias, "max_residual": max_residual}
        for name, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number >= 0, got {value!r}")
        if not any(limits.values()):
            raise ConfigError(f"all limits are 0, nothing can change: set one of {', '.join(limits)}")
        self.max_mm, self.max_bias, self.max_residual = (float(value) for value in limits.values())
        self.flow = Deformation(above_zero("knot_mm", knot_mm), squarings)
        self.knot_mm, self.squarings = self.flow.knot_mm, self.flow.squarings
        self.bias_knot_mm = above_zero("bias_knot_mm", bias_knot_mm)
        self.residual_knot_mm = above_zero("residual_knot_mm", residual_knot_mm)
        self._knots = {"log_bias": self.bias_knot_mm, "residual": self.residual_knot_mm}
        limit = {"velocity": self.max_mm, "log_bias": math.log1p(self.max_bias), "residual": self.max_residual}
        self._limits = {name: value for name, value in limit.items() if value > 0}

    def unit_limits(self) -> dict[str, float]:
        """Limit of every parameter there is at a magnitude of 1: mm, natural logarithms, standard deviations."""
        return dict(self._limits)

    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        found = dict(self.flow.shapes(image, spacing)) if "velocity" in self._limits else {}
        for name in set(self._limits) & set(self._knots):
            found[name] = (image.shape[1], *(m.shape[1] for m in self._matrices(name, image, spacing)))
        return {name: found[name] for name in self._limits}

    # ------------------------------------------------------------------------------------------------- the formula
    def apply(
        self,
        image: Tensor,
        parameters: Mapping[str, Tensor],
        spacing: Sequence[float],
        support: Tensor,
        field: Tensor | None = None,
    ) -> Tensor:
        moved, bias, residual = self._parts(image, parameters, spacing, support, field)
        return moved * bias + residual

    def displacement(self, parameters: Mapping[str, Tensor], shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
        if "velocity" in parameters:
            return self.flow.displacement(parameters, shape, spacing)
        some = next(iter(parameters.values()))
        return some.new_zeros(len(some), len(shape), *shape)

    def fields(
        self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], support: Tensor
    ) -> dict[str, Tensor]:
        """What was done to an image, at full resolution.

        Args:
            image: ``(B, C, *spatial)``, the clean one.
            parameters: see :meth:`shapes`, batch first.
            spacing: voxel size in mm.
            support: see :meth:`apply`.

        Returns:
            ``displacement`` ``(B, dims, *spatial)`` in mm, ``bias`` ``(B, C, *spatial)``, a factor, and ``residual``
            ``(B, C, *spatial)`` in image units; 1 and 0 outside the moved foreground, so that the moved image times
            ``bias`` plus ``residual`` is :meth:`apply`'s.
        """
        field = self.displacement({k: v.to(image) for k, v in parameters.items()}, image.shape[2:], spacing)
        _, bias, residual = self._parts(image, parameters, spacing, support, field)
        return {"displacement": field, "bias": bias, "residual": residual}

    def splines(self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float]) -> dict[str, Tensor]:
        """The appearance's fields as they are before any foreground: ``log_bias`` and ``residual``, those there are.

        Args:
            image: ``(B, C, *spatial)``, for shape and type.
            parameters: see :meth:`shapes`, batch first.
            spacing: voxel size in mm.

        Returns:
            ``(B, C, *spatial)`` each, in the units of their parameters.
        """
        return {
            name: bspline_field(parameters[name].to(image), self._matrices(name, image, spacing))
            for name in self._knots
            if name in parameters
        }

    def soft_warp(
        self,
        bits: Tensor,
        parameters: Mapping[str, Tensor],
        spacing: Sequence[float],
        field: Tensor | None = None,
    ) -> Tensor:
        """Masks moved with the image by linear interpolation, differentiable in the velocity.

        Args:
            bits: floating point ``(B, K, *spatial)``.
            parameters: see :meth:`shapes`, batch first.
            spacing: voxel size in mm.
            field: the :meth:`displacement` of these parameters, where it is there already.

        Returns:
            Shares between 0 and 1, ``(B, K, *spatial)``.
        """
        if "velocity" not in parameters:
            return bits
        if field is None:
            field = self.displacement({"velocity": parameters["velocity"].to(bits)}, bits.shape[2:], spacing)
        return resample(bits, field.to(bits), spacing)

    # ----------------------------------------------------------------------------------------------- the parameters
    def from_unit(self, raw: Mapping[str, Tensor], image: Tensor, spacing: Sequence[float]) -> Parameters:
        """Parameters of raw fields in [-1, 1] on any coarse grid, within the limits; differentiable.

        Args:
            raw: for every parameter ``(B, n, *any)``: n is C, or for the velocity a component per axis of the image.
                The grid's corners are the image's; every control point takes what lies at its place, by linear
                interpolation, and one beyond the border what the border has.
            image: ``(B, C, *spatial)``, for shape and type.
            spacing: voxel size in mm.

        Raises:
            ConfigError: if a raw field is missing or has other channels.
        """
        found = {}
        dims, shapes = image.dim() - 2, self.shapes(image, spacing)
        for name, (channels, *controls) in shapes.items():
            values = raw.get(name)
            if values is not None and name == "velocity" and values.shape[1] == dims != channels:
                values = values[:, _moving(image.shape[2:])]
            if values is None or values.dim() != image.dim() or values.shape[:2] != (len(image), channels):
                given = "none" if values is None else tuple(values.shape)
                wanted = dims if name == "velocity" else channels
                raise ConfigError(f"the raw {name} must be ({len(image)}, {wanted}, *{dims} sizes), got {given}")
            values = bspline_field(
                values.to(image), [_on_controls(n, c, image) for n, c in zip(values.shape[2:], controls)]
            )
            found[name] = values * self._limits[name]
        return self.project(found, 1.0)

    def scaled(self, parameters: Mapping[str, Tensor], scale: float | Tensor) -> Parameters:
        """All parameters times a number, or times one for each sample, ``(B,)``."""
        if not isinstance(scale, Tensor):
            return {k: v * scale for k, v in parameters.items()}
        return {k: v * scale.to(v).view(-1, *[1] * (v.dim() - 1)) for k, v in parameters.items()}

    def random(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        drawn = {
            k: draw((len(image), *shape), generator, image) * (magnitude * self._limits[k])
            for k, shape in self.shapes(image, spacing).items()
        }
        return self.project(drawn, magnitude)

    def control(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        """Control vectors of full length in random directions, the other parameters at one of their limits."""
        found: Parameters = {}
        for name, shape in self.shapes(image, spacing).items():
            limit = magnitude * self._limits[name]
            if name == "velocity":
                found |= self.flow.control(image, spacing, limit, generator)
            else:
                drawn = draw((len(image), *shape), generator, image)
                found[name] = torch.where(drawn < 0, -limit, limit).to(image)
        return found

    def project(self, parameters: Mapping[str, Tensor], magnitude: float) -> Parameters:
        """Control vectors that are too long are shortened, the rest is clamped; those allowed stay, bit for bit."""
        found: Parameters = {}
        for name, values in parameters.items():
            limit = magnitude * self._limits[name]
            if name == "velocity":
                found |= self.flow.project({name: values}, limit)
            else:
                found[name] = values.clamp(-limit, limit)
        return found

    def step(
        self, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor], share: float, magnitude: float
    ) -> Parameters:
        """Control vectors move along their own gradients, the rest by its sign, each by a share of its limit."""
        found: Parameters = {}
        for name, values in parameters.items():
            limit = magnitude * self._limits[name]
            if name == "velocity":
                found |= self.flow.step({name: values}, gradient, share, limit)
            else:
                found[name] = (values + share * limit * gradient[name].sign()).clamp(-limit, limit)
        return found

    def size(self, parameters: Mapping[str, Tensor]) -> Tensor:
        ratios = []
        for name, values in parameters.items():
            size = self.flow.size(parameters) if name == "velocity" else values.abs().flatten(1).amax(1)
            ratios.append(size / self._limits[name])
        return torch.stack(ratios).amax(0)

    # --------------------------------------------------------------------------------------------------- internals
    def _parts(
        self,
        image: Tensor,
        parameters: Mapping[str, Tensor],
        spacing: Sequence[float],
        support: Tensor,
        field: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The moved image, the factor and what is added: 1 and 0 outside the moved foreground and support."""
        parameters = {k: v.to(image) for k, v in parameters.items()}
        moved, inside = image, support & (image != 0)
        if "velocity" in parameters:
            velocity = {"velocity": parameters["velocity"]}
            moved = super().apply(image, velocity, spacing, support, field)
            if bool((support | (image == 0)).all()):  # as a rule: the moved foreground tells it without another warp
                inside = moved != 0
            else:
                inside = self.warp_label(support, velocity, spacing) & (moved != 0)
        fields = self.splines(image, parameters, spacing)
        bias, residual = torch.ones_like(image), torch.zeros_like(image)
        if "log_bias" in fields:
            bias = torch.where(inside, fields["log_bias"].exp(), 1.0)
        if "residual" in fields:
            axes = tuple(range(2, image.dim()))
            # what the voxel may lose until it is as dark as the channel's darkest
            low = torch.where(support & (image != 0), image, math.inf).amin(axes, keepdim=True)
            dark = (low > 0) & torch.isfinite(low)
            floor = torch.where(dark, (torch.where(dark, low, 0.0) - moved) * bias, -math.inf)
            added = fields["residual"] * rowwise(_spread(image, support), len(axes))
            residual = torch.where(inside, torch.maximum(added, floor.clamp_max(0)), 0.0)
        return moved, bias, residual

    def _matrices(self, name: str, image: Tensor, spacing: Sequence[float]) -> list[Tensor]:
        return [bspline_matrix(n, s, self._knots[name], image) for n, s in zip(image.shape[2:], spacing)]


def _spread(image: Tensor, support: Tensor) -> Tensor:
    """Population standard deviation of every channel over its foreground, ``(B, C)``; 0 without any."""
    flat, mask = image.detach().flatten(2), (support & (image != 0)).flatten(2)
    count = mask.sum(2, keepdim=True).clamp_min(1)
    mean = torch.where(mask, flat, 0.0).sum(2, keepdim=True, dtype=torch.float64) / count
    centred = torch.where(mask, flat - mean.to(flat), 0.0)
    return (centred.square().sum(2, dtype=torch.float64) / count[..., 0]).sqrt().to(image)


def _on_controls(size: int, controls: int, like: Tensor) -> Tensor:
    """Linear interpolation along one axis, ``(controls, size)``: control i of a spline stands i - 1 knots inside."""
    if controls == 1:
        share = torch.full((1,), 0.5)
    else:
        share = (torch.arange(controls) - 1).clamp(0, controls - 3) / (controls - 3)
    place = share.view(-1, 1) * (size - 1)
    return (1 - (place - torch.arange(size)).abs()).clamp_min(0).to(like)
