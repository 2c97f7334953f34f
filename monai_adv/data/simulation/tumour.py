"""A glioma: where it starts, the shape of its core, its rim and necrosis, and the oedema that spreads from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from monai_adv.data.simulation.anatomy import Anatomy, Axes, MassEffect, Tissues
from monai_adv.data.simulation.fields import Draws
from monai_adv.data.simulation.geometry import HEAD_LIMITS
from monai_adv.data.simulation.template import Template

LOW_GRADE = 0.30
"""Share of tumours drawn as low grade: no necrosis, and most of them without an enhancing part."""

LOW_GRADE_NODULES = 0.20
"""Share of the low-grade tumours with small enhancing nodules, so that 24 % of all have no enhancing part."""

_PATCH = 60.0  # half edge (mm) of the cube in which a tumour grows
_PATCH_STEP = 2.0
_INVADED = (0.05, 0.65, 1.0, 0.8)  # how much of CSF, grey, white and deep grey matter oedema replaces
_DIFFUSION = (0.0, 0.14, 1.0, 0.14)  # relative to white matter (Swanson et al., Cell Prolif 2000: 5 times and more)
_PROLIFERATION = 0.06
_FLUX = 0.11  # per step, below 1/6: the explicit scheme stays stable


class Compartments(NamedTuple):
    """A tumour on a grid: fractions (X, Y, Z) of the parts of its core and of oedema outside it, and its labels.

    Args:
        core: fraction of the tumour core.
        oedema: weight of oedema, before it is shared among the tissues it replaces.
        non_enhancing: part of the core.
        necrosis: part of the core.
        enhancing: part of the core.
    """

    core: Tensor
    oedema: Tensor
    non_enhancing: Tensor
    necrosis: Tensor
    enhancing: Tensor

    def labels(self, tissues: Tissues) -> Tensor:
        """(X, Y, Z) uint8 with the label values of BraTS 2017-2021: 1 NCR, 2 oedema, 4 enhancing."""
        labels = torch.zeros(self.core.shape, dtype=torch.uint8)
        labels[(self.oedema > 0.5) & (tissues.fractions[0] < 0.5) & (tissues.brain > 0.5)] = 2
        core = self.core > 0.5
        labels[core] = 1
        labels[core & (self.enhancing >= torch.maximum(self.necrosis, self.non_enhancing))] = 4
        return labels


def invaded() -> Tensor:
    """(4, 1, 1, 1) share of each healthy tissue that oedema replaces where it is full."""
    return torch.tensor(_INVADED)[:, None, None, None]


@dataclass(frozen=True)
class _Habit:
    """What kind of tumour it is, drawn once."""

    grade: str
    radius: float  # mm
    push: float
    roughness: float
    steps: int  # of growth
    necrosis: float  # radius of the necrosis relative to the core; 0: none
    enhancing: float  # share of the viable core that takes up contrast
    oedema_threshold: float


def _draw_habit(draws: Draws) -> _Habit:
    high = draws.uniform(0, 1) >= LOW_GRADE
    if high:
        solid = draws.uniform(0, 1) < 0.15
        necrosis = draws.uniform(0.2, 0.45) if solid else draws.uniform(0.55, 0.86)
        enhancing = draws.uniform(0.84, 0.985)
    else:
        necrosis = 0.0
        enhancing = draws.uniform(0.05, 0.16) if draws.uniform(0, 1) < LOW_GRADE_NODULES else 0.0
    return _Habit(
        grade="HGG" if high else "LGG",
        radius=draws.uniform(11, 23) if high else draws.uniform(13, 24),
        push=draws.uniform(0.12, 0.42) if high else draws.uniform(0.05, 0.30),
        roughness=draws.uniform(0.12, 0.24),
        steps=int(draws.uniform(30, 120) if high else draws.uniform(5, 50)),
        necrosis=necrosis,
        enhancing=enhancing,
        oedema_threshold=draws.uniform(0.12, 0.30),
    )


class Tumour:
    """One subject's tumour, a function of world coordinates.

    Placed and grown on the 2 mm template, so that it is the same at every image resolution.

    Args:
        seed: the subject's seed.
        anatomy: the subject's brain.
        template: the template for growth.
    """

    def __init__(self, seed: int, anatomy: Anatomy, template: Template) -> None:
        draws = Draws(seed, "tumour")
        self._habit = habit = _draw_habit(draws)
        self.centre = _place(draws, anatomy, template)
        self.mass = MassEffect(self.centre, habit.radius, habit.push)
        offsets = torch.arange(-_PATCH, _PATCH + 0.1, _PATCH_STEP)
        self._axes = axes = Axes(*(offsets + c for c in self.centre))
        tissues = anatomy(template, axes, self.mass)
        tissues.fractions.mul_(tissues.brain)
        rough = torch.cat([draws.field(step)(axes) for step in (16.0, 8.0, 5.0)])
        shape = self._core_distance(draws, tissues, rough)
        necrosis = self._necrosis_distance(shape, rough)
        density = self._grow(shape, tissues, rough)
        self._maps = torch.stack([shape, necrosis, density])
        self._uptake = draws.field(9.0)
        self._gap = self._gap_level(shape, necrosis, tissues)

    @property
    def info(self) -> dict[str, object]:
        """Plain data for the subject's metadata."""
        return {
            "grade": self._habit.grade,
            "radius_mm": round(self._habit.radius, 1),
            "centre_mni_mm": [round(float(c), 1) for c in self.centre],
            "enhancing_share": round(self._habit.enhancing, 3),
        }

    def window(self, axes: Axes) -> tuple[slice, slice, slice]:
        """Part of a grid that the tumour can reach; it may be empty."""
        inside = [torch.nonzero((a > p[0]) & (a < p[-1])).flatten() for a, p in zip(axes, self._axes)]
        if min(map(len, inside)) == 0:
            return slice(0), slice(0), slice(0)
        x, y, z = (slice(int(i[0]), int(i[-1]) + 1) for i in inside)
        return x, y, z

    def __call__(self, axes: Axes, brain: Tensor, spacing: float) -> Compartments:
        """The tumour on a grid inside `window`.

        Args:
            axes: the grid.
            brain: (X, Y, Z) from 0 outside to 1 inside the brain.
            spacing: of the grid in mm; a border is as wide as a voxel if that is coarse.
        """
        unit = [(a - p[0]) / (p[-1] - p[0]) * 2 - 1 for a, p in zip(axes, self._axes)]
        points = Axes(*unit).points().permute(1, 2, 3, 0).flip(-1)
        sampled = functional.grid_sample(self._maps[None], points[None], align_corners=True, padding_mode="border")[0]
        core, necrosis = self._fractions(sampled[0], sampled[1], brain, width=max(1.0, 0.4 * spacing))
        viable = core - necrosis
        enhancing = viable * self._selected(self._uptake(axes)[0])
        oedema = torch.sigmoid((sampled[2] - self._habit.oedema_threshold) / 0.06)
        return Compartments(core, oedema, viable - enhancing, necrosis, enhancing)

    def _selected(self, uptake: Tensor) -> Tensor:
        if self._habit.enhancing == 0:
            return torch.zeros_like(uptake)
        return torch.sigmoid((uptake - self._gap) * 4)

    def _fractions(self, shape: Tensor, hole: Tensor, brain: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """Core and necrosis from the normalised distances, with a border of `width` mm."""
        scale = self._habit.radius / width
        core = torch.sigmoid((1 - shape) * scale) * brain
        if self._habit.necrosis == 0:
            return core, torch.zeros_like(core)
        return core, core * torch.sigmoid((1 - hole) * scale * self._habit.necrosis)

    def _core_distance(self, draws: Draws, tissues: Tissues, rough: Tensor) -> Tensor:
        """Distance from the centre, 1 at the surface of the core: an ellipsoid, roughened, stopped by CSF and falx."""
        turn = torch.linalg.qr(draws.noise((3, 3)))[0]
        half = torch.tensor([draws.uniform(0.78, 1.05), draws.uniform(0.85, 1.15), draws.uniform(0.95, 1.30)])
        offset = self._axes.points() - self.centre[:, None, None, None]
        radial = torch.einsum("ij,jxyz->ixyz", turn, offset) / (half * self._habit.radius)[:, None, None, None]
        rms = self._habit.roughness * (rough[0] + 0.7 * rough[1] + 0.35 * rough[2])
        across = (-torch.sign(self._side(tissues)) * tissues.midline / 5).clamp(0, 1)
        barriers = 0.55 * tissues.fractions[0] + 0.6 * across + (1 - tissues.brain)
        return radial.square().sum(0).sqrt() + rms + barriers

    def _side(self, tissues: Tissues) -> Tensor:
        middle = [n // 2 for n in tissues.midline.shape]
        return tissues.midline[middle[0], middle[1], middle[2]]

    def _necrosis_distance(self, shape: Tensor, rough: Tensor) -> Tensor:
        if self._habit.necrosis == 0:
            return torch.full_like(shape, 9.0)
        return shape / self._habit.necrosis + 0.18 * rough[1] + 0.22 * rough[2]

    def _grow(self, shape: Tensor, tissues: Tissues, rough: Tensor) -> Tensor:
        """Density of infiltration: reaction and diffusion (Fisher-Kolmogorov) from the core along white matter."""
        conduct = torch.einsum("i,ixyz->xyz", torch.tensor(_DIFFUSION), tissues.fractions)
        falx = torch.exp(-((tissues.midline / 2.5) ** 2)) * (1 - tissues.fractions[2])  # open at the corpus callosum
        conduct = conduct.clamp_min(1e-4) * (tissues.brain > 0.5) * (1 - 0.95 * falx)
        vigour = torch.sigmoid(2.2 * rough[0] + 0.8 * rough[1])  # lobes rather than an even shell
        conduct = conduct * (0.25 + 1.1 * vigour)
        faces = [0.5 * (conduct.narrow(i, 1, n - 1) + conduct.narrow(i, 0, n - 1)) for i, n in enumerate(conduct.shape)]
        rate = _PROLIFERATION * (0.15 + 1.5 * vigour) * (conduct > 0.02)
        density = torch.sigmoid((1 - shape) * self._habit.radius / 1.2)
        for _ in range(self._habit.steps):
            change = rate * density * (1 - density)
            for i, n in enumerate(density.shape):
                flux = _FLUX * faces[i] * (density.narrow(i, 1, n - 1) - density.narrow(i, 0, n - 1))
                change.narrow(i, 0, n - 1).add_(flux)
                change.narrow(i, 1, n - 1).sub_(flux)
            density = (density + change).clamp_(0, 1)
        return density

    def _gap_level(self, shape: Tensor, hole: Tensor, tissues: Tissues) -> float:
        """Level of the uptake field above which the viable core enhances: it gives the share that was drawn."""
        core, necrosis = self._fractions(shape, hole, tissues.brain, width=1.0)
        uptake = self._uptake(self._axes)[0][(core - necrosis) > 0.5]
        return float(torch.quantile(uptake, 1 - self._habit.enhancing)) if uptake.numel() else -9.0


def _place(draws: Draws, anatomy: Anatomy, template: Template) -> Tensor:
    """A point (3,) inside the hemispheres, more often in white matter: mostly supratentorial, off the midline."""
    axes = Axes(*(torch.arange(low + 2.0, high, 4.0) for low, high in HEAD_LIMITS))
    tissues = anatomy(template, axes)
    x, y, z = axes.points()
    above_tentorium = (z > 0) | ((z > -25) & (x.abs() > 26) & (y > -50))
    deep = (tissues.depth > 9) & (tissues.depth < 38)
    allowed = (tissues.brain > 0.9) & (tissues.ventricles < 0.2) & deep & (x.abs() > 9) & above_tentorium
    weight = allowed * (tissues.fractions[2] + 0.25 * tissues.fractions[1])
    index = torch.multinomial(weight.flatten(), 1, generator=draws.generator)
    jitter = torch.tensor([draws.uniform(-2, 2) for _ in range(3)])
    return axes.points().flatten(1)[:, index[0]] + jitter
