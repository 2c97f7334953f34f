"""Cost of a step of RobustTrainer beside the bare passes it needs, as paired ratios.

    python benchmarks/robust_training.py [--methods pgd_at,trades] [--steps 1,3] [--size 32] [--threads 1] [--pairs 9]

A step of adversarial training with K attack steps needs K forward-backward passes to the image, with frozen
parameters, and one training pass (forward, loss, backward to the parameters, optimiser). Two denominators:

    passes  K passes to the image + 1 training pass: the least that K steps can cost
    K+1     K + 1 training passes, the count in which papers give the cost of adversarial training

TRADES needs a clean forward more and trains on twice the images, Free needs m training passes for m steps, with a
backward that goes on to the image; the denominators of both are made of these. Each pair runs the step and the bare
passes in changing order, in one process, on the same batch; times are CPU times of the process, so that other work on
the machine decides nothing.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor, nn

from monai_adv.engines import RobustTrainer
from monai_adv.engines.training import training_loss
from monai_adv.losses import as_loss
from monai_adv.networks import BASELINE, build_network
from monai_adv.victims import Head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="fgsm_at,pgd_at,trades,free", help="names, comma separated")
    parser.add_argument("--steps", default="1,3,7", help="attack steps K, comma separated (m of Free)")
    parser.add_argument("--size", type=int, default=32, help="side of the patches in voxels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    side = (options.size,) * 3
    batch = {
        "image": torch.randn(options.batch, 4, *side, generator=generator),
        "label": torch.randint(0, 4, (options.batch, 1, *side), generator=generator),
    }
    for name in options.methods.split(","):
        for steps in [1] if name == "fgsm_at" else [int(k) for k in options.steps.split(",")]:
            pair = _Pair(name, steps, batch)
            for first in (True, False):  # warm up
                pair.times(first)
            found = [pair.times(index % 2 == 0) for index in range(options.pairs)]
            for kind in ("passes", "K+1"):
                ratios = [times["step"] / times[kind] for times in found]
                print(
                    f"{name} K={steps}: median ratio to {kind} {statistics.median(ratios):.3f} (min {min(ratios):.3f}, "
                    f"max {max(ratios):.3f}, {options.pairs} pairs)",
                    flush=True,
                )


class _Pair:
    """A trainer's step and the passes it is made of, on one network."""

    def __init__(self, name: str, steps: int, batch: dict[str, Tensor]) -> None:
        torch.manual_seed(0)
        self.name, self.steps, self.batch = name, steps, batch
        self.network = build_network(BASELINE)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-4)
        self.loss = training_loss(Head("softmax"))
        method: dict[str, Any] = {"name": name}
        if name in ("fgsm_at", "pgd_at"):
            method |= {"share": 1.0, "budget": "fixed"}
        if name in ("pgd_at", "trades"):
            method["steps"] = steps
        if name == "free":
            method["replays"] = steps
        self.trainer = RobustTrainer(
            torch.device("cpu"), 1, [batch], self.network, self.optimizer, self.loss, method=method, decollate=False
        )
        self.trainer.logger.setLevel(logging.ERROR)
        self.seconds = 0.0
        started = 0.0

        @self.trainer.on(Events.ITERATION_STARTED)
        def _start() -> None:
            nonlocal started
            started = time.process_time()

        @self.trainer.on(Events.ITERATION_COMPLETED)
        def _stop() -> None:
            self.seconds = time.process_time() - started

    def times(self, step_first: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for what in ("step", "passes", "K+1") if step_first else ("K+1", "passes", "step"):
            if what == "step":
                self.trainer.run()
                found[what] = self.seconds
                continue
            started = time.process_time()
            self._passes() if what == "passes" else self._training_passes()
            found[what] = time.process_time() - started
        return found

    def _passes(self) -> None:
        if self.name == "free":
            self._training_passes()
            return
        image, label = self.batch["image"], self.batch["label"]
        if self.name == "trades":
            with torch.no_grad():
                self.network(image)
        self._to_the_image(image, label)
        self._train(2 if self.name == "trades" else 1)

    def _training_passes(self) -> None:
        for _ in range(self.steps if self.name == "free" else self.steps + 1 + (self.name == "trades")):
            self._train(1)

    def _to_the_image(self, image: Tensor, label: Tensor) -> None:
        self.network.eval().requires_grad_(False)
        loss, head = as_loss("dice_ce"), Head("softmax")
        for _ in range(self.steps):
            leaf = image.clone().requires_grad_(True)
            torch.autograd.grad(loss(self.network(leaf), label, head).sum(), leaf)
        self.network.train().requires_grad_(True)

    def _train(self, copies: int) -> None:
        image, label = (torch.cat([self.batch[key]] * copies) for key in ("image", "label"))
        network: nn.Module = self.network
        self.optimizer.zero_grad()
        # Free's one backward gives the gradient to the image too
        self.loss(network(image.requires_grad_(self.name == "free")), label).backward()
        self.optimizer.step()


if __name__ == "__main__":
    main()
