"""One subject's healthy brain: the template, individually bent, aged and sampled anywhere in the world."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from monai_adv.data.simulation.fields import Draws
from monai_adv.data.simulation.template import CHANNELS, Template

HEAD_SCALE = 0.945  # the ICBM 152 average is larger than a living brain
_PIVOT = (0.0, -17.0, 5.0)  # RAS mm; turned and scaled around
_SHARPNESS = 1 / 0.55  # of the softmax that turns the average's soft maps into one subject's tissue
_TISSUE_NOISE = 0.45  # of the tissue logits: the folding pattern of one subject


class Axes(NamedTuple):
    """World coordinates (RAS mm) of a grid along its three axes, each 1-D float32."""

    x: Tensor
    y: Tensor
    z: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of points along each axis."""
        return len(self.x), len(self.y), len(self.z)

    def points(self) -> Tensor:
        """(3, X, Y, Z) world coordinates of every grid point."""
        return torch.stack(torch.meshgrid(*self, indexing="ij"), 0)


@dataclass(frozen=True)
class MassEffect:
    """Radial push of the surroundings of a tumour.

    Args:
        centre: (3,) world point in mm.
        radius: of the tumour, in mm.
        strength: 0 (none) to below 1; how far tissue near the centre is moved, relative to its distance.
    """

    centre: Tensor
    radius: float
    strength: float


@dataclass(frozen=True)
class Tissues:
    """Healthy tissue on a grid.

    Args:
        fractions: (4, X, Y, Z) of CSF, grey matter, white matter and deep grey matter; they add up to one.
        brain: (X, Y, Z) from 0 outside to 1 inside.
        ventricles: (X, Y, Z) fraction of ventricular CSF.
        depth: (X, Y, Z) distance from the surface of the brain, mm.
        midline: (X, Y, Z) signed distance from the plane between the hemispheres, mm, positive on the right.
    """

    fractions: Tensor
    brain: Tensor
    ventricles: Tensor
    depth: Tensor
    midline: Tensor


class Anatomy:
    """Shape and tissue of one subject, a function of world coordinates.

    Args:
        seed: the subject's seed.
    """

    def __init__(self, seed: int) -> None:
        draws = Draws(seed, "anatomy")
        self._coarse, self._fine = draws.field(45.0, 3), draws.field(22.0, 3)
        self._bend = draws.uniform(2.5, 4.5), draws.uniform(0.8, 1.6)  # mm
        angles = [draws.normal(0.04), draws.normal(0.03), draws.normal(0.03)]  # radians
        size = HEAD_SCALE * (1 + draws.normal(0.03))
        scales = [1 / (size * (1 + draws.normal(0.02))) for _ in range(3)]
        self._matrix = _rotation(angles) @ torch.diag(torch.tensor(scales))
        self._shift = torch.tensor([draws.normal(1.5), draws.normal(2.0), draws.normal(2.0)])  # mm
        self._folding = draws.field(5.0, 3)
        self.atrophy = draws.uniform(0.2, 1.6)
        self.ventricle_size = draws.uniform(-0.6, 1.4)

    def __call__(self, template: Template, axes: Axes, mass: MassEffect | None = None) -> Tissues:
        """Tissue on a grid, pushed aside by a tumour if there is one."""
        maps, midline = self._sample(template, axes, mass)
        of = dict(zip(CHANNELS, maps))
        folding = _TISSUE_NOISE * self._folding(axes)
        logits = torch.stack(
            [
                torch.log(of["csf"] + 0.02) + folding[0] + self.atrophy + self.ventricle_size * of["ventricles"],
                torch.log(of["gm"] + 0.02) + folding[1],
                torch.log(of["wm"] + 0.02) + folding[2],
                torch.log(of["deep_gm"] + 0.005),
            ]
        )
        return Tissues(
            fractions=torch.softmax(logits * _SHARPNESS, 0),
            brain=maps[:4].sum(0).clamp(0, 1),
            ventricles=of["ventricles"],
            depth=of["depth"],
            midline=midline,
        )

    def _sample(self, template: Template, axes: Axes, mass: MassEffect | None) -> tuple[Tensor, Tensor]:
        """Template maps (6, X, Y, Z) at the places the subject's grid comes from, and their left-right coordinate."""
        world = axes.points()
        place = world + self._bend[0] * self._coarse(axes) + self._bend[1] * self._fine(axes)
        if mass is not None:
            offset = world - mass.centre[:, None, None, None]
            decay = offset.square().sum(0) / (1.15 * mass.radius) ** 2
            place -= offset * (mass.strength * torch.exp(-0.5 * decay))
        centre = torch.tensor(_PIVOT)
        place = torch.einsum("ij,jxyz->ixyz", self._matrix, place - centre[:, None, None, None])
        place += (centre + self._shift)[:, None, None, None]
        extent = template.step * (torch.tensor(template.maps.shape[1:]) - 1)
        unit = (place - _column(template.origin)) / extent[:, None, None, None] * 2 - 1
        maps = functional.grid_sample(template.maps[None], unit.permute(1, 2, 3, 0).flip(-1)[None], align_corners=True)
        return maps[0], place[0]


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None]


def _rotation(angles: Sequence[float]) -> Tensor:
    """(3, 3) rotation about x, then y, then z (radians)."""
    (cx, sx), (cy, sy), (cz, sz) = ((math.cos(a), math.sin(a)) for a in angles)
    about_x = torch.tensor([[1.0, 0.0, 0.0], [0.0, cx, -sx], [0.0, sx, cx]])
    about_y = torch.tensor([[cy, 0.0, sy], [0.0, 1.0, 0.0], [-sy, 0.0, cy]])
    about_z = torch.tensor([[cz, -sz, 0.0], [sz, cz, 0.0], [0.0, 0.0, 1.0]])
    return about_x @ about_y @ about_z
