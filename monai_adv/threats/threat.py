"""What an attacker may change: norm, budget and its units, bounds, support, modalities."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from monai_adv.errors import ConfigError
from monai_adv.threats.ball import Ball, L2Ball, LInfBall, ParametricBall
from monai_adv.threats.levels import Levels, Quantize, check_quantize
from monai_adv.threats.units import UNITS, foreground, unit_scale

Bounds = str | tuple[float | Sequence[float], float | Sequence[float]] | None


@dataclass(frozen=True)
class Threat(ABC):
    """A threat model: the set of perturbations an attack may use.

    A threat is a description without data; :meth:`bind` puts it around an image.

    Args:
        eps: budget, >= 0, in ``units``; ``inf`` leaves the perturbation's size to the attack (its bounds and support
            still hold).
        units: "std" (standard deviations of the support, per channel), "range" (fractions of its 0.5-99.5 percentile
            range, per channel; 8/255 of it is the usual "8/255") or "absolute" (the image's own units).
        channels: indices of the modalities that may change; all if None.
        bounds: "data" (each channel stays between the clean image's smallest and largest value), a pair
            ``(low, high)`` of numbers or of one number per channel, or None for no bounds.
        support: "foreground" (voxels where the channel is not zero) or "all"; a mask given to :meth:`bind` overrules.
        proportions: the modalities' own budgets as multiples of ``eps``, one number >= 0 per channel, e.g. with
            ``eps=1, units="absolute"`` the budget of each in scanner units; equal if None.
        quantize: the integer type the image is stored in ("int16" ...), or ``{"dtype": "int16", "slope": 0.5,
            "inter": 0}``: every image an attack tries, and returns, holds values of such a file (gradients pass
            straight through the rounding). None leaves values free.
    """

    eps: float
    units: str = "std"
    channels: tuple[int, ...] | None = None
    bounds: Bounds = "data"
    support: str = "foreground"
    proportions: tuple[float, ...] | None = None
    quantize: Quantize = None
    norm: ClassVar[str]

    def __post_init__(self) -> None:
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not self.eps >= 0:
            raise ConfigError(f"eps must be a number >= 0, got {self.eps!r}")
        self._check_units()
        if self.support not in ("foreground", "all"):
            raise ConfigError(f"support {self.support!r} is unknown: use 'foreground', 'all', or give a mask")
        if isinstance(self.bounds, str) and self.bounds != "data":
            raise ConfigError(f"bounds {self.bounds!r} are unknown: use 'data', (low, high) or None")
        if self.bounds is not None and not isinstance(self.bounds, str) and len(self.bounds) != 2:
            raise ConfigError(f"bounds need two ends, (low, high), got {self.bounds!r}")
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(int(c) for c in self.channels))
            if not self.channels:
                raise ConfigError("channels is empty: name at least one modality or leave it out for all")
        if self.proportions is not None:
            try:
                object.__setattr__(self, "proportions", tuple(float(p) for p in self.proportions))
            except (TypeError, ValueError):
                raise ConfigError(f"proportions need one number per channel, got {self.proportions!r}") from None
            if not all(0 <= p < math.inf for p in self.proportions):
                raise ConfigError(f"proportions must be finite and >= 0, got {list(self.proportions)}")
        check_quantize(self.quantize)

    def _check_units(self) -> None:
        if self.units not in UNITS:
            raise ConfigError(f"units {self.units!r} are unknown: use one of {', '.join(UNITS)}")

    def with_eps(self, eps: float) -> Threat:
        """The same threat with another budget."""
        return replace(self, eps=eps)

    def bind(self, image: Tensor, support: Tensor | None = None) -> Ball:
        """The set of images this threat allows around a clean image.

        Args:
            image: clean ``(B, C, *spatial)``.
            support: boolean mask ``(B, 1 or C, *spatial)`` of the voxels that may change; by the rule if None.

        Raises:
            ConfigError: if no voxel of a sample may change (an empty support, or a constant one in relative units), or
                a channel or bound does not exist.
        """
        batch, channels, *spatial = image.shape
        if support is None:
            mask = foreground(image) if self.support == "foreground" else torch.ones_like(image, dtype=torch.bool)
        else:
            if support.shape[0] != batch or support.shape[1] not in (1, channels) or list(support.shape[2:]) != spatial:
                raise ConfigError(f"support {tuple(support.shape)} does not fit the image {tuple(image.shape)}")
            mask = support.to(image.device).bool().expand(image.shape)
        scale = self._scale(image, mask)
        if self.channels is not None:
            if min(self.channels) < -channels or max(self.channels) >= channels:
                raise ConfigError(f"channels {self.channels} do not exist in an image of {channels} channels")
            chosen = torch.zeros(channels, dtype=torch.bool, device=image.device)
            chosen[list(self.channels)] = True
            mask = mask & chosen.view(1, -1, *[1] * len(spatial))
        mask = mask & (scale > 0)  # a constant channel has no standard deviation or range to move by
        empty = (~mask.flatten(1).any(1)).nonzero().flatten().tolist()
        if empty:
            raise ConfigError(
                f"no voxel of sample {empty} may change: its support is empty"
                + ("" if self.units == "absolute" else f" or constant, so that one {self.units} of it is 0")
            )
        low, high = self._limits(image)
        ball = self._ball(image.detach(), mask, scale, low, high)
        ball.levels = Levels.of(self.quantize, ball.clean)
        return ball

    def _scale(self, image: Tensor, mask: Tensor) -> Tensor:
        scale = unit_scale(image, mask, self.units)
        if self.proportions is None:
            return scale
        if len(self.proportions) != image.shape[1]:
            raise ConfigError(
                f"{len(self.proportions)} proportions for {image.shape[1]} channels: give one for each modality"
            )
        return scale * torch.as_tensor(self.proportions, dtype=scale.dtype, device=scale.device).view_as(scale[:1])

    def _limits(self, image: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.bounds is None:
            return None, None
        if isinstance(self.bounds, str):
            dims = tuple(range(2, image.dim()))
            return image.amin(dims, keepdim=True), image.amax(dims, keepdim=True)
        limits = []
        for bound in self.bounds:
            values = torch.as_tensor(bound, dtype=image.dtype, device=image.device).flatten()
            if len(values) not in (1, image.shape[1]):
                raise ConfigError(f"bounds need one number or one per channel ({image.shape[1]}), got {len(values)}")
            limits.append(values.view(1, -1, *[1] * (image.dim() - 2)))
        low, high = limits
        if bool((low > high).any()):
            raise ConfigError(f"bounds {self.bounds} have a lower end above the upper one")
        if bool((image < low).any()) or bool((image > high).any()):
            raise ConfigError(
                f"the clean image leaves the bounds {self.bounds}: it spans {float(image.min()):.4g} to "
                f"{float(image.max()):.4g}; use bounds='data' or bounds in the image's units"
            )
        return low, high

    @abstractmethod
    def _ball(self, clean: Tensor, mask: Tensor, scale: Tensor, low: Tensor | None, high: Tensor | None) -> Ball: ...

    def describe(self) -> str:
        """One line for tables and reports, e.g. ``L-inf <= 0.1 std``."""
        if math.isinf(self.eps):
            return f"unbounded {self.norm_name} in {self.units}{self._where()}"
        return f"{self.norm_name} <= {self.eps:g} {self.units}{self._where()}"

    def _where(self) -> str:
        found = "" if self.channels is None else f", channels {list(self.channels)}"
        if self.proportions is not None:
            found += f", times {[float(f'{p:.4g}') for p in self.proportions]}"
        if self.quantize is not None:
            found += f", stored as {self.quantize if isinstance(self.quantize, str) else self.quantize['dtype']}"
        return found

    def plain(self) -> dict[str, Any]:
        """Every field as plain data, for records."""
        return {"norm": self.norm, **asdict(self)}

    @property
    def norm_name(self) -> str:
        """The norm as readers write it."""
        return {"linf": "L-inf", "l2": "L2", "parameter": "parameter"}[self.norm]


class LInf(Threat):
    """No voxel of the support changes by more than ``eps`` (in ``units``, per channel).

    Example:
        >>> import torch
        >>> ball = LInf(0.5, units="absolute").bind(torch.tensor([[[0.0, 1.0, 3.0]]]))
        >>> ball.project(torch.tensor([[[9.0, 0.0, 3.2]]])).tolist()
        [[[0.0, 0.5, 3.0]]]
    """

    norm: ClassVar[str] = "linf"

    def _ball(self, clean: Tensor, mask: Tensor, scale: Tensor, low: Tensor | None, high: Tensor | None) -> Ball:
        return LInfBall(clean, mask, scale, self.eps, low, high)


class L2(Threat):
    """The Euclidean length of the whole perturbation, each channel measured in ``units``, is at most ``eps``.

    Example:
        >>> import torch
        >>> ball = L2(5.0, units="absolute", bounds=None).bind(torch.ones(1, 1, 2))
        >>> ball.project(torch.tensor([[[7.0, 9.0]]])).tolist()
        [[[4.0, 5.0]]]
    """

    norm: ClassVar[str] = "l2"

    def _ball(self, clean: Tensor, mask: Tensor, scale: Tensor, low: Tensor | None, high: Tensor | None) -> Ball:
        return L2Ball(clean, mask, scale, self.eps, low, high)


class Parametric(Threat):
    """The parameters of a physical change (a bias field, a deformation, motion ...) are limited, not its voxels.

    Args:
        eps: budget of the parameters, in ``units``.
        units: of the parameters, e.g. "mm"; the attack names them.
        channels: modalities that may change.
        bounds: None (default: the change is real physics) or as :class:`Threat`, then the image is clipped.
        support: as :class:`Threat`; voxels that may change where the change acts on intensities.
        proportions: None; a physical change has one budget.
        quantize: as :class:`Threat`.
    """

    norm: ClassVar[str] = "parameter"

    def __init__(
        self,
        eps: float,
        units: str = "absolute",
        channels: tuple[int, ...] | None = None,
        bounds: Bounds = None,
        support: str = "foreground",
        proportions: None = None,
        quantize: Quantize = None,
    ) -> None:
        if proportions is not None:
            raise ConfigError("proportions belong to voxelwise budgets; a physical change has one")
        for name, value in {
            "eps": eps, "units": units, "channels": channels, "bounds": bounds, "support": support,
            "proportions": None, "quantize": quantize,
        }.items():  # fmt: skip
            object.__setattr__(self, name, value)
        self.__post_init__()

    def _check_units(self) -> None:
        if math.isinf(self.eps):
            raise ConfigError("eps of a parametric threat must be finite")

    def _scale(self, image: Tensor, mask: Tensor) -> Tensor:
        return unit_scale(image, mask, "absolute")

    def _ball(self, clean: Tensor, mask: Tensor, scale: Tensor, low: Tensor | None, high: Tensor | None) -> Ball:
        return ParametricBall(clean, mask, scale, self.eps, low, high)

    def describe(self) -> str:
        return f"parameters <= {self.eps:g} {self.units}{self._where()}"


THREATS: dict[str, type[Threat]] = {"linf": LInf, "l2": L2, "parameter": Parametric}
"""Threats by the name of their norm."""


def create_threat(norm: str = "linf", **arguments: object) -> Threat:
    """A threat by the name of its norm: "linf", "l2" or "parameter".

    Raises:
        ConfigError: for an unknown norm or argument.
    """
    if norm not in THREATS:
        raise ConfigError(f"norm {norm!r} is unknown: use one of {', '.join(THREATS)}")
    try:
        return THREATS[norm](**arguments)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"threat {norm}: {error}") from error
