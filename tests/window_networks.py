"""Small networks, volumes and the comparison with plain autograd, for the tests of sliding-window gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from monai_adv.inferers import GradientSlidingWindowInferer

TOLERANCE = 1e-12


class Counted(nn.Module):
    """Counts the calls and the windows of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[int] = []

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        self.calls.append(window.shape[0])
        return self.network(window)


def tiny(dims: int, seed: int = 0, channels: int = 2, classes: int = 3, end: nn.Module | None = None) -> nn.Sequential:
    """Two convolutions with instance norm in float64, in eval mode."""
    torch.manual_seed(seed)
    conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
    norm = (nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 2]
    layers = [conv(channels, 4, 3, padding=1), norm(4, affine=True), nn.LeakyReLU(0.1), conv(4, classes, 3, padding=1)]
    return nn.Sequential(*layers, *([] if end is None else [end])).double().eval()


def volume(size: Sequence[int], batch: int = 1, channels: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).requires_grad_()


def loss_of(logits: torch.Tensor, seed: int = 2) -> torch.Tensor:
    """Curved, and different at every voxel."""
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (weight * logits + 0.5 * logits.square()).sum()


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def compare(
    ours: GradientSlidingWindowInferer,
    image: torch.Tensor,
    network: Callable[..., Any],
    plain: Callable[..., Any] | None = None,
    sources: Sequence[torch.Tensor] = (),
    **options: Any,
) -> None:
    """Output bit for bit, gradient to rounding, against plain autograd through MONAI's own inferer.

    ``plain`` is the network as MONAI can differentiate it, e.g. with its result cloned.
    """
    monai = SlidingWindowInferer(**options)
    plain = network if plain is None else plain
    with torch.no_grad():
        expected = monai(image.detach().clone(), plain)
    sources = [image, *sources]
    truth = torch.autograd.grad(loss_of(monai(image, plain)), sources)
    logits = ours(image, network)
    assert torch.equal(logits, expected)
    found = torch.autograd.grad(loss_of(logits), sources)
    for one, other in zip(found, truth, strict=True):
        assert error(one, other) <= TOLERANCE


def both(keep: int | str, **options: Any) -> tuple[GradientSlidingWindowInferer, dict[str, Any]]:
    return GradientSlidingWindowInferer(**options, keep_windows=keep), options
