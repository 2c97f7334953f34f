"""Universal perturbations of a cohort per modality: trained on some subjects, reported on the others."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_adv.attacks import UniversalPerturbation, fit_universal
from monai_adv.data import MODALITIES, load_case, load_mask, scan
from monai_adv.data.files import check_writable, write_atomic
from monai_adv.errors import ConfigError, DataError, MonaiAdvError, WriteError
from monai_adv.handlers import case_rows, setting_label
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.studies.provenance import versions
from monai_adv.studies.records import FIRST, csv_bytes
from monai_adv.studies.units import digest, write_json
from monai_adv.threats import Ball, Threat, create_threat
from monai_adv.victims import Victim, load_victim, mean_dice
from monai_adv.victims.checkpoint import file_hash

logger = logging.getLogger(__name__)

ALL = "all"
METHODS = ("clean", "noise", "universal")


@dataclass
class UniversalStudy:
    """What became of a study of universal perturbations.

    Attributes:
        folder: where everything was written.
        table: the "4 + 1" table: a row per modality and region.
        records: tidy rows of the held-out subjects.
        training_records: the same of the training subjects.
        perturbations: the perturbation of each modality.
        problems: one line per subject that could not be used; empty if all is well.
    """

    folder: Path
    table: pd.DataFrame
    records: pd.DataFrame
    training_records: pd.DataFrame
    perturbations: dict[str, UniversalPerturbation]
    problems: list[str] = field(default_factory=list)


class _Cohort(Sequence[Mapping[str, Any]]):
    """Training cases, loaded whenever they are asked for."""

    def __init__(self, items: Sequence[Mapping[str, Any]], config: DataConfig) -> None:
        self.items, self.config = items, config

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        case = cases.load(self.items[index], self.config)
        image = MetaTensor(case.image[0], affine=case.affine)
        return {"image": image, "label": case.classes[0], "subject": case.subject, "spacing": case.spacing}


def study_universal(
    root: str | Path,
    checkpoint: str | Path,
    output: str | Path,
    *,
    eps: float = 0.1,
    units: str = "std",
    norm: str = "linf",
    mode: str = "untargeted",
    target: Any = None,
    modalities: Sequence[str] = (*MODALITIES, ALL),
    hold_out: int = 5,
    test_every: int = 0,
    scheme: str | None = None,
    seed: int = 0,
    on_progress: Callable[[float, str], None] | None = None,
    **options: Any,
) -> UniversalStudy:
    """Train one perturbation per modality and one for all on some subjects, and score them on the others.

    Written to ``output``: ``universal_<modality>.nii.gz`` with a JSON each, ``records.csv`` (held-out subjects; what
    ``monai-adv compare`` reads), ``records_training.csv``, ``modality_table.csv`` and ``.md``,
    ``universal_<modality>_training.csv`` (loss and Dice per step), ``universal.json`` (what was asked for).

    Args:
        root: folder of NIfTI files with labels.
        checkpoint: the victim.
        output: folder to write to.
        eps: budget.
        units: its units.
        norm: "linf" or "l2".
        mode: "untargeted", "static" or "dynamic", see :func:`monai_adv.attacks.fit_universal`.
        target: "static": ``{"subject": name}`` of the cohort or ``{"file": path, "scheme": ...}``; "dynamic": a rule.
        modalities: which perturbations to train: T1, T1c, T2, FLAIR, all.
        hold_out: every n-th subject by name, from the first, is tested and never trained on; the split of
            ``monai-adv train``.
        test_every: measure the mean Dice of the held-out subjects every so many steps; 0 only at the end.
        scheme: label scheme where the names do not settle it.
        seed: of the training and of the noise.
        on_progress: told the share done and what is going on.
        **options: of :func:`monai_adv.attacks.fit_universal`: steps, batch, step_size, loss, confidence.

    Raises:
        ConfigError: if the options do not fit together.
        DataError: if there is nothing to train on or to test.
    """
    output = Path(output)
    unknown = sorted(set(modalities) - {*MODALITIES, ALL})
    if unknown or not modalities:
        raise ConfigError(f"modalities {', '.join(unknown) or '(none)'}: use {', '.join(MODALITIES)} or {ALL}")
    if hold_out < 2:
        raise ConfigError(f"hold_out must be at least 2, got {hold_out}: some subjects to train on, others to test")
    threats = {
        m: create_threat(norm, eps=eps, units=units, channels=None if m == ALL else (MODALITIES.index(m),))
        for m in modalities
    }
    check_writable(output / "modality_table.csv")
    found = scan(root, scheme)
    problems = [str(p) for p in found.problems if p.severity == "error"]
    held, kept = found.items[::hold_out], [x for i, x in enumerate(found.items) if i % hold_out]
    if not held or not kept:
        raise DataError("\n".join([f"{root}: {len(kept)} subjects to train on, {len(held)} to test", *problems]))
    config = DataConfig(root=Path(root), scheme=scheme)
    study = _Study(load_victim(checkpoint), config, threats, seed, problems)
    options |= {"mode": mode, "seed": seed, "reference": _reference(kept, config), "target": target}
    if mode == "static":
        options["target"] = _mask(target, {x["subject"]: x for x in found.items})
    asked = {
        "eps": eps, "units": units, "norm": norm, "target": target, "hold_out": hold_out,
        **{k: v for k, v in options.items() if k not in ("reference", "target")},
    }  # fmt: skip
    write_json(
        output / "universal.json",
        {
            "data": {
                "root": str(root),
                "tested": [x["subject"] for x in held],
                "trained": [x["subject"] for x in kept],
            },
            "victim": {"name": study.victim.name, "checkpoint_sha256": file_hash(checkpoint)},
            "asked": asked,
            "versions": versions(),
        },
    )
    trained: dict[str, UniversalPerturbation] = {}
    say = on_progress or (lambda done, what: None)
    for number, modality in enumerate(threats):
        progress = _Progress(study, modality, held, test_every, partial(_within, say, number, len(threats)))
        trained[modality] = study.train(modality, kept, progress, options)
        trained[modality].target = target
        trained[modality].save(output / f"universal_{modality}.nii.gz")
        write_atomic(output / f"universal_{modality}_training.csv", csv_bytes(pd.DataFrame(progress.rows)))
    rows: dict[str, list[dict[str, Any]]] = {"test": [], "training": []}
    for split, items in (("test", held), ("training", kept)):
        for item in items:
            say(0.99, f"scoring {item['subject']}")
            rows[split] += study.rows(item, trained, noise=split == "test")
    records, training = (pd.DataFrame(rows[s]).reindex(columns=list(FIRST)) for s in ("test", "training"))
    if records.empty:
        raise DataError("\n".join(["no held-out subject could be scored", *problems]))
    table = modality_table(records, training)
    for name, frame in (("records", records), ("records_training", training), ("modality_table", table)):
        write_atomic(output / f"{name}.csv", csv_bytes(frame))
    write_atomic(output / "modality_table.md", markdown(table, asked, records, training).encode())
    return UniversalStudy(output, table, records, training, trained, problems)


def _within(say: Callable[[float, str], None], number: int, total: int, share: float, what: str) -> None:
    """Tell the progress of one perturbation as that of all."""
    say((number + share) / total, what)


def _mask(rule: Any, items: Mapping[str, Mapping[str, Any]]) -> MetaTensor:
    """The one mask of a static target, with its own affine."""
    if not isinstance(rule, Mapping) or not set(rule) & {"subject", "file"}:
        raise ConfigError(
            f"mode static needs one mask as target, {{subject: NAME}} or {{file: PATH}}, got {rule!r}; a rule for "
            "every subject is mode dynamic"
        )
    if "file" in rule:
        return load_mask(rule["file"], rule.get("scheme", "brats2021"))
    if rule["subject"] not in items:
        raise ConfigError(f"target subject {rule['subject']!r} is not in the cohort: {', '.join(sorted(items))}")
    return load_case(items[rule["subject"]])["label"]


def _reference(items: Sequence[Mapping[str, Any]], config: DataConfig) -> MetaTensor | None:
    """The uncropped grid of the first subject that can be loaded; crops of the others lie in it by their affines."""
    for item in items:
        try:
            whole = cases.load(item, config).whole
        except MonaiAdvError:
            continue  # named when its turn comes
        return MetaTensor(torch.zeros(len(MODALITIES), *whole.shape[1:]), affine=whole.affine)
    return None


class _Study:
    """What scoring a subject needs; whatever a subject stumbles over costs only itself."""

    def __init__(
        self, victim: Victim, config: DataConfig, threats: Mapping[str, Threat], seed: int, problems: list[str]
    ) -> None:
        self.victim, self.config, self.threats, self.seed, self.problems = victim, config, threats, seed, problems
        self.bad: set[str] = set()

    def train(
        self, modality: str, items: Sequence[Mapping[str, Any]], progress: _Progress, options: Mapping[str, Any]
    ) -> UniversalPerturbation:
        """The perturbation of a modality; a subject that failed before is not tried again."""
        good = [item for item in items if item["subject"] not in self.bad]
        return fit_universal(
            self.victim, _Cohort(good, self.config), self.threats[modality], on_step=progress,
            on_problem=lambda index, error: self.problem(good[index]["subject"], error), **options,
        )  # fmt: skip

    def problem(self, subject: str, error: Exception) -> None:
        if not isinstance(error, MonaiAdvError):
            logger.debug("%s", "".join(traceback.format_exception(error)))
        self.bad.add(subject)
        text = str(error) or type(error).__name__
        self.problems.append(text if subject in text else f"{subject}: {text}")

    def held_out_dice(self, perturbation: UniversalPerturbation, items: Sequence[Mapping[str, Any]]) -> float:
        """Mean Dice over regions and usable subjects under a perturbation that is still being trained."""
        found = []
        for item in items:
            try:
                case = cases.load(item, self.config)
                label = self.victim.head.label_from_classes(case.classes)
                image = perturbation.applied(perturbation.threat.bind(case.image), case.affine[None])
                found.append(float(mean_dice(self.victim.predict(image, case.affine), label, self.victim.head)[0]))
            except MonaiAdvError:
                continue  # named when it is scored
        return float(np.mean(found)) if found else float("nan")

    def rows(
        self, item: Mapping[str, Any], trained: Mapping[str, UniversalPerturbation], noise: bool
    ) -> list[dict[str, Any]]:
        """Rows of one subject: clean, and per modality noise of the budget's size and the perturbation."""
        subject = item["subject"]
        if subject in self.bad:
            return []
        try:
            case = cases.load(item, self.config)
            return [row for found in self._scored(case, trained, noise) for row in found]
        except WriteError:
            raise
        except Exception as error:
            self.problem(subject, error)
            return []

    def _scored(
        self, case: cases.Case, trained: Mapping[str, UniversalPerturbation], noise: bool
    ) -> Iterator[list[dict[str, Any]]]:
        threat = next(iter(self.threats.values()))
        yield self._one(case, "clean", "", threat.with_eps(0.0), case.image)
        for modality, perturbation in trained.items():
            threat = self.threats[modality]
            ball = threat.bind(case.image)
            if noise:
                yield self._one(case, "noise", modality, threat, self._noise(ball, case.subject, modality))
            yield self._one(case, "universal", modality, threat, perturbation.applied(ball, case.affine[None]))

    def _noise(self, ball: Ball, subject: str, modality: str) -> Tensor:
        number = int(digest([self.seed, subject, modality])[:15], 16)
        return ball.noise("sign", torch.Generator().manual_seed(number))

    def _one(self, case: cases.Case, method: str, modality: str, threat: Threat, image: Tensor) -> list[dict[str, Any]]:
        attack = f"{method} {modality}".strip()
        identity = {
            "subject": case.subject, "victim": self.victim.name, "attack": attack, "method": method,
            "eps": threat.eps, "units": threat.units, "norm": threat.norm,
            "setting": setting_label(attack, threat.eps, threat.units, threat.norm), "status": "ok",
        }  # fmt: skip
        return case_rows(
            identity,
            head=self.victim.head,
            prediction=self.victim.predict(image, case.affine),
            label=self.victim.head.label_from_classes(case.classes),
            spacing=case.spacing,
            clean=case.image,
            adversarial=image,
            truth_outside=case.truth_outside(self.victim.head),
        )


class _Progress:
    """What is written down after every update of a perturbation."""

    def __init__(
        self,
        study: _Study,
        modality: str,
        held: Sequence[Mapping[str, Any]],
        every: int,
        say: Callable[[float, str], None],
    ) -> None:
        self.study, self.modality, self.held, self.every, self.say = study, modality, held, every, say
        self.rows: list[dict[str, Any]] = []

    def __call__(self, step: int, perturbation: UniversalPerturbation) -> None:
        entry = perturbation.details["trace"][-1]
        row = {"step": step, "loss": entry["loss"], "dice": entry["dice"]}
        if self.every:
            due = step % self.every == 0
            row["dice_held_out"] = self.study.held_out_dice(perturbation, self.held) if due else float("nan")
        self.rows.append(row)
        self.say(step / perturbation.details["steps"], f"training {self.modality}, Dice {entry['dice']:.3f}")


def modality_table(records: pd.DataFrame, training: pd.DataFrame) -> pd.DataFrame:
    """Mean and median Dice per modality and region: clean, noise, universal; and universal on the training subjects.

    Args:
        records: rows of the held-out subjects.
        training: rows of the training subjects.
    """
    names = [a.split(" ", 1)[1] for a in records.loc[records["method"] == "universal", "attack"].unique()]
    rows = []
    for modality in names:
        for region in records["region"].unique():
            row: dict[str, Any] = {"modality": modality, "region": region}
            for prefix, frame, methods in (("", records, METHODS), ("training_", training, ("clean", "universal"))):
                for method in methods:
                    attack = "clean" if method == "clean" else f"{method} {modality}"
                    dice = frame.loc[(frame["attack"] == attack) & (frame["region"] == region), "dice"]
                    row[f"{prefix}{method}_mean"], row[f"{prefix}{method}_median"] = dice.mean(), dice.median()
                    row[f"{prefix}n"] = len(dice)
            row["drop_mean"] = row["clean_mean"] - row["universal_mean"]
            row["noise_drop_mean"] = row["clean_mean"] - row["noise_mean"]
            rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame, asked: Mapping[str, Any], records: pd.DataFrame, training: pd.DataFrame) -> str:
    """The table for readers: mean (median) Dice, with what it is a table of."""
    goal = asked["mode"] if asked["target"] is None else f"{asked['mode']} {asked['target']}"
    lines = [
        f"Mean (median) Dice of {records['subject'].nunique()} held-out subjects under a universal perturbation "
        f"({goal}, {asked['norm']} <= {asked['eps']:g} {asked['units']}) trained on {training['subject'].nunique()} "
        "others: the vulnerability of this network under this threat model.",
        "",
        "| modality | region | clean | noise | universal | clean, training | universal, training |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = ("clean", "noise", "universal", "training_clean", "training_universal")
    for row in table.to_dict("records"):
        cells = [f"{row[f'{c}_mean']:.3f} ({row[f'{c}_median']:.3f})" for c in columns]
        lines.append(f"| {row['modality']} | {row['region']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
