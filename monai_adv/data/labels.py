"""Label schemes of the BraTS releases and of the Decathlon, and the regions that are scored.

The number in a label file means different tissues in different releases: 4 is enhancing tumour until BraTS 2021 and a
resection cavity from 2024; {1, 2, 3} is BraTS 2023 or the Decathlon, with 1 and 2 exchanged. Everything after this
module sees canonical class indices only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from monai_adv.errors import DataError, did_you_mean

MODALITIES = ("T1", "T1c", "T2", "FLAIR")
"""Canonical channel order."""
CLASSES = ("background", "NCR", "ED", "ET")
"""Canonical classes; the position is the class index (the channel of a softmax head)."""
REGIONS: dict[str, tuple[int, ...]] = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
"""BraTS evaluation regions as tuples of canonical class indices."""
SIGMOID_CHANNELS = ("TC", "WT", "ET")
"""Channel order of multi-label heads, as ``monai.transforms.ConvertToMultiChannelBasedOnBratsClasses`` has it."""

_UNTIL_2021 = {0: "background", 1: "NCR", 2: "ED", 4: "ET"}
_2023 = {0: "background", 1: "NCR", 2: "ED", 3: "ET"}
# The resection cavity (RC) is no tumour: it belongs to no region, so it becomes background.
_SINCE_2024 = {**_2023, 4: "background"}
_MSD = {0: "background", 1: "ED", 2: "NCR", 3: "ET"}
_VALUES: dict[str, dict[int, str]] = {
    **{f"brats{year}": _UNTIL_2021 for year in range(2017, 2022)},
    "brats2023": _2023,
    "brats2024": _SINCE_2024,
    "brats2025": _SINCE_2024,
    "msd": _MSD,
}


@dataclass(frozen=True)
class LabelScheme:
    """What the numbers in a label file mean.

    References: Menze et al. 2015; Baid et al. 2021 (1 NCR, 2 ED, 4 ET); Adewole et al. 2023 (3 ET);
    de Verdier et al. 2024 (4 resection cavity); Antonelli et al. 2022 (Decathlon: 1 ED, 2 NET, 3 ET).

    Attributes:
        name: ``"brats2017"`` ... ``"brats2021"``, ``"brats2023"``, ``"brats2024"``, ``"brats2025"`` or ``"msd"``.
        values: number in the file -> name in :data:`CLASSES`. The resection cavity of 2024 maps to background: it is
            no tumour and cannot be written back.

    Example:
        >>> LabelScheme.get("brats2021").to_classes(np.array([0, 1, 2, 4])).tolist()
        [0, 1, 2, 3]
        >>> LabelScheme.get("msd").to_classes(np.array([0, 1, 2, 3])).tolist()
        [0, 2, 1, 3]
    """

    name: str
    values: Mapping[int, str]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.values.values()) - set(CLASSES))
        if unknown:
            raise DataError(f"label scheme {self.name!r}: unknown classes {unknown}; the classes are {CLASSES}")
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.values.items()))))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, dict(self.values))  # a mappingproxy cannot be pickled

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names that :meth:`get` knows."""
        return tuple(_VALUES)

    @classmethod
    def get(cls, name: str | LabelScheme) -> LabelScheme:
        """The scheme of a release.

        Args:
            name: one of :meth:`names` (case does not matter), or a scheme, which is returned as it is.

        Raises:
            DataError: if the name is not known.
        """
        if isinstance(name, LabelScheme):
            return name
        key = str(name).lower().replace(" ", "")
        if key not in _VALUES:
            near = did_you_mean(key, _VALUES)
            raise DataError(f"unknown label scheme {name!r}{near}; known are {', '.join(_VALUES)}")
        return cls(key, _VALUES[key])

    def to_classes(self, array: Any, where: str = "") -> np.ndarray:
        """Translate a label volume into canonical class indices.

        Args:
            array: numbers as they stand in the file, any shape, integer or float type; NumPy array or tensor.
            where: file or subject for the message of an error.

        Returns:
            uint8 array of the same shape, indices into :data:`CLASSES`.

        Raises:
            DataError: if a value is not finite, not an integer, or not of this scheme.
        """
        found, indices = whole_numbers(as_numpy(array), where)
        unexpected = sorted(set(found) - set(self.values))
        if unexpected:
            prefix = f"{where}: " if where else ""
            expected = ", ".join(f"{value}={name}" for value, name in sorted(self.values.items()))
            raise DataError(
                f"{prefix}label values {found} do not fit scheme {self.name!r} ({expected}): unexpected {unexpected}. "
                f"{self._advice(found, unexpected)}"
            )
        table = np.zeros(max(self.values) + 1, dtype=np.uint8)
        for value, name in self.values.items():
            table[value] = CLASSES.index(name)
        return table[indices]

    def from_classes(self, classes: Any) -> np.ndarray:
        """Translate canonical class indices back into the numbers of this scheme.

        Args:
            classes: indices into :data:`CLASSES`, any shape.

        Returns:
            uint8 array of the same shape.

        Raises:
            DataError: if an index is not one of :data:`CLASSES`.
        """
        found, indices = whole_numbers(as_numpy(classes), "class indices")
        if found and (found[0] < 0 or found[-1] >= len(CLASSES)):
            raise DataError(f"class indices {found}: expected 0..{len(CLASSES) - 1} ({', '.join(CLASSES)})")
        table = np.zeros(len(CLASSES), dtype=np.uint8)
        for value, name in sorted(self.values.items(), reverse=True):  # the lowest number wins: background is 0
            table[CLASSES.index(name)] = value
        return table[indices]

    def _advice(self, found: Sequence[int], unexpected: Sequence[int]) -> str:
        tumour = set(found) - {0}
        if unexpected == [4] and self.name == "brats2023":
            return (
                "A 4 is the resection cavity from BraTS 2024 on and enhancing tumour until 2021: pass "
                "scheme='brats2024' or scheme='brats2021', whichever the data are."
            )
        if self.name == "msd" and 4 in unexpected:
            return "The Decathlon has no 4: pass the scheme of the BraTS release the label came from."
        if self.name in _VALUES and _VALUES[self.name] is _UNTIL_2021 and tumour <= {1, 2, 3}:
            return (
                "A 3 is enhancing tumour in BraTS 2023 and in the Decathlon, where 1 and 2 are exchanged: pass "
                "scheme='brats2023' or scheme='msd', whichever the data are."
            )
        fitting = [name for name, values in _VALUES.items() if set(found) <= set(values)]
        if fitting:
            return f"Schemes with these values: {', '.join(fitting)}; pass scheme= the one the data are."
        return "No known scheme has these values. Is this a tumour label map, and resampled by nearest neighbour?"


def as_numpy(array: Any) -> np.ndarray:
    """A tensor or anything like an array as a NumPy array, without a copy where that is possible."""
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def whole_numbers(array: np.ndarray, where: str) -> tuple[list[int], np.ndarray]:
    """The sorted distinct values of a label volume, and the volume as integers usable as indices.

    Raises:
        DataError: if a value is not finite or not an integer; ``where`` begins its message.
    """
    prefix = f"{where}: " if where else ""
    if array.size == 0:
        return [], array.astype(np.int64)
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating) or array.dtype == bool):
        raise DataError(f"{prefix}label of type {array.dtype}; expected whole numbers")
    if np.issubdtype(array.dtype, np.floating):
        finite = np.isfinite(array)
        if not finite.all():
            raise DataError(f"{prefix}{int((~finite).sum())} label voxels are NaN or Inf; write the label again")
        broken = array != np.rint(array)
        if broken.any():
            examples = ", ".join(f"{value:g}" for value in np.unique(array[broken])[:5])
            raise DataError(
                f"{prefix}{int(broken.sum())} label voxels are not whole numbers (such as {examples}). Labels must be "
                "resampled by nearest neighbour; is this an image or a probability map?"
            )
    low, high = int(array.min()), int(array.max())
    if max(abs(low), abs(high)) >= 2**62:
        raise DataError(f"{prefix}label voxels from {low:g} to {high:g}: is the scale in the header broken?")
    if low >= 0 and high < 65536:  # counting is ten times faster than sorting a whole volume
        indices = array.astype(np.intp if high > 255 else np.uint8)
        return np.flatnonzero(np.bincount(indices.ravel())).tolist(), indices
    return [int(value) for value in np.unique(array)], array.astype(np.int64)


def region_masks(classes: Any, names: Sequence[str] = tuple(REGIONS)) -> dict[str, Any]:
    """Binary masks of the evaluation regions.

    Args:
        classes: canonical class indices, any shape, NumPy array or tensor.
        names: regions of :data:`REGIONS`.

    Returns:
        name -> boolean array or tensor of the same shape and kind.

    Example:
        >>> {name: mask.tolist() for name, mask in region_masks(np.array([0, 1, 2, 3])).items()}
        {'WT': [False, True, True, True], 'TC': [False, True, False, True], 'ET': [False, False, False, True]}
    """
    masks = {}
    for name in names:
        if name not in REGIONS:
            raise DataError(f"unknown region {name!r}; known are {', '.join(REGIONS)}")
        mask = classes == REGIONS[name][0]
        for index in REGIONS[name][1:]:
            mask = mask | (classes == index)
        masks[name] = mask
    return masks


def region_channels(classes: torch.Tensor, names: Sequence[str] = SIGMOID_CHANNELS, dim: int = 0) -> torch.Tensor:
    """Stack region masks along the channel axis: the target of a multi-label (sigmoid) head.

    Args:
        classes: canonical class indices with one channel at ``dim``: (1, X, Y, Z), or (B, 1, X, Y, Z) with ``dim=1``.
        names: regions, in the order of the channels.
        dim: the channel axis.

    Returns:
        uint8 tensor with ``len(names)`` channels at ``dim`` (uint8, as MONAI's losses raise on booleans).

    Example:
        >>> region_channels(torch.tensor([[0, 1, 2, 3]])).tolist()
        [[0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 1]]
    """
    if classes.shape[dim] != 1:
        raise DataError(f"class indices of shape {tuple(classes.shape)}: expected one channel at axis {dim}")
    return torch.cat(list(region_masks(classes, names).values()), dim=dim).to(torch.uint8)
