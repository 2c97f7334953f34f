"""A subject as the study sees it: oriented, cropped to the brain, and back on its own grid for scoring."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import torch
from monai.data import MetaTensor
from monai.transforms import CropForeground, Orientation
from torch import Tensor

from monai_adv.data import align_mask, load_case, load_mask, scan
from monai_adv.data.findings import Finding
from monai_adv.errors import ConfigError, DataError, did_you_mean
from monai_adv.studies.config import DataConfig
from monai_adv.victims import Head


def select(
    root: str | Path, scheme: str | None = None, subjects: Sequence[str] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Finding]]:
    """The usable items of a folder, those of them that are wanted, and what is wrong with wanted subjects.

    Args:
        root: folder of images.
        scheme: label scheme where the names do not settle it.
        subjects: names of subjects; all if None.

    Raises:
        ConfigError: for a subject that is not there.
        DataError: if there is none at all.
    """
    found = scan(root, scheme)
    unknown = sorted(set(subjects or []) - {i["subject"] for i in found.items} - {p.subject for p in found.problems})
    if unknown:
        near = did_you_mean(unknown[0], [i["subject"] for i in found.items])
        raise ConfigError(
            f"subjects {', '.join(unknown)} are not in {root}{near or f'; names: monai-adv check {root}'}"
        )
    if not found.items and not found.problems:
        raise DataError(f"no subject in {root}")
    wanted = [item for item in found.items if not subjects or item["subject"] in subjects]
    errors = [p for p in found.problems if p.severity == "error" and (not subjects or p.subject in subjects)]
    return found.items, wanted, errors


@dataclass
class Case:
    """One subject ready to be attacked.

    Attributes:
        subject: its name.
        image: ``(1, C, *spatial)`` in the file's intensity units, oriented and cropped.
        classes: ``(1, 1, *spatial)`` canonical class indices on the same grid.
        spacing: voxel size in mm along the axes.
        affine: of the cropped grid.
        outside: label voxels ``(n,)`` that the crop left out (they count as missed).
        grid: a MetaTensor of the cropped grid, to bring masks to it.
        native: the label on the file's own grid.
        whole: the label on the oriented, uncropped grid.
        box: where the crop lies in the oriented grid.
    """

    subject: str
    image: Tensor
    classes: Tensor
    spacing: tuple[float, ...]
    affine: Tensor
    outside: Tensor
    grid: MetaTensor
    native: MetaTensor
    whole: MetaTensor
    box: tuple[slice, ...]

    def restore(self, data: Tensor) -> Tensor:
        """Bring ``(C, *spatial)`` from the cropped grid back to the file's own, zero outside the crop."""
        full = data.new_zeros((data.shape[0], *self.whole.shape[1:]))
        full[(slice(None), *self.box)] = data
        codes = "".join(nib.orientations.aff2axcodes(self.native.affine.numpy()))
        back = Orientation(axcodes=codes, labels=None)(MetaTensor(full, affine=self.whole.affine))
        return cast(MetaTensor, back).as_tensor()

    def truth_outside(self, head: Head) -> dict[str, int]:
        """True voxels of each region outside the crop."""
        if not len(self.outside):
            return {}
        label = head.label_from_classes(self.outside.view(1, 1, -1))
        return {name: int(mask.sum()) for name, mask in head.regions_of(label).items()}


def load(item: Mapping[str, Any], config: DataConfig) -> Case:
    """Load a datalist item, bring it to the study's orientation and crop it to the foreground.

    Raises:
        DataError: if a file is not what it should be.
    """
    case = load_case(item)
    image, label = case["image"], case["label"]
    native = cast(MetaTensor, label.clone())  # Orientation writes the new spacing into the header they would share
    if config.orientation is not None:
        orient = Orientation(axcodes=config.orientation, labels=None)
        image, label = orient(image), orient(label)
    outside = torch.zeros(0, dtype=torch.long)
    oriented = label
    box = tuple(slice(0, n) for n in label.shape[1:])
    if config.crop is not None:
        crop = CropForeground(select_fn=lambda x: x != 0, margin=config.crop, allow_smaller=True)
        start, end = crop.compute_bounding_box(image)
        box = tuple(slice(int(a), int(b)) for a, b in zip(start, end))
        whole = label.as_tensor()
        image, label = (cast(MetaTensor, crop.crop_pad(x, start, end)) for x in (image, label))
        left = _counts(whole) - _counts(label.as_tensor())
        left[0] = 0
        outside = torch.repeat_interleave(torch.arange(len(left)), left.clamp_min(0))
    affine = torch.as_tensor(image.affine)
    dims = image.dim() - 1
    spacing = tuple(torch.linalg.norm(affine[:dims, :dims].double(), dim=0).tolist())
    return Case(
        subject=case["subject"],
        image=image.as_tensor()[None].float().contiguous(),
        classes=label.as_tensor()[None].long().contiguous(),
        spacing=spacing,
        affine=affine,
        outside=outside,
        grid=MetaTensor(image.as_tensor()[:1], meta=image.meta),
        native=native,
        whole=oriented,
        box=box,
    )


def _counts(label: Tensor) -> Tensor:
    return torch.bincount(label.flatten().long(), minlength=4)


def target_mask(rule: Mapping[str, Any], case: Case, items: Mapping[str, Mapping[str, Any]], head: Head) -> Tensor:
    """The target segmentation of another subject or of a user's file, on this case's grid by world coordinates.

    Args:
        rule: ``{"subject": name}`` (of the same cohort) or ``{"file": path, "scheme": label scheme}``.
        case: the attacked case.
        items: the cohort's datalist by subject.
        head: the victim's head.

    Raises:
        ConfigError: if the subject is not in the cohort or the rule is not understood.
    """
    if "subject" in rule:
        if rule["subject"] not in items:
            raise ConfigError(f"target subject {rule['subject']!r} is not in the cohort: {', '.join(sorted(items))}")
        mask = load_case(items[rule["subject"]])["label"]
    else:
        mask = load_mask(rule["file"], rule.get("scheme", "brats2021"))
    return head.label_from_classes(align_mask(mask, case.grid)[None])


def item_hash(item: Mapping[str, Any]) -> str:
    """SHA-256 over the files of a datalist item."""
    digest = hashlib.sha256()
    images = item["image"] if isinstance(item["image"], (list, tuple)) else [item["image"]]
    for path in [*images, item["label"]]:
        if not Path(path).is_file():  # a pipe would be waited for, a device never ends
            raise FileNotFoundError(errno.ENOENT, "no such file, or no regular one", str(path))
        with open(path, "rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    digest.update(f"{item.get('scheme')}{item.get('channels')}".encode())
    return digest.hexdigest()
