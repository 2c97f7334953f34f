"""Input purification: a filter in front of a victim, itself part of what is attacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import GaussianSmooth, MedianSmooth
from torch import Tensor

from monai_adv.errors import ConfigError
from monai_adv.victims import Victim

FILTERS: dict[str, Callable[..., Any]] = {"gaussian": GaussianSmooth, "median": MedianSmooth}


class Purify:
    """A differentiable smoothing filter on batches that leaves the background exactly zero.

    The filter is MONAI's (``GaussianSmooth`` or ``MedianSmooth``). A gradient flows through it, so an attack on the
    purified victim is adaptive; see :func:`purified`.

    Args:
        kind: "gaussian" or "median".
        **options: of MONAI's transform: ``sigma`` in voxels, or ``radius`` in voxels.

    Example:
        >>> image = torch.zeros(1, 1, 5, 5)
        >>> image[..., 2, 2], image[..., 2, 3] = 4.0, 1.0
        >>> out = Purify("gaussian", sigma=1.0)(image)
        >>> bool(out[..., 2, 2] < 4), float(out[..., 0, 0])
        (True, 0.0)
    """

    def __init__(self, kind: str, **options: Any) -> None:
        if kind not in FILTERS:
            raise ConfigError(f"filter {kind!r} is unknown: use one of {', '.join(FILTERS)}")
        try:
            self.filter = FILTERS[kind](**options)
        except TypeError as error:
            raise ConfigError(f"filter {kind}: {error}") from error
        self.kind = kind

    def __call__(self, image: Tensor) -> Tensor:
        """Filter ``(B, C, *spatial)`` inside the non-zero voxels of each channel."""
        plain = image.as_tensor() if isinstance(image, MetaTensor) else image
        smooth = torch.stack([torch.as_tensor(self.filter(sample)) for sample in plain])
        return torch.where(plain != 0, smooth, torch.zeros_like(plain))


def purified(victim: Victim, purify: Callable[[Tensor], Tensor], name: str | None = None) -> Victim:
    """A victim whose images are filtered before everything else.

    An attack on the result goes through the filter (adaptive); the plain transfer test is to attack ``victim`` and
    score the outcome on the result. A defense shown only with the second is an upper bound.

    Args:
        victim: the undefended pipeline.
        purify: the filter, e.g. :class:`Purify`.
        name: how tables call it; the victim's name with " purified" by default.
    """
    inner = victim.preprocessing

    def both(image: Tensor) -> Tensor:
        filtered = purify(image)
        return filtered if inner is None else inner(filtered)

    return Victim(
        victim.network,
        inferer=victim.inferer,
        head=victim.head,
        preprocessing=both,
        postprocessing=victim.postprocessing,
        name=name or f"{victim.name} purified",
    )
