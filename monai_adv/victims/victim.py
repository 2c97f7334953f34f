"""The victim: the deployed pipeline as one differentiable callable."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn

from monai_adv.data.meta import plain as plain_tensor
from monai_adv.errors import ConfigError, NonFiniteError
from monai_adv.inferers import ResampledInferer, spread_windows
from monai_adv.victims.guard import guard
from monai_adv.victims.head import Head, as_head

# logit of a class where it cannot be, small enough for half precision: a probability of 2e-9
UNSEEN = -20.0
_CERTAIN = 20.0  # of a class that was decided otherwise than by the logits


class Victim:
    """Preprocessing, inference and network as deployed: image in, logits out, differentiable from end to end.

    Args:
        network: a segmentation network, ``(B, C, *spatial) -> (B, K, *spatial)`` logits.
        inferer: a MONAI inferer, e.g. :class:`monai_adv.inferers.GradientSlidingWindowInferer`; one plain forward
            by default.
        head: "softmax", "sigmoid" or a :class:`Head`.
        preprocessing: a differentiable callable ``(B, C, *spatial) -> (B, C', *other)``, e.g.
            :class:`monai_adv.transforms.NormalizeNonzeroBatch` or what
            :func:`monai_adv.transforms.make_differentiable` makes of a deployed ``Compose``; nothing by default. One
            with a method ``prepare(image, affine) -> (data, back)`` works on a grid of its own: ``back``, linear,
            brings logits to the image's. One that draws random numbers says so by a true attribute ``random`` and
            starts them anew by a method ``reseed(seed)``.
        postprocessing: a differentiable callable on the logits; nothing by default.
        name: how tables call this victim.
        refine: what cleans the discrete prediction when it is scored, e.g. :class:`monai_adv.victims.KeepLargest`:
            class indices ``(B, 1, *spatial)`` or bits ``(B, K, *spatial)`` to the same shape; never in the gradient.

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
        refine: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.network = network
        self.inferer = inferer if inferer is not None else SimpleInferer()
        self.head = as_head(head)
        self.preprocessing = preprocessing
        self.postprocessing = postprocessing
        self.name = name
        self.refine = refine
        self._guarded = False
        self._affine: Tensor | None = None

    def __call__(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """Logits ``(B, K, *spatial)`` of an image ``(B, C, *spatial)``; a gradient flows to the image if it wants one.

        The network is in evaluation mode and restored afterwards. Inside :meth:`attacked` that is done once for the
        whole attack.

        Args:
            image: ``(B, C, *spatial)``.
            affine: voxel to world, ``(n, n)`` or ``(B, n, n)``, for a preprocessing that asks for it; a MetaTensor's
                own if None, or what :meth:`attacked` was given.

        Raises:
            NonFiniteError: if a logit is NaN or infinite.
            ConfigError: if the network refuses the number of channels.
        """
        with self._protected():
            logits = self._forward(plain_tensor(image), self._affine_of(image, affine))
        # the sum is finite unless a logit is not, or logits are so large that it overflows: then they are looked at
        values = logits.detach()
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            raise NonFiniteError("the network gave NaN or infinite logits: the case cannot be scored")
        return logits

    @property
    def random(self) -> bool:
        """Whether two passes of one image may differ: such a victim is attacked pass by pass, and scored by `predict`.

        A deterministic one gives in every pass what :meth:`predict` says, so that nobody has to ask again.
        """
        return bool(getattr(self.preprocessing, "random", False))

    def reseed(self, seed: int) -> None:
        """Start its random numbers anew, so that what is done next does not depend on what was done before.

        Nothing for a deterministic victim.

        Args:
            seed: of the numbers of the passes; those of :meth:`predict` are not touched.
        """
        rule = getattr(self.preprocessing, "reseed", None)
        if rule is not None:
            rule(seed)

    def predict(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """The segmentation that is deployed, without a gradient: class indices or bits (see :meth:`Head.predict`).

        Every Dice that is reported of an image is this one's.
        """
        with torch.no_grad():
            return self.discretise(self(image, affine))

    def predict_logits(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """Logits that the head discretises to what :meth:`predict` gives, for whoever post-processes logits.

        Those of one pass, without a gradient; voxels that ``refine`` changes get the logits of a certain class.
        """
        with torch.no_grad():
            logits = self(image, affine)
            if self.refine is None:
                return logits
            seen, refined = self.head.predict(logits), self.discretise(logits)
            certain = _CERTAIN * (2 * self.head.encode(refined, logits) - 1)
            changed = seen != refined  # of a softmax head one channel, and all logits of the voxel change
            return torch.where(changed, certain, logits)

    def discretise(self, logits: Tensor) -> Tensor:
        """The prediction that is scored: that of the head, refined where the victim refines it; without a gradient.

        Args:
            logits: ``(B, K, *spatial)``.

        Raises:
            ConfigError: if ``refine`` changes the shape or the dtype.
        """
        prediction = self.head.predict(logits.detach())
        if self.refine is None:
            return prediction
        refined = self.refine(prediction)
        if refined.shape != prediction.shape or refined.dtype != prediction.dtype:
            raise ConfigError(
                f"refine turned a prediction of shape {tuple(prediction.shape)} ({prediction.dtype}) into "
                f"{tuple(refined.shape)} ({refined.dtype}); it must keep both"
            )
        return refined

    @contextmanager
    def attacked(
        self, support: Tensor | None = None, image: Tensor | None = None, affine: Tensor | None = None
    ) -> Iterator[Victim]:
        """Protect the network for the length of an attack; windows without support get no backward pass.

        Args:
            support: boolean mask ``(B, C, *spatial)`` outside which the image's gradient is not needed.
            image: the clean image; a preprocessing that couples voxels (a mean, say) says by its method
                ``gradient_support(image, support)`` where the gradient of its output is needed, or gets it everywhere.
            affine: voxel to world of the images it will be called with, plain tensors in an attack.
        """
        restrict = getattr(self.inferer, "restrict", None)
        if self.preprocessing is not None and support is not None:
            rule = getattr(self.preprocessing, "gradient_support", None)
            support = rule(image, support) if rule is not None and image is not None else None
        restricted: AbstractContextManager[Any] = nullcontext()
        if restrict is not None and support is not None and not bool(support.all()):  # a mask of all costs a pass
            restricted = restrict(support)
        with self._protected(), restricted:
            previous = self._guarded, self._affine
            self._guarded = True
            self._affine = self._affine if affine is None else affine
            try:
                yield self
            finally:
                self._guarded, self._affine = previous

    def resampled(self, spacing: Sequence[float], working_spacing: Sequence[float]) -> Victim:
        """The same victim for images of another voxel size: see :class:`monai_adv.inferers.ResampledInferer`.

        Args:
            spacing: voxel size of the images in mm, one per axis.
            working_spacing: voxel size the network was trained at.

        Raises:
            ConfigError: if the preprocessing brings images to a grid of its own.
        """
        if getattr(self.preprocessing, "changes_grid", False):
            raise ConfigError(
                "the preprocessing of this victim already brings images to the network's grid: give it the images and "
                "their affine instead of resampling"
            )
        inferer = ResampledInferer(self.inferer, spacing, working_spacing)
        return Victim(self.network, inferer, self.head, self.preprocessing, self.postprocessing, self.name, self.refine)

    def distributed(self, process_group: torch.distributed.ProcessGroup | None = None) -> Victim:
        """The same victim with the windows of one image computed by all ranks of a ``torch.distributed`` group.

        Every rank calls it with the same image, and so attacks it with the same seed; each gets the same result. See
        :class:`monai_adv.inferers.DistributedSlidingWindowInferer`.

        Args:
            process_group: the group; the default group if None.

        Raises:
            ConfigError: if the victim's inferer has no windows.

        Example:
            >>> from monai_adv.inferers import GradientSlidingWindowInferer
            >>> Victim(nn.Conv3d(4, 4, 1), GradientSlidingWindowInferer(roi_size=32)).distributed()
            Victim('network', Conv3d, DistributedSlidingWindowInferer, softmax)
        """
        other = copy.copy(self)
        other.inferer = spread_windows(self.inferer, process_group)
        return other

    def _protected(self) -> AbstractContextManager[Any]:
        if self._guarded:
            return nullcontext()
        return _guard_keeping_grad_mode(self._modules())

    def _modules(self) -> nn.Module:
        """Everything of the pipeline that has modes and buffers: a denoiser before the network has them too."""
        steps = [step for step in (self.preprocessing, self.postprocessing) if isinstance(step, nn.Module)]
        return nn.ModuleList([self.network, *steps]) if steps else self.network

    def _affine_of(self, image: Tensor, given: Tensor | None) -> Tensor | None:
        if given is None and isinstance(image, MetaTensor):
            return image.affine
        return self._affine if given is None else given

    def _forward(self, image: Tensor, affine: Tensor | None) -> Tensor:
        prepare = getattr(self.preprocessing, "prepare", None)
        back: Callable[[Tensor], Tensor] | None = None
        if prepare is not None:
            data, back = prepare(image, affine)
        else:
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
        if self.postprocessing is not None:
            logits = self.postprocessing(logits)
        return logits if back is None else self._restored(logits, back)

    def _restored(self, logits: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits on the image's grid; what the network never saw is background, as deployed."""
        restored = back(logits)
        with torch.no_grad():
            unseen = 1 - back(torch.ones_like(logits[:, :1]))
            unseen = torch.where(unseen.abs() < 1e-5, torch.zeros_like(unseen), unseen)  # rounding of the weights
        if not bool(unseen.any()):
            return restored
        background = logits.new_full((logits.shape[1], *[1] * (logits.dim() - 2)), UNSEEN)
        if self.head.exclusive:
            background[0] = 0
        # the interpolation is linear: as if the logits had been padded with these
        return restored + unseen * background

    def __repr__(self) -> str:
        return f"Victim({self.name!r}, {type(self.network).__name__}, {type(self.inferer).__name__}, {self.head.kind})"


@contextmanager
def _guard_keeping_grad_mode(network: nn.Module) -> Iterator[None]:
    enabled = torch.is_grad_enabled()
    with guard(network), torch.set_grad_enabled(enabled):
        yield


def _input_channels(network: nn.Module) -> int | None:
    """Input channels of the first convolution, most likely the one that sees the image; only to explain an error."""
    convolutions = (m for m in network.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    first = next(convolutions, None)
    return None if first is None else first.in_channels
