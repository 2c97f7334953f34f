"""Lesion-wise Dice and HD95 by the rules of BraTS 2023: every lesion counts once, whatever its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._arrays import bounding_box, to_mask
from ._surfaces import area_hd95

LESION_HD95_PENALTY = 374.0
"""HD95 in mm of a missed or an invented lesion in the BraTS 2023 rules."""


@dataclass(frozen=True)
class Lesion:
    """One lesion of the ground truth.

    Attributes:
        volume: of the truth, in mm^3.
        dice: against all predicted components that touch it.
        hd95: likewise, in mm; :data:`LESION_HD95_PENALTY` where nothing was predicted.
        found: whether a predicted component touches it.
        counted: whether it is larger than the smallest volume that counts.
    """

    volume: float
    dice: float
    hd95: float
    found: bool
    counted: bool


@dataclass(frozen=True)
class LesionScores:
    """What :func:`lesion_scores` gives for one region of one subject.

    Attributes:
        dice: lesion-wise Dice: the mean over counted lesions and false positives, which count 0; 1 where there is
            neither.
        hd95: lesion-wise HD95 in mm: likewise, a false positive counts :data:`LESION_HD95_PENALTY`; 0 where there is
            neither.
        found: counted lesions that a prediction touches (true positives).
        missed: counted lesions that none touches (false negatives).
        false_positives: predicted components that touch no lesion, not even one too small to count.
        lesions: all of them, those that do not count included.
    """

    dice: float
    hd95: float
    found: int
    missed: int
    false_positives: int
    lesions: list[Lesion] = field(default_factory=list)


def lesion_scores(
    prediction: Any,
    truth: Any,
    spacing: Sequence[float] | float,
    *,
    dilation: int = 3,
    min_volume: float = 50.0,
) -> LesionScores:
    """Score one region of one subject lesion by lesion.

    The rules: parts of the truth that touch (26 neighbours) once they are dilated belong to one lesion; the predicted
    components that touch the dilated lesion are scored together against it; a lesion of ``min_volume`` or less does not
    count, nor does what touches it; a component that touches none is a false positive, whatever its size. Reference:
    the evaluation of BraTS 2023 (Saluja et al., BraTS-2023-Metrics; 3 and 50 mm^3 for adult glioma, 1 and 50 for
    meningioma, 1 and 2 for metastases), where HD95 weights surface elements by their area (Nikolov et al. 2018,
    arXiv:1809.04430) and so differs a little from that of :func:`region_scores`.

    Args:
        prediction: mask of the region, (D, H, W), boolean or 0/1.
        truth: ground truth mask of the same shape.
        spacing: size of a voxel in mm, one number per axis in the axes' order, or one for all.
        dilation: in voxels (of 18 neighbours), as the rules have it for volumes of 1 mm.
        min_volume: largest volume in mm^3 that does not count.

    Raises:
        ValueError: if shapes differ or have not three axes, a mask holds other values than 0 and 1, the spacing is not
            positive, or dilation or volume is negative.

    Example:
        >>> truth = np.zeros((32, 16, 16), bool)
        >>> truth[2:8, 4:10, 4:10] = truth[20:26, 4:10, 4:10] = True  # two lesions of 216 mm^3
        >>> prediction = truth.copy()
        >>> prediction[20:26] = False  # one of them missed
        >>> scores = lesion_scores(prediction, truth, spacing=1.0)
        >>> scores.dice, scores.hd95, scores.found, scores.missed, scores.false_positives
        (0.5, 187.0, 1, 1, 0)
    """
    from scipy import ndimage

    p, t = to_mask(prediction, "The prediction"), to_mask(truth, "The truth")
    if p.shape != t.shape or p.ndim != 3:
        raise ValueError(f"Lesions are scored in volumes of one shape: prediction {p.shape}, truth {t.shape}.")
    steps = [float(step) for step in np.ravel(spacing)] * (3 if np.ndim(spacing) == 0 else 1)
    if len(steps) != 3 or not all(np.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"The spacing {spacing} is not one positive number of mm for each of the three axes.")
    if dilation < 0 or min_volume < 0:
        raise ValueError(f"dilation={dilation} and min_volume={min_volume} must not be negative.")

    box = bounding_box(p | t)  # what is dilated meets inside it, if it meets
    p, t = p[box], t[box]
    touching, grown = np.ones((3, 3, 3), bool), ndimage.generate_binary_structure(3, 2)

    def dilated(mask: np.ndarray) -> np.ndarray:
        # zero iterations would mean "until nothing changes"
        return ndimage.binary_dilation(mask, grown, iterations=dilation) if dilation else mask

    components, _ = ndimage.label(p, touching)
    groups, number = ndimage.label(dilated(t), touching)
    groups[~t] = 0  # lesions: the truth, numbered by the dilated component it lies in
    lesions, touched = [], set()
    for index, where in enumerate(ndimage.find_objects(groups, number), start=1):
        assert where is not None  # a dilated component holds what it was dilated from
        wide = tuple(slice(max(0, s.start - dilation), s.stop + dilation) for s in where)
        reach = dilated(groups[wide] == index)
        hits = np.unique(components[wide][reach])
        hits = hits[hits != 0]
        touched.update(hits.tolist())
        lesion, predicted = groups == index, np.isin(components, hits)
        both, volume = int((lesion & predicted).sum()), float(lesion.sum() * np.prod(steps))
        lesions.append(
            Lesion(
                volume=volume,
                dice=2.0 * both / (int(lesion.sum()) + int(predicted.sum())),
                hd95=area_hd95(predicted, lesion, steps) if len(hits) else LESION_HD95_PENALTY,
                found=len(hits) > 0,
                counted=volume > min_volume,
            )
        )
    false = int(components.max(initial=0)) - len(touched)
    counted = [lesion for lesion in lesions if lesion.counted]
    total = len(counted) + false
    return LesionScores(
        dice=sum(lesion.dice for lesion in counted) / total if total else 1.0,
        hd95=(sum(lesion.hd95 for lesion in counted) + false * LESION_HD95_PENALTY) / total if total else 0.0,
        found=sum(lesion.found for lesion in counted),
        missed=sum(not lesion.found for lesion in counted),
        false_positives=false,
        lesions=lesions,
    )
