"""Places in mm, and images whose warps are known."""

from __future__ import annotations

import torch

F64 = torch.float64


def places(shape, spacing) -> torch.Tensor:
    """Every voxel's place in mm from the centre, ``(dims, *shape)``."""
    axes = [(torch.arange(n, dtype=F64) - (n - 1) / 2) * s for n, s in zip(shape, spacing)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def random_image(shape, batch=1, channels=2, seed=0) -> torch.Tensor:
    return 1 + torch.rand(batch, channels, *shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def brain(shape, spacing, radius) -> torch.Tensor:
    """A ball of varying intensity on a background of 0."""
    distance = places(shape, spacing).norm(dim=0)
    return torch.where(distance < radius, 5 + random_image(shape)[0, 0], 0.0)[None, None]


def moved(effect, image, parameters, spacing) -> torch.Tensor:
    return effect.apply(image, parameters, spacing, image != 0)
