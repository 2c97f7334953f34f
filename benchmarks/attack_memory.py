"""Peak memory of every attack on one whole volume, each in a process of its own, beside FGSM.

    python benchmarks/attack_memory.py [--attacks ifgsm,motion] [--size 128] [--window 64]

The sliding window keeps no graph of its windows (``keep_windows=0``), so what an attack needs beyond FGSM is its own
state: momentum, multipliers, a spectrum; never the graph of a second window batch (the last column is that, measured
once by keeping one window more).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

OPTIONS: dict[str, dict] = {
    "noise": {}, "fgsm": {}, "ensemble": {}, "sea": {"steps": 4}, "apgd": {"steps": 3}, "square": {"queries": 3},
    "minimal": {"attack": {"name": "ifgsm", "steps": 2}},
}  # fmt: skip
LEFT_OUT = ("universal", "transfer")  # one evaluation of what was made elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", default=None, help="names, comma separated; all if left out")
    parser.add_argument("--size", type=int, default=128, help="side of the volume in voxels")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        attack_one(options.one, options.size, options.window, options.keep)
        return
    from monai_adv.attacks import ATTACKS

    names = options.attacks.split(",") if options.attacks else [n for n in ATTACKS if n not in LEFT_OUT]
    size = ["--size", str(options.size), "--window", str(options.window)]
    base = peak(["--one", "fgsm", *size])
    batch = peak(["--one", "fgsm", "--keep", "2", *size]) - base
    print(f"fgsm: peak {base:.0f} MiB; the graph of one window batch more: {batch:.0f} MiB", flush=True)
    for name in names:
        found = peak(["--one", name, *size])
        print(f"{name}: {found - base:+.0f} MiB beside fgsm ({found:.0f})", flush=True)


def peak(arguments: list[str]) -> float:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def attack_one(name: str, size: int, window: int, keep: int) -> None:
    import torch

    from monai_adv import attacks
    from monai_adv.inferers import GradientSlidingWindowInferer
    from monai_adv.networks import BASELINE, build_network
    from monai_adv.transforms import NormalizeNonzeroBatch
    from monai_adv.victims import Victim

    torch.set_num_threads(1)
    torch.manual_seed(0)
    inferer = GradientSlidingWindowInferer((window,) * 3, 2, overlap=0.25, mode="gaussian", keep_windows=keep)
    victim = Victim(build_network(BASELINE), inferer, preprocessing=NormalizeNonzeroBatch())
    image = torch.rand(1, 4, *(size,) * 3) * 1000 + 1
    label = torch.randint(0, 4, (1, 1, *(size,) * 3))
    attack = attacks.create(name, **OPTIONS.get(name, {"steps": 2}))
    attack(victim, image, label)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
