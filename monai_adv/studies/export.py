"""Adversarial volumes as files: the original geometry, one NIfTI per modality, a JSON that says what was done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monai_adv.attacks import create
from monai_adv.data import MODALITIES, save_nifti, scan
from monai_adv.errors import ConfigError, DataError, MonaiAdvError
from monai_adv.handlers import case_rows
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.studies.provenance import versions
from monai_adv.studies.units import safe_name, write_json
from monai_adv.victims import load_victim
from monai_adv.victims.checkpoint import file_hash

CONFIG = DataConfig(root=Path("."))
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
    case = cases.load(item, CONFIG)  # what `run` attacks: the same orientation, the same crop
    subject, image, grid = case.subject, case.image, case.native
    label = victim.head.label_from_classes(case.classes)
    clean = victim.predict(image)
    result = attack(victim, image, label, spacing=case.spacing, affine=case.affine)
    shared = {
        "head": victim.head,
        "label": label,
        "spacing": case.spacing,
        "truth_outside": case.truth_outside(victim.head),
    }
    adversarial = case.restore(result.image[0])
    before = case_rows({}, prediction=clean, **shared)
    shared["label"] = result.label  # moved with the anatomy, where that moved
    after = case_rows({}, prediction=result.prediction, clean=image, adversarial=result.image, **shared)
    folder = output / safe_name(subject)
    for channel, modality in enumerate(MODALITIES):
        like = _file_of(item, channel, grid)
        save_nifti(adversarial[channel].numpy(), like, folder / f"{safe_name(subject)}_{SUFFIX[modality]}.nii.gz")
    for kind, prediction in (("clean", clean), ("adversarial", result.prediction)):
        classes = case.restore(victim.head.classes_from_prediction(prediction)[0])[0].numpy().astype(np.uint8)
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
            "details": {name: values[0] for name, values in result.details.items()},
            "parameters": {k: v[0].tolist() for k, v in result.parameters.items() if v[0].numel() <= 10_000},
            "versions": versions(),
        },
    )
    return Exported(subject, folder, dice)


def _file_of(item: Mapping[str, Any], channel: int, grid: Any) -> Any:
    """The file whose header a modality keeps: its own, or for a 4D file the label's grid."""
    return item["image"][channel] if isinstance(item["image"], (list, tuple)) else grid
