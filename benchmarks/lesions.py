"""Lesion-wise Dice and HD95 against the rules of BraTS 2023 written out on whole volumes.

    python benchmarks/lesions.py TRUTHS

Every truth is moved by two voxels, thinned out and given islands; all three regions are scored by
`monai_adv.metrics.lesion_scores` and step by step as the evaluation does it, with its own library for surface distances
(`python -m pip install surface-distance`, part of the extra `test`). Printed: both scores, the largest difference, and
the seconds of a core that each took.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import surface_distance
from scipy import ndimage

from monai_adv.data import load_pair, pair_segmentations, region_masks
from monai_adv.metrics import LESION_HD95_PENALTY, lesion_scores

Scores = tuple[float, float, int, int, int]
TOUCHING = np.ones((3, 3, 3), bool)


def by_the_rules(p: np.ndarray, t: np.ndarray, spacing: tuple[float, ...], dilation: int, volume: float) -> Scores:
    """Lesion-wise Dice and HD95, lesions found and missed, components invented."""
    near = ndimage.generate_binary_structure(3, 2)
    components, _ = ndimage.label(p, TOUCHING)
    grown, number = ndimage.label(ndimage.binary_dilation(t, near, iterations=dilation), TOUCHING)
    lesions = grown * t
    touched: set[int] = set()
    pairs = []
    for index in range(1, number + 1):
        lesion = lesions == index
        hits = np.setdiff1d(components[ndimage.binary_dilation(lesion, near, iterations=dilation)], [0])
        touched |= set(hits.tolist())
        predicted = np.isin(components, hits)
        if lesion.sum() * np.prod(spacing) <= volume:
            continue
        dice = 2 * (lesion & predicted).sum() / (lesion.sum() + predicted.sum())
        distance = LESION_HD95_PENALTY
        if len(hits):
            surfaces = surface_distance.compute_surface_distances(lesion, predicted, spacing)
            distance = surface_distance.compute_robust_hausdorff(surfaces, 95)
        pairs.append((dice, distance, len(hits) > 0))
    false = int(components.max()) - len(touched)
    if not pairs and not false:
        return 1.0, 0.0, 0, 0, 0
    total, found = len(pairs) + false, sum(pair[2] for pair in pairs)
    distances = sum(pair[1] for pair in pairs) + false * LESION_HD95_PENALTY
    return sum(pair[0] for pair in pairs) / total, distances / total, found, len(pairs) - found, false


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("truths", type=Path)
    parser.add_argument("--subjects", type=int, default=None, help="the first ones; all if left out")
    parser.add_argument("--islands", type=int, default=60)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    worst, seconds = 0.0, np.zeros(2)
    pairs, _ = pair_segmentations(arguments.truths, arguments.truths)
    for pair in pairs[: arguments.subjects]:
        prediction, truth, spacing = load_pair(pair)
        prediction = np.roll(prediction, 2, axis=1)
        prediction[rng.random(prediction.shape) < 0.02] = 0
        where = tuple(rng.integers(0, side, arguments.islands) for side in prediction.shape)
        prediction[where] = rng.integers(1, 4, arguments.islands)
        predicted, true = region_masks(prediction), region_masks(truth)
        for region in true:
            began = time.process_time()
            own = lesion_scores(predicted[region], true[region], spacing)
            between = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # scipy.ndimage by its old names
                rules = by_the_rules(predicted[region], true[region], spacing, 3, 50.0)
            seconds += between - began, time.process_time() - between
            mine = (own.dice, own.hd95, own.found, own.missed, own.false_positives)
            difference = float(np.abs(np.subtract(mine, rules)).max())
            worst = max(worst, difference)
            shown = f"Dice {own.dice:.4f}, HD95 {own.hd95:.2f}, found/missed/invented {mine[2:]}"
            print(f"{pair.subject} {region}: {shown}, difference {difference:.1e}", flush=True)
    print(f"largest difference {worst:.1e}; {seconds[0]:.1f} s of a core, written out {seconds[1]:.1f} s")


if __name__ == "__main__":
    main()
