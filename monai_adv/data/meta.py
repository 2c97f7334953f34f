"""Stripping a MetaTensor at the door and giving its metadata back on the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_adv.errors import ConfigError


def plain(data: Any) -> Tensor:
    """A plain tensor of a tensor, MetaTensor or array: MetaTensor bookkeeping has no place in an optimisation loop."""
    return data.as_tensor() if isinstance(data, MetaTensor) else torch.as_tensor(data)


def like(data: Tensor, reference: Any) -> Tensor:
    """The data with the metadata of the reference: what ``Invertd`` and ``SaveImaged`` need to find their way back.

    Args:
        data: of the reference's grid; any number of channels.
        reference: a MetaTensor, whose meta, applied operations and batch flag are copied; anything else changes
            nothing.

    Returns:
        A MetaTensor that shares nothing with the reference, or ``data``.

    Example:
        >>> image = MetaTensor(torch.zeros(4, 2, 2, 2), affine=torch.diag(torch.tensor([1.0, 1, 3, 1])))
        >>> like(torch.ones(1, 2, 2, 2), image).pixdim.tolist()
        [1.0, 1.0, 3.0]
    """
    if not isinstance(reference, MetaTensor):
        return data
    # not through the constructor, which raises on the collated metadata of a batch (original_channel_dim)
    return cast(MetaTensor, MetaTensor(plain(data)).copy_meta_from(reference))


def voxel_size(source: Any, dims: int, index: int = 0) -> tuple[float, ...]:
    """Voxel size in mm of a MetaTensor or an affine.

    Args:
        source: a MetaTensor, or an affine ``(n, n)`` or ``(B, n, n)``.
        dims: number of spatial axes.
        index: sample, where there is an affine for each.

    Returns:
        One size per axis.

    Raises:
        ConfigError: if it is no affine of that many axes.

    Example:
        >>> voxel_size(torch.diag(torch.tensor([-1.0, 1, 3, 1])), 3)
        (1.0, 1.0, 3.0)
    """
    affine = torch.as_tensor(source.affine if isinstance(source, MetaTensor) else source).detach().double()
    if affine.dim() not in (2, 3) or affine.shape[-1] != affine.shape[-2] or affine.shape[-1] <= dims:
        raise ConfigError(f"an affine of {dims} axes must be ({dims + 1}, {dims + 1}), got {tuple(affine.shape)}")
    affine = affine if affine.dim() == 2 else affine[index]
    return tuple(torch.linalg.norm(affine[:-1, :dims], dim=0).tolist())


def spacing_of(image: Any, given: Sequence[float] | None = None, batched: bool = True) -> tuple[float, ...]:
    """Voxel size of an image in mm: the given one, a MetaTensor's own, or 1.

    Args:
        image: tensor or array ``(B, C, *spatial)``, or ``(C, *spatial)`` if not ``batched``.
        given: voxel size that is known better.
        batched: whether the first axis is a batch; its first sample's voxel size is taken.

    Raises:
        ConfigError: if it is not one positive number per axis.
    """
    dims = len(image.shape) - 1 - batched
    if given is None and isinstance(image, MetaTensor):
        given = voxel_size(image, dims)
    spacing = (1.0,) * dims if given is None else tuple(float(s) for s in given)
    if len(spacing) != dims or not all(0 < s < math.inf for s in spacing):
        raise ConfigError(f"spacing {spacing} must be {dims} sizes in mm, each > 0")
    return spacing
