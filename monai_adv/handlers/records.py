"""One tidy row per subject, setting and region: how every result is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from monai_adv.metrics import image_quality, perturbation_norms, region_scores, voxel_accuracy
from monai_adv.victims import Head

NORMS = tuple(f"{norm}_{unit}" for norm in ("linf", "l2") for unit in ("std", "range", "absolute"))
"""Columns of records that hold the size of a perturbation, ``<norm>_<units>``."""


def setting_label(attack: str, eps: float, units: str, norm: str = "linf") -> str:
    """How tables call an attack with its budget, e.g. ``ifgsm 0.1 std``."""
    if attack == "clean":
        return attack
    size = "unbounded" if eps == float("inf") else f"{eps:g} {units}"
    return f"{attack} {size}" + ("" if norm in ("linf", "parameter") else f" {norm}")


def case_rows(
    identity: Mapping[str, Any],
    *,
    head: Head,
    prediction: Tensor,
    label: Tensor,
    spacing: Sequence[float],
    clean: Tensor | None = None,
    adversarial: Tensor | None = None,
    support: Tensor | None = None,
    truth_outside: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Score one subject under one setting: a row per region.

    Args:
        identity: columns that say what was scored (subject, victim, attack, eps ...), repeated in every row.
        head: head of prediction and label.
        prediction: ``(1, 1 or K, *spatial)`` class indices or bits.
        label: same shape.
        spacing: voxel size in mm.
        clean: clean image ``(1, C, *spatial)``; without it no perturbation is measured.
        adversarial: attacked image, same shape and units.
        support: voxels that might change, ``(1, 1 or C, *spatial)``; the non-zero voxels of ``clean`` if None.
        truth_outside: true voxels of each region that lie outside the scored crop (they count as missed).

    Returns:
        Rows with dice, hd95, iou and voxel counts per region, voxel accuracy, the perturbation's norms in three
        units, SSIM and PSNR; BraTS's rule for empty regions.
    """
    if head.exclusive:
        accuracy = voxel_accuracy(prediction[0, 0].cpu().numpy(), label[0, 0].cpu().numpy())
    else:
        accuracy = float((prediction.bool() == label.bool()).all(1).float().mean())
    shared: dict[str, Any] = {**identity, "voxel_accuracy": accuracy}
    if clean is not None and adversarial is not None:
        inside = (clean != 0 if support is None else support.expand(clean.shape))[0].cpu().numpy()
        before, after = clean[0].cpu().numpy(), adversarial[0].cpu().numpy()
        norms = perturbation_norms(before, after, inside)
        shared |= {name: norms[name] for name in NORMS}
        shared["outside_max"] = norms["outside_max"]
        quality = image_quality(before, after, inside)
        shared |= {"ssim": quality["ssim"], "psnr": quality["psnr"]}
    predicted, truth = head.regions_of(prediction), head.regions_of(label)
    rows = []
    for region in head.region_names:
        a, b = predicted[region][0].cpu().numpy(), truth[region][0].cpu().numpy()
        scores: dict[str, Any] = dict(region_scores(a, b, spacing))
        missed = (truth_outside or {}).get(region, 0)
        if missed:
            scores |= _with_missed(scores, missed)
        rows.append({**shared, "region": region, **scores})
    return rows


def _with_missed(scores: Mapping[str, Any], missed: int) -> dict[str, Any]:
    """Overlap scores when ``missed`` true voxels lie where nothing was predicted; HD95 is unknown then."""
    dice_sum = scores["truth_voxels"] + scores["prediction_voxels"]
    both = 0 if scores["truth_empty"] or scores["prediction_empty"] else scores["dice"] * dice_sum / 2
    truth = scores["truth_voxels"] + missed
    total = truth + scores["prediction_voxels"]
    return {
        "dice": 2 * both / total,
        "iou": both / (total - both),
        "hd95": float("nan"),
        "truth_voxels": truth,
        "truth_empty": False,
    }


def jsonable(value: Any) -> Any:
    """Plain JSON data of NumPy and torch scalars and arrays."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (Tensor, np.ndarray)):
        return jsonable(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    return value
