"""What is measured: overlap per region with an explicit empty rule, size and visibility of a perturbation."""

from __future__ import annotations

from .norms import perturbation_norms
from .quality import ImageQuality, image_quality
from .regions import BRATS_HD95_PENALTY, RegionScores, region_scores, voxel_accuracy

__all__ = [
    "BRATS_HD95_PENALTY",
    "ImageQuality",
    "RegionScores",
    "image_quality",
    "perturbation_norms",
    "region_scores",
    "voxel_accuracy",
]
