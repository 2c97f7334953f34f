"""Segmentations on their own: masks a user brings as a target."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.data import MetaTensor

from monai_adv.data.headers import check_integrity, read_header
from monai_adv.data.labels import LabelScheme
from monai_adv.data.loading import read_volume


def load_mask(path: str | Path, scheme: str | LabelScheme) -> MetaTensor:
    """Load a segmentation file as canonical class indices, with its affine.

    Args:
        path: NIfTI file.
        scheme: label scheme of its values.

    Returns:
        uint8 MetaTensor (1, X, Y, Z).

    Raises:
        DataError: if the file cannot be read or holds values outside the scheme.
    """
    header = read_header(str(path), 3)
    check_integrity(header)
    raw = read_volume(header, torch.float64)
    classes = LabelScheme.get(scheme).to_classes(raw, where=str(path))
    return MetaTensor(torch.from_numpy(classes), meta=dict(raw.meta))
