"""How a network's output channels become a segmentation: mutually exclusive classes or overlapping regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from monai_adv.data.labels import CLASSES, REGIONS, SIGMOID_CHANNELS
from monai_adv.errors import ConfigError


@dataclass(frozen=True)
class Head:
    """The meaning of the logits ``(B, K, *spatial)`` of a segmentation network.

    ``softmax``: K mutually exclusive classes, the prediction is the argmax, a label is ``(B, 1, *spatial)`` class
    indices. ``sigmoid``: K overlapping regions, the prediction is ``logit > 0``, a label is ``(B, K, *spatial)`` bits.

    Args:
        kind: "softmax" or "sigmoid".
        regions: what is scored. For softmax a mapping from region name to the class indices it unites; for sigmoid
            the names of the channels in order. Defaults: BraTS WT, TC, ET, and MONAI's channel order TC, WT, ET.

    Example:
        >>> import torch
        >>> head = Head("softmax")
        >>> logits = torch.tensor([[[2.0]], [[0.0]], [[3.0]], [[1.0]]]).unsqueeze(0)  # (1, 4, 1, 1)
        >>> head.predict(logits).item()
        2
        >>> [name for name, mask in head.regions_of(head.predict(logits)).items() if mask.any()]
        ['WT']
    """

    kind: str
    regions: Mapping[str, tuple[int, ...]] | Sequence[str] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "sigmoid"):
            raise ConfigError(f"head {self.kind!r} is unknown: use 'softmax' (classes) or 'sigmoid' (regions)")
        regions: Mapping[str, tuple[int, ...]] | Sequence[str]
        if self.regions is None:
            regions = dict(REGIONS) if self.kind == "softmax" else tuple(SIGMOID_CHANNELS)
        elif self.kind == "softmax":
            if not isinstance(self.regions, Mapping):
                raise ConfigError("a softmax head needs regions as {name: (class indices, ...)}")
            regions = {name: tuple(int(i) for i in indices) for name, indices in self.regions.items()}
        else:
            if isinstance(self.regions, Mapping):
                raise ConfigError("a sigmoid head needs regions as the names of its channels, in order")
            regions = tuple(self.regions)
        object.__setattr__(self, "regions", regions)

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the scored regions."""
        assert self.regions is not None
        return tuple(self.regions)

    @property
    def exclusive(self) -> bool:
        """Whether classes exclude each other (softmax)."""
        return self.kind == "softmax"

    def probabilities(self, logits: Tensor) -> Tensor:
        """Per-voxel probabilities, same shape as the logits."""
        return torch.softmax(logits, dim=1) if self.exclusive else torch.sigmoid(logits)

    def predict(self, logits: Tensor) -> Tensor:
        """The segmentation: ``(B, 1, *spatial)`` class indices (int64) or ``(B, K, *spatial)`` bits (bool)."""
        return _argmax(logits) if self.exclusive else logits > 0

    def check_label(self, label: Tensor, logits: Tensor) -> Tensor:
        """Validate a label against the logits and return it as int64 indices or bool bits on the logits' device.

        Raises:
            ConfigError: if the shape or the values cannot belong to this head.
        """
        batch, channels, *spatial = logits.shape
        expected = (batch, 1 if self.exclusive else channels, *spatial)
        if tuple(label.shape) != expected:
            raise ConfigError(
                f"a {self.kind} head with logits {tuple(logits.shape)} needs a label of shape {expected}, "
                f"got {tuple(label.shape)}"
            )
        label = label.to(logits.device)
        if not self.exclusive:
            if label.dtype != torch.bool and not bool(((label == 0) | (label == 1)).all()):
                raise ConfigError("a sigmoid head needs a label of 0 and 1 per region channel")
            return label.bool()
        index = label.long()
        if label.is_floating_point() and not bool((index == label).all()):
            raise ConfigError("a softmax head needs integer class indices as label")
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= channels:
            raise ConfigError(
                f"label values {low}..{high} do not fit {channels} classes: say which class is what by the head's "
                "regions (monai-adv victim --outputs), or mask ignored voxels"
            )
        return index

    def encode(self, label: Tensor, logits: Tensor) -> Tensor:
        """One-hot (softmax) or bits (sigmoid) of a label, ``(B, K, *spatial)`` in the logits' dtype."""
        label = self.check_label(label, logits)
        if not self.exclusive:
            return label.to(logits.dtype)
        return torch.zeros_like(logits).scatter_(1, label, 1)

    def regions_of(self, segmentation: Tensor) -> dict[str, Tensor]:
        """Boolean mask ``(B, *spatial)`` of every region of a label or prediction."""
        if isinstance(self.regions, Mapping):
            return {
                name: torch.isin(segmentation[:, 0], torch.tensor(indices, device=segmentation.device))
                for name, indices in self.regions.items()
            }
        if segmentation.shape[1] != len(self.region_names):
            raise ConfigError(f"{segmentation.shape[1]} channels for the regions {self.region_names}")
        return {name: segmentation[:, k].bool() for k, name in enumerate(self.region_names)}

    def label_from_classes(self, classes: Tensor) -> Tensor:
        """This head's label ``(B, 1 or K, *spatial)`` from canonical BraTS class indices ``(B, 1, *spatial)``.

        A softmax head may count the classes in another order than BraTS, or unite some: its regions say how.

        Example:
            >>> decathlon = Head("softmax", {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)})  # 1 oedema, 2 necrosis
            >>> decathlon.label_from_classes(torch.tensor([[[0, 1, 2, 3]]])).tolist()
            [[[0, 2, 1, 3]]]
        """
        if self.exclusive:
            order = self._canonical()
            if order == list(range(len(CLASSES))):
                return classes.long()
            return torch.tensor(order, device=classes.device)[classes.long()]
        missing = [name for name in self.region_names if name not in REGIONS]
        if missing:
            raise ConfigError(f"no BraTS classes are known for the regions {missing}")
        masks = [torch.isin(classes, torch.tensor(REGIONS[n], device=classes.device)) for n in self.region_names]
        return torch.cat(masks, dim=1)

    def classes_from_prediction(self, prediction: Tensor) -> Tensor:
        """Canonical BraTS class indices ``(B, 1, *spatial)`` (uint8) from a prediction of this head.

        Overlapping bits are resolved from the outside inwards: WT gives oedema, TC overwrites with NCR, ET with ET.
        """
        if self.exclusive:
            order = self._canonical()
            if order == list(range(len(CLASSES))):
                return prediction.to(torch.uint8)
            table = torch.zeros(max(int(prediction.max()), *order) + 1, dtype=torch.uint8, device=prediction.device)
            for index in (3, 1, 2):  # where a class unites several: the one that lies in the fewest regions
                table[order[index]] = index
            return table[prediction.long()]
        masks = self.regions_of(prediction)
        if set(masks) != {"TC", "WT", "ET"}:
            raise ConfigError(f"the regions {self.region_names} are not BraTS WT, TC, ET")
        classes = torch.zeros_like(prediction[:, 0], dtype=torch.uint8)
        for name, index in (("WT", 2), ("TC", 1), ("ET", 3)):
            classes[masks[name]] = index
        return classes.unsqueeze(1)

    def _canonical(self) -> list[int]:
        """For every canonical class the index of a softmax head that lies in the same of its BraTS regions."""
        assert isinstance(self.regions, Mapping)
        regions = {name: self.regions[name] for name in REGIONS if name in self.regions}
        found = [0]
        for index in range(1, len(CLASSES)):
            known = sorted({0, index}.union(*regions.values()))
            same = [k for k in known if all((k in mine) == (index in REGIONS[n]) for n, mine in regions.items())]
            if not same:
                raise ConfigError(f"no class of the head with the regions {dict(regions)} is {CLASSES[index]} of BraTS")
            found.append(index if index in same else same[0])
        return found


def mean_dice(prediction: Tensor, label: Tensor, head: Head, weight: Tensor | None = None) -> Tensor:
    """Mean over regions of the Dice of each sample, ``(B,)`` in float64; an empty region predicted empty counts 1.

    Args:
        prediction: ``(B, 1 or K, *spatial)`` as :meth:`Head.predict` gives it.
        label: same shape.
        head: their head.
        weight: voxels that count, ``(B, 1, *spatial)``; all if None.
    """
    if isinstance(head.regions, Mapping):
        return _mean_dice_of_classes(prediction, label, head.regions, weight)
    predicted, truth = head.regions_of(prediction), head.regions_of(label)
    scores = []
    for name, a in predicted.items():
        b = truth[name]
        if weight is not None:
            counted = weight[:, 0].bool()
            a, b = a & counted, b & counted
        overlap = (a & b).flatten(1).sum(1).double()
        total = (a.flatten(1).sum(1) + b.flatten(1).sum(1)).double()
        scores.append(torch.where(total > 0, 2 * overlap / total.clamp_min(1), torch.ones_like(total)))
    return torch.stack(scores).mean(0)


def _mean_dice_of_classes(
    prediction: Tensor, label: Tensor, regions: Mapping[str, tuple[int, ...]], weight: Tensor | None
) -> Tensor:
    """:func:`mean_dice` of class indices from their joint histogram: one pass, whatever the number of regions."""
    classes = 1 + max(int(prediction.max()), int(label.max()), *(i for indices in regions.values() for i in indices))
    joint = label * classes + prediction
    scores = torch.ones(len(prediction), len(regions), dtype=torch.float64, device=prediction.device)
    for sample, pairs in enumerate(joint):
        counted = pairs.flatten() if weight is None else pairs[weight[sample].bool()]
        counts = torch.bincount(counted, minlength=classes * classes).view(classes, classes).double()
        for region, indices in enumerate(regions.values()):
            rows = counts[list(indices)]
            total = rows.sum() + counts[:, list(indices)].sum()
            if total > 0:
                scores[sample, region] = 2 * rows[:, list(indices)].sum() / total
    return scores.mean(1)


def _argmax(logits: Tensor) -> Tensor:
    """``logits.argmax(1, keepdim=True)``, the first of equals; 20 times faster on a CPU for a few channels."""
    if logits.shape[1] > 16 or logits.is_cuda:
        return logits.argmax(dim=1, keepdim=True)
    best = logits[:, :1]
    index = torch.zeros_like(best, dtype=torch.uint8)
    for channel in range(1, logits.shape[1]):
        values = logits[:, channel : channel + 1]
        # a later channel that beats all before it has the larger number
        index = torch.maximum(index, (values > best).view(torch.uint8) * channel)
        best = torch.maximum(best, values)
    return index.long()


def as_head(head: str | Head) -> Head:
    """``Head`` from its name or from itself."""
    return head if isinstance(head, Head) else Head(head)
