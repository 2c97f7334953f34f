"""Which voxels of a dense prediction have to be fooled, and which already are, for DAG and minimum-norm attacks."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from monai_adv.attacks.run import Run
from monai_adv.errors import ConfigError
from monai_adv.losses import logit_margin

REGIONS = ("lesion", "all")


def check_region(option: str, value: str) -> str:
    """One of :data:`REGIONS`.

    Raises:
        ConfigError: names the option.
    """
    if value not in REGIONS:
        raise ConfigError(f"{option} {value!r} is unknown: use 'lesion' or 'all'")
    return value


def check_share(option: str, value: float) -> float:
    """A number in (0, 1].

    Raises:
        ConfigError: names the option.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"{option} must be in (0, 1], got {value!r}")
    return value


def counted_voxels(run: Run, region: str, dilation: float = 0.0) -> Tensor:
    """Voxels that have to be fooled, ``(B, 1, *spatial)`` bool; none outside the run's weight.

    Args:
        run: label, clean prediction, target and weight.
        region: "all", or "lesion": not background in the label, in the clean prediction or in the target. A sample
            without any such voxel counts all of its voxels.
        dilation: the lesion grows by so many mm.
    """
    shape = (len(run.clean), 1, *run.clean.shape[2:])
    inside = torch.ones(shape, dtype=torch.bool, device=run.clean.device)
    if run.weight is not None:
        inside = run.weight > 0
    if region == "all":
        return inside
    masks = [run.label, run.head.predict(run.clean_logits)] + ([] if run.target is None else [run.target])
    lesion = torch.stack([(mask != 0).any(1, keepdim=True) for mask in masks]).any(0) & inside
    if dilation > 0:
        lesion = torch.stack([_dilated(sample, dilation, run.spacing) for sample in lesion]) & inside
    empty = ~lesion.flatten(1).any(1).view(-1, *[1] * (lesion.dim() - 1))
    return torch.where(empty, inside, lesion)


def _dilated(mask: Tensor, millimetres: float, spacing: tuple[float, ...]) -> Tensor:
    if not bool(mask.any()):
        return mask
    distance = ndimage.distance_transform_edt(~mask[0].cpu().numpy(), sampling=spacing)
    return torch.from_numpy(np.asarray(distance) <= millimetres)[None].to(mask.device)


def fooled(run: Run, prediction: Tensor) -> Tensor:
    """Voxels (bits, for a sigmoid head) that are wrong or, targeted, at the target: bool of the label's shape."""
    return prediction != run.label if run.target is None else prediction == run.target


def fooled_share(run: Run, prediction: Tensor, counted: Tensor) -> Tensor:
    """Share of the counted voxels (bits) that are fooled, ``(B,)`` float64."""
    done = fooled(run, prediction) & counted
    number = counted.flatten(1).sum(1).double() * prediction.shape[1]
    return done.flatten(1).sum(1).double() / number.clamp_min(1)


def resistance(run: Run, logits: Tensor) -> Tensor:
    """Logits between every voxel (bit) and being fooled: ``(B, 1 or K, *spatial)``, > 0 as long as it is not."""
    if run.target is None:
        return -logit_margin(logits, run.label, run.head)
    return logit_margin(logits, run.target, run.head)


def without_hardest(resistances: Tensor, counted: Tensor, share: float) -> Tensor:
    """The counted voxels (bits) less the given share of them that resists most, bool of the shape of ``resistances``.

    The share is rounded down to whole voxels per sample, so that fooling the rest fools at least ``1 - share``.
    """
    kept = counted.expand_as(resistances).clone()
    for sample, values in zip(kept, resistances):
        number = int(sample.sum())
        left_out = int(share * number + 1e-9)
        if left_out:
            chosen = values[sample]
            limit = chosen.kthvalue(number - left_out).values
            sample &= values <= limit
    return kept
