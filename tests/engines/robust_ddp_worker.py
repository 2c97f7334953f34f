"""One process of distributed robust training; started by test_robust_ddp.py."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from robust import batches, constant_generator, network, trainer
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

# without random numbers two processes see what one does with the doubled batch
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"name": "plain"},
    "pgd_at": {"name": "pgd_at", "steps": 2, "share": 1.0, "budget": "fixed", "random_start": False},
    "free": {"name": "free", "replays": 3},
    "vafa_at": {"name": "vafa_at", "steps": 2, "weight": 0.0},
    "distillation": {"name": "distillation", "temperature": 5},
    "synthesis": {"name": "synthesis", "share": 1.0, "scale": (1.0, 1.0)},  # of constant fields: the code tells nothing
    "trades": {"name": "trades", "steps": 2},
    "noise": {"name": "noise", "share": 1.0, "budget": "fixed", "bounds": None},
}
COMPARED = ("plain", "pgd_at", "free", "vafa_at", "distillation", "synthesis")
OPTIMISER_STEPS = {"free": 6}


def train(name: str, rank: int | None = None) -> tuple[nn.Module, list[int], list[torch.Tensor]]:
    """The trained network, reductions of its gradients and calls of its wrapper, and the images it was trained on.

    Two batches of four, of which each of two processes has its half.
    """
    data = batches(2, 2)
    if rank is not None:
        data = [{k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()} for batch in data]
    inner = network(2, "none")
    net: nn.Module = inner
    reductions = calls = 0
    if rank is not None:
        net = DistributedDataParallel(inner)

        def reduce(state, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations, and not at strings
            nonlocal reductions
            reductions += 1
            return allreduce_hook(state, bucket)

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        net.register_comm_hook(None, reduce)
        net.register_forward_pre_hook(count)
    method = dict(METHODS[name])
    if name == "distillation":
        method["teacher"] = network(2, seed=1)
    if name == "synthesis":
        method["generator"] = constant_generator(2)
    images: list[torch.Tensor] = []
    inner.register_forward_pre_hook(lambda m, x: images.append(x[0].detach().clone()) if m.training else None)
    trainer(net, data, method).run()
    return inner, [reductions, calls], images


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, me = Path(sys.argv[1]), int(sys.argv[2])
    distributed.init_process_group("gloo", f"file://{root}/store", timedelta(seconds=20), rank=me, world_size=2)
    counts = {}
    for each in METHODS:
        found, counts[each], seen = train(each, me)
        torch.save({"weights": found.state_dict(), "images": seen[0]}, root / f"{each}{me}.pt")
    distributed.destroy_process_group()
    (root / f"counts{me}.json").write_text(json.dumps(counts))
