"""Defenses as victims: composition in front of a pipeline, so that an adaptive attack needs no new interface."""

from monai_adv.defenses.certificate import ABSTAIN, Certificate
from monai_adv.defenses.crafting import craft
from monai_adv.defenses.defended import DefendedVictim, unaware
from monai_adv.defenses.detection import DetectionROC, detection_roc, detector_aware, disagreement
from monai_adv.defenses.objectives import frequency_distance, kl_divergence, soft_cross_entropy
from monai_adv.defenses.purification import FILTERS, Purify, purified
from monai_adv.defenses.smoothing import SmoothedVictim, certify, input_distance, smoothed

__all__ = [
    "ABSTAIN",
    "FILTERS",
    "Certificate",
    "DefendedVictim",
    "DetectionROC",
    "Purify",
    "SmoothedVictim",
    "certify",
    "craft",
    "detection_roc",
    "detector_aware",
    "disagreement",
    "frequency_distance",
    "input_distance",
    "kl_divergence",
    "purified",
    "smoothed",
    "soft_cross_entropy",
    "unaware",
]
