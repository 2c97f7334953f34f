"""Folders of NIfTI to MONAI datalists, label schemes, pre-flight checks, the simulated cohort, and writing NIfTI."""

from __future__ import annotations

from monai_adv.data.datalist import brats_datalist, scan
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
from monai_adv.data.simulation import simulate_cohort
from monai_adv.data.writing import save_nifti

__all__ = [
    "CLASSES",
    "MODALITIES",
    "REGIONS",
    "SIGMOID_CHANNELS",
    "LabelScheme",
    "LoadCased",
    "PreflightReport",
    "align_mask",
    "brats_datalist",
    "check_folder",
    "check_item",
    "load_case",
    "load_mask",
    "region_channels",
    "region_masks",
    "save_nifti",
    "scan",
    "simulate_cohort",
]
