"""Weights of other people's checkpoints, read without executing anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import optional_import
from torch import Tensor

from monai_adv.errors import CheckpointError

STATE_KEYS = ("model", "network", "net", "state_dict", "network_weights")
"""Where a state dict is looked for in a checkpoint."""
# numbers and arrays that trainers log beside the weights; plain data
_NUMPY: list[Any] = [np._core.multiarray.scalar, np._core.multiarray._reconstruct, np.ndarray, np.dtype]  # type: ignore[attr-defined]
_NUMPY += [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]


def read_checkpoint_file(path: str | Path) -> Any:
    """What a ``.pt``, ``.pth`` or ``.safetensors`` file holds; nothing in it is executed.

    Raises:
        CheckpointError: if the file is missing, damaged, or holds more than tensors and plain data.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"weights {path} do not exist; download them, or give another file as weights=")
    try:
        if path.suffix == ".safetensors":
            load, available = optional_import("safetensors.torch", name="load_file")
            if not available:
                raise CheckpointError(f"{path} needs the package safetensors: python -m pip install safetensors")
            return load(str(path))
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes raise whatever the reader stumbles over
        raise CheckpointError(f"weights {path} cannot be read with weights_only=True: {error}") from error


def state_dict_of(content: Any, where: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint, bare or under one of :data:`STATE_KEYS`.

    Args:
        content: what was read.
        where: the file, for the message of an error.

    Raises:
        CheckpointError: if there is none, or a weight is NaN or infinite.
    """
    while isinstance(content, Mapping):
        inner = [content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"weights {where} hold no state dict (name -> tensor), bare or under {STATE_KEYS}")
    bad = [k for k, v in content.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"weights {where}: {bad} are NaN or infinite")
    return dict(content)
