"""An untrained victim that predicts every class somewhere: there is something to filter, attack and certify."""

from __future__ import annotations

import torch
from oracles import make_image, make_victim

from monai_adv.victims import Victim


def varied(head: str = "softmax", dims: int = 3, scale: float = 4.0) -> Victim:
    """:func:`oracles.make_victim` with windows, whose classes have equal mean logits on :func:`oracles.make_image`."""
    victim = make_victim("windows", head, dims)
    last = victim.network[-1]
    with torch.no_grad():
        logits = victim(make_image(1, dims))
        last.bias -= logits.mean((0, *range(2, logits.dim())))
        last.weight *= scale
        last.bias *= scale
    return victim
