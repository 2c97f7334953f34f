"""Changes of anatomy: diffeomorphic deformation and affine motion; images linear, labels by nearest neighbour."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional

from monai_adv.errors import ConfigError
from monai_adv.transforms.physics.effect import (
    Effect,
    Parameters,
    above_zero,
    bspline_field,
    bspline_matrix,
    draw,
)

POINTS_PER_KNOT = 8  # of the grid a velocity is integrated on; the field it is made of is smooth between knots
MODES = {2: "bilinear", 3: "trilinear"}


class GeometricEffect(Effect):
    """Anatomy moves: ``x'(p) = x(p + u(p))`` with a displacement ``u`` in mm along the image's own axes.

    Images are interpolated linearly, labels take the nearest voxel of the same field. Background (exactly 0) moves as a
    label does and takes no part in the interpolation: otherwise the smallest motion would put a shell of faint voxels
    around a skull-stripped brain, which pipelines that normalise by the non-zero voxels take for brain. Outside the
    volume the value of its border goes on, so that a brain that is cut by the border shows no gap. Along an axis of one
    voxel nothing moves, and it has no parameters: a slice is a volume of depth one.
    """

    geometric: ClassVar[bool] = True

    @abstractmethod
    def displacement(self, parameters: Mapping[str, Tensor], shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
        """Where each voxel's value comes from, relative to it: ``(B, dims, *shape)`` in mm.

        Args:
            parameters: see :meth:`shapes`, batch first.
            shape: voxels of the volume.
            spacing: voxel size in mm.
        """

    def apply(
        self,
        image: Tensor,
        parameters: Mapping[str, Tensor],
        spacing: Sequence[float],
        support: Tensor,
        field: Tensor | None = None,
    ) -> Tensor:
        """The image with the anatomy moved, see :meth:`Effect.apply`.

        Args:
            image: ``(B, C, *spatial)``.
            parameters: see :meth:`shapes`, batch first.
            spacing: voxel size in mm.
            support: see :meth:`Effect.apply`.
            field: the :meth:`displacement` of these parameters, where it is there already.
        """
        parameters = {k: v.to(image) for k, v in parameters.items()}
        field = self.displacement(parameters, image.shape[2:], spacing) if field is None else field.to(image)
        moved = resample(image, field, spacing)
        foreground = image != 0
        if not bool(foreground.all()):
            share = resample(foreground.to(image), field, spacing)  # weight of the foreground in the interpolation
            inside = _gather(foreground, _nearest(field.detach(), spacing))
            moved = torch.where(inside, moved / torch.where(inside, share, 1.0), 0.0)
        still = torch.stack([(v == 0).flatten(1).all(1) for v in parameters.values()]).all(0)
        if not bool(still.any()):
            return moved
        # nothing moves: the image bit for bit, without the rounding of an interpolation, and yet with its gradient
        same = image + (moved - moved.detach()) if moved.requires_grad else image
        return torch.where(still.view(-1, *[1] * (image.dim() - 1)), same, moved)

    def fields(
        self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], support: Tensor
    ) -> dict[str, Tensor]:
        return {"displacement": self.displacement(parameters, image.shape[2:], spacing)}

    def warp_label(self, label: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float]) -> Tensor:
        return self.label_warp(label.shape[2:], parameters, spacing)(label)

    @torch.no_grad()
    def label_warp(
        self,
        shape: Sequence[int],
        parameters: Mapping[str, Tensor],
        spacing: Sequence[float],
        field: Tensor | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """:meth:`warp_label` for many labels of one shape: the field is computed once.

        Args:
            shape: of the labels.
            parameters: see :meth:`shapes`, batch first.
            spacing: voxel size in mm.
            field: the :meth:`displacement` of these parameters, where it is there already.

        Returns:
            Moves labels, bits or masks ``(B, K, *shape)`` of any type, which they keep.
        """
        if field is None:
            field = self.displacement({k: v.detach() for k, v in parameters.items()}, shape, spacing)
        index = _nearest(field, spacing)
        return lambda label: _gather(label, index.to(label.device))


class Deformation(GeometricEffect):
    """Smooth invertible warp: the flow of a stationary velocity field, integrated by scaling and squaring.

    The velocity is a cubic B-spline of control vectors none of which is longer than the magnitude, so no voxel moves
    by more than the magnitude. Parameter ``velocity``: ``(axes, *controls)`` in mm, a component for every axis of more
    than one voxel; its negative is the inverse warp. The flow of a smooth field does not fold
    (:func:`jacobian_determinant` > 0) while the magnitude is small against ``knot_mm``.

    Reference:
        Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms, MICCAI 2006 (scaling and
        squaring); Chen et al., AdvChain, Medical Image Analysis 2022 (adversarial deformations). The parametrisation
        in mm and the defaults are ours.

    Args:
        knot_mm: distance of the control points in mm.
        squarings: the velocity is followed in ``2 ** squarings`` steps.
    """

    name: ClassVar[str] = "deformation"
    units: ClassVar[str] = "mm"
    default_magnitude: ClassVar[float] = 4.0

    def __init__(self, knot_mm: float = 40.0, squarings: int = 7) -> None:
        self.knot_mm = above_zero("knot_mm", knot_mm)
        if isinstance(squarings, bool) or not isinstance(squarings, int) or not 1 <= squarings <= 16:
            raise ConfigError(f"squarings must be an integer between 1 and 16, got {squarings!r}")
        self.squarings = squarings

    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        _, matrices = self._grid(image.shape[2:], spacing, image)
        return {"velocity": (len(_moving(image.shape[2:])), *(m.shape[1] for m in matrices))}

    def displacement(self, parameters: Mapping[str, Tensor], shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
        velocity = parameters["velocity"]
        points, matrices = self._grid(shape, spacing, velocity)
        step = [_length(n, s) / max(m.shape[0] - 1, 1) for n, s, m in zip(shape, spacing, matrices)]
        field = _all_axes(bspline_field(velocity, matrices), shape) / 2**self.squarings
        for _ in range(self.squarings):
            field = field + resample(field, field, step)
        if points != list(shape):
            field = functional.interpolate(field, size=tuple(shape), mode=MODES[len(shape)], align_corners=True)
        return field

    def control(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        """Control vectors of full length in random directions."""
        shape = (len(image), *self.shapes(image, spacing)["velocity"])
        drawn = draw(shape, generator, image, "normal")
        return self.project({"velocity": magnitude * _direction(drawn)}, magnitude)

    def project(self, parameters: Mapping[str, Tensor], magnitude: float) -> Parameters:
        """Control vectors that are too long are shortened."""
        velocity = parameters["velocity"]
        length = torch.linalg.vector_norm(velocity, dim=1, keepdim=True)
        # a little inside, so that rounding leaves no vector too long
        inside = magnitude * (1 - 4 * torch.finfo(velocity.dtype).eps)
        factor = inside / torch.where(length > magnitude, length, 1.0)
        return {"velocity": torch.where(length > magnitude, velocity * factor, velocity)}

    def step(
        self, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor], share: float, magnitude: float
    ) -> Parameters:
        """Every control vector moves by a share of the magnitude along its own gradient, projected."""
        move = share * magnitude * _direction(gradient["velocity"])
        return self.project({"velocity": parameters["velocity"] + move}, magnitude)

    def size(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return torch.linalg.vector_norm(parameters["velocity"], dim=1).flatten(1).amax(1)

    def _grid(self, shape: Sequence[int], spacing: Sequence[float], like: Tensor) -> tuple[list[int], list[Tensor]]:
        """Points per axis of the grid the velocity is integrated on, and the spline's weights there.

        The grid spans the volume but is no finer than the spline needs: a full field per squaring would cost more
        memory and time than the network.
        """
        distance = self.knot_mm / POINTS_PER_KNOT
        points = [min(n, 1 + max(1, math.ceil(_length(n, s) / distance - 1e-6))) for n, s in zip(shape, spacing)]
        return points, [
            bspline_matrix(m, _length(n, s) / max(m - 1, 1), self.knot_mm, like)
            for m, n, s in zip(points, shape, spacing)
        ]


class Affine(GeometricEffect):
    """Rotation, translation and scaling about the centre of the volume: a patient who lies differently.

    A point at ``q`` mm from the centre goes to ``R S q + t``. Parameters, in physical units, for the axes of more than
    one voxel: ``rotation`` in degrees, about the axes 0, 1 and 2 (the one about axis 0 comes first; a positive angle
    about axis 2 turns axis 0 towards axis 1, as ``torch.rot90``), in 2D one angle; ``translation`` in mm and
    ``log_scale``, natural logarithms, one per axis. A magnitude of 1 allows each parameter its limit.

    Args:
        max_rotation: limit of every angle in degrees.
        max_translation: limit along every axis in mm.
        max_scaling: largest relative change of size, e.g. .1 for factors between 1 / 1.1 and 1.1.
    """

    name: ClassVar[str] = "affine"
    units: ClassVar[str] = "limits"
    default_magnitude: ClassVar[float] = 1.0

    def __init__(self, max_rotation: float = 10.0, max_translation: float = 5.0, max_scaling: float = 0.1) -> None:
        limits = {"max_rotation": max_rotation, "max_translation": max_translation, "max_scaling": max_scaling}
        for name, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number >= 0, got {value!r}")
        if not any(limits.values()):
            raise ConfigError(f"all limits are 0, nothing can move: set one of {', '.join(limits)}")
        self.max_rotation, self.max_translation, self.max_scaling = (float(v) for v in limits.values())
        self._limits = {
            "rotation": self.max_rotation,
            "translation": self.max_translation,
            "log_scale": math.log1p(self.max_scaling),
        }

    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        axes = len(_moving(image.shape[2:]))
        return {"rotation": (math.comb(axes, 2),), "translation": (axes,), "log_scale": (axes,)}

    def displacement(self, parameters: Mapping[str, Tensor], shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
        moving = _moving(shape)
        translation = parameters["translation"]
        batch, axes = translation.shape
        # where a voxel's value comes from: the inverse motion
        inverse = (
            torch.diag_embed(torch.exp(-parameters["log_scale"])) @ rotation_matrix(parameters["rotation"], axes).mT
        )
        change = inverse - torch.eye(axes).to(inverse)
        offset = -(inverse @ translation.unsqueeze(2))
        field = offset.view(batch, axes, *[1] * len(shape)).expand(batch, axes, *shape)
        for column, axis in enumerate(moving):
            half = _length(shape[axis], spacing[axis]) / 2
            place = torch.linspace(-half, half, shape[axis]).to(inverse)
            place = place.view(-1, *[1] * (len(shape) - 1 - axis))
            field = field + change[:, :, column].reshape(batch, axes, *[1] * len(shape)) * place
        return _all_axes(field, shape)

    def random(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        return {
            k: draw((len(image), *shape), generator, image) * (magnitude * self._limits[k])
            for k, shape in self.shapes(image, spacing).items()
        }

    def control(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        """Every parameter at one of its limits."""
        drawn = self.random(image, spacing, 1.0, generator)
        return {k: torch.where(v < 0, -1.0, 1.0).to(v) * (magnitude * self._limits[k]) for k, v in drawn.items()}

    def project(self, parameters: Mapping[str, Tensor], magnitude: float) -> Parameters:
        limits = {k: magnitude * self._limits[k] for k in parameters}
        return {k: v.clamp(-limits[k], limits[k]) for k, v in parameters.items()}

    def step(
        self, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor], share: float, magnitude: float
    ) -> Parameters:
        length = {k: share * magnitude * self._limits[k] for k in parameters}
        return self.project({k: v + length[k] * gradient[k].sign() for k, v in parameters.items()}, magnitude)

    def size(self, parameters: Mapping[str, Tensor]) -> Tensor:
        ratios = [v.abs() / (self._limits[k] or torch.finfo(v.dtype).tiny) for k, v in parameters.items()]
        return functional.pad(torch.cat(ratios, dim=1), (1, 0)).amax(1)


def jacobian_determinant(displacement: Tensor, spacing: Sequence[float]) -> Tensor:
    """Local change of volume of the map ``p -> p + u(p)``, by central differences; it folds where this is not > 0.

    Args:
        displacement: ``u`` in mm, ``(B, dims, *spatial)``; ``effect.displacement(parameters, shape, spacing)``.
        spacing: voxel size in mm.

    Returns:
        ``(B, *spatial)``; 1 where nothing moves. Along an axis of one voxel nothing changes.

    Example:
        >>> import torch
        >>> place = 2.0 * torch.arange(4.0).expand(1, 1, 3, 4)  # the second axis in mm
        >>> shrunk = torch.cat([torch.zeros_like(place), -0.25 * place], dim=1)
        >>> jacobian_determinant(shrunk, (1.0, 2.0)).unique().tolist()
        [0.75]
    """
    dims = displacement.dim() - 2
    if displacement.shape[1] != dims or len(spacing) != dims:
        raise ConfigError(
            f"a displacement {tuple(displacement.shape)} must be (B, dims, *spatial), with a spacing per axis, "
            f"got {tuple(spacing)}"
        )
    slopes = spatial_gradient(displacement, spacing)
    rows = [[slope[:, i] + 1 if i == axis else slope[:, i] for axis, slope in enumerate(slopes)] for i in range(dims)]
    return _determinant(rows)  # ten times as fast as that of as many small matrices


def _determinant(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Determinant of a small square matrix of tensors, along its first row."""
    if len(rows) == 1:
        return rows[0][0]
    total = torch.zeros_like(rows[0][0])
    for column, entry in enumerate(rows[0]):
        minor = _determinant([[*row[:column], *row[column + 1 :]] for row in rows[1:]])
        total = total + entry * minor if column % 2 == 0 else total - entry * minor
    return total


def jacobian(displacement: Tensor, spacing: Sequence[float]) -> Tensor:
    """Derivatives of the map ``p -> p + u(p)`` of :func:`jacobian_determinant`, ``(B, *spatial, dims, dims)``."""
    slopes = torch.stack(spatial_gradient(displacement, spacing), dim=-1).movedim(1, -2)
    return slopes + torch.eye(displacement.shape[1]).to(displacement)


def spatial_gradient(data: Tensor, spacing: Sequence[float]) -> list[Tensor]:
    """Change of ``(B, C, *spatial)`` per mm along every axis by central differences; 0 along an axis of one voxel."""
    return [
        torch.gradient(data, spacing=float(mm), dim=2 + axis)[0] if data.shape[2 + axis] > 1 else torch.zeros_like(data)
        for axis, mm in enumerate(spacing)
    ]


def resample(data: Tensor, displacement: Tensor, spacing: Sequence[float]) -> Tensor:
    """``data(p + u(p))`` by linear interpolation; outside the volume the border goes on.

    Args:
        data: ``(B, C, *spatial)``.
        displacement: ``u`` in mm, ``(B, dims, *spatial)``.
        spacing: voxel size in mm.
    """
    places = []
    for axis, (size, mm) in enumerate(zip(data.shape[2:], spacing)):
        ends = (-1.0, 1.0) if size > 1 else (0.0, 0.0)
        place = torch.linspace(*ends, size, dtype=data.dtype, device=data.device)
        place = place.view(-1, *[1] * (data.dim() - 3 - axis))
        half = _length(size, mm) / 2
        places.append(place + displacement[:, axis] / half if size > 1 else place.expand_as(displacement[:, axis]))
    grid = torch.stack(places[::-1], dim=-1)  # grid_sample names the last axis first
    return functional.grid_sample(data, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _nearest(displacement: Tensor, spacing: Sequence[float]) -> Tensor:
    """Flat index ``(B, voxels)`` of the voxel nearest to ``p + u(p)``."""
    shape = displacement.shape[2:]
    flat = torch.zeros((), dtype=torch.long, device=displacement.device)
    for axis, (size, mm) in enumerate(zip(shape, spacing)):
        place = torch.arange(size, dtype=displacement.dtype, device=displacement.device)
        place = place.view(-1, *[1] * (len(shape) - 1 - axis)) + displacement[:, axis] / mm
        flat = flat * size + place.round().clamp(0, size - 1).long()
    return flat.flatten(1)


def _gather(data: Tensor, index: Tensor) -> Tensor:
    """Voxels ``(B, C, *spatial)`` by their flat index."""
    flat = data.flatten(2)
    return flat.gather(2, index.unsqueeze(1).expand_as(flat)).view(data.shape)


def _moving(shape: Sequence[int]) -> list[int]:
    """Axes of more than one voxel."""
    return [axis for axis, size in enumerate(shape) if size > 1]


def _length(size: int, spacing: float) -> float:
    """From the first to the last voxel in mm."""
    return (size - 1) * spacing


def _all_axes(field: Tensor, shape: Sequence[int]) -> Tensor:
    """A field with components along the moving axes with zeros along the others."""
    moving = _moving(shape)
    if len(moving) == len(shape):
        return field
    full = field.new_zeros(len(field), len(shape), *field.shape[2:])
    full[:, moving] = field
    return full


def _direction(vectors: Tensor) -> Tensor:
    """Vectors ``(B, axes, ...)`` of length one; those of length zero stay."""
    if not vectors.numel():
        return vectors
    largest = vectors.abs().amax(1, keepdim=True)  # squares of tiny gradients would vanish
    vectors = vectors / torch.where(largest > 0, largest, 1.0)
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(1.0)


def rotation_matrix(angles: Tensor, axes: int) -> Tensor:
    """Rotation matrices ``(B, axes, axes)`` of angles in degrees, the first of them applied first."""
    matrix = torch.eye(axes).to(angles).expand(len(angles), axes, axes)
    # about axis 0, 1, 2: from the next axis towards the one after it
    planes = [(1, 2), (2, 0), (0, 1)] if axes == 3 else list(combinations(range(axes), 2))
    for column, (start, end) in enumerate(planes):
        angle = torch.deg2rad(angles[:, column])
        turn = torch.eye(axes).to(angles).repeat(len(angles), 1, 1)
        turn[:, start, start] = turn[:, end, end] = torch.cos(angle)
        turn[:, end, start], turn[:, start, end] = torch.sin(angle), -torch.sin(angle)
        matrix = turn @ matrix
    return matrix
