"""Attack an unmodified MONAI bundle: a configuration file given last on its command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai_adv.attacks import create


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
