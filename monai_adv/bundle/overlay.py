"""Attack an unmodified MONAI bundle: a configuration file given last on its command line."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from monai_adv.attacks import create
from monai_adv.errors import ConfigError

OVERLAYS = ("attack", "defend", "robust_train")
"""Overlays that ship with the package; their keys are in docs/bundles.md."""


def overlay_path(name: str) -> Path:
    """File of an overlay, to be given last in ``python -m monai.bundle run --config_file "[...]"``.

    Args:
        name: "attack" (every batch of ``validate#evaluator``), "defend" (a filter in front of its inferer) or
            "robust_train" (every batch of ``train#trainer``).

    Raises:
        ConfigError: lists the names there are.

    Example:
        >>> overlay_path("attack").name
        'attack.json'
    """
    if name not in OVERLAYS:
        raise ConfigError(f"overlay {name!r} is unknown: use one of {', '.join(OVERLAYS)}")
    return Path(str(files("monai_adv.bundle") / f"{name}.json"))


def attack_overlay(
    attack: Mapping[str, Any], head: str = "sigmoid", evaluator: str = "validate#evaluator"
) -> dict[str, Any]:
    """Configuration that makes a bundle's evaluator attack every batch before it is scored.

    Save it as JSON and give it last: ``python -m monai.bundle run --config_file "['train.json', 'evaluate.json',
    'attack.json']"``. Nothing of the bundle is edited; its own handlers write the adversarial scores.

    Args:
        attack: ``{"name": ..., **options}`` for :func:`monai_adv.attacks.create`; checked here.
        head: head of the bundle's network (the zoo's BraTS bundle has a sigmoid head).
        evaluator: id of the evaluator in the bundle's configuration.

    Example:
        >>> attack_overlay({"name": "fgsm", "eps": 0.1})["validate#evaluator#iteration_update"]["head"]
        'sigmoid'
    """
    create(**attack)
    return {
        f"{evaluator}#iteration_update": {
            "_target_": "monai_adv.engines.AttackIteration",
            "attack": dict(attack),
            "head": head,
        }
    }
