"""Leave a network exactly as it was found, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from monai_adv.errors import MonaiAdvError


@contextmanager
def guard(network: nn.Module) -> Iterator[nn.Module]:
    """Put a network in evaluation mode with frozen parameters, and restore it afterwards, also on an exception.

    Inside, gradients flow to the input only: no parameter requires a gradient, normalisation layers use their
    running statistics. Afterwards every module's training flag and every parameter's ``requires_grad`` are what they
    were; ``.grad`` is never touched. A buffer that changed in between (BatchNorm statistics of a module that forces
    its training mode) is put back and reported.

    Usable as a context manager and, like every ``contextmanager``, as a decorator.

    Args:
        network: the module to protect.

    Raises:
        MonaiAdvError: if a buffer was changed inside (it is restored first).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
        >>> with guard(net):
        ...     net.training, any(p.requires_grad for p in net.parameters())
        (False, False)
        >>> net.training, all(p.requires_grad for p in net.parameters())
        (True, True)
    """
    modes = [(module, module.training) for module in network.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    buffers = [
        (module, f"{path}.{name}".lstrip("."), name, buffer, buffer.detach().clone())
        for path, module in network.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        network.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield network
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        changed = []
        with torch.no_grad():
            for module, path, name, buffer, before in buffers:
                replaced = module._buffers.get(name) is not buffer  # self.count = self.count + 1
                if replaced or not _identical(buffer, before):
                    buffer.copy_(before)
                    module._buffers[name] = buffer
                    changed.append(path)
    if changed:
        raise MonaiAdvError(
            f"the network changed its buffers {changed} while it was attacked (a module that ignores eval mode?); "
            "they were restored, the result is discarded"
        )


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # NaN equals NaN
