"""What a targeted attack wants the victim to say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from monai_adv.data.labels import CLASSES, REGIONS
from monai_adv.errors import ConfigError
from monai_adv.losses import edits
from monai_adv.victims import Head

RULES = ("background", "least_likely", "permute", "remove_smallest_lesion")
"""Rules without arguments."""
EDITS: dict[str, str] = {
    "hide": "{hide: ET}",
    "swap": "{swap: [NCR, ET]}",
    "grow": "{grow: 4} or {grow: {mm: 4, region: ET}}",
    "shrink": "{shrink: 4} or {shrink: {mm: 4, region: ET}}",
    "shift": "{shift: [4, 0, -8]}",
    "insert": "{insert: {radius: 6, class: ET}} with center: [voxel indices] or seed: number",
}
"""Rules with arguments, and how they are written; lengths in mm."""
_NESTED = {"WT": ("WT", "TC", "ET"), "TC": ("TC", "ET")}


def make_target(
    rule: str | Mapping[str, Any] | Tensor,
    label: Tensor,
    logits: Tensor,
    head: Head,
    spacing: Sequence[float] | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """The target segmentation of a targeted attack, of the head's label kind.

    Rules, as Python and as YAML write them (ours, but for the first three):

    - ``"background"``: the tumour vanishes.
    - ``"least_likely"``: per voxel the class of the lowest clean logit, or the flipped bit.
    - ``"permute"``: ET becomes NCR, NCR oedema, oedema background.
    - ``{"hide": name}``: a class or region vanishes and is filled with the nearest remaining label, see :func:`hide`.
    - ``{"swap": [a, b]}``: two classes, or regions without common classes, change places.
    - ``{"grow": mm}``, ``{"shrink": mm}``: the lesion is dilated (new voxels take the nearest lesion label) or eroded
      (lost voxels become background); ``{"grow": {"mm": 4, "region": "ET"}}`` only a class or region, over what is
      around it, and ``shrink`` then fills with the nearest remaining label.
    - ``{"shift": [mm, mm, mm]}``: the lesion moves along the voxel axes (in a study right, anterior, superior), to the
      nearest voxel; it leaves background.
    - ``"remove_smallest_lesion"``: the smallest connected component goes, also if it is the only one.
    - ``{"insert": {"radius": mm, "class": name, "center": [...], "seed": n}}``: a ball of a class appears, at voxel
      ``center``, or drawn by ``seed``, or (with neither) as far from the existing lesion as ``support`` allows.
    - a mask of the head's label shape: another subject's or a user's, see :func:`monai_adv.data.align_mask`.

    The lesion is all that is not background. A name is a class index, NCR / ED / ET, or a region of the head. Regions
    of a sigmoid head that are BraTS regions are edited as the classes they stand for, so that both heads get the same
    target (all but ``hide``; bits that contradict each other are resolved first, ET before TC before WT). Other sigmoid
    regions are edited channel by channel, and a name is one of them or its index.

    Args:
        rule: see above.
        label: the label the attack starts from (ground truth or clean prediction).
        logits: clean logits ``(B, K, *spatial)``.
        head: the head.
        spacing: voxel size in mm along the axes; 1 if None.
        support: where ``insert`` may put a lesion, ``(B, 1 or C, *spatial)``; everywhere if None.

    Raises:
        ConfigError: for an unknown rule or class, a mask that does not fit, or an edit that cannot be done.
    """
    label = head.check_label(label, logits)
    if isinstance(rule, Tensor):
        return head.check_label(rule, logits)
    check_target_rule(rule)
    if rule == "background":
        return torch.zeros_like(label)
    if rule == "least_likely":
        return logits.argmin(1, keepdim=True) if head.exclusive else ~head.predict(logits)
    if rule == "permute":
        return permute(label, logits.shape[1], head)
    shape = tuple(logits.shape[2:])
    size = (1.0,) * len(shape) if spacing is None else tuple(float(s) for s in spacing)
    if len(size) != len(shape) or not all(0 < s < math.inf for s in size):
        raise ConfigError(f"spacing {size} must be {len(shape)} sizes in mm, each > 0")
    if support is not None and (len(support) != len(label) or tuple(support.shape[2:]) != shape):
        raise ConfigError(f"support {tuple(support.shape)} does not fit the label {tuple(label.shape)}")
    name: str = rule if isinstance(rule, str) else next(iter(rule))
    value: Any = None if isinstance(rule, str) else rule[name]
    if name == "hide":
        return hide(label, value, head, size, logits.shape[1])
    if not head.exclusive and not set(head.region_names) <= set(REGIONS):
        return _edit_channels(name, value, label, head, size, support)
    classes = label if head.exclusive else _classes_of(label, head)
    edited = _edit_classes(name, value, classes, logits.shape[1], head, size, support)
    return head.label_from_classes(edited)


def permute(label: Tensor, channels: int, head: Head) -> Tensor:
    """Exchange tumour parts: ET becomes NCR, NCR becomes oedema, oedema becomes background.

    For classes other than the four of BraTS each class becomes the one before it, and background stays.
    """
    if head.exclusive and channels != len(CLASSES):
        return (label - 1).clamp_min(0)
    classes = label if head.exclusive else head.classes_from_prediction(label).long()
    table = torch.tensor([0, 2, 0, 1], device=label.device)  # background, NCR, ED, ET
    return head.label_from_classes(table[classes])


def hide(
    label: Tensor,
    name: str | int,
    head: Head,
    spacing: Sequence[float] | None = None,
    channels: int | None = None,
) -> Tensor:
    """Remove a class or a region and fill its voxels with the nearest remaining label.

    Args:
        label: of the head's kind.
        name: a class index, a class name (NCR, ED, ET) or a region of the head. For a sigmoid head a region; the
            regions inside it (TC and ET inside WT, ET inside TC) go with it, those around it stay.
        head: the head.
        spacing: voxel size in mm; 1 if None.
        channels: number of classes of the network, to check an index against.
    """
    if not head.exclusive:
        if name not in head.region_names:
            raise ConfigError(f"cannot hide {name!r}: the head's regions are {', '.join(head.region_names)}")
        nested = _NESTED.get(str(name), (str(name),))
        result = label.clone()
        for k, region in enumerate(head.region_names):
            if region in nested:
                result[:, k] = False
        return result
    gone = _class_indices("hide", name, head, channels)
    return edits.remove(label, gone, (1.0,) * (label.dim() - 2) if spacing is None else spacing)


# ------------------------------------------------------------------------------------------- edits of classes
def _edit_classes(
    name: str,
    value: Any,
    classes: Tensor,
    channels: int,
    head: Head,
    spacing: tuple[float, ...],
    support: Tensor | None,
) -> Tensor:
    count = channels if head.exclusive else len(CLASSES)

    def indices(which: str | int) -> list[int]:
        return _class_indices(name, which, head, count)

    if name == "swap":
        first, second = (indices(part) for part in value)
        both = [str(i) if count != len(CLASSES) else CLASSES[i] for i in first if i in second]
        if both:
            raise ConfigError(
                f"cannot swap {value[0]!r} and {value[1]!r}: both hold {', '.join(both)}, which cannot be in two "
                "places; swap classes (NCR, ED, ET) or regions without common classes"
            )
        if not head.exclusive and _bits(head, first) == _bits(head, second):
            raise ConfigError(
                f"cannot swap {value[0]!r} and {value[1]!r}: the head's regions {', '.join(head.region_names)} do not "
                "tell them apart"
            )
        return edits.swap(classes, first, second, spacing)
    if name in ("grow", "shrink"):
        mm, region = _amount(value)
        edit = edits.grow if name == "grow" else edits.shrink
        return edit(classes, mm, spacing, None if region is None else indices(region))
    if name == "insert":
        chosen = indices(value["class"])
        if len(chosen) != 1 or chosen == [0] or not (head.exclusive or any(next(iter(_bits(head, chosen))))):
            raise ConfigError(
                f"cannot insert {value['class']!r}: a lesion needs one class that the head knows and that is not "
                f"background, not classes {chosen}; name one class"
            )
        return edits.insert(classes, value["radius"], chosen[0], spacing, support, *_where(value, spacing))
    return _edit_anywhere(name, value, classes, spacing)


def _edit_anywhere(name: str, value: Any, classes: Tensor, spacing: tuple[float, ...]) -> Tensor:
    """The edits that name no class."""
    if name == "shift":
        if len(value) != len(spacing):
            raise ConfigError(f"target shift {list(value)} needs {len(spacing)} distances in mm, one per axis")
        return edits.shift(classes, value, spacing)
    assert name == "remove_smallest_lesion"
    return edits.remove_smallest_lesion(classes)


def _class_indices(what: str, name: str | int, head: Head, channels: int | None) -> list[int]:
    if isinstance(name, int):
        if name < 0 or (channels is not None and name >= channels):
            known = "its own" if channels is None else f"0..{channels - 1}"
            raise ConfigError(f"cannot {what} class {name}: the network has the classes {known}")
        return [name]
    found: list[int] | None = None
    if isinstance(head.regions, Mapping):
        found = list(head.regions[name]) if name in head.regions else None
    elif name in head.region_names:
        found = list(REGIONS[name])
    if found is None and name in CLASSES and channels in (None, len(CLASSES)):
        found = [CLASSES.index(name)]
    if found is None or (channels is not None and max(found) >= channels):
        names = [*(CLASSES[1:] if channels in (None, len(CLASSES)) else ()), *head.region_names]
        last = "" if channels is None else f" 0..{channels - 1}"
        known = ", ".join(dict.fromkeys(names))
        raise ConfigError(f"cannot {what} {name!r}: use a class index{last}, or one of {known}")
    return found


def _classes_of(label: Tensor, head: Head) -> Tensor:
    """Canonical classes of a sigmoid label with any of the BraTS regions, from the outside inwards."""
    masks = head.regions_of(label)
    classes = torch.zeros_like(label[:, 0], dtype=torch.long)
    for name, index in (("WT", 2), ("TC", 1), ("ET", 3)):
        if name in masks:
            classes[masks[name]] = index
    return classes.unsqueeze(1)


def _bits(head: Head, classes: list[int]) -> set[tuple[bool, ...]]:
    """What a sigmoid head says of some classes."""
    return {tuple(bits) for bits in head.label_from_classes(torch.tensor(classes).view(-1, 1, 1)).flatten(1).tolist()}


# ------------------------------------------------------------------------------------- edits of other channels
def _edit_channels(
    name: str, value: Any, label: Tensor, head: Head, spacing: tuple[float, ...], support: Tensor | None
) -> Tensor:
    """Edit regions that are not those of BraTS: each channel is a mask of its own."""

    def index(which: str | int) -> int:
        if isinstance(which, int) and 0 <= which < len(head.region_names):
            return which
        if which not in head.region_names:
            raise ConfigError(f"cannot {name} {which!r}: the head's regions are {', '.join(head.region_names)}")
        return head.region_names.index(str(which))

    def each(edit: Callable[[Tensor], Tensor], masks: Tensor) -> Tensor:
        return edit(masks.long().flatten(0, 1)[:, None]).view(masks.shape).bool()

    result = label.clone()
    if name == "swap":
        first, second = (index(part) for part in value)
        if first == second:
            raise ConfigError(f"cannot swap {value[0]!r} and {value[1]!r}: they are the same region")
        result[:, [first, second]] = label[:, [second, first]]
    elif name in ("grow", "shrink"):
        mm, region = _amount(value)
        edit = edits.grow if name == "grow" else edits.shrink
        chosen = slice(None) if region is None else slice(index(region), index(region) + 1)
        result[:, chosen] = each(lambda masks: edit(masks, mm, spacing), label[:, chosen])
    elif name == "insert":
        chosen = slice(index(value["class"]), index(value["class"]) + 1)
        anything = label.any(1, keepdim=True).long()  # it stays clear of every region
        ball = edits.insert(anything, value["radius"], 2, spacing, support, *_where(value, spacing)) == 2
        result[:, chosen] |= ball
    else:
        result = each(lambda masks: _edit_anywhere(name, value, masks, spacing), label)
    return result


# ---------------------------------------------------------------------------------------- reading the rules
def check_target_rule(rule: Any) -> None:
    """Refuse a target rule that :func:`make_target` cannot follow for any label, before anything is loaded.

    Raises:
        ConfigError: for an unknown rule or wrong arguments; says what there is.
    """
    if isinstance(rule, str):
        if rule in EDITS:
            raise ConfigError(f"target {rule!r} needs its arguments: {EDITS[rule]}")
        if rule not in RULES:
            raise ConfigError(f"target {rule!r} is unknown: use {_known()}")
        return
    if not isinstance(rule, Mapping):
        raise ConfigError(f"target {rule!r} is neither a rule nor a mask (a tensor): use {_known()}")
    if set(rule) & {"subject", "file"}:
        raise ConfigError(
            f"target {dict(rule)} is a mask on disk, which studies resolve for each subject (monai-adv run); give an "
            "attack the mask itself: target=head.label_from_classes(align_mask(load_mask(path, scheme), image)), both "
            "from monai_adv.data"
        )
    if len(rule) != 1 or next(iter(rule)) not in EDITS:
        raise ConfigError(f"target {dict(rule)} is unknown: use {_known()}")
    name, value = next(iter(rule.items()))
    if not _CHECKS[name](value):
        raise ConfigError(f"target {dict(rule)} is malformed: {name} is written {EDITS[name]}; lengths are in mm")


def _known() -> str:
    return f"one of {', '.join(RULES)}; or {'; '.join(EDITS.values())}; or a mask"


def _is_name(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _is_length(value: Any) -> bool:
    return _is_distance(value) and value >= 0


def _is_list(value: Any, of: Callable[[Any], bool], sizes: tuple[int, ...]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) in sizes and all(of(v) for v in value)


def _is_amount(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return _is_length(value)
    return {"mm"} <= set(value) <= {"mm", "region"} and _is_length(value["mm"]) and _is_name(value.get("region", 0))


def _is_insertion(value: Any) -> bool:
    if not isinstance(value, Mapping) or not {"radius", "class"} <= set(value) <= {"radius", "class", "center", "seed"}:
        return False
    return (
        _is_length(value["radius"])
        and value["radius"] > 0
        and _is_name(value["class"])
        and ("center" not in value or _is_list(value["center"], _is_index, (2, 3)))
        and ("seed" not in value or _is_index(value["seed"]))
        and not {"center", "seed"} <= set(value)  # nothing would be left to draw
    )


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_distance(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "hide": _is_name,
    "swap": lambda value: _is_list(value, _is_name, (2,)),
    "grow": _is_amount,
    "shrink": _is_amount,
    "shift": lambda value: _is_list(value, _is_distance, (2, 3)),
    "insert": _is_insertion,
}


def _amount(value: Any) -> tuple[float, str | int | None]:
    return (value["mm"], value.get("region")) if isinstance(value, Mapping) else (value, None)


def _where(value: Mapping[str, Any], spacing: tuple[float, ...]) -> tuple[Sequence[int] | None, int | None]:
    center = value.get("center")
    if center is not None and len(center) != len(spacing):
        raise ConfigError(f"target insert: the center {list(center)} needs {len(spacing)} voxel indices")
    return center, value.get("seed")


def target_agreement(prediction: Tensor, target: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """How far a targeted attack has come, ``(B,)`` in [0, 1] (ours).

    Of all voxels (bits) that had to change or are not at the target, the share that had to change and did: 1 if the
    prediction is the target, 0 if nothing that had to change did. Unlike Dice it is graded for an empty target.

    Args:
        prediction: ``(B, 1 or K, *spatial)``.
        target: same shape.
        label: what the target was made from, same shape.
        weight: voxels that count, ``(B, 1, *spatial)``; all if None.
    """
    reached = prediction == target
    wanted = target != label
    done, union = wanted & reached, wanted | ~reached
    if weight is not None:
        done, union = done & weight.bool(), union & weight.bool()
    done, union = (mask.flatten(1).sum(1).double() for mask in (done, union))
    return torch.where(union > 0, done / union.clamp_min(1), torch.ones_like(union))
