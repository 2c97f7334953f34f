"""Test-time augmentation inside the gradient, and clean-up of predictions that applies only when scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.inferers.logits import logits_of


class MirrorInferer(Inferer):
    """The mean over mirrored passes, differentiable: what nnU-Net and many entries of BraTS deploy.

    The image is mirrored along every combination of ``axes``, the logits are mirrored back and averaged. The gradient
    is that of the mean, exact to rounding. Every pass is recomputed in the backward pass, so that the memory of one
    pass (of one window batch with a :class:`GradientSlidingWindowInferer`) is enough for all eight.

    Reference:
        Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation,
        Nature Methods 2021 (mirroring along all axes, softmax or logits averaged).

    Args:
        inferer: runs each mirrored pass.
        axes: spatial axes to mirror, 0 the first after the channels; n axes make 2^n passes.
        average: "logits", or "probabilities": then the result is the logits whose softmax or sigmoid is the mean
            probability, so that whatever reads logits still can.
        head: "softmax" or "sigmoid"; what makes probabilities of logits, needed to average them.

    Raises:
        ConfigError: for axes that are not different numbers >= 0, or an average that cannot be taken.

    Example:
        >>> from monai.inferers import SimpleInferer
        >>> image = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> MirrorInferer(SimpleInferer(), axes=(0,))(image, lambda x: x.cumsum(-1)).tolist()
        [[[4.0, 4.5, 5.5]]]
    """

    def __init__(
        self, inferer: Inferer, axes: Sequence[int] = (0, 1, 2), average: str = "logits", head: str | None = None
    ) -> None:
        super().__init__()
        axes = tuple(axes)
        if any(isinstance(a, bool) or not isinstance(a, int) or a < 0 for a in axes) or len(set(axes)) != len(axes):
            raise ConfigError(f"axes {axes} must be different spatial axes, 0 the first after the channels")
        if average not in ("logits", "probabilities"):
            raise ConfigError(f"average {average!r} is unknown: use 'logits' or 'probabilities'")
        if average == "probabilities" and head not in ("softmax", "sigmoid"):
            raise ConfigError(f"to average probabilities say head='softmax' or 'sigmoid', not {head!r}")
        self.inferer = inferer
        self.axes = axes
        self.average = average
        self.head = head
        self._support: Tensor | None = None

    @property
    def flips(self) -> list[tuple[int, ...]]:
        """The spatial axes mirrored in each pass, the plain pass first."""
        return [flip for n in range(len(self.axes) + 1) for flip in combinations(self.axes, n)]

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Logits ``(B, K, *spatial)`` of ``inputs`` ``(B, C, *spatial)``, averaged over the mirrored passes.

        Args:
            inputs: the image.
            network: see MONAI's inferers; so are the other arguments, which are not mirrored.

        Raises:
            ConfigError: if the image has fewer spatial axes than are to be mirrored, or the network returns no logits.
        """
        if any(axis >= inputs.dim() - 2 for axis in self.axes):
            raise ConfigError(f"cannot mirror axes {self.axes} of an image of shape {tuple(inputs.shape)}")
        total: tuple[Tensor, ...] | None = None
        for flip in self.flips:
            dims = [axis + 2 for axis in flip]
            # torch.flip copies: also the plain pass gets tensors of its own only if it is mirrored
            data = torch.flip(inputs, dims) if dims else inputs
            logits = logits_of(self._pass(data, dims, network, *args, **kwargs), data)
            terms = self._terms(torch.flip(logits, dims) if dims else logits)
            total = terms if total is None else tuple(self._add(a, b) for a, b in zip(total, terms))
        assert total is not None
        return self._finish(total, len(self.flips))

    @contextmanager
    def restrict(self, support: Tensor | None) -> Iterator[MirrorInferer]:
        """Hand the support on, mirrored with the image: see :class:`GradientSlidingWindowInferer`."""
        before, self._support = self._support, support
        try:
            yield self
        finally:
            self._support = before

    # ---------------------------------------------------------------------------------------------- internals
    def _pass(self, data: Tensor, dims: list[int], network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        narrowed: AbstractContextManager[Any] = nullcontext()
        inner = getattr(self.inferer, "restrict", None)
        if self._support is not None and inner is not None:
            narrowed = inner(torch.flip(self._support, dims) if dims else self._support)
        with narrowed:
            if not torch.is_grad_enabled() or not self.axes:
                return self.inferer(data, network, *args, **kwargs)
            windows = _window_inferer(self.inferer)
            if windows is None:
                return checkpoint(self.inferer, data, network, *args, use_reentrant=False, **kwargs)
            # it recomputes its windows itself, all but a lone batch of them: then the network recomputes
            if windows is self.inferer and _lone_batch(windows, data):
                network = _Recomputed(network)
            return self.inferer(data, network, *args, **kwargs)

    def _terms(self, logits: Tensor) -> tuple[Tensor, ...]:
        """What is added up over the passes: logits, or log-probabilities, whose exponentials are."""
        if self.average == "logits":
            return (logits,)
        if self.head == "softmax":
            return (torch.log_softmax(logits, dim=1),)
        return F.logsigmoid(logits), F.logsigmoid(-logits)

    def _add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self.average == "logits" else torch.logaddexp(a, b)

    def _finish(self, total: tuple[Tensor, ...], passes: int) -> Tensor:
        if self.average == "logits":
            return total[0] / passes
        if self.head == "softmax":  # up to a constant that a softmax does not see; subtracted, they are log means
            return total[0] - torch.log(torch.tensor(float(passes)))
        return total[0] - total[1]  # log(mean p / mean (1 - p))


class _Recomputed(nn.Module):
    """A network whose activations are computed again in the backward pass."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.network, *args, use_reentrant=False, **kwargs)


def _window_inferer(inferer: Inferer) -> GradientSlidingWindowInferer | None:
    """The inferer that recomputes windows, itself or inside wrappers that keep theirs in ``inferer``."""
    found: Any = inferer
    while found is not None and not isinstance(found, GradientSlidingWindowInferer):
        found = getattr(found, "inferer", None)
    return found


def _lone_batch(inferer: GradientSlidingWindowInferer, data: Tensor) -> bool:
    """Whether all windows may fit into one batch (never a wrong no): an axis beyond the window has two at least."""
    spatial = data.shape[2:]
    roi = inferer.roi_size if isinstance(inferer.roi_size, Sequence) else (inferer.roi_size,) * len(spatial)
    longer = sum(0 < window < size for window, size in zip(roi, spatial))
    return len(data) * 2**longer <= inferer.sw_batch_size


class KeepLargest:
    """Keep the largest connected component of each class or region of a prediction, for every sample of a batch.

    It belongs to scoring, not to the gradient: give it to a :class:`monai_adv.victims.Victim` as ``refine``.
    What MONAI's ``KeepLargestConnectedComponent`` does to one image, by SciPy where that one needs scikit-image.

    Args:
        labels: class indices, or channels of bits, that are cleaned; all if None.
        independent: each on its own, or (False) the union of them.
        connectivity: hops that count as neighbours, 1 to the number of axes; the most if None.

    Raises:
        ConfigError: for a connectivity below 1.

    Example:
        >>> bits = torch.tensor([1, 0, 1, 1]).bool().view(1, 1, 4, 1)
        >>> KeepLargest()(bits).flatten().tolist()
        [False, False, True, True]
    """

    def __init__(
        self, labels: Sequence[int] | int | None = None, independent: bool = True, connectivity: int | None = None
    ) -> None:
        if connectivity is not None and connectivity < 1:
            raise ConfigError(f"connectivity must be 1 or more, got {connectivity}")
        self.labels = (labels,) if isinstance(labels, int) else None if labels is None else tuple(labels)
        self.independent = independent
        self.connectivity = connectivity

    def __call__(self, prediction: Tensor) -> Tensor:
        """Clean ``(B, 1, *spatial)`` class indices or ``(B, K, *spatial)`` bits; same shape and dtype."""
        kept = prediction.clone()
        for sample in kept:
            masks = self._masks(sample)
            if not self.independent and masks:
                masks = [torch.stack(masks).any(0)]
            for mask in masks:
                sample.masked_fill_(mask & ~self._largest(mask), 0)
        return kept

    def _masks(self, sample: Tensor) -> list[Tensor]:
        """The mask of every class or channel to clean, each of the sample's shape ``(1 or K, *spatial)``."""
        if sample.dtype == torch.bool:
            channels = range(len(sample)) if self.labels is None else self.labels
            masks = []
            for channel in channels:
                mask = torch.zeros_like(sample)
                mask[channel] = sample[channel]
                masks.append(mask)
            return masks
        classes = [c for c in sample.unique().tolist() if c != 0] if self.labels is None else self.labels
        return [sample == index for index in classes]

    def _largest(self, mask: Tensor) -> Tensor:
        """Where the largest component of the union over channels lies, broadcast over them."""
        flat = mask.any(0).cpu().numpy()
        near = ndimage.generate_binary_structure(flat.ndim, min(self.connectivity or flat.ndim, flat.ndim))
        parts, count = ndimage.label(flat, structure=near)
        if count < 2:
            return mask.any(0, keepdim=True)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        return torch.from_numpy(parts == sizes.argmax()).to(mask.device)[None]
