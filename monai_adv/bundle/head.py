"""Which head a pipeline's post-processing speaks of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from monai.transforms import Activations, Activationsd, AsDiscrete, AsDiscreted, Compose

from monai_adv.errors import ConfigError
from monai_adv.victims import Head
from monai_adv.victims.head import as_head

Regions = Mapping[str, Sequence[int]] | Sequence[str]

_HOW = "give it: head='sigmoid' or 'softmax' (`--attack_head` beside an overlay, `--head` of `monai-adv run --bundle`)"


def head_kind(postprocessing: Any, key: str = "pred") -> str:
    """ "sigmoid" or "softmax", as the post-processing of a pipeline tells.

    Args:
        postprocessing: a ``Compose`` (or a list) with MONAI's ``Activations(d)`` and ``AsDiscrete(d)``.
        key: key of the prediction in dictionary transforms.

    Raises:
        ConfigError: if it does not tell, contradicts itself, or cuts probabilities elsewhere than at one half.

    Example:
        >>> head_kind(Compose([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)]))
        'sigmoid'
    """
    said: dict[str, str] = {}
    for step in _steps(postprocessing):
        options = _options(step, key)
        if options.get("sigmoid"):
            said["sigmoid"] = "Activations(sigmoid=True)"
        if options.get("softmax"):
            said["softmax"] = "Activations(softmax=True)"
        if options.get("argmax"):
            said["softmax"] = "AsDiscrete(argmax=True)"
        threshold = options.get("threshold")
        if threshold is not None and abs(float(threshold) - 0.5) > 1e-6:
            raise ConfigError(f"the post-processing cuts at {threshold}, a head cuts probabilities at 0.5; {_HOW}")
    if len(said) != 1:
        found = " and ".join(said.values()) or "neither Activations(sigmoid, softmax) nor AsDiscrete(argmax)"
        raise ConfigError(f"the post-processing holds {found}, so the head cannot be told from it; {_HOW}")
    return next(iter(said))


def find_head(postprocessing: Any, regions: Regions | None = None, head: str | Head | None = None) -> Head:
    """The head of a pipeline, for the overlays that attack a bundle.

    Args:
        postprocessing: see :func:`head_kind`.
        regions: what is scored, see :class:`monai_adv.victims.Head`; if None the classes that ``AsDiscrete(to_onehot)``
            counts (softmax), or TC, WT, ET.
        head: what to take instead of asking the post-processing.

    Raises:
        ConfigError: see :func:`head_kind`.
    """
    kind = head if head is not None else head_kind(postprocessing)
    if isinstance(kind, Head) and regions is None:
        return kind
    name = kind.kind if isinstance(kind, Head) else kind
    if regions is None and name == "softmax":
        counts = [_options(step, "pred").get("to_onehot") for step in _steps(postprocessing)]
        count = next((c for c in counts if isinstance(c, int)), None)
        regions = None if count is None else {f"class {k}": (k,) for k in range(1, count)}
    return as_head(name) if regions is None else Head(name, _plain(regions))


def _plain(regions: Regions) -> dict[str, tuple[int, ...]] | tuple[str, ...]:
    if not isinstance(regions, Mapping):
        return tuple(str(name) for name in regions)
    found: dict[str, tuple[int, ...]] = {}
    for name, indices in regions.items():
        found[str(name)] = (indices,) if isinstance(indices, int) else tuple(indices)
    return found


def _steps(transform: Any) -> Iterator[Any]:
    """The transforms of a Compose, one by one, also of those inside it."""
    members = transform.transforms if isinstance(transform, Compose) else transform
    if isinstance(members, (list, tuple)):
        for member in members:
            yield from _steps(member)
    elif members is not None:
        yield members


def _options(step: Any, key: str) -> dict[str, Any]:
    """What an activation or a discretisation does to the prediction."""
    names = {Activations: ("sigmoid", "softmax"), AsDiscrete: ("argmax", "threshold", "to_onehot")}
    names[Activationsd], names[AsDiscreted] = names[Activations], names[AsDiscrete]
    for kind, options in names.items():
        if not isinstance(step, kind):
            continue
        found = {option: getattr(step, option, None) for option in options}
        if not hasattr(step, "keys"):
            return found
        keys = list(step.keys)  # one value per key
        place = keys.index(key) if key in keys else None
        return {} if place is None else {o: v[place] for o, v in found.items() if isinstance(v, (list, tuple))}
    return {}
