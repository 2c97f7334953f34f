"""Attacks by name, for YAML, the command line and tables."""

from __future__ import annotations

import inspect
from typing import Any

from monai_adv.attacks.base import Attack
from monai_adv.attacks.sign import FGSM, IFGSM, PGD, Noise, TargetedIFGSM
from monai_adv.errors import ConfigError
from monai_adv.threats import create_threat

ATTACKS: dict[str, type[Attack]] = {cls.name: cls for cls in (Noise, FGSM, IFGSM, TargetedIFGSM, PGD)}


def available() -> dict[str, str]:
    """Names of the attacks that :func:`create` knows, with one line on each and its reference."""
    return {n: f"{(inspect.getdoc(c) or '').splitlines()[0]} [{c.reference}]" for n, c in ATTACKS.items()}


def create(name: str, eps: float = 0.1, *, norm: str = "linf", **options: Any) -> Attack:
    """An attack by name from plain options.

    Args:
        name: see :func:`available`.
        eps: budget, in ``units``.
        norm: "linf" or "l2".
        **options: of the threat (units, channels, bounds, support) and of the attack (loss, steps, target ...).

    Raises:
        ConfigError: for an unknown name or option; the message lists what there is.

    Example:
        >>> create("pgd", eps=0.1, steps=10).threat.describe()
        'L-inf <= 0.1 std'
    """
    if name not in ATTACKS:
        raise ConfigError(f"attack {name!r} is unknown: use one of {', '.join(ATTACKS)}")
    threat_options = {k: options.pop(k) for k in ("units", "channels", "bounds", "support") if k in options}
    for key in ("channels", "bounds"):  # lists in YAML
        if isinstance(threat_options.get(key), list):
            threat_options[key] = tuple(threat_options[key])
    known = option_names(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"attack {name} has no option {', '.join(unknown)}: it takes {', '.join(known)}")
    return ATTACKS[name](create_threat(norm, eps=eps, **threat_options), **options)


def option_names(name: str) -> list[str]:
    """The constructor's options of an attack, without the threat."""
    own = [p for p in inspect.signature(ATTACKS[name].__init__).parameters if p not in ("self", "threat", "options")]
    general = [p for p in inspect.signature(Attack.__init__).parameters if p not in ("self", "threat")]
    return list(dict.fromkeys(own + general))
