"""What is measured: overlap per region and lesion with explicit empty rules, size and visibility of a perturbation."""

from __future__ import annotations

from .lesions import LESION_HD95_PENALTY, Lesion, LesionScores, lesion_scores
from .norms import perturbation_norms
from .quality import ImageQuality, image_quality
from .regions import BRATS_HD95_PENALTY, RegionScores, region_scores, voxel_accuracy

__all__ = [
    "BRATS_HD95_PENALTY",
    "LESION_HD95_PENALTY",
    "ImageQuality",
    "Lesion",
    "LesionScores",
    "RegionScores",
    "image_quality",
    "lesion_scores",
    "perturbation_norms",
    "region_scores",
    "voxel_accuracy",
]
