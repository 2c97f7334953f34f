"""A defense in the place of a bundle's inferer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monai.inferers import Inferer
from torch import Tensor

from monai_adv.data.meta import like
from monai_adv.inferers import differentiable


class PurifiedInferer(Inferer):
    """Filter the image, then infer: purification for pipelines whose configuration names an inferer.

    A gradient flows through both, so an attack in the same evaluator is adaptive.

    Args:
        inferer: the pipeline's own; a plain ``SlidingWindowInferer`` gets exact gradients.
        purify: the filter on ``(B, C, *spatial)``, e.g. :class:`monai_adv.defenses.Purify`.
    """

    def __init__(self, inferer: Inferer, purify: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inferer = differentiable(inferer)
        self.purify = purify

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the inferer gives for the filtered image, with the image's metadata."""
        return self.inferer(like(self.purify(inputs), inputs), network, *args, **kwargs)
