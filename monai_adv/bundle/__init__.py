"""Overlays that attack an unmodified MONAI bundle."""

from monai_adv.bundle.overlay import attack_overlay

__all__ = ["attack_overlay"]
