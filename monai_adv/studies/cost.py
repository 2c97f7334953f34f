"""What a unit costs, from what is declared: passes of the attack times windows of the case. No voxel is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
from monai.data.utils import dense_patch_slices
from monai.inferers.utils import _get_scan_interval
from monai.utils import ensure_tuple_rep, fall_back_tuple

from monai_adv.attacks import Attack
from monai_adv.data.headers import read_header
from monai_adv.errors import DataError
from monai_adv.inferers import SlicewiseInferer
from monai_adv.victims import Victim

_TRIES = 7
"""Budgets that a search for the smallest one tries, about."""


@dataclass(frozen=True)
class Passes:
    """Passes over the whole volume.

    Attributes:
        forwards: without a gradient.
        gradients: forward and backward.

    Example:
        >>> (Passes(1, 10) + Passes(2, 0)).total
        23
    """

    forwards: int
    gradients: int

    @property
    def total(self) -> int:
        """Forward and backward passes together."""
        return self.forwards + 2 * self.gradients

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forwards + other.forwards, self.gradients + other.gradients)


CLEAN = Passes(1, 0)


def passes(attack: Attack) -> Passes:
    """Passes that an attack is declared to need at one budget; a search that may stop early is counted to its end.

    Example:
        >>> from monai_adv.attacks import create
        >>> passes(create("ifgsm", eps=0.1, steps=10)), passes(create("noise", eps=0.1))
        (Passes(forwards=2, gradients=10), Passes(forwards=2, gradients=0))
    """
    inside = list(getattr(attack, "_members", []))
    if inside:  # an ensemble: each of its attacks
        return sum((passes(member.attack) for member in inside), Passes(0, 0))
    inner = getattr(attack, "_inner", None)
    if isinstance(inner, Attack):  # the smallest budget of another attack
        once = passes(inner)
        return Passes(_TRIES * once.forwards, _TRIES * once.gradients)
    if hasattr(attack, "_crafting"):  # on a surrogate, then one look at the victim
        return passes(attack._crafting(attack.threat)) + Passes(2, 0)
    restarts, draws = getattr(attack, "restarts", 1), attack.draws
    if hasattr(attack, "queries"):
        return Passes((1 + attack.queries) * draws, 0)
    losses = getattr(attack, "losses", (attack.loss,))
    if hasattr(attack, "steps"):
        gradients = attack.steps * len(losses) if _searches(attack) else 0
    else:
        gradients = 1 if attack.name == "fgsm" else 0
    forwards = 1 + restarts * getattr(attack, "repeats", 1)
    forwards += getattr(attack, "grid", 0) + getattr(attack, "bisections", 0)
    return Passes(forwards * draws, gradients * restarts * draws)


def _searches(attack: Attack) -> bool:
    """Whether the steps are taken: a random control has none, a synthesis only where it is found case by case."""
    return not getattr(attack, "control", False) and bool(getattr(attack, "optimize", True))


def votes(victim: Victim) -> int:
    """Passes of one scored prediction."""
    return int(getattr(victim, "samples", 1))


def header_shape(
    item: Mapping[str, Any], orientation: str | None
) -> tuple[tuple[int, int, int], tuple[float, float, float]] | None:
    """Voxels and spacing (mm) of a datalist item in an orientation, from the first header; None if it is unreadable."""
    image = item["image"]
    path = image[0] if isinstance(image, (list, tuple)) else image
    try:
        header = read_header(path, ndim=None)
    except (DataError, OSError):
        return None
    shape, spacing = header.shape[:3], header.spacing
    if orientation is not None:
        wanted = nib.orientations.axcodes2ornt(tuple(orientation))
        turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(header.affine), wanted)
        order = (
            [int(axis) for axis in turn[:, 0].argsort()] if not any(math.isnan(x) for x in turn[:, 0]) else [0, 1, 2]
        )
        target = {int(turn[axis, 0]): axis for axis in order}
        shape = tuple(shape[target[k]] for k in range(3))
        spacing = tuple(spacing[target[k]] for k in range(3))  # type: ignore[assignment]
    return (shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2])


def windows(victim: Victim, shape: Sequence[int]) -> int:
    """Windows of one pass of a victim over a volume: 1 for a victim that sees it whole.

    Args:
        victim: its inferer tells windows, slices and mirrored passes.
        shape: of the volume, in voxels.
    """
    count, size = 1, [int(n) for n in shape]
    inferer: Any = victim.inferer
    while True:
        ratio = getattr(inferer, "ratio", None)
        if ratio is not None and len(ratio) == len(size):
            size = [max(1, round(n * r)) for n, r in zip(size, ratio)]
        if isinstance(inferer, SlicewiseInferer):
            count, size = count * size[-1], size[:-1]
        count *= len(getattr(inferer, "flips", "1"))
        inner = getattr(inferer, "inferer", None)
        if inner is None:
            break
        inferer = inner
    roi = getattr(inferer, "roi_size", None)
    if roi is None:
        return count
    window = fall_back_tuple(roi, size)
    padded = [max(n, w) for n, w in zip(size, window)]
    overlap = ensure_tuple_rep(inferer.overlap, len(size))
    step = _get_scan_interval(padded, window, len(size), overlap)
    return count * len(dense_patch_slices(padded, window, step))
