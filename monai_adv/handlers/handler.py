"""An ignite handler that writes a tidy record of every case an :class:`AttackEvaluator` sees."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor

from monai_adv.errors import ConfigError
from monai_adv.handlers.records import case_rows, setting_label
from monai_adv.victims import Head, as_head, plain_tensor


class AttackRecordSaver:
    """Write clean and adversarial scores of every case, one row per region, to a CSV that ``compare`` reads.

    Attach it to an :class:`monai_adv.engines.AttackEvaluator`. Rows are written when a batch is done, so a crash
    loses at most the batch it happened in; an existing file is continued (by another attack, say), and a subject it
    holds already under the same setting is an error.

    Args:
        path: CSV file.
        victim: name of the victim in the table.
        head: head of the network.
        spacing: voxel size in mm; taken from the image's affine if None.
        subject_key: key of the subject's name in the batch; the image's file name if it is missing.
    """

    def __init__(
        self,
        path: str | Path,
        victim: str = "network",
        head: str | Head = "softmax",
        spacing: tuple[float, ...] | None = None,
        subject_key: str = "subject",
    ) -> None:
        self.path = Path(path)
        self.victim = victim
        self.head = as_head(head)
        self.spacing = spacing
        self.subject_key = subject_key
        self.rows: list[dict[str, Any]] = []
        self._seen: set[tuple[str, str]] = set()
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self._seen = {(row["subject"], row["setting"]) for row in csv.DictReader(file)}

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        # earlier than MODEL_COMPLETED, on which MONAI decollates the batch into a list
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.iteration)

    def iteration(self, engine: Engine) -> None:
        """Record the batch that was just evaluated."""
        output, attack = engine.state.output, getattr(engine, "attack", None)
        if attack is None or not isinstance(output, dict) or "clean_pred" not in output:
            raise ConfigError("AttackRecordSaver reads an AttackEvaluator's output; attach it to one")
        threat = attack.threat
        label = plain_tensor(output[CommonKeys.LABEL])
        for index in range(len(label)):
            subject = self._subject(engine, index)
            setting = setting_label(attack.name, threat.eps, threat.units, threat.norm)
            if (subject, setting) in self._seen:
                raise ConfigError(f"{subject}, {setting} was recorded already: a duplicated case is a wrong p-value")
            rows: list[dict[str, Any]] = []
            one = slice(index, index + 1)
            clean = plain_tensor(output["clean_image"])[one]
            spacing = self.spacing or _spacing(output[CommonKeys.IMAGE], index, clean.dim() - 2)
            for name, key, image in (
                ("clean", "clean_pred", clean),
                (attack.name, CommonKeys.PRED, plain_tensor(output[CommonKeys.IMAGE])[one]),
            ):
                eps = 0.0 if name == "clean" else threat.eps
                identity = {
                    "subject": subject, "victim": self.victim, "attack": name, "method": name, "eps": eps,
                    "units": threat.units,
                    "norm": threat.norm, "setting": setting_label(name, eps, threat.units, threat.norm), "status": "ok",
                }  # fmt: skip
                if (subject, identity["setting"]) in self._seen:
                    continue  # the clean rows, recorded with another attack
                self._seen.add((subject, str(identity["setting"])))
                logits = plain_tensor(output[key])[one]
                rows += case_rows(
                    identity,
                    head=self.head,
                    prediction=self.head.predict(logits),
                    label=self.head.check_label(label[one], logits),
                    spacing=spacing,
                    clean=clean,
                    adversarial=image,
                )
            self._write(rows)

    def _subject(self, engine: Engine, index: int) -> str:
        batch = engine.state.batch
        if isinstance(batch, dict) and self.subject_key in batch:
            return str(batch[self.subject_key][index])
        names = getattr(engine.state.output["clean_image"], "meta", {}).get("filename_or_obj")  # type: ignore[index]
        if names is not None:
            name = names if isinstance(names, str) else names[index]
            return Path(str(name)).name.split(".nii")[0]
        raise ConfigError(f"no subject: give the batch a {self.subject_key!r} key or images with file names")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows


def _spacing(image: Tensor, index: int, dims: int) -> tuple[float, ...]:
    if isinstance(image, MetaTensor):
        affine = image.affine if image.affine.dim() == 2 else image.affine[index]
        return tuple(torch.linalg.norm(affine[:dims, :dims], dim=0).tolist())
    raise ConfigError("the image carries no affine: give the spacing in mm")
