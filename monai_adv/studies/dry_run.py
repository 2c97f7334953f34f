"""What a study would take, estimated from a moment of its networks: nothing is attacked and nothing is written."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.utils import fall_back_tuple
from torch import Tensor

from monai_adv.errors import ConfigError
from monai_adv.inferers.logits import logits_of
from monai_adv.studies.config import StudyConfig
from monai_adv.studies.cost import Passes, header_shape
from monai_adv.studies.plan import Plan
from monai_adv.studies.runner import make_plan
from monai_adv.studies.shards import assign
from monai_adv.victims import Victim

_IMAGES, _LOGITS = 6, 6
"""Volumes of the size of the image and of the logits that an attack holds at a time, about."""


@dataclass
class Calibration:
    """One window batch of a victim, measured.

    Attributes:
        forward: seconds per window.
        gradient: seconds per window, forward and backward.
        bytes: peak of the process (CPU) or of its tensors (CUDA).
        volume_bytes: of the tensors that an attack on the largest subject holds besides, about.
    """

    forward: float
    gradient: float
    bytes: int
    volume_bytes: int

    def seconds(self, passes: Passes, windows: int) -> float:
        """Time of passes over a volume of so many windows."""
        return windows * (passes.forwards * self.forward + passes.gradients * self.gradient)


@dataclass
class Estimate:
    """A study before it is run. Time and memory are estimates: loading, scoring and the crop are not in them.

    Attributes:
        subjects: number of subjects.
        units: number of units.
        rows: per victim and attack: budgets, units, windows of one pass over all subjects, passes, seconds.
        calibrations: per victim.
        seconds: of all units, one after the other.
        bytes: peak memory of a process.
        shards: units and seconds of every shard.
        problems: what is wrong with the data.
    """

    subjects: int
    units: int
    rows: list[dict[str, Any]]
    calibrations: dict[str, Calibration]
    seconds: float
    bytes: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def dry_run(study: StudyConfig, shards: int = 1) -> Estimate:
    """Plan a study and estimate what it takes.

    Args:
        study: the study; its victims are loaded, and each runs a window batch forward and backward.
        shards: number of processes it would be dealt to.

    Raises:
        ConfigError: as :func:`monai_adv.studies.run_study`.
    """
    plan = make_plan(study)
    known = {}
    for name, victim in plan.victims.items():
        try:
            known[name] = _calibrate(victim, plan)
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:  # as the run would, for every subject
            raise ConfigError(f"victim {name}: a batch of windows cannot be computed: {error}") from error
    rows: dict[int, dict[str, Any]] = {}
    seconds: list[list[float]] = []
    for item in plan.items:
        windows = plan.windows(item)
        own = []
        for index, group in enumerate(plan.groups):
            first = group[0]
            count = windows[first.victim]
            took = sum(known[first.victim].seconds(setting.passes, count) for setting in group)
            own.append(took)
            row = rows.setdefault(
                index,
                {"victim": first.victim, "attack": first.attack, "budgets": len(group), "units": 0, "windows": 0,
                 "passes": sum(s.passes.total for s in group), "seconds": 0.0},
            )  # fmt: skip
            row["units"] += len(group)
            row["windows"] += count
            row["seconds"] += took
        seconds.append(own)
    found = Estimate(
        len(plan.items), plan.total, list(rows.values()), known, sum(map(sum, seconds)),
        max(k.bytes + k.volume_bytes for k in known.values()), problems=plan.problems,
    )  # fmt: skip
    found.shards = _shards(plan, seconds, shards)
    return found


def _shards(plan: Plan, seconds: list[list[float]], count: int) -> list[dict[str, Any]]:
    dealt = assign(plan.costs(), count)
    totals: dict[int, dict[str, Any]] = defaultdict(lambda: {"units": 0, "seconds": 0.0})
    for shards, took in zip(dealt, seconds):
        for group, shard in enumerate(shards):
            totals[shard]["units"] += len(plan.groups[group])
            totals[shard]["seconds"] += took[group]
    return [{"shard": f"{k + 1}/{count}", **totals[k]} for k in range(count)]


def _calibrate(victim: Victim, plan: Plan) -> Calibration:
    """Time one window batch forward, and forward and backward."""
    inferer: Any = victim.inferer
    while getattr(inferer, "inferer", None) is not None:
        inferer = inferer.inferer
    shapes = [found[0] for item in plan.items if (found := header_shape(item, plan.study.data.orientation))]
    largest = max(shapes, key=lambda shape: shape[0] * shape[1] * shape[2], default=(64, 64, 64))
    parameter = next(victim.network.parameters(), torch.zeros(()))
    convolution = next((p for p in victim.network.parameters() if p.dim() > 2), None)
    dims = 3 if convolution is None else convolution.dim() - 2
    channels = 4 if convolution is None else convolution.shape[1]
    window = fall_back_tuple(getattr(inferer, "roi_size", None), largest[:dims])
    batch = int(getattr(inferer, "sw_batch_size", 1))
    data = torch.randn((batch, channels, *window), generator=torch.Generator().manual_seed(0))
    data = data.to(parameter.device)
    cuda = data.is_cuda
    with victim._protected():
        if cuda:
            torch.cuda.reset_peak_memory_stats(data.device)
        with torch.no_grad():
            logits = logits_of(victim.network(data), data)  # the first call is not the usual one
            forward = _timed(lambda: logits_of(victim.network(data), data), cuda)

        def both() -> Tensor:
            leaf = data.clone().requires_grad_(True)
            with torch.enable_grad():
                total = logits_of(victim.network(leaf), leaf).square().sum()
            return torch.autograd.grad(total, leaf)[0]

        gradient = _timed(both, cuda)
    if cuda:
        peak = torch.cuda.max_memory_allocated(data.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    voxels = largest[0] * largest[1] * largest[2]
    volumes = 4 * voxels * (_IMAGES * channels + _LOGITS * logits.shape[1])
    return Calibration(forward / batch, gradient / batch, int(peak), volumes)


def _timed(work: Any, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
