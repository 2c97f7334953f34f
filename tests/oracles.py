"""Small victims with known behaviour, images with a zero background, and labels for both heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import Head, Victim

SHAPES = {2: (6, 5), 3: (4, 5, 6)}  # the first size of 3D equals batch and channels: views that mix axes go wrong
CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, Callable[..., nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def make_image(batch: int = 4, dims: int = 3, channels: int = 4, seed: int = 0, dtype=torch.float64) -> Tensor:
    """Z-score like values; the border of the first axis and a random tenth are background, exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *SHAPES[dims])
    image = torch.randn(shape, generator=generator, dtype=dtype) * torch.arange(1, channels + 1).view(-1, *[1] * dims)
    image[:, :, 0] = 0
    return torch.where(torch.rand(shape, generator=generator, dtype=dtype) < 0.1, torch.zeros_like(image), image)


def make_label(head: Head | str, batch: int = 4, dims: int = 3, classes: int = 4, seed: int = 1) -> Tensor:
    """Every class in every sample; for a sigmoid head the nested regions of those classes."""
    head = head if isinstance(head, Head) else Head(head)
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (batch, 1, *SHAPES[dims]), generator=generator)
    label.flatten(1)[:, :classes] = torch.arange(classes)
    return head.label_from_classes(label)


def out_channels(head: str) -> int:
    return 4 if head == "softmax" else 3


def seeded(build: Callable[[], nn.Module], seed: int = 0, dtype=torch.float64) -> nn.Module:
    """Build a module with its own random numbers, in evaluation-like but training mode, as users leave it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build().to(dtype)
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return network


def linear_network(dims: int = 3, channels: int = 4, classes: int = 4, seed: int = 0, dtype=torch.float64) -> nn.Module:
    """A voxelwise linear model: its worst case is known in closed form."""
    return seeded(lambda: CONV[dims](channels, classes, 1), seed, dtype)


def smooth_network(dims: int = 3, classes: int = 4, seed: int = 0, dtype=torch.float64) -> nn.Module:
    """A differentiable network with a 3-voxel context and batch normalisation."""
    return seeded(
        lambda: nn.Sequential(CONV[dims](4, 6, 3, padding=1), NORM[dims](6), nn.Softplus(), CONV[dims](6, classes, 1)),
        seed,
        dtype,
    )


def make_victim(kind: str, head: str = "softmax", dims: int = 3, seed: int = 0, dtype=torch.float64) -> Victim:
    """A victim: "linear", "smooth" (whole volume) or "windows" (normalisation and sliding windows around "smooth")."""
    if kind == "linear":
        return Victim(linear_network(dims, classes=out_channels(head), seed=seed, dtype=dtype), head=head)
    network = smooth_network(dims, out_channels(head), seed, dtype)
    if kind == "smooth":
        return Victim(network, head=head)
    inferer = GradientSlidingWindowInferer(
        roi_size=(4,) * dims, sw_batch_size=2, overlap=0.5, mode="gaussian", keep_windows=0
    )
    return Victim(network, inferer=inferer, head=head, preprocessing=NormalizeNonzeroBatch())
