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
from monai_adv.networks.stored import read_stored, require_finite
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
    require_finite(state, path, "generator")
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
    content = read_stored(path, "generator", "monai-adv train-synthesis")
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
    require_finite(content["state_dict"], path, "generator")
    return generator.eval()
