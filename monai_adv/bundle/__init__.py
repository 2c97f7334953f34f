"""MONAI bundles: overlays that attack or defend an unmodified one, and a victim out of one."""

from monai_adv.bundle.head import find_head, head_kind
from monai_adv.bundle.inferer import PurifiedInferer
from monai_adv.bundle.overlay import OVERLAYS, attack_overlay, overlay_path
from monai_adv.bundle.scans import scan_victim
from monai_adv.bundle.trust import bundle_hash
from monai_adv.bundle.victim import BundleVictim, load_bundle

__all__ = [
    "OVERLAYS",
    "BundleVictim",
    "PurifiedInferer",
    "attack_overlay",
    "bundle_hash",
    "find_head",
    "head_kind",
    "load_bundle",
    "overlay_path",
    "scan_victim",
]
