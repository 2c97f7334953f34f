"""Input purification: a filter in front of a victim, itself part of what is attacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from monai_adv.data.meta import plain, voxel_size
from monai_adv.defenses.defended import Composed, DefendedVictim
from monai_adv.errors import ConfigError
from monai_adv.transforms import FilterImage, StraightThrough
from monai_adv.transforms.filter_kinds import KINDS
from monai_adv.victims import Victim

FILTERS: dict[str, Callable[..., Any]] = dict(KINDS)
"""Filters by name, with what makes them."""


class Purify:
    """A filter on batches that leaves the background exactly zero and passes a gradient.

    Gaussian and median smoothing pass their own gradient. The others have none: they run as they are, and the gradient
    is that of the identity on the foreground, or of a smooth ``surrogate`` (backward pass differentiable
    approximation), so that an attack on the purified victim is adaptive; see :func:`purified`.

    Reference:
        Athalye et al., Obfuscated gradients give a false sense of security, ICML 2018.

    Args:
        kind: see :class:`monai_adv.transforms.FilterImage`: gaussian, median, bit_depth, curvature_diffusion,
            gradient_diffusion, bilateral, nlm, n4.
        surrogate: whose gradient is taken instead: a name of a filter that passes one, ``{"kind": ..., **options}``, or
            a differentiable callable on batches; None is the filter's own gradient, or the identity's.
        **options: of the filter.

    Raises:
        ConfigError: for an unknown filter or option, or a surrogate without a gradient.

    Example:
        >>> image = torch.zeros(1, 1, 5, 5)
        >>> image[..., 2, 2], image[..., 2, 3] = 4.0, 1.0
        >>> out = Purify("gaussian", sigma=1.0)(image)
        >>> bool(out[..., 2, 2] < 4), float(out[..., 0, 0])
        (True, 0.0)
    """

    reads_affine = True

    def __init__(
        self,
        kind: str,
        *,
        surrogate: str | Mapping[str, Any] | Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.filter = FilterImage(kind, **options)
        self.kind = kind
        self.surrogate = surrogate
        self._path: Callable[[Tensor], Tensor] | None
        if surrogate is None or not isinstance(surrogate, (str, Mapping)):
            self._path = surrogate
        else:
            spec = {"kind": surrogate} if isinstance(surrogate, str) else dict(surrogate)
            if "kind" not in spec:
                raise ConfigError(f"surrogate {surrogate!r} needs a kind: {{kind: gaussian, sigma: 1.0}}")
            smooth = Purify(**spec)
            if not smooth.filter.differentiable:
                raise ConfigError(f"surrogate {smooth.kind} passes no gradient itself: use gaussian or median")
            self._path = smooth

    def __call__(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """Filter ``(B, C, *spatial)`` inside the non-zero voxels of each channel.

        Args:
            image: the batch.
            affine: voxel to world, ``(n, n)`` or ``(B, n, n)``, for filters with a size in mm; a MetaTensor's own if
                None, else voxels of 1 mm.
        """
        affine = getattr(image, "affine", None) if affine is None else affine
        data = plain(image)
        data = data if data.is_floating_point() else data.float()

        def step(batch: Tensor) -> Tensor:
            return torch.stack([self.filter(sample, _spacing(affine, i, sample)) for i, sample in enumerate(batch)])

        if self.filter.differentiable and self._path is None:
            return step(data)
        through = StraightThrough(step, self._path)(data)
        return torch.where(data != 0, through, torch.zeros_like(data))  # nor does the background get a gradient

    def gradient_support(self, image: Tensor, support: Tensor) -> Tensor:
        """Where the gradient of the output is needed for that of the image on ``support``.

        Args:
            image: ``(B, C, *spatial)``.
            support: same shape, bool.
        """
        pointwise = not self.filter.differentiable and self._path is None
        return support if pointwise else (image != 0) | support

    def __repr__(self) -> str:
        options = {**self.filter.options, **({} if self.surrogate is None else {"surrogate": self.surrogate})}
        return f"Purify({', '.join([repr(self.kind), *(f'{k}={v!r}' for k, v in options.items())])})"


def purified(victim: Victim, purify: Callable[..., Tensor], name: str | None = None) -> DefendedVictim:
    """A victim whose images are filtered before everything else.

    An attack on the result goes through the filter (adaptive); the unaware one is crafted on its ``undefended`` and
    scored on the result: :func:`monai_adv.defenses.unaware`. A defense shown only with the second is an upper bound.

    Args:
        victim: the undefended pipeline, or one with another filter, which then comes second.
        purify: the filter, e.g. :class:`Purify`: ``(B, C, *spatial)`` to the same shape.
        name: how tables call it; the victim's name with " purified" by default.
    """
    return DefendedVictim(victim, Composed(purify, victim.preprocessing), name or f"{victim.name} purified")


def _spacing(affine: Tensor | None, index: int, sample: Tensor) -> tuple[float, ...] | None:
    if affine is None:
        return None
    shared = affine.dim() == 2 or len(affine) == 1
    return voxel_size(affine, sample.dim() - 1, 0 if shared else index)
