"""Adversarial volumes as files: stored as their sources are, and scored again from disk by the untouched pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_adv.attacks import Attack, AttackResult, create
from monai_adv.data import (
    MODALITIES,
    LabelScheme,
    Storage,
    along_world,
    save_displacement,
    save_nifti,
    stored_type,
)
from monai_adv.data.files import check_writable, inside
from monai_adv.errors import ConfigError, MonaiAdvError, WriteError
from monai_adv.handlers import case_rows, setting_label
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.studies.provenance import versions
from monai_adv.studies.records import replace_rows
from monai_adv.studies.units import safe_name, write_json
from monai_adv.studies.victims import at_spacing
from monai_adv.transforms.physics import Effect
from monai_adv.victims import Victim, load_victim
from monai_adv.victims.checkpoint import file_hash

SCHEMA = "monai_adv.adversarial_case/1"
KEYS = ("subject", "setting", "region")
STORES = ("source", "float32", "int16")
CONFIG = DataConfig(root=Path("."))
SUFFIX = dict(zip(MODALITIES, ("t1", "t1ce", "t2", "flair")))


@dataclass
class Exported:
    """What became of one subject.

    Attributes:
        subject: its name.
        folder: where its files are.
        dice: region -> Dice of the clean scan, of the adversarial one in memory, and of its files loaded anew.
        error: why there is nothing, or None.
        source: datalist item of the clean files.
        written: the same of the files written: the adversarial image, and the label that belongs to it.
        displacement: file of the displacement field of an attack that moved the anatomy.
    """

    subject: str
    folder: Path | None = None
    dice: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    error: str | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    displacement: Path | None = None


def attack_files(
    root: str | Path,
    checkpoint: str | Path,
    output: str | Path,
    spec: Mapping[str, Any],
    subjects: Sequence[str] | None = None,
    scheme: str | None = None,
    *,
    store: str = "source",
    resample: bool = False,
) -> Iterator[Exported]:
    """Attack subjects of a folder on their own grid, write the results as NIfTI, and score them again from disk.

    Per subject: ``<subject>_t1.nii.gz`` ... (adversarial, in scanner units), ``<subject>_t1_perturbation.nii.gz`` ...
    (float32), ``_clean_prediction`` and ``_adversarial_prediction`` (canonical class indices), and ``_attack.json``;
    where the attack moved the anatomy ``_seg`` and ``_displacement`` (vectors in mm, see
    :func:`monai_adv.data.save_displacement`), and of an attack with smooth fields of intensity ``_t1_bias`` (factor)
    ... and ``_t1_residual`` (scanner units) ... ``records.csv`` in ``output`` has a row per subject, region and
    setting: clean, attacked in memory, and the files loaded anew.

    Args:
        root: folder of images.
        checkpoint: the victim.
        output: folder to write to, one folder per subject.
        spec: ``{"name": attack, "eps": ..., **options}`` for :func:`monai_adv.attacks.create`.
        subjects: names of subjects; all if None.
        scheme: label scheme where the names do not settle it.
        store: type of the adversarial files. "source": each as its source, with its slope; where sources hold whole
            numbers the attack uses only values that they can store. "int16": whole numbers. "float32": any values.
        resample: run the network at the spacing it was trained at, inside the attacked pipeline.

    Yields:
        One :class:`Exported` per subject, as it is done; a bad subject costs only itself.

    Raises:
        ConfigError: for an unknown subject, attack or type.
        WriteError: if the folder cannot be written.
    """
    if store not in STORES:
        raise ConfigError(f"store {store!r} is unknown: use one of {', '.join(STORES)}")
    create(**spec)  # a wrong option is told before anything is read
    victim = load_victim(checkpoint)
    _, chosen, broken = cases.select(root, scheme, subjects)
    check_writable(Path(output) / "records.csv")
    for problem in broken:
        yield Exported(problem.subject, error=str(problem))
    job = _Job(victim, Path(checkpoint), dict(spec), Path(output), store, resample)
    for item in chosen:
        try:
            yield job.one(item)
        except WriteError:
            raise  # the next subject could not be written either
        except (MonaiAdvError, RuntimeError, MemoryError, OSError) as error:
            yield Exported(item["subject"], error=f"{item['subject']}: {error}")


@dataclass
class _Job:
    """What all subjects share."""

    victim: Victim
    checkpoint: Path
    spec: dict[str, Any]
    output: Path
    store: str
    resample: bool

    def one(self, item: Mapping[str, Any]) -> Exported:
        folder = inside(self.output, self.output / safe_name(item["subject"]))
        if folder.resolve() in {Path(path).resolve().parent for path in _sources(item)}:
            raise ConfigError(f"{folder} holds the source files: choose another output folder")
        case = cases.load(item, CONFIG)  # what `run` attacks: the same orientation, the same crop
        storages = self._storages(item)
        attack = create(**{**_quantized(storages, case.subject), **self.spec})
        victim = self._at(case)
        label = victim.head.label_from_classes(case.classes)
        clean = victim.predict(case.image, case.affine)
        victim.reseed(attack.seed)
        result = attack(victim, case.image, label, spacing=case.spacing, affine=case.affine)
        predicted = result.predicted_by(victim, case.affine)
        _clear(folder, safe_name(case.subject))
        written = self._write(item, case, storages, (clean, predicted), result, attack, folder)
        displacement = self._write_fields(item, case, result, attack, folder)
        again = cases.load({**item, **written}, CONFIG)
        kept = self._at(again).predict(again.image, again.affine)

        threat, name = attack.threat, self.spec["name"]
        shared = {"subject": case.subject, "victim": victim.name, "units": threat.units, "norm": threat.norm}

        def setting(title: str, eps: float) -> dict[str, Any]:
            label = setting_label(title, eps, threat.units, threat.norm)
            return {**shared, "attack": title, "method": title, "eps": eps, "setting": label}

        before = _score(setting("clean", 0.0), case, victim, clean, label)
        memory = _score(
            setting(name, threat.eps), case, victim, predicted, result.label,
            clean=case.image, adversarial=result.image,
        )  # fmt: skip
        truth = victim.head.label_from_classes(again.classes)
        disk = _score(setting(f"{name} from disk", threat.eps), again, victim, kept, truth)
        self._document(item, written, folder, case.subject, attack, result, (before, memory, disk))
        replace_rows(self.output / "records.csv", [*before, *memory, *disk], KEYS)
        dice = {b["region"]: (b["dice"], m["dice"], d["dice"]) for b, m, d in zip(before, memory, disk)}
        return Exported(case.subject, folder, dice, source=item, written={**item, **written}, displacement=displacement)

    def _at(self, case: cases.Case) -> Victim:
        return at_spacing(self.victim, self.checkpoint, case.spacing) if self.resample else self.victim

    def _storages(self, item: Mapping[str, Any]) -> list[Storage]:
        """How each modality will be stored."""
        if self.store != "source":
            return [Storage(np.dtype(self.store))] * len(MODALITIES)
        if isinstance(item["image"], (list, tuple)):
            return [stored_type(path) for path in item["image"]]
        return [stored_type(item["image"])] * len(MODALITIES)

    def _write(
        self,
        item: Mapping[str, Any],
        case: cases.Case,
        storages: Sequence[Storage],
        predictions: tuple[Tensor, Tensor],
        result: AttackResult,
        attack: Attack,
        folder: Path,
    ) -> dict[str, Any]:
        """Write the files of a subject; what of its datalist item is another file now."""
        stem, head = safe_name(case.subject), self.victim.head
        # outside the crop all modalities are background, and stay as they are
        change = case.restore(result.image[0] - case.image[0])
        adversarial = case.restore(result.image[0])
        paths = []
        for channel, modality in enumerate(MODALITIES):
            like = item["image"][channel] if isinstance(item["image"], (list, tuple)) else case.native
            path = folder / f"{stem}_{SUFFIX[modality]}.nii.gz"
            save_nifti(adversarial[channel].numpy(), like, path, storage=storages[channel])
            difference = folder / f"{stem}_{SUFFIX[modality]}_perturbation.nii.gz"
            save_nifti(change[channel].numpy(), like, difference)
            paths.append(str(path))
        for kind, prediction in zip(("clean", "adversarial"), predictions):
            classes = case.restore(head.classes_from_prediction(prediction)[0])[0].numpy().astype(np.uint8)
            save_nifti(classes, case.native, folder / f"{stem}_{kind}_prediction.nii.gz")
        changed: dict[str, Any] = {"image": paths}
        if attack.moves_voxels:
            truth = case.restore(head.classes_from_prediction(result.label)[0])[0]
            moved = LabelScheme.get(item["scheme"]).from_classes(truth)
            changed["label"] = str(save_nifti(moved, case.native, folder / f"{stem}_seg.nii.gz"))
        return changed

    def _write_fields(
        self, item: Mapping[str, Any], case: cases.Case, result: AttackResult, attack: Attack, folder: Path
    ) -> Path | None:
        """Write what a physical effect did to every voxel; the file of the displacement, if there is one."""
        effect = getattr(attack, "effect", None)
        if not isinstance(effect, Effect) or not result.parameters:
            return None
        stem = safe_name(case.subject)
        support = attack.threat.bind(case.image).mask
        with torch.no_grad():
            fields = effect.fields(case.image, result.parameters, case.spacing, support)
        # outside the crop there is background only: nothing is multiplied, added or moved
        for kind, neutral in (("bias", 1.0), ("residual", 0.0)):
            if kind in fields:
                whole = case.restore(fields[kind][0].float() - neutral) + neutral
                for channel, modality in enumerate(MODALITIES):
                    like = item["image"][channel] if isinstance(item["image"], (list, tuple)) else case.native
                    save_nifti(whole[channel].numpy(), like, folder / f"{stem}_{SUFFIX[modality]}_{kind}.nii.gz")
        if "displacement" not in fields:
            return None
        vectors: Tensor = torch.from_numpy(along_world(fields["displacement"][0], case.affine)).float()
        return save_displacement(case.restore(vectors), case.native, folder / f"{stem}_displacement.nii.gz")

    def _document(
        self,
        item: Mapping[str, Any],
        written: Mapping[str, Any],
        folder: Path,
        subject: str,
        attack: Attack,
        result: AttackResult,
        rows: tuple[list[dict[str, Any]], ...],
    ) -> None:
        before, memory, disk = rows
        write_json(
            folder / f"{safe_name(subject)}_attack.json",
            {
                "schema": SCHEMA,
                "subject": subject,
                "sources": {str(path): file_hash(path) for path in _sources(item)},
                "files": {Path(path).name: file_hash(path) for path in sorted(folder.glob("*.nii.gz"))},
                "adversarial": [Path(path).name for path in written["image"]],
                "attack": {**attack.parameters(), "name": self.spec["name"], "seed": attack.seed},
                "threat": attack.threat.plain(),
                "victim": {"name": self.victim.name, "checkpoint_sha256": file_hash(self.checkpoint)},
                "resampled": self.resample,
                "clean": before,
                "in_memory": memory,
                "from_disk": disk,
                "success": bool(result.success[0]),
                "cost": vars(result.cost),
                "details": {name: values[0] for name, values in result.details.items()},
                "parameters": {k: v[0].tolist() for k, v in result.parameters.items() if v[0].numel() <= 10_000},
                "versions": versions(),
            },
        )


def _sources(item: Mapping[str, Any]) -> list[Any]:
    """Files of a datalist item."""
    images = item["image"] if isinstance(item["image"], (list, tuple)) else [item["image"]]
    return [*images, item["label"]]


def _clear(folder: Path, stem: str) -> None:
    """Remove what an earlier attack wrote and this one may not: a moved label beside unmoved images would mislead."""
    maybe = ("seg.nii.gz", "displacement.nii.gz", "synthesis.png", "*_bias.nii.gz", "*_residual.nii.gz")
    for path in (path for name in maybe for path in folder.glob(f"{stem}_{name}")):
        path.unlink()


def _quantized(storages: Sequence[Storage], subject: str) -> dict[str, Any]:
    """Option of the attack for files of these types."""
    if all(storage.dtype.kind == "f" for storage in storages):
        return {}
    names = sorted({storage.dtype.name for storage in storages})
    if len(names) > 1:
        raise ConfigError(f"{subject}: its modalities are stored as {', '.join(names)}: write them with store=float32")
    slope, inter = [storage.quantum for storage in storages], [storage.inter for storage in storages]
    return {"quantize": {"dtype": names[0], "slope": slope, "inter": inter}}


def _score(
    identity: Mapping[str, Any], case: cases.Case, victim: Victim, prediction: Any, label: Any, **images: Any
) -> list[dict[str, Any]]:
    return case_rows(
        {**identity, "status": "ok"}, head=victim.head, prediction=prediction, label=label, spacing=case.spacing,
        truth_outside=case.truth_outside(victim.head), **images,
    )  # fmt: skip
