"""Crops around tumours of raw images, each a function of seed, epoch and index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureTyped,
    FgBgToIndicesd,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    SpatialPadd,
)
from monai.utils import CommonKeys
from torch import Tensor
from torch.utils.data import Dataset

from monai_adv.data import load_case
from monai_adv.data.meta import plain
from monai_adv.engines.synthesis import REAL
from monai_adv.errors import ConfigError, DataError
from monai_adv.victims import Head

_BOTH = (CommonKeys.IMAGE, CommonKeys.LABEL)
_TOLERANCE = 1e-3  # of voxel sizes that count as equal, in mm


@dataclass
class Cohort:
    """Subjects in memory, oriented, cropped to the foreground, padded to the patch, in the files' intensities.

    Attributes:
        volumes: per subject image, label and the indices of its tumour.
        subjects: their names.
        spacing: voxel size in mm that all of them have.
        problems: a line for every subject that was left out.
    """

    volumes: list[dict[str, Any]] = field(default_factory=list)
    subjects: list[str] = field(default_factory=list)
    spacing: tuple[float, ...] = ()
    problems: list[str] = field(default_factory=list)


def load_cohort(items: Sequence[Mapping[str, Any]], patch: Sequence[int]) -> Cohort:
    """Load what crops are cut from; a subject that cannot be used costs itself.

    Args:
        items: datalist with labels.
        patch: in voxels; slices are cut from volumes that are padded in the plane only.

    Raises:
        ConfigError: if subjects have different voxel sizes.
    """
    prepare = Compose(
        [
            Orientationd(_BOTH, axcodes="RAS", labels=None),
            CropForegroundd(
                _BOTH, source_key="image", select_fn=lambda x: x != 0, margin=4, allow_smaller=True
            ),
            SpatialPadd(_BOTH, spatial_size=_depth_one(patch)),
        ]
    )  # fmt: skip
    index = Compose([EnsureTyped(_BOTH, track_meta=False), FgBgToIndicesd("label", image_key="image")])
    cohort = Cohort()
    for item in items:
        try:
            case = load_case(item)
        except DataError as error:
            cohort.problems.append(str(error))
            continue
        name = str(case["subject"])
        if "label" not in case or not bool((case["label"] > 0).any()):
            cohort.problems.append(f"{name}: there is no tumour in its label to train on")
            continue
        volume = prepare({key: case[key] for key in _BOTH})
        spacing = tuple(torch.linalg.norm(torch.as_tensor(volume["image"].affine)[:3, :3].double(), dim=0).tolist())
        if cohort.spacing and not np.allclose(spacing, cohort.spacing, rtol=0, atol=_TOLERANCE):
            raise ConfigError(
                f"{name} has voxels of {_mm(spacing)}, {cohort.subjects[0]} of {_mm(cohort.spacing)}: displacements in "
                "mm need one voxel size; resample the images, or train on those of one size"
            )
        cohort.spacing = cohort.spacing or spacing
        cohort.volumes.append(index(volume))
        cohort.subjects.append(name)
    return cohort


class TumourCrops(Dataset[dict[str, Tensor]]):
    """Crops whose centre is a random tumour voxel, mirrored left to right half of the time.

    Slices (a patch of two sides) are axial; one with more tumour is drawn more often. Crop ``index`` of an epoch is
    always the same, whichever was drawn before.

    Args:
        cohort: what is cut.
        patch: two or three sides in voxels.
        head: what the labels are for.
        seed: of all draws.
        length: crops of an epoch.
        real: whether a crop of another subject comes along.
    """

    def __init__(self, cohort: Cohort, patch: Sequence[int], head: Head, *, seed: int, length: int, real: bool) -> None:
        self.cohort, self.head, self.seed, self.length, self.real = cohort, head, seed, length, real
        self.flat = len(patch) == 2
        self.epoch = 0
        self._cut = Compose(
            [
                RandCropByPosNegLabeld(
                    _BOTH,
                    label_key="label",
                    fg_indices_key="label_fg_indices",
                    bg_indices_key="label_bg_indices",
                    spatial_size=_depth_one(patch),
                    pos=1,
                    neg=0,
                ),
                RandFlipd(_BOTH, prob=0.5, spatial_axis=0),
            ]
        )

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """The crops of another epoch are other ones."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        numbers = np.random.default_rng((self.seed, self.epoch, index))
        subjects = len(self.cohort.volumes)
        chosen = int(numbers.integers(subjects))
        crop = self._crop(chosen, numbers)
        result = {
            str(CommonKeys.IMAGE): crop["image"].float(),
            str(CommonKeys.LABEL): self.head.label_from_classes(crop["label"].long()[None])[0],
        }
        if self.real:
            other = (chosen + 1 + int(numbers.integers(subjects - 1))) % subjects
            result[REAL] = self._crop(other, numbers)["image"].float()
        return result

    def _crop(self, subject: int, numbers: np.random.Generator) -> dict[str, Tensor]:
        self._cut.set_random_state(int(numbers.integers(2**31)))
        (crop,) = self._cut(self.cohort.volumes[subject])
        found = {key: plain(crop[key]) for key in _BOTH}
        return {key: value.squeeze(-1) if self.flat else value for key, value in found.items()}


def _depth_one(patch: Sequence[int]) -> tuple[int, ...]:
    """A slice is a volume of depth one until it is cut."""
    return (*patch, 1) if len(patch) == 2 else tuple(patch)


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing) + " mm"
