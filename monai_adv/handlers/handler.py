"""An ignite handler that writes a tidy record of every case an :class:`AttackEvaluator` sees."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor

from monai_adv.data.headers import stem
from monai_adv.data.meta import plain, voxel_size
from monai_adv.errors import ConfigError
from monai_adv.handlers.records import case_rows, setting_label
from monai_adv.handlers.shared import check_parts, check_sampler, gathered, processes, rank
from monai_adv.stats.tables import csv_cell
from monai_adv.victims import Head, as_head


class AttackRecordSaver:
    """Write clean and adversarial scores of every case, one row per region, to a CSV that ``compare`` reads.

    Attach it to an :class:`monai_adv.engines.AttackEvaluator`. What is scored is what that one deploys: its logits are
    refined, or a vote, where it was told so. Rows are written when a batch is done, so a crash loses at most the batch
    it happened in; an existing file is continued (by another attack, say), and a subject it holds already under the
    same setting is an error.

    Of several processes (``torch.distributed``) each writes its own ``NAME.rank0.csv`` beside the file. When all are
    done, the first process adds the rows of all to the file, and each deletes its own. Cases that two processes have,
    as a sampler makes them that pads for equal lengths, are an error; lengths need not be equal.

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
        self._file = self.path

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.STARTED, self.started)
        # earlier than MODEL_COMPLETED, on which MONAI decollates the batch into a list
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self.iteration)
        engine.add_event_handler(Events.COMPLETED, self.completed)

    def started(self, engine: Engine) -> None:
        """Read what an existing file holds; all processes continue the first one's."""
        self.rows = []
        check_sampler(engine)
        several, problem = processes() > 1, None
        self._file = self.path.with_suffix(f".rank{rank()}{self.path.suffix}") if several else self.path
        self._seen = set()
        if several and self._file.exists():
            problem = f"{self._file} is left of a run that did not finish: look into it and move it away"
        elif self.path.exists() and rank() == 0:
            try:
                with open(self.path, newline="", encoding="utf-8") as file:
                    self._seen = {(row["subject"], row["setting"]) for row in csv.DictReader(file)}
            except (KeyError, UnicodeDecodeError) as error:
                problem = f"{self.path} is no table of records that can be continued: {error!r}"
        found = gathered((problem, self._seen))  # an error of one process must not leave the others waiting
        for problem, _ in found:
            if problem is not None:
                raise ConfigError(problem)
        self._seen = found[0][1]

    def completed(self, engine: Engine) -> None:
        """Merge the rows of all processes into the file."""
        if processes() == 1:
            return
        parts = gathered(self.rows)
        check_parts([[(row["subject"], row["setting"]) for row in rows] for rows in parts])
        if rank() == 0:
            rows = [row for part in parts for row in part]
            _append(self.path, sorted(rows, key=lambda row: row["subject"]))
        gathered(None)  # the rows are in the file before anyone deletes its own
        self._file.unlink(missing_ok=True)

    def iteration(self, engine: Engine) -> None:
        """Record the batch that was just evaluated."""
        output, attack = engine.state.output, getattr(engine, "attack", None)
        if attack is None or not isinstance(output, dict) or "clean_pred" not in output:
            raise ConfigError("AttackRecordSaver reads an AttackEvaluator's output; attach it to one")
        threat = attack.threat
        if output[CommonKeys.LABEL] is None:
            raise ConfigError("AttackRecordSaver scores against the label, and the batch has none")
        label = plain(output[CommonKeys.LABEL])
        for index in range(len(label)):
            subject = self._subject(engine, index)
            setting = setting_label(attack.name, threat.eps, threat.units, threat.norm)
            if (csv_cell(subject), csv_cell(setting)) in self._seen:
                raise ConfigError(f"{subject}, {setting} was recorded already: a duplicated case is a wrong p-value")
            rows: list[dict[str, Any]] = []
            one = slice(index, index + 1)
            clean = plain(output["clean_image"])[one]
            spacing = self.spacing or _spacing(output[CommonKeys.IMAGE], index)
            for name, key, image in (
                ("clean", "clean_pred", clean),
                (attack.name, CommonKeys.PRED, plain(output[CommonKeys.IMAGE])[one]),
            ):
                eps = 0.0 if name == "clean" else threat.eps
                identity = {
                    "subject": subject, "victim": self.victim, "attack": name, "method": name, "eps": eps,
                    "units": threat.units,
                    "norm": threat.norm, "setting": setting_label(name, eps, threat.units, threat.norm), "status": "ok",
                }  # fmt: skip
                known = (csv_cell(subject), str(csv_cell(identity["setting"])))  # as the file has it
                if known in self._seen:
                    continue  # the clean rows, recorded with another attack
                self._seen.add(known)
                logits = plain(output[key])[one]
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
            return stem(str(name)) or Path(str(name)).name
        raise ConfigError(f"no subject: give the batch a {self.subject_key!r} key or images with file names")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        _append(self._file, rows)
        self.rows += rows


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file; a new one gets a header."""
    names, new = list(rows[0]), not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not new:
        with open(path, newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
        if header != names:
            raise ConfigError(f"{path} has other columns ({', '.join(header)}) than what is to be added: move it away")
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        if new:
            writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)


def _spacing(image: Tensor, index: int) -> tuple[float, ...]:
    if isinstance(image, MetaTensor):
        return voxel_size(image, image.dim() - 2, index)
    raise ConfigError("the image carries no affine: give the spacing in mm")
