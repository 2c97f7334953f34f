"""Z-score normalisation that passes a gradient, equal to what MONAI's deployed pipelines compute."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.config.type_definitions import NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from monai_adv.data.meta import like, plain


class NormalizeNonzeroBatch:
    """Z-score every channel of every sample over its non-zero voxels; zero voxels stay exactly zero.

    The differentiable form of ``monai.transforms.NormalizeIntensity(nonzero=True, channel_wise=True)``, which works in
    place and therefore raises on a tensor that requires a gradient. Mean and standard deviation (population, as
    NumPy's) are part of the graph, so an attack on scanner units sees the whole pipeline. A channel whose non-zero
    voxels are all equal is only shifted. It is the ``preprocessing`` of a :class:`monai_adv.victims.Victim`.

    Example:
        >>> import torch
        >>> NormalizeNonzeroBatch()(torch.tensor([[[0.0, 1.0, 3.0]]])).tolist()
        [[[0.0, -1.0, 1.0]]]
    """

    def __call__(self, image: Tensor) -> Tensor:
        """Normalise ``(B, C, *spatial)``."""
        data = plain(image)
        if not data.is_floating_point():
            data = data.float()
        flat = data.flatten(2)
        mask = flat != 0
        count = mask.sum(-1, keepdim=True).clamp_min(1)
        nothing = torch.zeros((), dtype=data.dtype, device=data.device)
        # statistics in float64: 10^6 voxels of int16 size lose the last digits of a float32 sum; masked, although zeros
        # add nothing, because they would get a gradient
        mean = torch.where(mask, flat, nothing).sum(-1, keepdim=True, dtype=torch.float64) / count
        centred = torch.where(mask, flat - mean.to(data.dtype), nothing)
        variance = centred.square().sum(-1, keepdim=True, dtype=torch.float64) / count
        std = torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()
        result = (centred / std.to(data.dtype)).view_as(data)
        return like(result, image)

    @staticmethod
    def gradient_support(image: Tensor, support: Tensor) -> Tensor:
        """Where the gradient of the output is needed for that of the image on ``support``.

        Mean and standard deviation couple every non-zero voxel of a channel; zero voxels pass nothing on.

        Args:
            image: ``(B, C, *spatial)``.
            support: same shape, bool.
        """
        return (image != 0) | support


class NormalizeNonzeroSlices(NormalizeNonzeroBatch):
    """:class:`NormalizeNonzeroBatch` of every slice for itself: what a 2D network sees of a volume or of its slices.

    A volume ``(B, C, H, W, D)`` is normalised slice by slice along its last axis, the axial one of canonical
    orientation; slices ``(B, C, H, W)`` are the samples they are. So both are the same slices to the network.

    Example:
        >>> import torch
        >>> slices = torch.rand(3, 4, 8, 8)
        >>> volume = slices.movedim(0, -1)[None]
        >>> torch.equal(NormalizeNonzeroSlices()(volume)[0, ..., 1], NormalizeNonzeroSlices()(slices)[1])
        True
    """

    def __call__(self, image: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)`` or ``(B, C, H, W, D)``."""
        if image.dim() != 5:
            return super().__call__(image)
        data = plain(image)
        slices = super().__call__(data.movedim(-1, 1).flatten(0, 1))
        return like(slices.unflatten(0, (len(data), data.shape[-1])).movedim(1, -1), image)


class NormalizeNonzero(Transform):
    """Array transform of :class:`NormalizeNonzeroBatch`: one image ``(C, *spatial)``."""

    def __call__(self, image: NdarrayOrTensor) -> Tensor:
        """Normalise ``(C, *spatial)``; metadata are kept, integers become float32."""
        return NormalizeNonzeroBatch()(convert_to_tensor(image, track_meta=isinstance(image, MetaTensor))[None])[0]


class NormalizeNonzerod(MapTransform):
    """Dictionary twin of :class:`NormalizeNonzero`.

    Args:
        keys: keys of channel-first images.
        allow_missing_keys: do not raise where a key is missing.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.normalizer = NormalizeNonzero()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Normalise the images under the keys."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.normalizer(convert_to_tensor(result[key], track_meta=True))
        return result
