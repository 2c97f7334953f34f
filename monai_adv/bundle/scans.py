"""A bundle's victim for scans in scanner units: its channel order and its preprocessing inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from monai_adv.bundle.victim import BundleVictim
from monai_adv.data.meta import plain
from monai_adv.transforms import make_differentiable
from monai_adv.victims import Victim


def scan_victim(bundle: BundleVictim, name: str | None = None) -> Victim:
    """The victim of a bundle for images in T1, T1c, T2, FLAIR order and scanner units.

    The bundle's own preprocessing is made differentiable and stands behind the change of the channel order, so that an
    attack acts on the voxels of the files.

    Args:
        bundle: what :func:`monai_adv.bundle.load_bundle` found.
        name: how tables call it.

    Raises:
        ConfigError: if the bundle does not name its channels, or its preprocessing cannot stand inside a victim.
    """
    preprocessing = InChannelOrder(bundle.channel_order, make_differentiable(bundle.preprocessing))  # type: ignore[arg-type]
    victim = bundle.victim
    return Victim(victim.network, victim.inferer, victim.head, preprocessing, name=name or victim.name)


class InChannelOrder:
    """A victim's preprocessing for channels in another order.

    Args:
        order: for every channel of the network its place in the images.
        preprocessing: what follows, e.g. a :class:`monai_adv.transforms.DifferentiableCompose`.
    """

    def __init__(self, order: Sequence[int], preprocessing: Any) -> None:
        self.order = list(order)
        self.preprocessing = preprocessing

    @property
    def changes_grid(self) -> bool:
        """Whether what follows works on a grid of its own."""
        return bool(getattr(self.preprocessing, "changes_grid", False))

    def __call__(self, image: Tensor, affine: Tensor | None = None) -> Tensor:
        """The network's input for ``(B, C, *spatial)``."""
        return self.preprocessing(plain(image)[:, self.order], affine)

    def prepare(self, image: Tensor, affine: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The network's input, and the way back for its logits."""
        return self.preprocessing.prepare(plain(image)[:, self.order], affine)

    def gradient_support(self, image: Tensor, support: Tensor) -> Tensor:
        """Where the output's gradient is needed for the image's on ``support``, both ``(B, C, *spatial)``."""
        return self.preprocessing.gradient_support(image[:, self.order], support[:, self.order])
