"""Inference at another voxel size: the image is resampled, the logits are brought back to its grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer

from monai_adv.errors import ConfigError

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class ResampledInferer(Inferer):
    """Run an inferer on a grid of the network's voxel size, differentiable from end to end.

    The image is resampled linearly to the nearest whole number of voxels, the logits back to the image's grid, so that
    a network trained at 2 mm segments a 1 mm scan at 1 mm, and an attack acts on the scan's own voxels. At a ratio of
    two each coarse voxel is the mean of the fine voxels it holds.

    Args:
        inferer: works on the resampled image, e.g. a :class:`GradientSlidingWindowInferer`.
        spacing: voxel size of the images it is called with, mm per axis.
        working_spacing: voxel size the network was trained at, mm per axis.

    Example:
        >>> from monai.inferers import SimpleInferer
        >>> inferer = ResampledInferer(SimpleInferer(), spacing=(1.0, 1.0), working_spacing=(2.0, 2.0))
        >>> inferer(torch.ones(1, 1, 9, 8), lambda x: x[:, :, : x.shape[2]] * x.shape[2]).unique().tolist()
        [4.0]
    """

    def __init__(self, inferer: Inferer, spacing: Sequence[float], working_spacing: Sequence[float]) -> None:
        super().__init__()
        if len(spacing) != len(working_spacing) or not all(s > 0 for s in (*spacing, *working_spacing)):
            raise ConfigError(f"spacing {tuple(spacing)} and {tuple(working_spacing)} must be positive, one per axis")
        self.inferer = inferer
        self.ratio = tuple(own / work for own, work in zip(spacing, working_spacing))

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Logits ``(B, K, *spatial)`` of an image ``(B, C, *spatial)`` on the image's grid."""
        small = self._interpolate(inputs, self._size(inputs.shape[2:]))
        logits = self.inferer(small, network, *args, **kwargs)
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        return self._interpolate(logits, inputs.shape[2:])

    @contextmanager
    def restrict(self, support: torch.Tensor | None) -> Iterator[ResampledInferer]:
        """Hand the support on, as the coarse voxels that hold a part of it."""
        inner = getattr(self.inferer, "restrict", None)
        narrowed: AbstractContextManager[Any] = nullcontext()
        if inner is not None and support is not None:
            narrowed = inner(self._interpolate(support.float(), self._size(support.shape[2:])) > 0)
        with narrowed:
            yield self

    def _size(self, shape: Sequence[int]) -> list[int]:
        if len(shape) != len(self.ratio):
            raise ConfigError(f"an image of shape {tuple(shape)} has not the {len(self.ratio)} axes of the spacing")
        return [max(1, round(n * r)) for n, r in zip(shape, self.ratio)]

    @staticmethod
    def _interpolate(data: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        if list(data.shape[2:]) == list(size):
            return data
        return F.interpolate(data, size=tuple(size), mode=_LINEAR[len(size)], align_corners=False)
