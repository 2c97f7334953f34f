"""A victim in one file: weights beside the plain configuration that rebuilds the pipeline around them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import ensure_tuple_rep
from torch import nn

from monai_adv import __version__
from monai_adv.data.files import atomic_file
from monai_adv.errors import CheckpointError, MonaiAdvError
from monai_adv.inferers import GradientSlidingWindowInferer, SlicewiseInferer
from monai_adv.networks import build_network, spatial_dims
from monai_adv.networks.stored import read_stored, require_finite
from monai_adv.transforms import NormalizeNonzeroBatch, NormalizeNonzeroSlices
from monai_adv.victims.head import Head
from monai_adv.victims.victim import UNSEEN, Victim

FORMAT = "monai_adv.victim/1"
_HALF = " (beyond 65504 in 16 bits)"
PREPROCESSING = {
    "zscore_nonzero": NormalizeNonzeroBatch,
    "zscore_nonzero_slices": NormalizeNonzeroSlices,
    "none": None,
}


@dataclass
class VictimConfig:
    """Everything beside the weights that a deployed pipeline needs, as plain data.

    Args:
        network: configuration for :func:`monai_adv.networks.build_network`.
        head: "softmax" or "sigmoid".
        regions: region names of a sigmoid head in channel order, or ``{name: class indices}`` of a softmax head;
            the BraTS default if None.
        preprocessing: "zscore_nonzero" (per channel over non-zero voxels), "zscore_nonzero_slices" (the same for every
            slice) or "none".
        roi_size: sliding window in voxels, one per axis of the network.
        overlap: overlap of windows, in [0, 1).
        mode: blending, "gaussian" or "constant".
        sw_batch_size: windows per forward.
        spacing: spacing in mm the network was trained at, for information and for the resampling victim.
        training: how the weights came about (command, seed, cohort), for information.
    """

    network: dict[str, Any]
    head: str = "softmax"
    regions: Any = None
    preprocessing: str = "zscore_nonzero"
    roi_size: list[int] = field(default_factory=lambda: [64, 64, 64])
    overlap: float = 0.5
    mode: str = "gaussian"
    sw_batch_size: int = 2
    spacing: list[float] | None = None
    training: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: str | Path, network: nn.Module, config: VictimConfig, *, half: bool = False) -> Path:
    """Write a network's weights and the configuration of its pipeline, atomically.

    Args:
        path: file to write (``.pt``).
        network: the trained network.
        config: its pipeline.
        half: store floating point weights in 16 bits (they are computed with in 32).

    Raises:
        CheckpointError: if the configuration is no plain data, or a weight is NaN, infinite, or too large for 16 bits.
    """
    path = Path(path)
    try:
        plain = json.loads(json.dumps(asdict(config)))  # whatever else pickle would take could not be read back safely
    except TypeError as error:
        raise CheckpointError(f"checkpoint {path}: its configuration is not plain data: {error}") from error
    state = {k: v.detach().cpu() for k, v in network.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    require_finite(state, path, "checkpoint", _HALF)
    with atomic_file(path) as stream:
        torch.save({"format": FORMAT, "version": __version__, "config": plain, "state_dict": state}, stream)
    return path


def read_checkpoint(path: str | Path) -> tuple[nn.Module, VictimConfig]:
    """Read a checkpoint written by :func:`save_checkpoint`; nothing in the file is executed.

    Raises:
        CheckpointError: if the file is missing, not such a checkpoint, or does not fit its own network.
    """
    path = Path(path)
    content = read_stored(path, "checkpoint", "monai-adv train")
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} is not a {FORMAT} file; make one of weights trained elsewhere by "
            f"`monai-adv victim {path} -o victim.pt --network NAME` (in Python import_weights, or Victim(network, ...))"
        )
    try:
        config = VictimConfig(**content["config"])
        network = build_network(config.network)
    except Exception as error:  # a missing key, or whatever a network makes of arguments that mean nothing
        raise CheckpointError(f"checkpoint {path}: its configuration is not one of this version: {error}") from error
    try:
        state = {k: v.float() if v.is_floating_point() else v for k, v in content["state_dict"].items()}
        network.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit its network {config.network}: {error}") from error
    require_finite(state, path, "checkpoint", _HALF)
    return network.eval(), config


def build_victim(
    network: nn.Module,
    config: VictimConfig,
    *,
    name: str = "network",
    device: str | torch.device = "cpu",
    keep_windows: int | str = "auto",
) -> Victim:
    """The deployed pipeline around a network.

    A 2D network takes slices ``(B, C, H, W)``, and volumes ``(B, C, H, W, D)`` slice by slice along the last axis; a
    slice that is zero everywhere is background (see :class:`monai_adv.inferers.SlicewiseInferer`).

    Raises:
        CheckpointError: for a preprocessing or a window that this network cannot have.
    """
    if config.preprocessing not in PREPROCESSING:
        raise CheckpointError(
            f"preprocessing {config.preprocessing!r} is unknown: use one of {', '.join(PREPROCESSING)}"
        )
    if not (isinstance(config.overlap, (int, float)) and 0 <= config.overlap < 1):
        raise CheckpointError(f"overlap {config.overlap!r} must be a number in [0, 1)")
    if not (isinstance(config.sw_batch_size, int) and config.sw_batch_size >= 1):
        raise CheckpointError(f"sw_batch_size {config.sw_batch_size!r} must be a whole number of 1 or more")
    dims = spatial_dims(config.network)
    if len(config.roi_size) != dims:
        raise CheckpointError(f"roi_size {list(config.roi_size)} has not the {dims} axes of the network")
    fixed = config.network.get("img_size")
    if fixed is not None and list(config.roi_size) != list(ensure_tuple_rep(fixed, dims)):
        raise CheckpointError(
            f"{config.network['name']} was built for images of {fixed}: its windows cannot be {list(config.roi_size)}"
        )
    head, normalisation = Head(config.head, config.regions), PREPROCESSING[config.preprocessing]
    inferer: Inferer = GradientSlidingWindowInferer(
        roi_size=tuple(config.roi_size),
        sw_batch_size=config.sw_batch_size,
        overlap=config.overlap,
        mode=config.mode,
        keep_windows=keep_windows,
    )
    if dims == 2:
        channels = config.network.get("out_channels")  # where the class's default counts the network is asked
        background = None if channels is None else [UNSEEN] * int(channels)
        if background is not None and head.exclusive:
            background[0] = 0.0
        inferer = SlicewiseInferer(inferer, background)
    return Victim(
        network.to(device),
        inferer=inferer,
        head=head,
        preprocessing=None if normalisation is None else normalisation(),
        name=name,
    )


def load_victim(
    path: str | Path,
    *,
    name: str | None = None,
    device: str | torch.device = "cpu",
    keep_windows: int | str = "auto",
    **changes: Any,
) -> Victim:
    """A :class:`Victim` from a checkpoint file.

    Args:
        path: file written by ``monai-adv train`` or :func:`save_checkpoint`.
        name: how tables call it; the file's stem by default.
        device: where it runs.
        keep_windows: see :class:`monai_adv.inferers.GradientSlidingWindowInferer`.
        **changes: fields of :class:`VictimConfig` to replace, e.g. ``overlap=0.25``; None keeps the stored value. The
            network itself is as it was trained.

    Raises:
        CheckpointError: see :func:`read_checkpoint`; also for an unknown field in ``changes``.
    """
    network, config = read_checkpoint(path)
    changeable = [f.name for f in fields(VictimConfig) if f.name not in ("network", "training")]
    for key, value in changes.items():
        if key not in changeable:
            raise CheckpointError(f"{key!r} cannot be changed in a stored victim: use one of {', '.join(changeable)}")
        if value is not None:
            setattr(config, key, value)
    try:
        return build_victim(network, config, name=name or Path(path).stem, device=device, keep_windows=keep_windows)
    except MonaiAdvError:
        raise
    except Exception as error:  # whatever libraries make of a stored option that means nothing
        raise CheckpointError(f"checkpoint {path}: its pipeline cannot be built: {error}") from error


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()
