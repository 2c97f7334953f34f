"""Which of the things a network returned are its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from monai_adv.errors import ConfigError

__all__ = ["logits_of"]

_KEYS = ("logits", "out", "pred")


def logits_of(output: Any, window: torch.Tensor) -> torch.Tensor:
    """The logits in what a network returned for a window batch.

    Args:
        output: a tensor; a tuple or list, of which the first entry counts; a mapping with one entry or with exactly
            one of the keys ``"logits"``, ``"out"``, ``"pred"``.
        window: the window batch (N, C, \\*spatial).

    Returns:
        A tensor (N, K, \\*spatial).

    Raises:
        ConfigError: where no logits can be told.
    """
    found = output
    if isinstance(found, Mapping):
        keys = [key for key in _KEYS if key in found]
        if len(found) != 1 and len(keys) != 1:
            raise ConfigError(
                f"the network returned a dictionary with the keys {list(found)}, in which the logits cannot be told: "
                f"return one entry, or exactly one of {list(_KEYS)}, or wrap the network so that it returns "
                "the logits alone, e.g. lambda x: network(x)['seg']"
            )
        found = found[keys[0]] if len(found) != 1 else next(iter(found.values()))
    elif isinstance(found, tuple | list):
        if len(found) == 0:
            raise ConfigError("the network returned an empty sequence; it must return its logits first")
        found = found[0]
    if not isinstance(found, torch.Tensor):
        raise ConfigError(
            f"the network returned {type(output).__name__} with {type(found).__name__} where a tensor of logits was "
            "expected: wrap the network so that it returns the logits alone"
        )
    if found.ndim != window.ndim or found.shape[0] != window.shape[0] or not found.is_floating_point():
        raise ConfigError(
            f"the network turned a window batch of shape {tuple(window.shape)} into {found.dtype} of shape "
            f"{tuple(found.shape)}, which are not logits (N, K, *spatial) of the same batch: deep-supervision heads "
            "are off in eval mode; otherwise wrap the network so that it returns the logits alone"
        )
    return found
