"""Cost of attacks beside the bare passes they need, as paired ratios.

    python benchmarks/attack_step.py [--attacks ifgsm,mifgsm] [--size 96] [--pairs 9] [--threads 2]

Each pair runs an attack of ``steps`` steps and, in changing order in one process, as many bare passes as it took: a
forward with ``autograd.grad`` of the attack's own loss for every backward pass, a plain forward for every other. What
is left is the metric of the iterates, the bookkeeping of the best one, and the projected steps. Times are CPU times of
the process, so that other work on the machine decides nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from monai_adv import attacks
from monai_adv.attacks import Run
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.networks import BASELINE, build_network
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import Victim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", default="ifgsm,pgd,mifgsm,segpgd,cospgd,apgd", help="names, comma separated")
    parser.add_argument("--size", type=int, default=96, help="side of the volume in voxels")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    network = build_network(BASELINE).eval().requires_grad_(False)
    inferer = GradientSlidingWindowInferer((options.window,) * 3, 2, overlap=0.5, mode="gaussian", keep_windows=0)
    victim = Victim(network, inferer, preprocessing=NormalizeNonzeroBatch())
    image = torch.rand(1, 4, *(options.size,) * 3) * 1000 + 1
    label = torch.randint(0, 4, (1, 1, *(options.size,) * 3))
    for name in options.attacks.split(","):
        attack = attacks.create(name, eps=0.1, steps=options.steps)
        ratios = [_pair(victim, attack, image, label, pair % 2 == 1) for pair in range(options.pairs + 1)][1:]
        print(
            f"{name}: median ratio {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}, "
            f"{options.pairs} pairs of {options.steps} steps)",
            flush=True,
        )


def _pair(victim: Victim, attack: attacks.Attack, image: torch.Tensor, label: torch.Tensor, first: bool) -> float:
    """Time of the attack's search over that of the bare passes; ``first`` says which goes first."""
    with victim.attacked(attack.threat.bind(image).mask, image):
        counts = _search(victim, attack, image, label)  # the clean pass before the search is among them
        times = {}
        for what in ("attack", "bare") if first else ("bare", "attack"):
            start = time.process_time()
            if what == "attack":
                counts = _search(victim, attack, image, label)
                times[what] = time.process_time() - start
            else:
                _bare(victim, attack, image, label, *counts)
                times[what] = time.process_time() - start
    return times["attack"] / times["bare"]


def _search(victim: Victim, attack: attacks.Attack, image: torch.Tensor, label: torch.Tensor) -> tuple[int, int]:
    generator = torch.Generator().manual_seed(0)
    run = Run(attack, victim, attack.threat.bind(image), label, None, None, generator, (1.0,) * (image.dim() - 2))
    run.start_budget(attack.threat.eps)
    attack._search(run)
    cost = run.result(image).cost
    return cost.forwards, cost.backwards


def _bare(
    victim: Victim, attack: attacks.Attack, image: torch.Tensor, label: torch.Tensor, forwards: int, backwards: int
) -> None:
    for _ in range(backwards):
        x = image.clone().requires_grad_(True)
        torch.autograd.grad(attack.loss(victim(x), label, victim.head).sum(), x)
    with torch.no_grad():
        for _ in range(forwards - backwards):
            victim(image)


if __name__ == "__main__":
    main()
