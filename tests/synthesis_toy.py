"""A bright disc or ball on a dim one, a victim that reads it off the intensities, and trainers around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from monai_adv.engines import SynthesisTrainer
from monai_adv.networks import SynthesisCritic, SynthesisGenerator
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import Head, Victim

SPACING = 3.0
EFFECT = {"max_mm": 6.0, "knot_mm": 12.0, "bias_knot_mm": 24.0, "residual_knot_mm": 12.0, "max_residual": 1.5}


def discs(batch: int = 2, dims: int = 2, size: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images ``(B, 1, *size)`` of 300 with a disc of 600 and a zero border, and the discs as bits."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.stack(torch.meshgrid(*[torch.arange(size).float()] * dims, indexing="ij"))
    images, labels = [], []
    for _ in range(batch):
        middle = size / 2 - 0.5 + 2 * torch.rand(dims, generator=generator) - 1
        distance = (place - middle.view(-1, *[1] * dims)).square().sum(0).sqrt()
        image = torch.where(distance < size / 4, 600.0, 300.0) + 20 * torch.rand(distance.shape, generator=generator)
        image[distance > 0.45 * size] = 0
        images.append(image[None])
        labels.append((distance < size / 4)[None])
    return torch.stack(images), torch.stack(labels)


def threshold_victim(dims: int = 2) -> Victim:
    """Bright is tumour: the logit grows with the z-score, through a network with everything that can be disturbed."""
    convolution: Any = nn.Conv2d if dims == 2 else nn.Conv3d
    norm: Any = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
    first = convolution(1, 1, 1)
    nn.init.constant_(first.weight, 4.0)
    nn.init.constant_(first.bias, -1.0)
    network = nn.Sequential(first, norm(1), nn.Dropout(0.5)).train()
    return Victim(network, head=Head("sigmoid", ("WT",)), preprocessing=NormalizeNonzeroBatch())


def generator(dims: int = 2, seed: int = 0, **options: Any) -> SynthesisGenerator:
    """A small generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"channels": (4, 8, 8), "latent": 2, "effect": EFFECT, "in_channels": 1, **options}
        return SynthesisGenerator(dims, **options)


def trainer(
    data: Any, dims: int = 2, critic: bool = True, rate: float = 1e-2, victim: Victim | None = None, **options: Any
) -> SynthesisTrainer:
    """A trainer with small networks, always the same ones."""
    network = options.pop("generator", None) or generator(dims)
    options = {"max_epochs": 1, "drop": (0.1, 0.5), **options}
    if critic:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            judge = SynthesisCritic(dims, 1, channels=4)
        options |= {"critic": judge, "critic_optimizer": torch.optim.Adam(judge.parameters(), rate)}
    else:
        options["weights"] = {**options.get("weights", {}), "critic": 0.0}
    epochs = options.pop("max_epochs")
    optimizer = torch.optim.Adam(network.parameters(), rate)
    return SynthesisTrainer(
        "cpu", epochs, data, network, victim or threshold_victim(dims), optimizer, [SPACING] * dims, **options
    )


def batches(count: int = 2, batch: int = 2, dims: int = 2) -> list[dict[str, Tensor]]:
    """Batches of discs with other discs as the real ones."""
    found = []
    for index in range(count):
        image, label = discs(batch, dims, seed=index)
        found.append({"image": image, "label": label, "real": discs(batch, dims, seed=100 + index)[0]})
    return found
