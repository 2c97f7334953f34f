"""Adversarial volumes as files: the original geometry, one NIfTI per modality, a JSON that says what was done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_adv.attacks import create
from monai_adv.data import MODALITIES, load_case, save_nifti, scan
from monai_adv.errors import ConfigError, DataError, MonaiAdvError
from monai_adv.handlers import case_rows
from monai_adv.studies.provenance import versions
from monai_adv.studies.units import safe_name, write_json
from monai_adv.victims import load_victim
from monai_adv.victims.checkpoint import file_hash

SUFFIX = dict(zip(MODALITIES, ("t1", "t1ce", "t2", "flair")))


@dataclass
class Exported:
    """What became of one subject.

    Attributes:
        subject: its name.
        folder: where its files are.
        dice: region -> (clean, adversarial) Dice.
        error: why there is nothing, or None.
    """

    subject: str
    folder: Path | None = None
    dice: dict[str, tuple[float, float]] = field(default_factory=dict)
    error: str | None = None


def attack_files(
    root: str | Path,
    checkpoint: str | Path,
    output: str | Path,
    spec: Mapping[str, Any],
    subjects: Sequence[str] | None = None,
    scheme: str | None = None,
) -> Iterator[Exported]:
    """Attack subjects of a folder on their own grid and write the results as NIfTI.

    Per subject: ``<subject>_t1.nii.gz`` ... (adversarial, float32, scanner units), ``_clean_prediction``,
    ``_adversarial_prediction`` (canonical class indices) and ``_attack.json``.

    Args:
        root: folder of NIfTI files.
        checkpoint: the victim.
        output: folder to write to, one folder per subject.
        spec: ``{"name": attack, "eps": ..., **options}`` for :func:`monai_adv.attacks.create`.
        subjects: names of subjects; all if None.
        scheme: label scheme where the names do not settle it.

    Yields:
        One :class:`Exported` per subject, as it is done; a bad subject costs only itself.

    Raises:
        ConfigError: for an unknown subject or attack.
    """
    attack = create(**spec)
    victim = load_victim(checkpoint)
    found = scan(root, scheme)
    names = {item["subject"] for item in found.items}
    unknown = sorted(set(subjects or []) - names - {p.subject for p in found.problems})
    if unknown:
        raise ConfigError(f"subjects {', '.join(unknown)} are not in {root}")
    for problem in found.problems:
        if problem.severity == "error" and (not subjects or problem.subject in subjects):
            yield Exported(problem.subject, error=str(problem))
    chosen = [item for item in found.items if not subjects or item["subject"] in subjects]
    if not chosen and not found.problems:
        raise DataError(f"no subject in {root}")
    for item in chosen:
        try:
            yield _one(item, victim, attack, Path(output), spec, checkpoint)
        except (MonaiAdvError, RuntimeError, MemoryError) as error:
            yield Exported(item["subject"], error=f"{item['subject']}: {error}")


def _one(
    item: Mapping[str, Any], victim: Any, attack: Any, output: Path, spec: Mapping[str, Any], checkpoint: str | Path
) -> Exported:
    case = load_case(item)
    subject = case["subject"]
    image, grid = case["image"].as_tensor()[None], case["label"]
    label = victim.head.label_from_classes(grid.as_tensor()[None])
    clean = victim.predict(image)
    result = attack(victim, image, label)
    spacing = torch.linalg.norm(torch.as_tensor(grid.affine)[:3, :3].double(), dim=0).tolist()
    shared = {"head": victim.head, "label": label, "spacing": spacing}
    before = case_rows({}, prediction=clean, **shared)
    after = case_rows({}, prediction=result.prediction, clean=image, adversarial=result.image, **shared)
    folder = output / safe_name(subject)
    for channel, modality in enumerate(MODALITIES):
        like = _file_of(item, channel, grid)
        save_nifti(result.image[0, channel].numpy(), like, folder / f"{safe_name(subject)}_{SUFFIX[modality]}.nii.gz")
    for kind, prediction in (("clean", clean), ("adversarial", result.prediction)):
        classes = victim.head.classes_from_prediction(prediction)[0, 0].numpy().astype(np.uint8)
        save_nifti(classes, grid, folder / f"{safe_name(subject)}_{kind}_prediction.nii.gz")
    dice = {b["region"]: (b["dice"], a["dice"]) for b, a in zip(before, after)}
    write_json(
        folder / f"{safe_name(subject)}_attack.json",
        {
            "subject": subject,
            "sources": item["image"],
            "attack": {"name": spec["name"], **attack.parameters()},
            "victim": {"checkpoint_sha256": file_hash(checkpoint), "name": victim.name},
            "in_memory": {"clean": before, "adversarial": after},
            "success": bool(result.success[0]),
            "versions": versions(),
        },
    )
    return Exported(subject, folder, dice)


def _file_of(item: Mapping[str, Any], channel: int, grid: Any) -> Any:
    """The file whose header a modality keeps: its own, or for a 4D file the label's grid."""
    return item["image"][channel] if isinstance(item["image"], (list, tuple)) else grid
