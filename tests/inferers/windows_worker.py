"""One process of sliding windows spread over two; started once by test_distributed_windows.py for all its cases."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from victims_on_disk import TINY
from window_networks import Counted, loss_of, tiny, volume

from monai_adv import attacks
from monai_adv.errors import NonFiniteError
from monai_adv.inferers import DistributedSlidingWindowInferer, GradientSlidingWindowInferer
from monai_adv.networks import build_network
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import MirrorInferer, Victim, VictimConfig, build_victim, load_victim, save_checkpoint

SIZES = {"2D": (13, 17), "3D": (9, 7, 12)}
# dimensions, overlap, blending, windows per call, kept window batches
EXACT = list(itertools.product(SIZES, (0.25, 0.5), ("constant", "gaussian"), (1, 3), (0, 1, "auto")))
OPTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {  # the volume's size, what the inferer is given
    "one window": ((8, 8), {"roi_size": 8}),  # the other rank has none
    "one window, padded": ((5, 7), {"roi_size": 8, "padding_mode": "reflect"}),
    "two windows, one call": ((8, 16), {"roi_size": 8, "overlap": 0, "sw_batch_size": 4}),
    "padded axis": ((5, 20), {"roi_size": 8, "overlap": 0.5, "sw_batch_size": 2}),
    "buffered": ((9, 12, 7), {"roi_size": 6, "overlap": 0.5, "buffer_steps": 1, "sw_batch_size": 3}),
    "buffered along the first axis": ((9, 12, 7), {"roi_size": 6, "buffer_steps": 2, "buffer_dim": 0}),
    "cached weights": ((9, 12), {"roi_size": (6, 6), "cache_roi_weight_map": True, "mode": "gaussian"}),
}
Result = dict[str, Any]


def inferer(spread: bool, **options: Any) -> GradientSlidingWindowInferer:
    return DistributedSlidingWindowInferer(**options) if spread else GradientSlidingWindowInferer(**options)


def results(ours: GradientSlidingWindowInferer, image: torch.Tensor, network: nn.Module, **more: Any) -> Result:
    """Logits with and without a gradient, the gradients of image and parameters, and the windows of each call."""
    counted = Counted(network)
    logits = ours(image, counted, **more)
    found = torch.autograd.grad(loss_of(logits), [image, *network.parameters()])
    calls = list(counted.calls)
    with torch.no_grad():
        quiet = ours(image, counted)
    return {"logits": logits.detach(), "quiet": quiet, "gradients": list(found), "calls": calls}


def exact(spread: bool, dims: str, overlap: float, mode: str, sw_batch_size: int, keep: int | str) -> Result:
    ours = inferer(
        spread, roi_size=6, overlap=overlap, mode=mode, sw_batch_size=sw_batch_size, keep_windows=keep, sigma_scale=0.2
    )
    return results(ours, volume(SIZES[dims], batch=2), tiny(int(dims[0])))


def options(spread: bool, name: str) -> Result:
    size, given = OPTIONS[name]
    return results(inferer(spread, **given, keep_windows=0), volume(size), tiny(len(size)))


def support(spread: bool) -> Result:
    """A gradient on a corner only: the other rank's windows hold none of it."""
    image = volume((8, 24))
    mask = torch.zeros_like(image, dtype=torch.bool)
    mask[..., :3, :5] = True
    network = Counted(tiny(2).requires_grad_(False))
    logits = inferer(spread, roi_size=8, overlap=0, keep_windows=0)(image, network, support=mask)
    (found,) = torch.autograd.grad(loss_of(logits), image)
    return {"logits": logits.detach(), "gradients": [found], "calls": network.calls}


def halved(spread: bool) -> Result:
    """Logits of half the resolution."""
    network = nn.Sequential(tiny(2), nn.AvgPool2d(2)).eval()
    return results(inferer(spread, roi_size=8, overlap=0.5, mode="gaussian", keep_windows=0), volume((16, 20)), network)


def single(spread: bool) -> Result:
    """In float32."""
    image = volume((9, 7, 12)).detach().float().requires_grad_()
    ours = inferer(spread, roi_size=6, overlap=0.5, mode="gaussian", sw_batch_size=2, keep_windows=0)
    network = tiny(3).float()
    logits = ours(image, network)
    found = torch.autograd.grad((logits.square() * 0.5 + logits.exp()).sum(), image)
    return {"logits": logits.detach(), "gradients": list(found)}


def condition(spread: bool) -> Result:
    """A second volume and the windows' coordinates."""
    network, image = tiny(2), volume((5, 21))
    other = volume((5, 21), seed=9).detach()

    def run(window: torch.Tensor, where: list[Any], condition: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor([w[3].start for w in where], dtype=window.dtype)
        return network(window) * starts.view(-1, 1, 1, 1) + condition[:, :1]

    ours = inferer(spread, roi_size=8, overlap=0.5, sw_batch_size=2, with_coord=True, keep_windows=1)
    logits = ours(image, run, condition=other)
    found = torch.autograd.grad(loss_of(logits), [image, *network.parameters()])
    return {"logits": logits.detach(), "gradients": list(found)}


def checkpoint(root: Path) -> Path:
    """A victim's file, once."""
    torch.manual_seed(5)
    settings = {**TINY, "in_channels": 2}
    config = VictimConfig(settings, roi_size=[8, 8, 8], overlap=0.5, sw_batch_size=2)
    return save_checkpoint(root / "victim.pt", build_network(settings), config)


def attack(spread: bool, root: Path, mirrored: bool = False) -> Result:
    """A whole attack on a loaded victim, in float64."""
    victim = load_victim(root / "victim.pt")
    victim.network.double()
    if mirrored:
        victim.inferer = MirrorInferer(victim.inferer, axes=(0,))
    if spread:
        victim = victim.distributed()
    return attacked(victim, (12, 10, 9), 4)


def slices(spread: bool) -> Result:
    """A 2D network on a volume at another voxel size."""
    torch.manual_seed(6)
    config = {**TINY, "in_channels": 2, "spatial_dims": 2}
    victim = build_victim(build_network(config).double(), VictimConfig(config, roi_size=[8, 8]))
    victim = victim.resampled((1.0, 1.0, 1.0), (1.0, 2.0, 1.0))
    return attacked(victim.distributed() if spread else victim, (12, 16, 4), 2)


def attacked(victim: Victim, size: tuple[int, ...], steps: int, seed: int = 7) -> Result:
    image = volume(size, seed=3).detach()
    image[..., :3] = 0  # background
    label = torch.randint(0, 4, (1, 1, *size), generator=torch.Generator().manual_seed(4))
    found = attacks.create("pgd", eps=0.3, steps=steps, seed=seed)(victim, image, label)
    return {"logits": victim.predict_logits(found.image), "gradients": [found.image]}


# ------------------------------------------------------------------------------------------------------- failures
class Failing(nn.Module):
    """Raises at a call of this process, if it is the rank to fail."""

    def __init__(self, call: int, error: Exception) -> None:
        super().__init__()
        self.network, self.call, self.error = tiny(2), call, error

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        self.call -= 1
        if self.call == 0 and distributed.get_rank() == 1:
            raise self.error
        return self.network(window)


def gradient(network: nn.Module, image: torch.Tensor, scale: float = 1.0, **given: Any) -> torch.Tensor:
    ours = DistributedSlidingWindowInferer(roi_size=8, overlap=0, keep_windows=0, **given)
    return torch.autograd.grad(scale * loss_of(ours(image, network)), image)[0]


def seeded(size: tuple[int, ...] = (8, 40), own: int = 0) -> torch.Tensor:
    return volume(size, seed=1 + own * distributed.get_rank())


def with_weights(own: int) -> nn.Module:
    return tiny(2, seed=own * distributed.get_rank())


def poisoned() -> str:
    """NaN in a window of rank 1."""
    victim = Victim(nn.Conv2d(2, 4, 1), DistributedSlidingWindowInferer(roi_size=8, overlap=0))
    image = torch.zeros(1, 2, 8, 16)
    if distributed.get_rank() == 1:

        class Poison(nn.Conv2d):
            def forward(self, window: torch.Tensor) -> torch.Tensor:
                return super().forward(window) * float("nan")

        victim.network.__class__ = Poison
    try:
        victim(image)
    except NonFiniteError as error:
        return str(error)
    return "nothing"


def seeds() -> Result:
    """Random starts of their own; the normalised images have their mean and their norm in common."""
    ours = DistributedSlidingWindowInferer(roi_size=8, overlap=0)
    victim = Victim(tiny(2, classes=4), ours, preprocessing=NormalizeNonzeroBatch())
    return attacked(victim, (8, 16), 1, seed=distributed.get_rank())


def outside() -> str:
    """A group of rank 0 alone."""
    return str(gradient(tiny(2), seeded(), process_group=distributed.new_group([0])).norm().item())


FAILURES: dict[str, Callable[[], Any]] = {
    "forward": lambda: gradient(Failing(2, ValueError("out of luck")), seeded()),
    "first window": lambda: gradient(Failing(1, ValueError("out of luck")), seeded()),
    "without a gradient": lambda: _quiet(Failing(1, ValueError("out of luck"))),
    "backward": lambda: gradient(Failing(3, ValueError("out of luck")), seeded()),
    "non-finite": lambda: gradient(Failing(1, NonFiniteError("not a number")), seeded()),
    "everywhere": lambda: gradient(nn.Conv2d(5, 2, 1).double().eval(), seeded()),
    "image": lambda: gradient(tiny(2), seeded(own=1)),
    "seeds": seeds,
    "shape": lambda: gradient(tiny(2), seeded((8, 24 + 8 * distributed.get_rank()))),
    "weights": lambda: gradient(with_weights(1), seeded()),
    "upstream": lambda: gradient(tiny(2), seeded(), scale=1.0 + distributed.get_rank()),
    "training": lambda: gradient(tiny(2).train(), seeded()),
    "dropout": lambda: gradient(_Random().eval(), seeded()),
    "group": outside,
    "nan": poisoned,
    "after all": lambda: gradient(tiny(2), seeded()).norm().item(),
}


class _Random(nn.Module):
    def forward(self, window: torch.Tensor) -> torch.Tensor:
        return window + torch.randn_like(window)


def _quiet(network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return DistributedSlidingWindowInferer(roi_size=8, overlap=0)(seeded(), network)


def all_cases(root: Path) -> dict[str, Callable[[bool], Result]]:
    """Every comparison with one process, by name."""
    cases: dict[str, Callable[[bool], Result]] = {}
    for case in EXACT:
        cases[f"exact {case}"] = lambda spread, case=case: exact(spread, *case)
    for name in OPTIONS:
        cases[f"options {name}"] = lambda spread, name=name: options(spread, name)
    cases |= {"support": support, "halved": halved, "condition": condition, "single": single, "attack slices": slices}
    cases["attack pgd"] = lambda spread: attack(spread, root)
    cases["attack mirrored"] = lambda spread: attack(spread, root, mirrored=True)
    return cases


def failing_cases() -> dict[str, tuple[str, str]]:
    said = {}
    for name, run in FAILURES.items():
        try:
            said[name] = ("", str(run()))
        except Exception as error:
            said[name] = (type(error).__name__, str(error))
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, me = Path(sys.argv[1]), int(sys.argv[2])
    distributed.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=20), rank=me, world_size=2)
    everything = {name: case(True) for name, case in all_cases(folder).items()}
    torch.save(everything, folder / f"results{me}.pt")
    torch.save(failing_cases(), folder / f"said{me}.pt")
    distributed.destroy_process_group()
