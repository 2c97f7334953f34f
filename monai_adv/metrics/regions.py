"""Overlap and distance of one tumour region, with an explicit rule for empty masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from ._arrays import to_mask, to_numpy
from ._surfaces import voxel_hd95

EmptyRule = Literal["brats", "nan"]

BRATS_HD95_PENALTY = 373.13
"""HD95 in mm where exactly one mask is empty: the diagonal of the 240 x 240 x 155 mm BraTS volume."""


class RegionScores(TypedDict):
    """What `region_scores` gives: the fields of a record that describe one region."""

    dice: float
    hd95: float
    iou: float
    truth_voxels: int
    prediction_voxels: int
    truth_empty: bool
    prediction_empty: bool


def region_scores(
    prediction: Any,
    truth: Any,
    spacing: Sequence[float] | float,
    *,
    empty: EmptyRule = "brats",
    hd95: bool = True,
) -> RegionScores:
    """Score one region of one subject: Dice, HD95, IoU and voxel counts.

    HD95 is the larger of the two directed 95th percentiles of surface distances, by
    `monai.metrics.compute_hausdorff_distance`. Reference: Bakas et al., "Identifying the best machine learning
    algorithms for brain tumor segmentation" (2018), arXiv:1811.02629.

    Empty masks, by rule:

    ============  ======================  ================================  ==============================
    rule          both empty              only the prediction empty         only the truth empty
    ============  ======================  ================================  ==============================
    ``"brats"``   Dice 1, IoU 1, HD95 0   Dice 0, IoU 0, HD95 373.13 mm     Dice 0, IoU 0, HD95 373.13 mm
    ``"nan"``     all NaN                 Dice 0, IoU 0, HD95 NaN           all NaN
    ============  ======================  ================================  ==============================

    ``"nan"`` is the default of MONAI's DiceMetric and HausdorffDistanceMetric (NaN is then dropped from the mean).

    Args:
        prediction: mask of the region, (D, H, W) or (H, W), boolean or 0/1.
        truth: ground truth mask of the same shape.
        spacing: size of a voxel in mm, one number per axis in the axes' order, or one for all.
        empty: the rule for empty masks.
        hd95: whether to compute HD95 (the costly part); if not, it is NaN unless the empty rule gives it.

    Returns:
        dice, hd95 (mm), iou, truth_voxels, prediction_voxels, truth_empty, prediction_empty.

    Raises:
        ValueError: if shapes differ, a mask holds other values than 0 and 1, the spacing is not positive or does
            not fit the axes, or the rule is unknown.

    Example:
        >>> import numpy as np
        >>> truth = np.zeros((8, 8, 8), bool)
        >>> truth[2:6, 2:6, 2:6] = True
        >>> prediction = np.roll(truth, 1, axis=0)
        >>> scores = region_scores(prediction, truth, spacing=(2.0, 1.0, 1.0))
        >>> scores["dice"], scores["iou"], scores["hd95"]
        (0.75, 0.6, 2.0)
    """
    if empty not in ("brats", "nan"):
        raise ValueError(f"Unknown rule for empty regions: {empty!r}; choose 'brats' or 'nan'.")
    p, t = to_mask(prediction, "The prediction"), to_mask(truth, "The truth")
    if p.shape != t.shape:
        raise ValueError(f"The prediction has shape {p.shape}, the truth {t.shape}.")
    steps = [float(step) for step in np.ravel(spacing)] * (t.ndim if np.ndim(spacing) == 0 else 1)
    if len(steps) != t.ndim or not all(np.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"The spacing {spacing} is not one positive number of mm for each of the {t.ndim} axes.")

    n_p, n_t, both = int(p.sum()), int(t.sum()), int((p & t).sum())
    if n_p and n_t:
        dice, iou = 2.0 * both / (n_p + n_t), both / (n_p + n_t - both)
        distance = voxel_hd95(p, t, steps) if hd95 else float("nan")
    elif empty == "brats":
        dice, iou, distance = (0.0, 0.0, BRATS_HD95_PENALTY) if n_p or n_t else (1.0, 1.0, 0.0)
    else:
        dice = iou = 0.0 if n_t else float("nan")
        distance = float("nan")
    return {
        "dice": dice,
        "hd95": distance,
        "iou": iou,
        "truth_voxels": n_t,
        "prediction_voxels": n_p,
        "truth_empty": n_t == 0,
        "prediction_empty": n_p == 0,
    }


def voxel_accuracy(pred_classes: Any, truth_classes: Any, support: Any = None) -> float:
    """Give the share of voxels whose predicted class is the true one.

    Args:
        pred_classes: class indices, any shape.
        truth_classes: class indices of the same shape.
        support: boolean mask of the same shape to count in; every voxel if None. With the whole volume the
            background dominates: the accuracy of a brain tumour network is near 1 whatever an attack does.

    Returns:
        The accuracy in [0, 1].

    Raises:
        ValueError: if shapes differ or there is no voxel to count.

    Example:
        >>> voxel_accuracy([[0, 1], [2, 3]], [[0, 1], [2, 0]])
        0.75
    """
    p, t = to_numpy(pred_classes), to_numpy(truth_classes)
    if p.shape != t.shape:
        raise ValueError(f"The predicted classes have shape {p.shape}, the true ones {t.shape}.")
    right = p == t
    if support is not None:
        where = to_numpy(support).astype(bool)
        if where.shape != right.shape:
            raise ValueError(f"The support has shape {where.shape}, the classes {right.shape}.")
        right = right[where]
    if right.size == 0:
        raise ValueError("No voxel to count the accuracy over: the support is empty.")
    return float(right.mean())
