"""Adversarial attacks and defenses for volumetric medical image segmentation, built on MONAI."""

__version__ = "0.1.0"
