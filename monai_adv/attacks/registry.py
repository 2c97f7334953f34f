"""Attacks by name, for YAML, the command line and tables."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from monai_adv.attacks.auto import APGD, SEA
from monai_adv.attacks.base import Attack
from monai_adv.attacks.black_box import Square, Transfer
from monai_adv.attacks.dense import DAG
from monai_adv.attacks.ensemble import Ensemble
from monai_adv.attacks.frequency import VAFA
from monai_adv.attacks.mask import ASM, ASMA, SSM
from monai_adv.attacks.minimal import Minimal
from monai_adv.attacks.minimum_norm import FMN, ALMAProx
from monai_adv.attacks.momentum import MIFGSM
from monai_adv.attacks.physical import BiasFieldAttack, GammaAttack
from monai_adv.attacks.physical_geometry import AffineAttack, DeformationAttack
from monai_adv.attacks.physical_kspace import GhostingAttack, GibbsAttack, MotionAttack, RicianAttack
from monai_adv.attacks.segmentation import CosPGD, SegPGD
from monai_adv.attacks.sign import FGSM, IFGSM, PGD, Noise, TargetedIFGSM
from monai_adv.attacks.synthesis import SynthesisAttack
from monai_adv.attacks.universal import Universal
from monai_adv.errors import ConfigError, MonaiAdvError, did_you_mean
from monai_adv.threats import Threat, create_threat

_CLASSES: tuple[type[Attack], ...] = (
    # one line each, in the order of the documentation
    Noise,
    FGSM,
    IFGSM,
    TargetedIFGSM,
    PGD,
    MIFGSM,
    SegPGD,
    CosPGD,
    APGD,
    SEA,
    Ensemble,
    SSM,
    ASM,
    ASMA,
    DAG,
    FMN,
    ALMAProx,
    Minimal,
    Universal,
    VAFA,
    BiasFieldAttack,
    GammaAttack,
    DeformationAttack,
    AffineAttack,
    SynthesisAttack,
    MotionAttack,
    GhostingAttack,
    GibbsAttack,
    RicianAttack,
    Square,
    Transfer,
)
ATTACKS: dict[str, type[Attack]] = {cls.name: cls for cls in _CLASSES}
"""Attack classes by name, in the order of the documentation."""


THREAT_OPTIONS = ("units", "channels", "bounds", "support", "proportions", "quantize")
"""Options of :func:`create` that belong to the threat."""
GROUP = "monai_adv.attacks"
"""Entry points by which installed packages add attacks."""
_NO_OPTION = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def register(kind: type[Attack]) -> type[Attack]:
    """Make an attack of one's own known by its name: to :func:`create`, studies run from Python, checks and tables.

    A decorator for the class. The name holds for this process; run the same class's cell or file again and the newer
    one counts. A unit of a study is computed again when the source of the class has changed. The attacks of an
    installed package that names them as entry points ``monai_adv.attacks`` need no call: they are found by their
    names, on the command line too.

    Args:
        kind: a subclass of :class:`Attack` with ``name``, ``reference`` and a docstring, whose first line tables show.

    Raises:
        ConfigError: for what is no such class, or a name that another attack has.

    Example:
        >>> from monai_adv.attacks import PGD
        >>> class Gentle(PGD):
        ...     "PGD with few steps."
        ...     name = "gentle"
        ...     reference = "ours"
        >>> register(Gentle) is attack_class("gentle")
        True
        >>> del ATTACKS["gentle"]
    """
    if not (isinstance(kind, type) and issubclass(kind, Attack)) or inspect.isabstract(kind):
        raise ConfigError(f"{kind!r} is no attack: derive from monai_adv.attacks.Attack and define _search(self, run)")
    own = {key: vars(kind).get(key) for key in ("name", "reference", "__doc__")}
    lacks = [key for key, value in own.items() if not (isinstance(value, str) and value.strip())]
    if lacks:
        raise ConfigError(f"attack {kind.__name__} needs a text of its own for {', '.join(lacks)}")
    taken = ATTACKS.get(kind.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ConfigError(f"the name {kind.name!r} belongs to {taken.__module__}.{taken.__qualname__}: use another")
    ATTACKS[kind.name] = kind
    return kind


def _find_installed() -> None:
    """Register the attacks that installed packages declare as entry points; the names here go first."""
    for point in entry_points(group=GROUP):
        if point.name in ATTACKS:
            continue
        try:
            kind = register(point.load())
        except Exception as error:  # whatever an import stumbles over
            raise ConfigError(f"attack {point.name} of {point.value} cannot be loaded: {error}") from error
        if kind.name != point.name:
            del ATTACKS[kind.name]
            raise ConfigError(f"entry point {point.name} of {point.value} is an attack named {kind.name}: name it so")


def available() -> dict[str, str]:
    """Names of the attacks that :func:`create` knows, with one line on each and its reference."""
    _find_installed()
    return {n: f"{(inspect.getdoc(c) or '').splitlines()[0]} [{c.reference}]" for n, c in ATTACKS.items()}


def create(name: str, eps: float | None = None, *, norm: str | None = None, **options: Any) -> Attack:
    """An attack by name from plain options.

    Args:
        name: see :func:`available`.
        eps: budget, in ``units`` (or in the attack's own); if None .1, or the attack's own default.
        norm: "linf" or "l2"; the first the attack searches if None.
        **options: of the threat (:data:`THREAT_OPTIONS`) and of the attack (loss, steps, target ...).

    Raises:
        ConfigError: for an unknown name or option; the message lists what there is.

    Example:
        >>> create("pgd", eps=0.1, steps=10).threat.describe()
        'L-inf <= 0.1 std'
    """
    kind = attack_class(name)
    if eps is None:
        eps = 0.1 if kind.default_eps is None else kind.default_eps[0]
    norm = kind.norms[0] if norm is None else norm
    threat_options = {k: options.pop(k) for k in THREAT_OPTIONS if k in options}
    for key in ("channels", "bounds", "proportions"):  # lists in YAML
        if isinstance(threat_options.get(key), list):
            threat_options[key] = tuple(threat_options[key])
    if kind.units is not None and threat_options.setdefault("units", kind.units) != kind.units:
        raise ConfigError(
            f"the budget of {name} is in {kind.units}, not in {threat_options['units']}: leave units out, and give eps "
            f"in {kind.units}"
        )
    with _told(name, {"norm": norm, "eps": eps, **threat_options}):
        threat = create_threat(norm, eps=eps, **threat_options)
    return build({"name": name, **options}, threat)


def build(spec: str | Mapping[str, Any], threat: Threat) -> Attack:
    """An attack from ``{"name": ..., **options}`` (or its name) inside a given threat, for attacks made of attacks.

    Raises:
        ConfigError: for an unknown name or option.
    """
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in options:
        raise ConfigError(f"an attack needs a name: {options}")
    name = options.pop("name")
    kind, known = attack_class(name), option_names(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        near = did_you_mean(unknown[0], [*known, "eps", "norm", *THREAT_OPTIONS], cutoff=0.8)
        raise ConfigError(
            f"attack {name} has no option {', '.join(unknown)}{near or ':'} it takes {', '.join(known)}; its threat "
            f"eps, norm, {', '.join(THREAT_OPTIONS)}"
        )
    with _told(name, options):
        return kind(threat, **options)


@contextmanager
def _told(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Options are a user's plain data: what an attack stumbles over when it is made is an error of theirs."""
    try:
        yield
    except MonaiAdvError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"attack {name} cannot be made with {options}: {error}") from error


def attack_class(name: str) -> type[Attack]:
    """The class of a registered name.

    Raises:
        ConfigError: lists the names there are.
    """
    if name not in ATTACKS:
        _find_installed()
    if name not in ATTACKS:
        raise ConfigError(
            f"attack {name!r} is unknown{did_you_mean(name, ATTACKS) or ':'} use one of {', '.join(ATTACKS)}; one of "
            "your own has to be registered first (monai_adv.attacks.register)"
        )
    return ATTACKS[name]


def option_defaults(name: str) -> dict[str, Any]:
    """The options an attack has beyond those of every attack, with their defaults."""
    general = set(inspect.signature(Attack.__init__).parameters)
    found: dict[str, Any] = {}
    for cls in attack_class(name).__mro__:
        if cls is Attack:
            break
        for p in inspect.signature(vars(cls)["__init__"]).parameters.values() if "__init__" in vars(cls) else ():
            if p.name in option_names(name) and p.name not in found and p.default is not p.empty:
                found[p.name] = p.default
    shared = general - {"target"} if attack_class(name).modes == "targeted" else general
    return {k: v for k, v in found.items() if k not in shared}


def option_names(name: str) -> list[str]:
    """The constructor's options of an attack, without the threat; those of its base classes come last."""
    names: list[str] = []
    for cls in attack_class(name).__mro__:
        if "__init__" not in vars(cls) or cls is object:
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.name not in ("self", "threat") and p.kind not in _NO_OPTION]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break  # what a class does not pass on cannot be given
    closed = {"loss"} if attack_class(name).fixed_loss else set()
    closed |= {"target"} if attack_class(name).modes == "untargeted" else set()
    return [n for n in dict.fromkeys(names) if n not in closed]
