"""The victim: the deployed pipeline as one differentiable callable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn

from monai_adv.errors import ConfigError, NonFiniteError
from monai_adv.inferers import ResampledInferer
from monai_adv.victims.guard import guard
from monai_adv.victims.head import Head, as_head


class Victim:
    """Preprocessing, inference and network as deployed: image in, logits out, differentiable from end to end.

    Args:
        network: a segmentation network, ``(B, C, *spatial) -> (B, K, *spatial)`` logits.
        inferer: a MONAI inferer, e.g. :class:`monai_adv.inferers.GradientSlidingWindowInferer`; one plain forward
            by default.
        head: "softmax", "sigmoid" or a :class:`Head`.
        preprocessing: a differentiable callable ``(B, C, *spatial) -> (B, C, *spatial)``, e.g.
            :class:`monai_adv.transforms.NormalizeNonzeroBatch`; nothing by default.
        postprocessing: a differentiable callable on the logits; nothing by default.
        name: how tables call this victim.

    Example:
        >>> victim = Victim(nn.Conv3d(4, 4, 1), head="softmax")
        >>> victim(torch.zeros(1, 4, 8, 8, 8)).shape
        torch.Size([1, 4, 8, 8, 8])
    """

    def __init__(
        self,
        network: nn.Module,
        inferer: Inferer | None = None,
        head: str | Head = "softmax",
        preprocessing: Callable[[Tensor], Tensor] | None = None,
        postprocessing: Callable[[Tensor], Tensor] | None = None,
        name: str = "network",
    ) -> None:
        self.network = network
        self.inferer = inferer if inferer is not None else SimpleInferer()
        self.head = as_head(head)
        self.preprocessing = preprocessing
        self.postprocessing = postprocessing
        self.name = name
        self._guarded = False

    def __call__(self, image: Tensor) -> Tensor:
        """Logits ``(B, K, *spatial)`` of an image ``(B, C, *spatial)``; a gradient flows to the image if it wants one.

        The network is in evaluation mode and restored afterwards. Inside :meth:`attacked` that is done once for the
        whole attack.

        Raises:
            NonFiniteError: if a logit is NaN or infinite.
            ConfigError: if the network refuses the number of channels.
        """
        with self._protected():
            logits = self._forward(plain_tensor(image))
        # the sum is finite unless a logit is not, or logits are so large that it overflows: then they are looked at
        values = logits.detach()
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            raise NonFiniteError("the network gave NaN or infinite logits: the case cannot be scored")
        return logits

    def predict(self, image: Tensor) -> Tensor:
        """The segmentation of an image, without a gradient: class indices or bits (see :meth:`Head.predict`)."""
        with torch.no_grad():
            return self.head.predict(self(image))

    @contextmanager
    def attacked(self, support: Tensor | None = None, image: Tensor | None = None) -> Iterator[Victim]:
        """Protect the network for the length of an attack; windows without support get no backward pass.

        Args:
            support: boolean mask ``(B, C, *spatial)`` outside which the image's gradient is not needed.
            image: the clean image; a preprocessing that couples voxels (a mean, say) says by its method
                ``gradient_support(image, support)`` where the gradient of its output is needed, or gets it everywhere.
        """
        restrict = getattr(self.inferer, "restrict", None)
        if self.preprocessing is not None and support is not None:
            rule = getattr(self.preprocessing, "gradient_support", None)
            support = rule(image, support) if rule is not None and image is not None else None
        restricted: AbstractContextManager[Any] = nullcontext()
        if restrict is not None and support is not None and not bool(support.all()):  # a mask of all costs a pass
            restricted = restrict(support)
        with self._protected(), restricted:
            previous, self._guarded = self._guarded, True
            try:
                yield self
            finally:
                self._guarded = previous

    def resampled(self, spacing: Sequence[float], working_spacing: Sequence[float]) -> Victim:
        """The same victim for images of another voxel size: see :class:`monai_adv.inferers.ResampledInferer`.

        Args:
            spacing: voxel size of the images in mm, one per axis.
            working_spacing: voxel size the network was trained at.
        """
        inferer = ResampledInferer(self.inferer, spacing, working_spacing)
        return Victim(self.network, inferer, self.head, self.preprocessing, self.postprocessing, self.name)

    def _protected(self) -> AbstractContextManager[Any]:
        if self._guarded:
            return nullcontext()
        return _guard_keeping_grad_mode(self._modules())

    def _modules(self) -> nn.Module:
        """Everything of the pipeline that has modes and buffers: a denoiser before the network has them too."""
        steps = [step for step in (self.preprocessing, self.postprocessing) if isinstance(step, nn.Module)]
        return nn.ModuleList([self.network, *steps]) if steps else self.network

    def _forward(self, image: Tensor) -> Tensor:
        data = image if self.preprocessing is None else self.preprocessing(image)
        try:
            logits = self.inferer(data, self.network)
        except RuntimeError as error:
            channels = _input_channels(self.network)
            if channels is None or data.shape[1] == channels:
                raise
            raise ConfigError(
                f"the network takes {channels} channels but the data have {data.shape[1]}: "
                "give the modalities the network was trained on, in its order"
            ) from error
        if isinstance(logits, dict):
            raise ConfigError(f"the network returns a dictionary {sorted(logits)}; wrap it so that it returns logits")
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        logits = plain_tensor(logits)
        return logits if self.postprocessing is None else self.postprocessing(logits)

    def __repr__(self) -> str:
        return f"Victim({self.name!r}, {type(self.network).__name__}, {type(self.inferer).__name__}, {self.head.kind})"


@contextmanager
def _guard_keeping_grad_mode(network: nn.Module) -> Iterator[None]:
    enabled = torch.is_grad_enabled()
    with guard(network), torch.set_grad_enabled(enabled):
        yield


def plain_tensor(data: Tensor) -> Tensor:
    """A plain tensor: MetaTensor bookkeeping has no place in an optimisation loop."""
    return data.as_tensor() if isinstance(data, MetaTensor) else data


def _input_channels(network: nn.Module) -> int | None:
    """Input channels of the first convolution, most likely the one that sees the image; only to explain an error."""
    convolutions = (m for m in network.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    first = next(convolutions, None)
    return None if first is None else first.in_channels
