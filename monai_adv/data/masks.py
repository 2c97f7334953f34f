"""Segmentations on their own: masks a user brings as a target."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch
from torch import Tensor

from monai_adv.data.headers import check_integrity, read_header
from monai_adv.data.labels import LabelScheme
from monai_adv.data.loading import read_volume
from monai_adv.errors import DataError


def load_mask(path: str | Path, scheme: str | LabelScheme) -> MetaTensor:
    """Load a segmentation file as canonical class indices, with its affine.

    Args:
        path: NIfTI, NRRD or MetaImage file.
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


def align_mask(mask: MetaTensor, like: MetaTensor) -> Tensor:
    """Bring a segmentation to the grid of an image: same place in the world, nearest neighbour, background outside.

    Another subject's or a user's mask becomes the target of an attack this way::

        target = head.label_from_classes(align_mask(load_mask(path, "brats2021"), image))
        result = attack(victim, image, label, target=target)

    Args:
        mask: class indices (1, X, Y, Z), see :func:`load_mask`; any orientation and voxel size.
        like: the image: (C, X, Y, Z), or a batch (B, C, X, Y, Z) with one affine or one per sample.

    Returns:
        int64 (1, X, Y, Z) for one image, (B, 1, X, Y, Z) for a batch, on the image's device.

    Raises:
        DataError: if one of them has no affine, or not these axes.
    """
    if not isinstance(mask, MetaTensor) or not isinstance(like, MetaTensor):
        raise DataError("align_mask needs MetaTensors: their affines say where the voxels are in the world")
    if mask.dim() != 4 or len(mask) != 1 or like.dim() not in (4, 5):
        raise DataError(
            f"align_mask needs a mask (1, X, Y, Z) and an image (C, X, Y, Z) or (B, C, X, Y, Z), got "
            f"{tuple(mask.shape)} and {tuple(like.shape)}"
        )
    batch = like.dim() == 5
    affines = torch.as_tensor(like.affine)
    if affines.dim() == 2:
        affines = affines[None].expand(len(like) if batch else 1, -1, -1)
    resample = ResampleToMatch(mode="nearest", padding_mode="zeros")
    found = []
    for affine in affines:
        grid = MetaTensor(torch.zeros(1, *like.shape[-3:]), affine=affine)
        aligned = cast(MetaTensor, resample(mask.float(), grid))
        found.append(aligned.as_tensor().round().long())
    return (torch.stack(found) if batch else found[0]).to(like.device)
