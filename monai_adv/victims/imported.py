"""Weights trained elsewhere become a victim's checkpoint: a state dict, and what has to be said about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from monai_adv.errors import CheckpointError, ConfigError
from monai_adv.networks import build_network, trainable_network
from monai_adv.victims.checkpoint import FORMAT, VictimConfig, build_victim
from monai_adv.victims.head import Head
from monai_adv.victims.naming import channel_order, head_of_classes, region
from monai_adv.victims.weights import read_checkpoint_file, state_dict_of

# what trainers and torch.compile put in front of every name
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "_model.")
_OUTPUTS = {"sigmoid": ("TC", "WT", "ET"), "softmax": ("NCR", "ED", "ET")}
SHOWN = 4


def import_weights(
    weights: str | Path,
    network: Mapping[str, Any],
    *,
    head: str | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    **pipeline: Any,
) -> tuple[nn.Module, VictimConfig]:
    """Read weights that another program trained into one of MONAI's networks; :func:`save_checkpoint` writes them.

    Nothing in the file is executed. The weights must fit the network one to one.

    Args:
        weights: ``.pt``, ``.pth``, ``.ckpt`` or ``.safetensors`` file: a state dict, bare or under a usual name.
        network: ``{"name": class name in monai_adv.networks.NETWORKS, **arguments}`` as it was trained; four inputs
            and the head's outputs are filled in.
        head: "sigmoid" (a region per output) or "softmax" (the background and a class per output); the one that fits
            the weights if None.
        inputs: modalities in the network's order; T1, T1c, T2, FLAIR if None.
        outputs: what the network's outputs are, in order: regions of a sigmoid head (TC, WT, ET if None), classes
            after the background of a softmax head (NCR, ED, ET if None).
        **pipeline: further fields of :class:`VictimConfig`: ``preprocessing``, ``roi_size`` (128 per axis if left out),
            ``overlap``, ``mode``, ``sw_batch_size``, ``spacing``, ``training``.

    Raises:
        CheckpointError: if the file cannot be read, or does not fit; the message says in what.
        ConfigError: for unknown names or a pipeline that cannot be.

    Example:
        >>> network, config = import_weights(
        ...     "model.pt", {"name": "SegResNet", "init_filters": 16}, inputs=["T1c", "T1", "T2", "FLAIR"],
        ...     roi_size=[128, 128, 128], spacing=[1.0, 1.0, 1.0],
        ... )  # doctest: +SKIP
        >>> save_checkpoint("segresnet.pt", network, config)  # doctest: +SKIP
    """
    path = Path(weights)
    known = {f.name for f in fields(VictimConfig)} - {"network", "head", "regions"}
    if set(pipeline) - known:
        raise ConfigError(f"{', '.join(sorted(set(pipeline) - known))}: not one of {', '.join(sorted(known))}")
    content = read_checkpoint_file(path)
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        raise CheckpointError(f"{path} is a victim's checkpoint already: use it as it is")
    states = _without_prefixes(state_dict_of(content, str(path)))
    if head is not None and head not in _OUTPUTS:
        raise ConfigError(f"head {head!r} is unknown: use 'softmax' (classes) or 'sigmoid' (regions)")
    order = None if inputs is None else list(channel_order(inputs))
    dims = int(network.get("spatial_dims", 3))
    roi_size = list(pipeline.pop("roi_size", None) or [128] * dims)
    problems = []
    for kind in [head] if head else ["sigmoid", "softmax"]:
        described = dict(network)
        count = None if outputs is None else len(outputs) + (kind == "softmax")
        if count is not None:
            described.setdefault("out_channels", count)
        described = trainable_network(kind, roi_size, **described)
        if order is not None and order != list(range(len(order))):
            described["input_order"] = order
        found = build_network(described)
        difference, state = min(((_difference(s, found), s) for s in states), key=lambda fit: len(fit[0]))
        if difference:
            problems.append((len(difference), difference, described))
            continue
        found.load_state_dict(state)
        config = VictimConfig(described, kind, _regions(kind, outputs), roi_size=roi_size, **pipeline)
        build_victim(found, config)  # raises where the pipeline cannot be
        return found.eval(), config
    _, difference, described = min(problems, key=lambda problem: problem[0])
    more = f"; {len(difference) - SHOWN} more" if len(difference) > SHOWN else ""
    arguments = ", ".join(f"{key}={value}" for key, value in described.items() if key != "name")
    raise CheckpointError(
        f"weights {path} do not fit {described['name']}({arguments}): {'; '.join(difference[:SHOWN])}{more}. Name the "
        "network and its arguments (--network, --network-option) as they were trained"
    )


def _regions(kind: str, outputs: Sequence[str] | None) -> Any:
    """Regions of the head as plain data; None for the BraTS default."""
    if outputs is None or [region(name) for name in outputs] == list(_OUTPUTS[kind]):
        return None
    if kind == "sigmoid":
        return [region(name) for name in outputs]
    head: Head = head_of_classes(dict(enumerate(outputs, start=1)))
    assert isinstance(head.regions, Mapping)
    return {name: list(members) for name, members in head.regions.items()}


def _without_prefixes(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The state dict as it is, and without what wrappers put in front of every name, one more taken off each time."""
    found = [dict(state)]
    while (shared := next((p for p in _PREFIXES if all(n.startswith(p) for n in found[-1])), None)) is not None:
        found.append({name[len(shared) :]: value for name, value in found[-1].items()})
    return found


def _difference(state: Mapping[str, Tensor], network: nn.Module) -> list[str]:
    """In what a state dict does not fit a network: first other shapes, which name the argument that is wrong."""
    own = network.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the network"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    missing, extra = [n for n in own if n not in state], [n for n in state if n not in own]
    found = shapes
    if missing:
        found = [*found, f"{len(missing)} weights are not in the file, {_some(missing)}"]
    if extra:
        found = [*found, f"{len(extra)} of the file are not in the network, {_some(extra)}"]
    return found


def _some(names: Sequence[str]) -> str:
    layers = list(dict.fromkeys(re.sub(r"\.(weight|bias|running_\w+|num_batches_tracked)$", "", n) for n in names))
    return f"{', '.join(layers[:2])} ..." if len(layers) > 2 else ", ".join(layers)
