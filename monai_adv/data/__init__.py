"""Folders of images to MONAI datalists, label schemes, pre-flight checks, the simulated cohort, and writing NIfTI."""

from __future__ import annotations

from monai_adv.data.convert import convert_volume
from monai_adv.data.datalist import Scan, brats_datalist, scan
from monai_adv.data.displacement import along_axes, along_world, load_displacement, save_displacement
from monai_adv.data.findings import Finding
from monai_adv.data.headers import stored_type
from monai_adv.data.labels import (
    CLASSES,
    MODALITIES,
    REGIONS,
    SIGMOID_CHANNELS,
    LabelScheme,
    region_channels,
    region_masks,
)
from monai_adv.data.loading import LoadCased, load_case
from monai_adv.data.masks import align_mask, load_mask
from monai_adv.data.preflight import PreflightReport, check_folder, check_item
from monai_adv.data.segmentations import SegmentationPair, load_pair, pair_segmentations
from monai_adv.data.simulation import simulate_cohort
from monai_adv.data.storage import Storage
from monai_adv.data.writing import save_nifti

__all__ = [
    "CLASSES",
    "MODALITIES",
    "REGIONS",
    "SIGMOID_CHANNELS",
    "Finding",
    "LabelScheme",
    "LoadCased",
    "PreflightReport",
    "Scan",
    "SegmentationPair",
    "Storage",
    "align_mask",
    "along_axes",
    "along_world",
    "brats_datalist",
    "check_folder",
    "check_item",
    "convert_volume",
    "load_case",
    "load_displacement",
    "load_mask",
    "load_pair",
    "pair_segmentations",
    "region_channels",
    "region_masks",
    "save_displacement",
    "save_nifti",
    "scan",
    "simulate_cohort",
    "stored_type",
]
