"""Methods of robust training by name, for YAML, the command line and checkpoints."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from monai_adv.attacks.registry import THREAT_OPTIONS
from monai_adv.engines.robust.adversarial import AdversarialIteration
from monai_adv.engines.robust.distillation import DistillationIteration
from monai_adv.engines.robust.free import FreeIteration
from monai_adv.engines.robust.paired import TradesIteration, VAFTIteration
from monai_adv.engines.robust.synthesis import SynthesisIteration
from monai_adv.errors import ConfigError
from monai_adv.victims import Head

METHODS: dict[str, str] = {
    "plain": "the engine's own step",
    "noise": "control: Gaussian noise of standard deviation eps on a share of each batch",
    "fgsm_at": "FGSM with a random start on a share of each batch (Goodfellow 2015; step 1.25 eps, Wong 2020)",
    "pgd_at": "PGD of some steps on a share of each batch (Madry 2018)",
    "free": "m replays of each batch, one backward for weights and perturbation (Shafahi 2019)",
    "trades": "clean loss + beta KL(clean || adversarial) (Zhang 2019)",
    "vafa_at": "frequency adversarial training, VAFT (Hanif 2023)",
    "distillation": "cross entropy at temperature T against a teacher (Papernot 2016)",
    "synthesis": "a share of each batch replaced by what a trained generator makes of it (Chen 2019)",
}
"""Methods of robust training by name, with one line on each."""
_EPS = 0.1
_GIVEN = ("self", "attack", "threat", "head", "iteration_update", "image_key", "label_key", "preprocessing")
Iteration = Callable[[Any, Any], Any]


def create_method(method: str | Mapping[str, Any] | None, head: str | Head = "softmax") -> Iteration | None:
    """An ``iteration_update`` from plain data.

    Args:
        method: a name of :data:`METHODS`, or ``{"name": ..., **options}``: options of the iteration (share, budget,
            beta, replays, temperature, generator ...) and of the attack or its threat (eps, norm, units, steps, loss
            ...). The budget is .1 if left out, in "absolute" units: batches are normalised, so these are standard
            deviations of the brain.
        head: head of the engine's network.

    Returns:
        The iteration, or None for plain training.

    Raises:
        ConfigError: for an unknown name or option.

    Example:
        >>> create_method({"name": "pgd_at", "eps": 0.2, "steps": 2}).attack.threat.describe()
        'L-inf <= 0.2 absolute'
    """
    options: dict[str, Any] = {"name": method or "plain"} if not isinstance(method, Mapping) else dict(method)
    name = options.pop("name", None)
    if name == "offline":
        raise ConfigError(
            "offline copies are data, not a step: make them with monai_adv.studies.offline.adversarial_copies, or by "
            "`monai-adv train --method offline`"
        )
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown: use one of {', '.join(METHODS)}, offline")
    if name == "plain":
        _refuse(name, options, ())
        return None
    if name == "distillation":
        own = _own(DistillationIteration)
        _refuse(name, {k: v for k, v in options.items() if k not in own}, own)
        return DistillationIteration(**options, head=head)
    if name == "synthesis":
        own = _own(SynthesisIteration)
        _refuse(name, {k: v for k, v in options.items() if k not in own}, own)
        if "generator" not in options:
            raise ConfigError("method synthesis needs generator: the file of a trained one")
        return SynthesisIteration(**options)
    if name == "free":
        own, threat = _own(FreeIteration), ("eps", "norm", *THREAT_OPTIONS)
        _refuse(name, {k: v for k, v in options.items() if k not in own + threat}, own + threat)
        return FreeIteration({"eps": _EPS, "units": "absolute", **_take(options, threat)}, **options)
    if name == "vafa_at":
        iteration = _take(options, _own(VAFTIteration))
        return VAFTIteration({"name": "vafa", "units": "absolute", **options}, head=head, **iteration)
    eps: Any = options.get("eps", _EPS)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise ConfigError(f"eps of {name} must be a finite number > 0, got {eps!r}")
    presets: dict[str, dict[str, Any]] = {
        "noise": {"name": "noise", "kind": "gaussian"},
        "fgsm_at": {"name": "pgd", "steps": 1, "step_size": 1.25 * eps},
        "pgd_at": {"name": "pgd", "steps": 3},
        "trades": {"name": "pgd", "steps": 3},
    }
    cls: Any = TradesIteration if name == "trades" else AdversarialIteration
    iteration = _take(options, _own(cls))
    fixed = {"noise": ("kind",), "fgsm_at": ("steps", "step_size")}.get(name, ())
    if wrong := [option for option in fixed if option in options]:
        raise ConfigError(f"method {name} fixes {', '.join(wrong)}: use pgd_at, or AdversarialIteration itself")
    attack = {**presets[name], "eps": eps, "units": "absolute", **options}
    return cls(attack, head=head, **iteration)


def _own(cls: type) -> tuple[str, ...]:
    """The options of an iteration that are plain data."""
    return tuple(p for p in inspect.signature(cls).parameters if p not in _GIVEN)


def _take(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: options.pop(name) for name in names if name in options}


def _refuse(name: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if options:
        raise ConfigError(
            f"method {name} has no option {', '.join(sorted(options))}: it takes {', '.join(known) or 'none'}"
        )
