"""A synthesis generator in one file: weights beside the plain data that rebuild it and say what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from monai_adv import __version__
from monai_adv.data.files import atomic_file
from monai_adv.errors import CheckpointError, ConfigError
from monai_adv.networks.synthesis import SynthesisGenerator

FORMAT = "monai_adv.synthesis/1"


def save_generator(path: str | Path, generator: SynthesisGenerator, training: Mapping[str, Any] | None = None) -> Path:
    """Write a generator's weights and configuration, atomically.

    Args:
        path: file to write (``.pt``).
        generator: the generator.
        training: how the weights came about (victim, recipe, subjects), plain data.

    Raises:
        CheckpointError: if ``training`` is no plain data, or a weight is NaN or infinite.
    """
    path = Path(path)
    try:
        plain = json.loads(json.dumps({"config": generator.config(), "training": dict(training or {})}))
    except TypeError as error:
        raise CheckpointError(f"generator {path}: what it was trained on is not plain data: {error}") from error
    state = {k: v.detach().cpu() for k, v in generator.state_dict().items()}
    _require_finite(state, path)
    with atomic_file(path) as stream:
        torch.save({"format": FORMAT, "version": __version__, **plain, "state_dict": state}, stream)
    return path


def load_generator(path: str | Path) -> SynthesisGenerator:
    """Read a generator written by :func:`save_generator`; nothing in the file is executed.

    Returns:
        The generator on the CPU, in evaluation mode; ``training_info`` is what was stored beside the weights.

    Raises:
        CheckpointError: if the file is missing, not a generator, or does not fit its own configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"generator {path} does not exist; train one with `monai-adv train-synthesis`")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever the unpickler stumbles over
        raise CheckpointError(f"generator {path} cannot be read with weights_only=True: {error}") from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a generator ({FORMAT}); write one with `monai-adv train-synthesis` or save_generator"
        )
    try:
        generator = SynthesisGenerator(**content["config"])
        generator.training_info = dict(content["training"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"generator {path}: its configuration is not one of this version: {error}") from error
    try:
        generator.load_state_dict(content["state_dict"])
    except (RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"generator {path}: its weights do not fit its configuration: {error}") from error
    _require_finite(content["state_dict"], path)
    return generator.eval()


def _require_finite(state: Mapping[str, torch.Tensor], path: Path) -> None:
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"generator {path}: the weights {bad} are NaN or infinite")
