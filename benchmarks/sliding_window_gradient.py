"""Memory and time of the gradient through sliding-window inference, against plain autograd and checkpointing.

    python benchmarks/sliding_window_gradient.py                    # both tables
    python benchmarks/sliding_window_gradient.py --part memory --overlap 0.25 --json growth.json

Memory: the peak resident memory (VmHWM) of a fresh process per method and number of windows that takes the gradient of
one volume; the growth per window is the slope between the numbers of windows. The volume's own tensors (input,
gradient, logits, upstream gradient: one per channel; sum of weights: one) grow with the volume too: "net" is without.

Time: all methods in one process, in turn and in changing order, each against plain autograd of the same round; the
median of the ratios, with the smallest and largest. CPU time is given beside wall time: on a busy machine it is the
steadier of the two.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch.utils.checkpoint import checkpoint

from monai_adv.inferers import GradientSlidingWindowInferer

MIB = 2**20
METHODS = {
    "autograd": "plain autograd through MONAI",
    "checkpoint": "torch.utils.checkpoint(use_reentrant=False)",
    "recompute": "GradientSlidingWindowInferer(keep_windows=0)",
    "half": "GradientSlidingWindowInferer(keep_windows=half)",
    "keep": "GradientSlidingWindowInferer(keep_windows=all)",
    "auto": 'GradientSlidingWindowInferer(keep_windows="auto")',
}


def grid(windows: int) -> tuple[int, int, int]:
    """The most cubic arrangement of a number of windows."""
    shapes = [
        (a, b, windows // (a * b))
        for a in range(1, windows + 1)
        for b in range(1, a + 1)
        if windows % (a * b) == 0 and windows // (a * b) <= b
    ]
    return min(shapes, key=lambda shape: sum(shape))


def volume_size(windows: int, window: int, overlap: float) -> list[int]:
    """The volume in which exactly that many windows lie."""
    step = int(window * (1 - overlap))
    return [window + (n - 1) * step for n in grid(windows)]


def network(args: argparse.Namespace) -> torch.nn.Module:
    """A small U-Net with instance norm, in eval mode; frozen unless the parameters' gradient is measured too."""
    torch.manual_seed(0)
    strides = [2] * (len(args.features) - 1)
    net = UNet(3, args.channels, args.channels, args.features, strides, num_res_units=args.units, norm="INSTANCE")
    return net.eval().requires_grad_(args.parameters)


def gradient_of(method: str, args: argparse.Namespace, net: torch.nn.Module, windows: int) -> Callable[[], Any]:
    """A function that takes one gradient of a volume."""
    size = volume_size(windows, args.window, args.overlap)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, args.channels, *size, generator=generator, device="cpu").to(args.device).requires_grad_()
    upstream = torch.randn(image.shape, generator=generator).to(args.device)  # as many logits as channels
    options = {
        "roi_size": [args.window] * 3,
        "sw_batch_size": args.sw_batch_size,
        "overlap": args.overlap,
        "mode": "gaussian",
    }
    batches = math.ceil(windows / args.sw_batch_size)
    inferer: SlidingWindowInferer
    predictor: Callable[..., Any] = net
    if method in ("autograd", "checkpoint"):
        inferer = SlidingWindowInferer(**options)
        if method == "checkpoint":

            def predictor(window: torch.Tensor) -> torch.Tensor:
                return checkpoint(net, window, use_reentrant=False)
    else:
        keep: int | str = {"recompute": 0, "half": batches // 2, "keep": batches, "auto": "auto"}[method]
        inferer = GradientSlidingWindowInferer(**options, keep_windows=keep)
    sources = [image, *(p for p in net.parameters() if p.requires_grad)]

    def take() -> Any:
        return torch.autograd.grad(inferer(image, predictor), sources, upstream)

    return take


def peak(device: str) -> float:
    """Peak memory of this process in MiB: on the accelerator, or resident."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / MIB
    try:
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        scale = MIB if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Growth of the peak per window, each measurement in a process of its own."""
    tensors = 4 * args.channels + 1
    few, many = args.windows
    voxels = [math.prod(volume_size(n, args.window, args.overlap)) for n in (few, many)]
    own = tensors * 4 * (voxels[1] - voxels[0]) / MIB / (many - few)
    rows = []
    for method in args.methods:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", method]
        peaks = [float(subprocess.check_output([*command, str(n)], text=True)) for n in (few, many)]
        growth = (peaks[1] - peaks[0]) / (many - few)
        rows.append({"method": method, "peaks": peaks, "growth": growth, "net": growth - own})
        print(
            f"{METHODS[method]:<52}{peaks[0]:9.0f}{peaks[1]:9.0f}{growth:12.2f}{growth - own:12.2f}",
            flush=True,
        )
    print(f"the volume's own tensors: {own:.2f} MiB per window ({tensors} values per voxel)")
    return rows


def timing(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios to plain autograd, taken round by round."""
    net = network(args)
    names = ["autograd", *(m for m in args.methods if m != "autograd")]
    steps = {name: gradient_of(name, args, net, args.timed_windows) for name in names}
    for step in steps.values():
        step()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for k in range(args.repeats):
        shift = k % len(names)
        order = names[shift:] + names[:shift]
        for name in order if k % 2 == 0 else reversed(order):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            if args.device != "cpu":
                torch.cuda.synchronize(args.device)
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = []
    for name in names:
        row: dict[str, Any] = {"method": name, "seconds": statistics.median(wall for wall, _ in taken[name])}
        for kind, label in enumerate(("wall", "cpu")):
            ratios = [mine[kind] / plain[kind] for mine, plain in zip(taken[name], taken["autograd"])]
            row[label] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows.append(row)
        texts = ["{:.3f} ({:.2f}-{:.2f})".format(*row[label]) for label in ("wall", "cpu")]
        print(f"{METHODS[name]:<52}{row['seconds']:9.2f}{texts[0]:>22}{texts[1]:>22}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("memory", "time", "both"), default="both")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS)[:-1])
    parser.add_argument("--windows", nargs=2, type=int, default=[8, 48], help="numbers of windows for the growth")
    parser.add_argument("--timed-windows", type=int, default=8, help="number of windows for the times")
    parser.add_argument("--window", type=int, default=64, help="edge of a window in voxels")
    parser.add_argument("--overlap", type=float, default=0.5)
    parser.add_argument("--sw-batch-size", type=int, default=1)
    parser.add_argument("--channels", type=int, default=4, help="of the image and of the logits")
    parser.add_argument("--features", nargs="+", type=int, default=[16, 32, 64, 128], help="of the U-Net's levels")
    parser.add_argument("--units", type=int, default=2, help="residual units per level of the U-Net")
    parser.add_argument("--parameters", action="store_true", help="the parameters' gradient too, as in training")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        gradient_of(args.child[0], args, network(args), int(args.child[1]))()
        print(peak(args.device))
        return
    found: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k not in ("json", "child")}}
    if args.part != "time":
        few, many = args.windows
        print(f"peak MiB{'':44}{few:>4} win.{many:>4} win.  per window         net")
        found["memory"] = memory(args)
    if args.part != "memory":
        print(f"time, {args.timed_windows} windows{'':36}seconds{'wall ratio (range)':>22}{'CPU ratio (range)':>22}")
        found["time"] = timing(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
