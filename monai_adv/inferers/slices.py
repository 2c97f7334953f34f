"""A 2D network on whole volumes, slice by slice, with exact gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from monai.inferers import Inferer
from torch import Tensor

from monai_adv.data.meta import like, plain
from monai_adv.errors import ConfigError

from .logits import logits_of


class SlicewiseInferer(Inferer):
    """Give a volume to a 2D inferer as a batch of its slices along the last axis, and a batch of slices as it is.

    The last axis of canonical orientation is the axial one. The logits are those of MONAI's ``SliceInferer``, but the
    slices of all volumes share the inner inferer's window batches, its gradient is exact in the memory of one of
    them, and a slice that is zero everywhere need not be asked about: instance normalisation blows up whatever a
    network makes of it. Such a slice is background, with a gradient of exactly zero.

    Args:
        inferer: works on slices ``(B, C, H, W)``, e.g. a :class:`GradientSlidingWindowInferer`.
        background: logits ``(K,)`` of every voxel of a slice that is zero everywhere; the network is asked if None.

    Example:
        >>> import torch
        >>> from monai.inferers import SimpleInferer
        >>> inferer = SlicewiseInferer(SimpleInferer(), background=[0.0])
        >>> volume = torch.ones(1, 1, 8, 8, 3)
        >>> volume[..., 0] = 0
        >>> inferer(volume, torch.exp)[0, 0, 0, 0].tolist()
        [0.0, 2.7182817459106445, 2.7182817459106445]
    """

    def __init__(self, inferer: Inferer, background: Sequence[float] | None = None) -> None:
        super().__init__()
        self.inferer = inferer
        self.background = None if background is None else tuple(float(v) for v in background)
        self._support: Tensor | None = None

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Logits of slices ``(B, C, H, W)``, or of volumes ``(B, C, H, W, D)``, on their own grid.

        Args:
            inputs: the images.
            network: gives logits (N, K, h, w) for a window batch (N, C, h, w).
            args: handed on to the inferer, and so are ``kwargs``.

        Raises:
            ConfigError: these are neither slices nor volumes, or background and logits differ in their channels.
        """
        if inputs.dim() not in (4, 5):
            raise ConfigError(
                f"a 2D network takes slices (B, C, H, W) or volumes (B, C, H, W, D), not an image of shape "
                f"{tuple(inputs.shape)}"
            )
        image, support = plain(inputs), self._support
        slices = _stacked(image)
        if support is not None:
            support = _stacked(support.expand(len(image), *support.shape[1:]))
        if self.background is None:
            logits = self._run(slices, support, network, *args, **kwargs)
        else:
            logits = self._filled(slices, support, network, *args, **kwargs)
        if image.dim() == 5:
            logits = logits.unflatten(0, (len(image), image.shape[-1])).movedim(1, -1)
        return like(logits, inputs)

    @contextmanager
    def restrict(self, support: Tensor | None) -> Iterator[SlicewiseInferer]:
        """Hand the support on, as that of the slices: see :class:`GradientSlidingWindowInferer`."""
        before, self._support = self._support, support
        try:
            yield self
        finally:
            self._support = before

    def _filled(
        self, slices: Tensor, support: Tensor | None, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Logits ``(N, K, H, W)``; the network sees only slices that are not zero everywhere."""
        assert self.background is not None
        seen = (slices.detach() != 0).flatten(1).any(1).nonzero().flatten()
        if len(seen) == len(slices):
            return self._checked(self._run(slices, support, network, *args, **kwargs))
        logits = slices.new_tensor(self.background).view(1, -1, 1, 1)
        logits = logits.expand(len(slices), -1, *slices.shape[2:])
        if not len(seen):
            # of the graph, so that a gradient can be asked for: it is zero
            return logits + 0 * slices.sum() if slices.requires_grad else logits.clone()
        mask = None if support is None else support[seen]
        found = self._checked(self._run(slices[seen], mask, network, *args, **kwargs))
        return logits.to(found).index_copy(0, seen.to(found.device), found)

    def _run(
        self, slices: Tensor, support: Tensor | None, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        inner = getattr(self.inferer, "restrict", None)
        narrowed: AbstractContextManager[Any] = nullcontext()
        if inner is not None and support is not None:
            narrowed = inner(support)
        with narrowed:
            return plain(logits_of(self.inferer(slices, network, *args, **kwargs), slices))

    def _checked(self, logits: Tensor) -> Tensor:
        assert self.background is not None
        if logits.shape[1] != len(self.background):
            raise ConfigError(f"{len(self.background)} background logits for a network of {logits.shape[1]} channels")
        return logits


def _stacked(data: Tensor) -> Tensor:
    """Slices ``(B, C, H, W)`` as they are, those of volumes ``(B, C, H, W, D)`` as ``(B D, C, H, W)``."""
    return data.movedim(-1, 1).flatten(0, 1) if data.dim() == 5 else data
