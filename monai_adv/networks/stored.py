"""Files of weights beside plain data: what reading and writing them has in common, whatever they hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_adv.errors import CheckpointError


def read_stored(path: Path, kind: str, command: str) -> Any:
    """The content of a file of tensors and plain data; nothing in it is executed.

    Args:
        path: file to read.
        kind: what it should be, for messages.
        command: makes such a file.

    Raises:
        CheckpointError: if it is missing or cannot be read.
    """
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise CheckpointError(f"{kind} {path} does not exist; train one with `{command}`")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever the unpickler stumbles over
        raise CheckpointError(f"{kind} {path} cannot be read with weights_only=True: {error}") from error


def require_finite(state: Mapping[str, Tensor], path: Path, kind: str, hint: str = "") -> None:
    """Raise a :class:`CheckpointError` that names the weights of a state dict that are NaN or infinite."""
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"{kind} {path}: the weights {bad} are NaN or infinite{hint}")
