"""Small networks, batches and trainers for the tests of robust training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_adv.engines import RobustTrainer
from monai_adv.networks import SynthesisGenerator
from monai_adv.networks.synthesis import HEAD_GAIN

CPU = torch.device("cpu")
PUSH = 2.0  # bias of a head of a constant generator: its field is tanh(2) everywhere


def network(dims: int = 3, norm: str = "batch", seed: int = 0) -> nn.Module:
    """Four modalities in, four classes or regions out."""
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    layers = {
        "batch": nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d,
        "dropout": lambda _: nn.Dropout(0.2),
        "none": lambda _: nn.Identity(),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(conv(4, 6, 3, padding=1), layers[norm](6), nn.ReLU(), conv(6, 4, 3, padding=1))


def batches(
    count: int = 2, dims: int = 3, head: str = "softmax", size: int = 4, seed: int = 1
) -> list[dict[str, Tensor]]:
    """Batches of four patches of four modalities, with a margin of exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        image = torch.randn(size, 4, *[8] * dims, generator=generator)
        image[..., :2] = 0
        label = torch.randint(0, 4, (size, 1, *[8] * dims), generator=generator)
        if head == "sigmoid":
            label = torch.rand(size, 4, *[8] * dims, generator=generator) < 0.3
        found.append({"image": image, "label": label})
    return found


def constant_generator(dims: int = 2, *, spacing: bool = True, **effect: Any) -> SynthesisGenerator:
    """A generator whose fields are constant: what it does can be said in closed form, whatever image and code."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = SynthesisGenerator(dims, 4, (4, 4, 4), latent=2, effect=effect)
    with torch.no_grad():
        for head in made.heads.values():
            head.conv.weight.zero_()  # type: ignore[union-attr, operator]
            head.conv.bias.fill_(PUSH / HEAD_GAIN)  # type: ignore[union-attr, operator]
    if spacing:
        made.training_info = {"spacing": [1.0] * dims}
    return made.eval()


def entropy(head: str = "softmax") -> Callable[[Tensor, Tensor], Tensor]:
    """Plain cross entropy of a head, written without the package."""
    if head == "softmax":
        return lambda z, y: F.cross_entropy(z, y[:, 0])
    return lambda z, y: F.binary_cross_entropy_with_logits(z, y.to(z.dtype))


def trainer(
    net: nn.Module, data: Any, method: Any = None, cls: Any = RobustTrainer, head: str = "softmax", **options: Any
) -> SupervisedTrainer:
    """A trainer on the CPU; a ``SupervisedTrainer`` gets the method in MONAI's own slot."""
    options = {"max_epochs": 1, "loss_function": entropy(head), "decollate": False, **options}
    if cls is RobustTrainer:
        options |= {"method": method, "head": head}
    else:
        options["iteration_update"] = method
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(net.parameters(), 0.1)
    return cls(device=CPU, train_data_loader=data, network=net, optimizer=optimizer, **options)


def watch(engine: SupervisedTrainer) -> list[dict[str, Any]]:
    """Filled with clean image, trained image, loss and logits of every iteration."""
    seen: list[dict[str, Any]] = []

    @engine.on(Events.ITERATION_COMPLETED)
    def _look(engine: Any) -> None:
        out = engine.state.output
        clean = engine.state.batch["image"]
        seen.append(
            {"clean": clean, "image": out["image"].detach(), "loss": float(out["loss"].detach()), "pred": out["pred"]}
        )

    return seen


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks agree bit for bit, buffers included."""
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)
