"""MONAI transforms whose own code raises on, cuts or falsifies a gradient: the same values with the true gradient.

Each class is MONAI's with the offending step replaced. :func:`equivalent` lets it take over a deployed instance.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from monai.data.meta_obj import get_track_meta
from monai.transforms import (
    AdjustContrast,
    ClipIntensityPercentiles,
    NormalizeIntensity,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    StdShiftIntensity,
    Transform,
)
from monai.transforms.utils import soft_clip
from monai.transforms.utils_pytorch_numpy_unification import clip, percentile
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch import Tensor

from monai_adv.data.meta import like, plain
from monai_adv.transforms.straight_through import replaced


def normalized(data: Tensor, sub: Any = None, div: Any = None, nonzero: bool = False) -> Tensor:
    """``(data - sub) / div`` with the mean and the population standard deviation where they are not given.

    Args:
        data: any shape, one set of statistics.
        sub: number, or one per voxel; the mean if None.
        div: number, or one per voxel, of which 0 counts as 1; the standard deviation if None.
        nonzero: only the non-zero voxels count and change; zeros stay zero and get no gradient.

    Example:
        >>> normalized(torch.tensor([0.0, 1.0, 3.0]), nonzero=True).tolist()
        [0.0, -1.0, 1.0]
    """
    mask = data != 0 if nonzero else None
    if mask is not None and not bool(mask.any()):
        return data
    # the order of MONAI's own sums, for the same bits
    values = data if mask is None else torch.masked_select(data, mask)
    sub = values.mean() if sub is None else torch.as_tensor(plain(sub), dtype=data.dtype, device=data.device)
    div = values.std(correction=0) if div is None else torch.as_tensor(plain(div), dtype=data.dtype, device=data.device)
    result = (data - sub) / torch.where(div == 0, torch.ones_like(div), div)
    return result if mask is None else torch.where(mask, result, torch.zeros_like(result))


class NormalizeIntensityEquivalent(NormalizeIntensity):
    """``NormalizeIntensity`` out of place, with mean and standard deviation inside the graph.

    MONAI's raises on a view modified in place (``channel_wise``), and takes ``.item()`` of both statistics otherwise,
    which hides from the gradient that every voxel moves them.
    """

    def __call__(self, img: Any) -> Tensor:
        """Normalise ``(C, *spatial)``."""
        given = convert_to_tensor(img, track_meta=get_track_meta())
        data = plain(given)
        single = data.float()  # as MONAI: computed in 32 bits, whatever comes in
        if not self.channel_wise:
            result = normalized(single, self.subtrahend, self.divisor, self.nonzero)
        else:
            for name, values in (("subtrahend", self.subtrahend), ("divisor", self.divisor)):
                if values is not None and len(values) != len(data):
                    raise ValueError(f"img has {len(data)} channels, but {name} has {len(values)} components.")
            given_each = [
                [None] * len(data) if values is None else values for values in (self.subtrahend, self.divisor)
            ]
            channels = [normalized(x, sub, div, self.nonzero) for x, sub, div in zip(single, *given_each)]
            result = torch.stack(channels).to(data.dtype if data.is_floating_point() else torch.float32)
        return convert_to_dst_type(like(result, given), like(result, given), dtype=self.dtype or data.dtype)[0]


class StdShiftIntensityEquivalent(StdShiftIntensity):
    """``StdShiftIntensity`` out of place; zeros that do not count get no gradient."""

    def __call__(self, img: Any) -> Tensor:
        """Shift ``(C, *spatial)``."""
        given = convert_to_tensor(img, track_meta=get_track_meta(), dtype=self.dtype)
        data = plain(given)
        return like(torch.stack([self._shifted(x) for x in data]) if self.channel_wise else self._shifted(data), given)

    def _shifted(self, data: Tensor) -> Tensor:
        if not self.nonzero:
            return data + self.factor * data.std(correction=0)
        mask = data != 0
        if not bool(mask.any()):
            return data
        offset = self.factor * torch.masked_select(data, mask).std(correction=0)
        return torch.where(mask, data + offset, torch.zeros_like(data))


class ScaleIntensityRangePercentilesEquivalent(ScaleIntensityRangePercentiles):
    """``ScaleIntensityRangePercentiles`` whose percentiles pass a gradient at any size of volume."""

    def _normalize(self, img: Any) -> Tensor:
        b_min, b_max = self.b_min, self.b_max
        if self.relative:
            if b_min is None or b_max is None:
                raise ValueError("If it is relative, b_min and b_max should not be None.")
            b_min, b_max = (b_min + (b_max - b_min) * q / 100.0 for q in (self.lower, self.upper))
        low: Any = percentile_of(img, self.lower)
        high: Any = percentile_of(img, self.upper)
        scale = ScaleIntensityRange(low, high, b_min, b_max, self.clip, self.dtype)
        return convert_to_tensor(scale(img), track_meta=False)


class ClipIntensityPercentilesEquivalent(ClipIntensityPercentiles):
    """``ClipIntensityPercentiles`` whose percentiles pass a gradient at any size of volume."""

    def _clip(self, img: Any, clipping_values: list[Any] | None = None) -> Tensor:
        soft = self.sharpness_factor
        low, high = (
            None if q is None and soft is not None else percentile_of(img, end if q is None else q)
            for q, end in ((self.lower, 0.0), (self.upper, 100.0))
        )
        if clipping_values is not None:
            clipping_values.append(tuple(None if v is None else v.item() for v in (low, high)))
        if soft is not None:
            return convert_to_tensor(soft_clip(img, soft, low, high, self.dtype), track_meta=False)
        return convert_to_tensor(clip(img, low, high), track_meta=False)


class AdjustContrastEquivalent(AdjustContrast):
    """``AdjustContrast`` with the intensity range inside the graph, and a finite gradient where gamma is below one.

    MONAI's takes ``float()`` of the range, and its gradient at the smallest value (the background) is infinite for
    gamma below one, so that one such voxel makes every gradient NaN; here those voxels get none through the power.
    """

    def __call__(self, img: Any, gamma: float | None = None) -> Tensor:
        """Adjust ``(C, *spatial)``."""
        given = convert_to_tensor(img, track_meta=get_track_meta())
        gamma = self.gamma if gamma is None else gamma
        data = -plain(given) if self.invert_image else plain(given)
        low = data.min()
        extent = data.max() - low
        base = (data - low) / (extent + 1e-7)
        inside = base > 0 if 0 < gamma < 1 else torch.ones_like(base, dtype=torch.bool)
        result = torch.where(inside, torch.where(inside, base, 1.0) ** gamma, 0.0) * extent + low
        if self.retain_stats:
            result = result - result.mean()
            result = data.std() * (result / (result.std() + 1e-8)) + data.mean()
        return like(-result if self.invert_image else result, given)


def percentile_of(data: Tensor, q: float) -> Tensor:
    """MONAI's percentile with a gradient: above a million voxels MONAI goes through NumPy, which cuts it.

    Args:
        data: any shape.
        q: in [0, 100].
    """
    value = torch.as_tensor(percentile(plain(data).detach(), q))
    if not data.requires_grad:
        return value
    flat = plain(data).flatten()
    position = q / 100.0 * (len(flat) - 1)
    below = min(math.floor(position), len(flat) - 1)
    path = flat.kthvalue(below + 1).values
    if position > below:
        path = path + (flat.kthvalue(below + 2).values - path) * (position - below)
    return replaced(path, value)


_EQUIVALENTS: dict[type, tuple[type, str]] = {
    NormalizeIntensity: (NormalizeIntensityEquivalent, "statistics inside the gradient, out of place"),
    StdShiftIntensity: (StdShiftIntensityEquivalent, "out of place"),
    ScaleIntensityRangePercentiles: (ScaleIntensityRangePercentilesEquivalent, "percentiles inside the gradient"),
    ClipIntensityPercentiles: (ClipIntensityPercentilesEquivalent, "percentiles inside the gradient"),
    AdjustContrast: (AdjustContrastEquivalent, "intensity range inside the gradient"),
}


def equivalent(transform: Any) -> tuple[Any, str] | None:
    """The equivalent of a transform, or of a dictionary transform around one, and what it does differently.

    Args:
        transform: a deployed transform; it is left alone. A user's subclass has no equivalent: its own code counts.

    Returns:
        The replacement and a note, or None.

    Example:
        >>> equivalent(NormalizeIntensity(nonzero=True))[0].nonzero
        True
    """
    if type(transform) in _EQUIVALENTS:
        kind, note = _EQUIVALENTS[type(transform)]
        new: Any = object.__new__(kind)
        new.__dict__.update(vars(transform))
        return new, note
    inner = inner_of(transform)
    if inner is None or type(inner[1]) not in _EQUIVALENTS:
        return None
    name, held = inner
    found = equivalent(held)
    assert found is not None
    new = copy.copy(transform)
    setattr(new, name, found[0])
    return new, found[1]


def inner_of(transform: Any) -> tuple[str, Transform] | None:
    """The array transform that one of MONAI's dictionary transforms holds, with the name of the attribute."""
    if not type(transform).__module__.startswith("monai.") or not hasattr(transform, "keys"):
        return None
    held = [(name, value) for name, value in vars(transform).items() if isinstance(value, Transform)]
    return held[0] if len(held) == 1 else None
