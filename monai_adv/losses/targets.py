"""What a targeted attack wants the victim to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from monai_adv.data.labels import CLASSES
from monai_adv.errors import ConfigError
from monai_adv.victims import Head

RULES = ("background", "least_likely", "permute", "hide")


def make_target(
    rule: str | Mapping[str, Any] | Tensor,
    label: Tensor,
    logits: Tensor,
    head: Head,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """The target segmentation of a targeted attack, of the head's label kind.

    Args:
        rule: "background" (the tumour vanishes); "least_likely" (per voxel the class of the lowest clean logit, or
            the flipped bit); "permute" (ET becomes NCR, NCR oedema, oedema background); ``{"hide": class or region}``
            (it vanishes and is filled with the nearest remaining label); or a mask, of the head's label shape: another
            subject's, or a user's (see :func:`monai_adv.data.load_mask`).
        label: the label the attack starts from (ground truth or clean prediction).
        logits: clean logits ``(B, K, *spatial)``.
        head: the head.
        spacing: voxel size in mm for rules in mm; 1 if None.

    Raises:
        ConfigError: for an unknown rule or class, or a mask that does not fit.
    """
    label = head.check_label(label, logits)
    if isinstance(rule, Tensor):
        return head.check_label(rule, logits)
    if isinstance(rule, Mapping):
        if set(rule) != {"hide"}:
            raise ConfigError(f"target {dict(rule)} is unknown: use {{'hide': name}} or one of {', '.join(RULES)}")
        name = rule["hide"]
        if isinstance(name, int) and not 0 <= name < logits.shape[1]:
            raise ConfigError(f"cannot hide class {name}: the network has the classes 0..{logits.shape[1] - 1}")
        return hide(label, name, head)
    if rule == "background":
        return torch.zeros_like(label)
    if rule == "least_likely":
        return logits.argmin(1, keepdim=True) if head.exclusive else ~head.predict(logits)
    if rule == "permute":
        return permute(label, logits.shape[1], head)
    raise ConfigError(f"target {rule!r} is unknown: use one of {', '.join(RULES)}, {{'hide': name}}, or a mask")


def permute(label: Tensor, channels: int, head: Head) -> Tensor:
    """Exchange tumour parts: ET becomes NCR, NCR becomes oedema, oedema becomes background.

    For classes other than the four of BraTS each class becomes the one before it, and background stays.
    """
    if head.exclusive and channels != len(CLASSES):
        return (label - 1).clamp_min(0)
    classes = label if head.exclusive else head.classes_from_prediction(label).long()
    table = torch.tensor([0, 2, 0, 1], device=label.device)  # background, NCR, ED, ET
    return head.label_from_classes(table[classes])


def hide(label: Tensor, name: str | int, head: Head) -> Tensor:
    """Remove a class or a region and fill its voxels with the nearest remaining label.

    Args:
        label: of the head's kind.
        name: a class index, a class name (NCR, ED, ET) or a region of the head. For a sigmoid head a region; the
            regions inside it (TC and ET inside WT, ET inside TC) go with it.
        head: the head.
    """
    if not head.exclusive:
        nested = {"WT": ("WT", "TC", "ET"), "TC": ("TC", "ET")}.get(str(name), (str(name),))
        if name not in head.region_names:
            raise ConfigError(f"cannot hide {name!r}: the head's regions are {', '.join(head.region_names)}")
        result = label.clone()
        for k, region in enumerate(head.region_names):
            if region in nested:
                result[:, k] = False
        return result
    removed = torch.isin(label, torch.tensor(_class_indices(name, head), device=label.device))
    result = label.clone()
    for b in range(len(label)):
        gone = removed[b, 0].cpu().numpy()
        if gone.any():
            if gone.all():
                raise ConfigError(f"cannot hide {name!r}: nothing else is left in sample {b}")
            nearest = ndimage.distance_transform_edt(gone, return_distances=False, return_indices=True)
            values = label[b, 0].cpu().numpy()[tuple(np.asarray(nearest))]
            result[b, 0] = torch.from_numpy(values).to(label.device)
    return result


def _class_indices(name: str | int, head: Head) -> list[int]:
    if isinstance(name, int):
        return [name]
    if isinstance(head.regions, Mapping) and name in head.regions:
        return list(head.regions[name])
    if name in CLASSES:
        return [CLASSES.index(name)]
    raise ConfigError(f"cannot hide {name!r}: use a class index, one of {', '.join(CLASSES)}, or a region")


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
