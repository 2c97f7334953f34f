"""Changes that happen in k-space: motion between segments, ghosting, truncation (Gibbs ringing).

Images are taken as real and so is the reconstruction: what is added to an image is the real part of the inverse
Fourier transform of the change in k-space, which is defined for z-scored images with negative values too. Axes of one
voxel are left alone and have no parameters. Space is periodic, as it is for a scanner: what leaves the field of view
comes in at the other side. The field of view is the image's, so a volume cropped to the brain has a smaller one than
the scan had, and ghosts nearer to each other.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, pad
from torch.utils.checkpoint import checkpoint

from monai_adv.errors import ConfigError
from monai_adv.transforms.physics.effect import Effect, Parameters, above_zero, draw
from monai_adv.transforms.physics.geometry import rotation_matrix


class KSpaceEffect(Effect):
    """An effect that adds the real image of a change in k-space; base class."""

    @abstractmethod
    def change(self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], axis: int) -> Tensor:
        """What is added to the image; exactly 0 for parameters of 0.

        Args:
            image: ``(B, C, *spatial)``, every axis of two voxels or more.
            parameters: batch first.
            spacing: mm, one per axis of this image.
            axis: the effect's phase-encoding axis among the spatial axes of this image; 0 if it has none.
        """

    def apply(
        self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], support: Tensor
    ) -> Tensor:
        axes = self._axes(image)
        thick = image.reshape(*image.shape[:2], *(image.shape[2 + a] for a in axes))
        parameters = {k: v.to(image) for k, v in parameters.items()}
        added = self.change(thick, parameters, [spacing[a] for a in axes], self._line_axis(image))
        return torch.where(support, image + added.view(image.shape), image)

    def _axes(self, image: Tensor) -> list[int]:
        """Spatial axes with more than one voxel."""
        return [a for a, n in enumerate(image.shape[2:]) if n > 1]

    def _line_axis(self, image: Tensor) -> int:
        """The phase-encoding axis, counted among those with more than one voxel."""
        axis = getattr(self, "axis", None)
        if axis is None:
            return 0
        dims = image.dim() - 2
        if not -dims <= axis < dims:
            raise ConfigError(f"{self.name}: axis {axis} does not exist in an image {tuple(image.shape[2:])}")
        axes = self._axes(image)
        if axis % dims not in axes:
            raise ConfigError(
                f"{self.name}: axis {axis} has one voxel in an image {tuple(image.shape[2:])}, so there are no "
                "phase-encoding lines along it: choose another axis"
            )
        return axes.index(axis % dims)


# --------------------------------------------------------------------------------------------------- motion
class Motion(KSpaceEffect):
    """Rigid motion of the head between the segments of an acquisition.

    The lines of k-space along the phase-encoding axis are acquired from one edge to the other in consecutive segments,
    and every segment sees the head in another pose. The segment that holds the centre of k-space is the reference and
    does not move, so that the coarse anatomy and with it the label stay where they are. An odd number of segments
    leaves the reference around the centre; with an even one the centre is at its edge, and the coarse anatomy goes
    half the way with the neighbouring segment.

    Translations are exact phase ramps; rotations (about the middle of the image, first about axis 0, then 1, then 2)
    are linear interpolations before the Fourier transform. Parameters: ``translation``: ``(C, segments, axes)`` in mm,
    how far the head moves along each axis; ``rotation``: ``(C, segments, 3)`` in degrees, ``(C, segments, 1)`` with
    two axes, none with one or without ``rotate``. There are at most as many segments as lines.

    Reference:
        Shaw et al., A k-space model of movement artefacts, IEEE TMI 2020 (segments of k-space from moved heads).

    Args:
        segments: of the acquisition.
        axis: phase-encoding axis; 1 is anterior-posterior in arrays in RAS order.
        rotate: whether the head rotates too; without, a step costs two Fourier transforms and no interpolation.
    """

    name: ClassVar[str] = "motion"
    units: ClassVar[str] = "mm|deg"
    default_magnitude: ClassVar[float] = 3.0

    def __init__(self, segments: int = 7, axis: int = 1, rotate: bool = True) -> None:
        self.segments = _integer("segments", segments, 2)
        self.axis = _integer("axis", axis, -3, 2)
        self.rotate = bool(rotate)

    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        axes = self._axes(image)
        poses = (image.shape[1], int(self._segment_of_line(image).max()) + 1)
        shapes: dict[str, tuple[int, ...]] = {"translation": (*poses, len(axes))}
        if self.rotate and len(axes) > 1:
            shapes["rotation"] = (*poses, 3 if len(axes) == 3 else 1)
        return shapes

    def random(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        return self._still(image, super().random(image, spacing, magnitude, generator))

    def control(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        return self._still(image, super().control(image, spacing, magnitude, generator))

    def change(self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], axis: int) -> Tensor:
        segment = segments_of_lines(image.shape[2 + axis], self.segments).to(image.device)
        return segment_motion(
            image, parameters["translation"], parameters.get("rotation"), segment, spacing, axis, int(segment[0])
        )

    def _segment_of_line(self, image: Tensor) -> Tensor:
        axis = self._line_axis(image)
        return segments_of_lines(image.shape[2 + self._axes(image)[axis]], self.segments)

    def _still(self, image: Tensor, parameters: Parameters) -> Parameters:
        """The segment of the centre, which never moves, has parameters of 0."""
        centre = int(self._segment_of_line(image)[0])
        for pose in parameters.values():
            pose[:, :, centre] = 0
        return parameters


def segments_of_lines(lines: int, segments: int) -> Tensor:
    """Segment ``(lines,)`` of every line in the order of ``torch.fft``; acquired from the lowest frequency up."""
    segments = min(segments, lines)
    return torch.fft.ifftshift(torch.arange(lines) * segments // lines)


def segment_motion(
    image: Tensor,
    translation: Tensor,
    rotation: Tensor | None,
    segment: Tensor,
    spacing: Sequence[float],
    axis: int,
    still: int | None = None,
) -> Tensor:
    """The change of an image whose lines of k-space were acquired in different poses.

    Args:
        image: ``(B, C, *spatial)``.
        translation: ``(B, C, segments, axes)`` in mm.
        rotation: ``(B, C, segments, 3 or 1)`` in degrees, or None.
        segment: of every line, ``(lines,)``, in the order of ``torch.fft``.
        spacing: mm.
        axis: phase-encoding axis, among the spatial ones.
        still: the segment whose pose does not count.
    """
    dims = image.dim() - 2
    every = tuple(range(2, 2 + dims))
    others = tuple(d for d in every if d != 2 + axis)
    moving = torch.ones_like(segment, dtype=torch.bool) if still is None else segment != still
    shift = translation[:, :, segment] * moving.view(1, 1, -1, 1)
    ramp = _phase_ramp(image, shift, spacing, axis)
    change = (ramp - 1) * torch.fft.fftn(image, dim=every)
    if rotation is not None:
        lines, turned, content = [], [], _content(image)
        for s in range(rotation.shape[2]):
            # a segment costs an interpolation of the whole image, but only its own lines of a Fourier transform
            here = (segment == s).nonzero().flatten()
            angles = rotation[:, :, s]
            if s == still or not len(here) or not (angles.requires_grad or bool(angles.any())):
                continue
            arguments = (image, angles, here, spacing, axis, content)
            if angles.requires_grad and torch.is_grad_enabled():  # the graph keeps angles, not volumes
                part = checkpoint(_turned_lines, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                part = _turned_lines(*arguments)
            lines.append(here)
            turned.append(torch.fft.fftn(part, dim=others))
        if lines:
            where = torch.cat(lines)
            seen = torch.cat(turned, 2 + axis) * ramp.index_select(2 + axis, where)
            change = change.index_add(2 + axis, where, seen)
    return torch.fft.ifftn(change, dim=every).real


def _phase_ramp(image: Tensor, shift: Tensor, spacing: Sequence[float], axis: int) -> Tensor:
    """Factor ``(B, C, *spatial)`` of k-space that moves every line ``(B, C, lines, axes)`` mm."""
    ramp: Tensor | None = None
    for a, (size, mm) in enumerate(zip(image.shape[2:], spacing)):
        frequency = torch.fft.fftfreq(size, mm, dtype=image.dtype, device=image.device)
        turns = shift[..., a] * frequency if a == axis else shift[..., a, None] * frequency
        factor = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
        shape = [n if i in (a, axis) else 1 for i, n in enumerate(image.shape[2:])]
        factor = (factor if axis <= a else factor.transpose(2, 3)).reshape(*image.shape[:2], *shape)
        ramp = factor if ramp is None else ramp * factor
    assert ramp is not None
    return ramp


def _turned_lines(
    image: Tensor, angles: Tensor, lines: Tensor, spacing: Sequence[float], axis: int, content: Sequence[range]
) -> Tensor:
    """Lines of the Fourier transform along one axis of what a rotation adds to an image."""
    matrices = rotation_matrix(angles.reshape(-1, angles.shape[2]), image.dim() - 2)
    box = _reach(matrices.detach(), content, image.shape[2:], spacing)
    window: tuple[Any, ...] = (..., *(slice(r.start, r.stop) for r in box))
    crop = image[window]
    turned = (angles != 0).any(2).view(*angles.shape[:2], *[1] * len(box))
    # interpolating at the voxels themselves may round, so no angle is left out
    added = torch.where(turned, _turned(crop, matrices, box, image.shape[2:], spacing) - crop, 0.0)
    size = image.shape[2 + axis]
    turns = torch.arange(box[axis].start, box[axis].stop, device=image.device)[:, None] * lines % size
    phase = turns.to(image) * (2 * math.pi / size)
    last = added.movedim(2 + axis, -1)
    seen = torch.complex(last @ phase.cos(), -(last @ phase.sin())).movedim(-1, 2 + axis)
    margins = [(0, 0) if a == axis else (r.start, n - r.stop) for a, (r, n) in enumerate(zip(box, image.shape[2:]))]
    return pad(seen, [m for pair in reversed(margins) for m in pair])


def _turned(
    crop: Tensor, matrices: Tensor, box: Sequence[range], shape: Sequence[int], spacing: Sequence[float]
) -> Tensor:
    """A box of an image, turned about the middle of the whole image; the image is 0 outside the box."""
    half = crop.new_tensor([(len(r) - 1) * s / 2 for r, s in zip(box, spacing)])
    middle = crop.new_tensor([(r.start + r[-1] - n + 1) * s / 2 for r, n, s in zip(box, shape, spacing)])
    inverse = matrices.mT  # where a voxel comes from, in mm, then in grid_sample's half sizes and reversed axes
    source = (inverse * half / half[:, None]).flip((1, 2))
    offset = ((inverse @ middle - middle) / half).flip(1)
    flat = crop.reshape(-1, 1, *crop.shape[2:])
    grid = affine_grid(torch.cat([source, offset[..., None]], 2), list(flat.shape), align_corners=True)
    return grid_sample(flat, grid, mode="bilinear", padding_mode="zeros", align_corners=True).view(crop.shape)


def _content(image: Tensor) -> list[range]:
    """The voxels of each axis that hold all of an image that is not 0, and one more at either side."""
    filled = (image != 0).flatten(0, 1).any(0)
    found = []
    for a, size in enumerate(filled.shape):
        seen = filled.movedim(a, 0).flatten(1).any(1).nonzero()
        found.append(range(max(int(seen[0]) - 1, 0), min(int(seen[-1]) + 2, size)) if len(seen) else range(2))
    return found


def _reach(matrices: Tensor, content: Sequence[range], shape: Sequence[int], spacing: Sequence[float]) -> list[range]:
    """Where the content may come to lie: most of a head's image is background, which needs no interpolation."""
    middle = [(n - 1) / 2 for n in shape]
    ends = [((r.start - m) * s, (r[-1] - m) * s) for r, m, s in zip(content, middle, spacing)]
    corners = matrices.new_tensor(list(product(*ends)))
    places = torch.cat([corners[None], corners @ matrices.mT]).flatten(0, 1)
    low, high = places.amin(0).tolist(), places.amax(0).tolist()
    return [
        range(max(math.floor(b / s + m), 0), min(math.ceil(t / s + m) + 1, n))
        for b, t, s, m, n in zip(low, high, spacing, middle, shape)
    ]


# ------------------------------------------------------------------------------------------- ghosting, Gibbs
class Ghosting(KSpaceEffect):
    """Ghosts along the phase-encoding axis: every so many lines of k-space are weighted by ``1 + a``.

    The lines ``k = 1`` modulo the period, counted from the centre, are weighted, so the centre never is. Copies of the
    image appear at multiples of ``1 / period`` of the field of view: with a period of 2,
    ``x' = x + a (x - x moved by half the field of view) / 2``. Parameter ``ghost``: ``(C, 2)``, real and imaginary
    part of ``a``, inside a disc of the magnitude; ``(C, 1)`` for a period of 2, whose ghost in quadrature does not
    show in a real image.

    Args:
        period: every how many lines; also the number of copies with the image itself.
        axis: phase-encoding axis; 1 is anterior-posterior in arrays in RAS order.
    """

    name: ClassVar[str] = "ghosting"
    units: ClassVar[str] = "share"
    default_magnitude: ClassVar[float] = 0.3

    def __init__(self, period: int = 2, axis: int = 1) -> None:
        self.period = _integer("period", period, 2)
        self.axis = _integer("axis", axis, -3, 2)

    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        self._line_axis(image)
        return {"ghost": (image.shape[1], 1 if self.period == 2 else 2)}

    def random(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        """Uniform in the disc."""
        on_circle = self.control(image, spacing, magnitude, generator)["ghost"]
        radius = draw((*on_circle.shape[:2], 1), generator, on_circle).abs() ** (1 / on_circle.shape[2])
        return {"ghost": on_circle * radius}

    def control(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        shape = (len(image), *self.shapes(image, spacing)["ghost"])
        return self.project({"ghost": _unit(draw(shape, generator, image, "normal")) * magnitude}, magnitude)

    def project(self, parameters: Mapping[str, Tensor], magnitude: float) -> Parameters:
        ghost = parameters["ghost"]
        inside = magnitude * (1 - 4 * torch.finfo(ghost.dtype).eps)  # rounding leaves none too long
        return {"ghost": torch.where(ghost.norm(dim=2, keepdim=True) > magnitude, _unit(ghost) * inside, ghost)}

    def step(
        self, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor], share: float, magnitude: float
    ) -> Parameters:
        ghost = parameters["ghost"] + share * magnitude * _unit(gradient["ghost"])
        return self.project({"ghost": ghost}, magnitude)

    def size(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters["ghost"].norm(dim=2).amax(1)

    def change(self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], axis: int) -> Tensor:
        size = image.shape[2 + axis]
        frequency = torch.fft.ifftshift(torch.arange(size, device=image.device) - size // 2)
        chosen = (frequency % self.period == 1).to(image)
        ghost = parameters["ghost"]
        imaginary = ghost[..., 1] if ghost.shape[2] == 2 else torch.zeros_like(ghost[..., 0])
        weight = torch.complex(ghost[..., 0], imaginary)[..., None] * chosen
        lines = torch.fft.fft(image, dim=2 + axis)
        return torch.fft.ifft(lines * _along(weight, axis, image), dim=2 + axis).real


class Gibbs(KSpaceEffect):
    """Truncation of k-space: coarser resolution and ringing at edges.

    Along each axis, frequencies above ``1 - cut`` of the largest (Nyquist's) are lost, over a short linear taper that
    makes the loss differentiable. Parameter ``cut``: ``(C, axes)``, shares of k-space, between 0 and the magnitude.

    Args:
        taper: width of the taper as a share of k-space.
    """

    name: ClassVar[str] = "gibbs"
    units: ClassVar[str] = "share"
    default_magnitude: ClassVar[float] = 0.5

    def __init__(self, taper: float = 0.1) -> None:
        self.taper = above_zero("taper", taper)

    def shapes(self, image: Tensor, spacing: Sequence[float]) -> dict[str, tuple[int, ...]]:
        return {"cut": (image.shape[1], len(self._axes(image)))}

    def random(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        """Uniform between nothing and the magnitude."""
        shape = (len(image), *self.shapes(image, spacing)["cut"])
        return self.project({"cut": draw(shape, generator, image).abs() * magnitude}, magnitude)

    def control(self, image: Tensor, spacing: Sequence[float], magnitude: float, generator: Generator) -> Parameters:
        """Random shares among the axes; the largest of every sequence is at the magnitude."""
        cut = self.random(image, spacing, 1.0, generator)["cut"]
        return self.project({"cut": cut / cut.amax(2, keepdim=True) * magnitude}, magnitude)

    def project(self, parameters: Mapping[str, Tensor], magnitude: float) -> Parameters:
        return {"cut": parameters["cut"].clamp(0, magnitude)}

    def change(self, image: Tensor, parameters: Mapping[str, Tensor], spacing: Sequence[float], axis: int) -> Tensor:
        changed, added = image, torch.zeros_like(image)
        for a, size in enumerate(image.shape[2:]):  # one axis after the other: the window is a product
            share = torch.arange(size // 2 + 1, dtype=image.dtype, device=image.device) * (2 / size)
            beyond = share - (1 - parameters["cut"][..., a, None])
            lost = -(beyond / self.taper).clamp(0, 1)
            lines = torch.fft.rfft(changed, dim=2 + a) * _along(lost, a, image)
            added = added + torch.fft.irfft(lines, n=size, dim=2 + a)
            changed = image + added
        return added


def _along(weights: Tensor, axis: int, image: Tensor) -> Tensor:
    """Weights ``(B, C, n)`` of one spatial axis, so that they multiply an image."""
    shape = [1] * (image.dim() - 2)
    shape[axis] = weights.shape[2]
    return weights.view(*weights.shape[:2], *shape)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of the last axis at length 1; 0 stays 0."""
    peak = vectors.abs().amax(-1, keepdim=True)  # slopes of a saturated network underflow when squared
    vectors = vectors / torch.where(peak > 0, peak, 1.0)
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1)


def _integer(name: str, value: Any, low: int, high: float = math.inf) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limits = f">= {low}" if math.isinf(high) else f"between {low} and {high}"
        raise ConfigError(f"{name} must be an integer {limits}, got {value!r}")
    return value
