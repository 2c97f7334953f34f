"""A gradient through a step that has none (BPDA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from monai_adv.errors import ConfigError


class StraightThrough(nn.Module):
    """Run a step as it is, and differentiate something else: the identity, or a smooth surrogate of the step.

    Rounding, histogram matching, a median filter or a denoiser called through NumPy hide the gradient from an attack,
    not the weakness from an attacker. Backward pass differentiable approximation makes a victim with such a step
    attackable. Use it as preprocessing or postprocessing of a :class:`monai_adv.victims.Victim`, or inside its network.

    Reference:
        Athalye et al., Obfuscated gradients give a false sense of security, ICML 2018.

    Args:
        step: the true step, tensor to tensor; it gets a copy without a graph and may change it in place, detach, or
            return another dtype.
        surrogate: a differentiable callable near to the step, whose gradient is taken at the step's input; the
            identity if None (then the step must keep the shape).

    Example:
        >>> x = torch.tensor([0.2, 1.7], requires_grad=True)
        >>> y = StraightThrough(torch.round)(x)
        >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
        ([0.0, 2.0], [1.0, 1.0])
    """

    def __init__(self, step: Callable[[Tensor], Any], surrogate: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        if not callable(step) or not (surrogate is None or callable(surrogate)):
            raise ConfigError(f"StraightThrough needs callables, got step {step!r} and surrogate {surrogate!r}")
        self.step = step
        self.surrogate = surrogate

    def forward(self, data: Tensor) -> Tensor:
        """The step's result, in the dtype of the gradient's path.

        Raises:
            ConfigError: if the step's shape is not that of the identity or of the surrogate.
        """
        with torch.no_grad():
            value = torch.as_tensor(self.step(data.detach().clone()))
        path = data if self.surrogate is None else self.surrogate(data)
        if value.shape != path.shape:
            raise ConfigError(
                f"the step turned {tuple(data.shape)} into {tuple(value.shape)}, its gradient comes from "
                f"{tuple(path.shape)}: give StraightThrough a surrogate with the step's shape"
            )
        return replaced(path, value)

    def gradient_support(self, image: Tensor, support: Tensor) -> Tensor:
        """Where the gradient of the output is needed for that of the image on ``support``.

        Args:
            image: ``(B, C, *spatial)``.
            support: same shape, bool.
        """
        if self.surrogate is None:
            return support
        rule = getattr(self.surrogate, "gradient_support", None)
        return torch.ones_like(support) if rule is None else rule(image, support)


def replaced(path: Tensor, value: Tensor) -> Tensor:
    """The value of the second tensor with the gradient (and the dtype) of the first.

    Args:
        path: where the gradient goes.
        value: same shape.

    Example:
        >>> x = torch.tensor([0.2, 1.7], requires_grad=True)
        >>> torch.autograd.grad(replaced(x, x.detach().round()).sum(), x)[0].tolist()
        [1.0, 1.0]
    """
    return _Replace.apply(path, value.to(path))


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, path: Tensor, value: Tensor) -> Tensor:
        return value.clone() if value is path else value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
