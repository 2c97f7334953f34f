"""Input purification filters as MONAI transforms: MONAI's and SimpleITK's, with parameters in stated units."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_tensor
from torch import Tensor

from monai_adv.data.meta import like, plain, spacing_of
from monai_adv.errors import ConfigError
from monai_adv.transforms.filter_kinds import KINDS, Filter


class FilterImage(Transform):
    """One filter on one image ``(C, *spatial)``; voxels that are exactly zero, the background, stay exactly zero.

    Every channel is filtered for itself. "std" is the standard deviation of the channel's non-zero voxels, mm come
    from the voxel size.

    =======================  =====================================================================================
    kind                     options with their defaults
    =======================  =====================================================================================
    ``gaussian``             sigma=1.0 voxels (MONAI; passes a gradient)
    ``median``               radius=1 voxel (MONAI; passes a gradient)
    ``bit_depth``            bits=4: 2^bits equal steps from the 0.5 to the 99.5 percentile, clipped to them
    ``curvature_diffusion``  iterations=5, conductance=1.0, time_step=None (the largest stable one)
    ``gradient_diffusion``   iterations=5, conductance=1.0, time_step=None
    ``bilateral``            domain_sigma=1.5 mm, range_sigma=0.3 std
    ``nlm``                  bandwidth=0.3 std, patch_radius=1 voxel, search_sigma=3.0 voxels, samples=50,
                             iterations=2: patch-based denoising over random patches, the non-local means of ITK; slow
    ``n4``                   shrink=4, iterations=(50, 50, 50, 50), fwhm=0.15: divides by the bias field, whose
                             geometric mean over the foreground is 1; positive images only
    =======================  =====================================================================================

    The filters of SimpleITK see the box of the channel's non-zero voxels, so that empty space around it changes
    nothing, and give no gradient: :class:`monai_adv.defenses.Purify` passes one straight through.

    Reference:
        Xu et al., Feature squeezing, NDSS 2018 (bit depth, median, non-local means); Perona and Malik 1990 (gradient),
        Whitaker and Xue 2001 (curvature diffusion); Tomasi and Manduchi 1998; Awate and Whitaker 2006 (patches);
        Tustison et al. 2010 (N4).

    Args:
        kind: see the table.
        **options: see the table.

    Raises:
        ConfigError: for an unknown filter or option, or a value that it cannot have.

    Example:
        >>> image = torch.tensor([[[0.0, 1.0, 2.0, 4.0]]])
        >>> FilterImage("bit_depth", bits=1)(image).round(decimals=1).tolist()
        [[[0.0, 1.0, 1.0, 4.0]]]
    """

    def __init__(self, kind: str, **options: Any) -> None:
        if kind not in KINDS:
            raise ConfigError(f"filter {kind!r} is unknown: use one of {', '.join(KINDS)}")
        try:
            self.filter: Filter = KINDS[kind](**options)
        except TypeError as error:
            raise ConfigError(f"filter {kind}: {error}") from error
        self.kind = kind
        self.options = options

    @property
    def differentiable(self) -> bool:
        """Whether a gradient flows through it."""
        return self.filter.differentiable

    def __call__(self, img: Any, spacing: Sequence[float] | None = None) -> Tensor:
        """The filtered image; metadata are kept, whole numbers become float32.

        Args:
            img: ``(C, *spatial)``, 2D or 3D.
            spacing: voxel size in mm; a MetaTensor's own if None, else 1.
        """
        image = convert_to_tensor(img, track_meta=isinstance(img, MetaTensor))
        data = plain(image)
        data = data if data.is_floating_point() else data.float()
        if data.dim() not in (3, 4):
            raise ConfigError(f"a filter needs an image (C, *spatial) of two or three axes, got {tuple(data.shape)}")
        filtered = self.filter(data, spacing_of(image, spacing, batched=False))
        return like(torch.where(data != 0, filtered.to(data), torch.zeros_like(data)), image)

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"{type(self).__name__}({self.kind!r}{options})"


class FilterImaged(MapTransform):
    """Dictionary twin of :class:`FilterImage`.

    Args:
        keys: keys of channel-first images.
        kind: see :class:`FilterImage`.
        allow_missing_keys: do not raise where a key is missing.
        **options: see :class:`FilterImage`.
    """

    def __init__(self, keys: KeysCollection, kind: str, allow_missing_keys: bool = False, **options: Any) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = FilterImage(kind, **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Filter the images under the keys."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.transform(convert_to_tensor(result[key], track_meta=True))
        return result


class BitDepth(FilterImage):
    """Fewer grey values: the ``bit_depth`` filter of :class:`FilterImage`.

    Args:
        bits: 1 to 16; ``2^bits`` grey values are left.
    """

    def __init__(self, bits: int = 4) -> None:
        super().__init__("bit_depth", bits=bits)

    def __repr__(self) -> str:
        return f"BitDepth(bits={self.options['bits']})"


class BitDepthd(FilterImaged):
    """Dictionary twin of :class:`BitDepth`.

    Args:
        keys: keys of channel-first images.
        bits: 1 to 16.
        allow_missing_keys: do not raise where a key is missing.
    """

    def __init__(self, keys: KeysCollection, bits: int = 4, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, "bit_depth", allow_missing_keys, bits=bits)
