"""The values a file can hold: an attack on stored scans may only use those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_adv.errors import ConfigError

Quantize = str | Mapping[str, Any] | None
TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
_SLACK = 1e-5  # of a level: what float32 loses on the way from a stored number to its value and back


def check_quantize(quantize: Quantize) -> None:
    """Make sure that a quantisation is one.

    Raises:
        ConfigError: for an unknown type or key, or a slope that is not positive.
    """
    if quantize is None:
        return
    rule = {"dtype": quantize} if isinstance(quantize, str) else dict(quantize)
    if rule.get("dtype") not in TYPES or set(rule) - {"dtype", "slope", "inter"}:
        raise ConfigError(
            f"quantize {quantize!r} is not understood: use one of {', '.join(TYPES)}, or "
            "{dtype: int16, slope: 0.5, inter: 0} with one number or one per channel"
        )
    slopes = np.atleast_1d(rule.get("slope", 1.0))
    if not (np.isfinite(slopes).all() and (slopes > 0).all()):
        raise ConfigError(f"quantize: slope must be > 0, got {rule['slope']!r}")


@dataclass(frozen=True)
class Levels:
    """The stored numbers ``k`` of an integer type, whose values are ``inter + slope k``.

    Args:
        slope: distance of neighbouring values, ``(1, 1 or C, 1, ...)`` float64.
        inter: value of 0, same shape.
        lowest: smallest stored number.
        highest: largest stored number.
        name: the type, for messages.
    """

    slope: Tensor
    inter: Tensor
    lowest: int
    highest: int
    name: str

    @classmethod
    def of(cls, quantize: Quantize, image: Tensor) -> Levels | None:
        """The levels for an image ``(B, C, *spatial)``, or None without quantisation.

        Raises:
            ConfigError: if the image does not hold such values.
        """
        if quantize is None:
            return None
        rule = {"dtype": quantize} if isinstance(quantize, str) else dict(quantize)
        limits = np.iinfo(rule["dtype"])
        shape = (1, -1, *[1] * (image.dim() - 2))
        slope, inter = (
            torch.as_tensor(rule.get(key, default), dtype=torch.float64, device=image.device).view(shape)
            for key, default in (("slope", 1.0), ("inter", 0.0))
        )
        for key, value in (("slope", slope), ("inter", inter)):
            if value.shape[1] not in (1, image.shape[1]):
                raise ConfigError(f"quantize: {key} needs one number or one per channel, got {value.shape[1]}")
        levels = cls(slope, inter, int(limits.min), int(limits.max), str(rule["dtype"]))
        number = levels.number(image)
        nearest = number.round()  # the type's largest number times a slope, in float32, may lie a bit beyond it
        wrong = ((number - nearest).abs() > 1e-3) | (nearest < limits.min) | (nearest > limits.max)
        if bool(wrong.any()):
            raise ConfigError(
                f"quantize={quantize!r}: {int(wrong.sum())} voxels of the clean image are no {levels.name} values; "
                "attack the image as it is stored (before any resampling), or leave quantize out"
            )
        return levels

    def number(self, image: Tensor) -> Tensor:
        """The stored numbers of values, not rounded, in float64."""
        return (image.double() - self.inter) / self.slope

    def value(self, number: Tensor) -> Tensor:
        """The values of stored numbers, in float64."""
        return number * self.slope + self.inter

    def range(self, low: Tensor | None, high: Tensor | None) -> tuple[Tensor, Tensor]:
        """First and last stored number between two values; the type's own where there is no limit."""
        least = torch.full_like(self.slope, self.lowest)
        most = torch.full_like(self.slope, self.highest)
        if low is not None:
            least = torch.maximum(least, torch.ceil(self.number(low) - _SLACK))
        if high is not None:
            most = torch.minimum(most, torch.floor(self.number(high) + _SLACK))
        return least, most
