"""Defenses as victims: composition in front of a pipeline, so that an adaptive attack needs no new interface."""

from monai_adv.defenses.purification import FILTERS, Purify, purified

__all__ = ["FILTERS", "Purify", "purified"]
