"""Cost of an attack step beside a bare forward and ``autograd.grad`` of the same loss, as paired ratios.

    python benchmarks/attack_step.py [--size 96] [--pairs 9] [--threads 2]

Each pair runs ``steps`` bare steps and ``steps`` steps of I-FGSM in one process, in changing order. An attack step is
the gradient, the metric of the iterate, the bookkeeping of the best one and the projected step.
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
    attack = attacks.create("ifgsm", eps=0.1, steps=options.steps)
    ball = attack.threat.bind(image)
    normalize = NormalizeNonzeroBatch()

    def bare() -> float:
        start = time.perf_counter()
        for _ in range(options.steps):
            x = image.clone().requires_grad_(True)
            loss = attack.loss(inferer(normalize(x), network), label, victim.head).sum()
            torch.autograd.grad(loss, x)
        return time.perf_counter() - start

    def attacked() -> float:
        with victim.attacked(ball.mask, image):
            run = Run(attack, victim, ball, label, None, None, torch.Generator())
            run.start_budget(0.1)
            start = time.perf_counter()
            x = image
            for step in range(options.steps):
                x = ball.step(x, run.gradient(x, candidate=step > 0), 0.025)
            return time.perf_counter() - start

    bare(), attacked()
    ratios = []
    for pair in range(options.pairs):
        if pair % 2:
            a = attacked()
            b = bare()
        else:
            b = bare()
            a = attacked()
        ratios.append(a / b)
        print(f"bare {b / options.steps:.3f} s/step, attack {a / options.steps:.3f} s/step, ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})")


if __name__ == "__main__":
    main()
