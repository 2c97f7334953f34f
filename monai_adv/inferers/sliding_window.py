"""Sliding-window inference with an exact gradient in the memory of one window batch."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map
from monai.inferers import SlidingWindowInferer
from monai.utils import BlendMode, PytorchPadMode, convert_to_dst_type, fall_back_tuple, look_up_option

from monai_adv.errors import ConfigError

from .logits import logits_of
from .windows import WindowPass, stitch

__all__ = ["GradientSlidingWindowInferer"]


class GradientSlidingWindowInferer(SlidingWindowInferer):
    """MONAI's sliding-window inferer whose gradient needs the memory of one window batch.

    The logits are MONAI's own: its tiler cuts, blends and stitches. Plain automatic differentiation through it keeps
    the graph of every window; this inferer runs the windows without graphs and recomputes them in the backward pass.
    With the stitched logits Z(v) = (1/c(v)) sum_k W(v - s_k) f(x[s_k])(v - s_k), where c is the sum of the weights,
    and any upstream gradient G = dL/dZ, window k's part of the gradient is that of f at x[s_k] with the upstream
    gradient G[s_k] W / c[s_k]: the chain rule, exact to rounding, for the image and for the network's parameters
    (training through it). The price is one more forward pass of each recomputed window.

    - A window whose upstream gradient is zero everywhere, or (while only the image's gradient is asked for) that holds
      no voxel of the support, costs nothing in the backward pass.
    - One window batch in total is never recomputed. ``keep_windows`` window batches keep their graphs.
    - A network that ends in softmax, sigmoid or relu, works in place or returns a view of its input is safe. Of a
      tuple or list the first entry is the logits, of a dictionary the only one or ``"logits"``, ``"out"``, ``"pred"``.
    - The recomputation sees the forward pass's train / eval modes, autocast state, PyTorch random numbers (dropout)
      and buffers, and leaves them as it found them: batch normalisation counts each window once.
    - The result can be differentiated once, not twice. Forward hooks of the network run again with a recomputation;
      random numbers of other libraries are not repeated. Without a gradient (``torch.no_grad``) it is MONAI's inferer.

    Reference:
        Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016, https://arxiv.org/abs/1604.06174

    Args:
        roi_size: window size in voxels, one number or one per spatial axis, as in MONAI.
        sw_batch_size: most windows per network call.
        overlap: share of a window that the next one overlaps, in [0, 1), one number or one per axis.
        mode: blending, "constant" or "gaussian".
        sigma_scale: standard deviation of the Gaussian as a share of the window.
        padding_mode: how a volume smaller than the window is padded.
        cval: fill value of constant padding.
        sw_device: where the windows are computed.
        device: where the logits are stitched.
        progress: whether the forward pass shows a bar.
        cache_roi_weight_map: whether the window's weights are computed once.
        cpu_thresh: voxels above which logits are stitched on the CPU.
        buffer_steps: windows stitched on ``sw_device`` before they are moved to ``device``.
        buffer_dim: the axis of that buffer.
        with_coord: whether the network takes the windows' coordinates as second argument.
        keep_windows: how many window batches keep their graphs from the forward to the backward pass: 0 recomputes all,
            "auto" keeps as many as leave a quarter of the free memory free.

    Raises:
        ConfigError: for a ``keep_windows`` that is neither a number >= 0 nor "auto".

    Example:
        >>> inferer = GradientSlidingWindowInferer(roi_size=(8, 8), overlap=0.5, mode="gaussian", keep_windows=0)
        >>> image = torch.randn(1, 1, 12, 20, requires_grad=True)
        >>> network = torch.nn.Conv2d(1, 2, 3, padding=1)
        >>> (gradient,) = torch.autograd.grad(inferer(image, network).square().sum(), image)
        >>> gradient.shape
        torch.Size([1, 1, 12, 20])
    """

    _own_tiling = False  # of a subclass: whether a pass without a gradient also goes through `_tile`

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int = 1,
        overlap: Sequence[float] | float = 0.25,
        mode: BlendMode | str = BlendMode.CONSTANT,
        sigma_scale: Sequence[float] | float = 0.125,
        padding_mode: PytorchPadMode | str = PytorchPadMode.CONSTANT,
        cval: float = 0.0,
        sw_device: torch.device | str | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        cache_roi_weight_map: bool = False,
        cpu_thresh: int | None = None,
        buffer_steps: int | None = None,
        buffer_dim: int = -1,
        with_coord: bool = False,
        keep_windows: int | str = "auto",
    ) -> None:
        super().__init__(
            roi_size=roi_size,
            sw_batch_size=sw_batch_size,
            overlap=overlap,
            mode=mode,
            sigma_scale=sigma_scale,
            padding_mode=padding_mode,
            cval=cval,
            sw_device=sw_device,
            device=device,
            progress=progress,
            cache_roi_weight_map=cache_roi_weight_map,
            cpu_thresh=cpu_thresh,
            buffer_steps=buffer_steps,
            buffer_dim=buffer_dim,
            with_coord=with_coord,
        )
        whole = isinstance(keep_windows, int) and not isinstance(keep_windows, bool) and keep_windows >= 0
        if not whole and keep_windows != "auto":
            raise ConfigError(f"keep_windows must be a whole number >= 0 or 'auto', got {keep_windows!r}")
        self.keep_windows = keep_windows
        self._support: torch.Tensor | None = None

    @contextlib.contextmanager
    def restrict(self, support: torch.Tensor | None) -> Iterator[GradientSlidingWindowInferer]:
        """Within the context, the image's gradient is wanted on a support only, and is zero elsewhere.

        The logits and the parameters' gradients do not change.

        Args:
            support: (B or 1, C or 1, \\*spatial), true where the gradient is wanted; None is everywhere.

        Example:
            >>> inferer = GradientSlidingWindowInferer(roi_size=(8, 8))
            >>> image = torch.ones(1, 1, 8, 16, requires_grad=True)
            >>> with inferer.restrict(image > 2):
            ...     logits = inferer(image, torch.nn.Conv2d(1, 2, 1))
            >>> torch.autograd.grad(logits.sum(), image)[0].any().item()
            False
        """
        before, self._support = self._support, support
        try:
            yield self
        finally:
            self._support = before

    def __call__(
        self,
        inputs: torch.Tensor,
        network: Callable[..., Any],
        *args: Any,
        support: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The stitched logits of a volume.

        Args:
            inputs: the volume (B, C, \\*spatial).
            network: gives logits (N, K, \\*window) for a window batch (N, C, \\*window).
            args: handed on to the network.
            support: where the volume's gradient is wanted (B or 1, C or 1, \\*spatial); it is zero elsewhere. Windows
                without such a voxel still take part in the logits. The default is that of ``restrict``, or everywhere.
            kwargs: handed on to the network; ``condition`` (like ``inputs``) is windowed along.

        Returns:
            The logits (B, K, \\*spatial), a MetaTensor if ``inputs`` is one.

        Raises:
            ConfigError: where no logits can be told in what the network returned, or the support does not fit.
        """
        if not torch.is_grad_enabled() and not self._own_tiling:
            predictor = functools.partial(_predict, network, inputs.untyped_storage().data_ptr())
            return cast(torch.Tensor, super().__call__(inputs, predictor, *args, **kwargs))
        volume = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        support = self._checked(self._support if support is None else support, volume)
        condition = kwargs.get("condition")
        if condition is not None and condition.requires_grad:
            raise ConfigError("the gradient of `condition` is not computed: detach it")

        # padded here, in MONAI's way, so that autograd undoes it; within, volume and windows have the same coordinates
        padding = self._padding(volume)
        if any(padding):
            mode = look_up_option(self.padding_mode, PytorchPadMode)
            volume = F.pad(volume, padding, mode=mode, value=self.cval)
            if condition is not None and condition.shape == inputs.shape:
                condition = kwargs["condition"] = F.pad(condition, padding, mode=mode, value=self.cval)
            if support is not None:  # a padded voxel belongs to the support if the voxel it repeats does
                support = F.pad(support.to(volume.dtype), padding, mode=mode, value=0) > 0

        tiler = copy.copy(self)
        tiler.with_coord = True
        run = tiler._start(network, volume, self.with_coord, condition)
        with torch.no_grad():
            logits = tiler._tile(volume.detach(), run, *args, **kwargs)
        if torch.is_grad_enabled() and (volume.requires_grad or run.leaves):
            importance = functools.partial(tiler._importance, run.window_shape, run.sw_device, volume.dtype)
            logits = stitch(run, logits, volume, importance, support)
        if any(padding):
            logits = logits[self._crop(padding, inputs.shape[2:], volume.shape[2:], logits.shape[2:])]
        if isinstance(inputs, MetaTensor):  # as MONAI ends
            like = MetaTensor([]).copy_meta_from(inputs, copy_attr=False)
            logits = convert_to_dst_type(logits, like, device=logits.device)[0]
        return logits

    def _start(
        self, network: Callable[..., Any], volume: torch.Tensor, with_coord: bool, condition: torch.Tensor | None
    ) -> WindowPass:
        """A pass over the windows of a (padded) volume."""
        return WindowPass(network, volume, self.sw_batch_size, self.keep_windows, with_coord, condition, self.sw_device)

    def _tile(self, volume: torch.Tensor, run: WindowPass, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The stitched logits of a pass, which MONAI's tiler goes through."""
        # the pass hands MONAI one tensor per window batch
        return cast(torch.Tensor, SlidingWindowInferer.__call__(self, volume, run, *args, **kwargs))

    def _padding(self, volume: torch.Tensor) -> list[int]:
        """What a volume smaller than the window is padded by, in the order of ``torch.nn.functional.pad``."""
        spatial = volume.shape[2:]
        if isinstance(self.roi_size, Sequence) and len(self.roi_size) != len(spatial):
            return []  # MONAI's error says what is wrong
        missing = [max(window - size, 0) for window, size in zip(fall_back_tuple(self.roi_size, spatial), spatial)]
        return [part for short in reversed(missing) for part in (short // 2, short - short // 2)]

    @staticmethod
    def _crop(
        padding: Sequence[int], wanted: Sequence[int], padded: Sequence[int], stitched: Sequence[int]
    ) -> tuple[slice, ...]:
        """Where the unpadded volume lies in the stitched logits, which may have another resolution."""
        before = list(padding[0::2])[::-1]
        zoom = [o / i for o, i in zip(stitched, padded)]
        spatial = [slice(round(b * z), round((b + size) * z)) for b, size, z in zip(before, wanted, zoom)]
        return (slice(None), slice(None), *spatial)

    def _importance(self, window: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """MONAI's weights of a window (1, 1, \\*window)."""
        weights = self.roi_weight_map
        if weights is None:
            weights = compute_importance_map(window, self.mode, self.sigma_scale, device=device, dtype=dtype)
        weights = torch.as_tensor(weights).to(device=device, dtype=dtype)
        return weights if weights.ndim == len(window) + 2 else weights[None, None]

    @staticmethod
    def _checked(support: torch.Tensor | None, volume: torch.Tensor) -> torch.Tensor | None:
        """A support as a bool view of the volume's batch size, or an error."""
        if support is None:
            return None
        if isinstance(support, MetaTensor):
            support = support.as_tensor()
        fits = support.ndim == volume.ndim and support.shape[2:] == volume.shape[2:]
        fits = fits and all(s in (1, v) for s, v in zip(support.shape[:2], volume.shape[:2]))
        if not fits:
            raise ConfigError(
                f"the support has the shape {tuple(support.shape)}, which does not fit a volume of shape "
                f"{tuple(volume.shape)}: it must be (B or 1, C or 1, *spatial)"
            )
        support = support.detach().to(device=volume.device, dtype=torch.bool)
        return support.expand(volume.shape[0], *support.shape[1:])


def _predict(
    network: Callable[..., Any], storage: int, window: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The logits of a window batch, in memory of their own: MONAI multiplies them in place."""
    if window.untyped_storage().data_ptr() == storage:
        window = window.clone()  # a view of the volume, which no network shall write into
    return logits_of(network(window, *args, **kwargs), window).clone()
