"""Files of weights beside plain data: what reading and writing them has in common, whatever they hold."""

from __future__ import annotations

import os
import re
import zipfile
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
        what = "is a folder: give the file" if os.path.isdir(path) else "does not exist"
        raise CheckpointError(f"{kind} {path} {what}; train one with `{command}`")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever the unpickler stumbles over
        raise CheckpointError(f"{kind} {path} cannot be read with weights_only=True: {_why(path, error)}") from error


def _why(path: Path, error: Exception) -> str:
    """What is the matter with a file, in one line, instead of torch's advice to execute it."""
    refused = re.search(r"Unsupported (?:global|class)[^:]*: (?:GLOBAL )?([\w.]+)", str(error))
    if refused is not None:
        return (
            f"it holds objects of {refused[1]}, which only code in the file could make; save the weights alone, "
            "torch.save(network.state_dict(), ...)"
        )
    if os.path.getsize(path) == 0:
        return "the file is empty; copy it again"
    if not zipfile.is_zipfile(path):
        return "it is damaged, or no file of torch.save; copy it again"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require_finite(state: Mapping[str, Tensor], path: Path, kind: str, hint: str = "") -> None:
    """Raise a :class:`CheckpointError` that names the weights of a state dict that are NaN or infinite."""
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"{kind} {path}: the weights {bad} are NaN or infinite{hint}")
