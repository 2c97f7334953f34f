"""Certified segmentations of a folder's subjects: NIfTI on each file's own grid, and a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Generator

from monai_adv.data.files import check_writable, inside
from monai_adv.defenses import Certificate, certify
from monai_adv.defenses.smoothing import check_options
from monai_adv.errors import MonaiAdvError, WriteError
from monai_adv.handlers import case_rows
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.studies.provenance import versions
from monai_adv.studies.records import replace_rows
from monai_adv.studies.units import safe_name, write_json
from monai_adv.studies.victims import at_spacing
from monai_adv.victims import Victim, load_victim
from monai_adv.victims.checkpoint import file_hash

SCHEMA = "monai_adv.certificate/1"
KEYS = ("subject", "victim", "resampled", "sigma", "tau", "region")
CLAIM = (
    "With probability 1 - alpha over the samples, the smoothed segmentation of every certified voxel does not change "
    "while the network's input (after the preprocessing) moves by less than the radius in the L2 norm."
)
RESAMPLED = " The input is meant on the file's own grid: noise and radius come before it is resampled for the network."


@dataclass
class Certified:
    """What became of one subject.

    Attributes:
        subject: its name.
        folder: where its files are.
        certificate: what was proved.
        rows: its rows of the table.
        error: why there is nothing, or None.
    """

    subject: str
    folder: Path | None = None
    certificate: Certificate | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def certify_files(
    root: str | Path,
    checkpoint: str | Path,
    output: str | Path,
    subjects: Sequence[str] | None = None,
    scheme: str | None = None,
    *,
    seed: int = 0,
    resample: bool = False,
    on_progress: Callable[[float, str], Any] | None = None,
    **options: Any,
) -> Iterator[Certified]:
    """Certify subjects of a folder; write the certified segmentations as NIfTI and ``records.csv``.

    Per subject: ``<subject>_certified_segmentation.nii.gz`` (canonical class indices, 255 abstains; outside the crop to
    the foreground the network is not run and the value is 0), ``<subject>_certified_abstention.nii.gz`` and
    ``<subject>_certificate.json``. ``records.csv`` has a row per subject and region: Dice without noise, of the
    smoothed segmentation and certified, abstention, radius.

    Args:
        root: folder of images.
        checkpoint: the victim.
        output: folder to write to, one folder per subject.
        subjects: names of subjects; all if None.
        scheme: label scheme where the names do not settle it.
        seed: of the noise, anew for every subject.
        resample: run the network at the spacing it was trained at, inside the certified pipeline. Noise and radius stay
            on the file's own grid; the way to coarser voxels averages the noise (1 mm to 2 mm: to about a third).
        on_progress: called with the share done and what is being done.
        **options: of :func:`monai_adv.defenses.certify`: sigma, samples, draws0, tau, alpha, correction, batch.

    Yields:
        One :class:`Certified` per subject, as it is done; a bad subject costs only itself.

    Raises:
        ConfigError: for an unknown subject or an option out of range; per subject, if the checkpoint does not say at
            which spacing it was trained.
        WriteError: if the folder cannot be written.
    """
    check_options(**options)
    victim = load_victim(checkpoint)
    _, chosen, broken = cases.select(root, scheme, subjects)
    check_writable(Path(output) / "records.csv")
    for problem in broken:
        yield Certified(problem.subject, error=str(problem))
    for index, item in enumerate(chosen):

        def progress(share: float, done: int = index, subject: str = item["subject"]) -> None:
            if on_progress is not None:
                on_progress((done + share) / len(chosen), subject)

        try:
            yield _one(item, victim, Path(checkpoint), Path(output), seed, resample, progress, options)
        except WriteError:
            raise
        except (MonaiAdvError, RuntimeError, MemoryError, OSError) as error:
            yield Certified(item["subject"], error=f"{item['subject']}: {error}")


def _one(
    item: Mapping[str, Any],
    victim: Victim,
    checkpoint: Path,
    output: Path,
    seed: int,
    resample: bool,
    progress: Callable[[float], Any],
    options: Mapping[str, Any],
) -> Certified:
    started = time.perf_counter()
    case = cases.load(item, DataConfig(root=Path(".")))
    if resample:
        victim = at_spacing(victim, checkpoint, case.spacing)
    head = victim.head
    label, outside = head.label_from_classes(case.classes), case.truth_outside(head)
    clean = case_rows(
        {}, head=head, prediction=victim.predict(case.image, case.affine), label=label, spacing=case.spacing,
        truth_outside=outside,
    )  # fmt: skip
    certificate = certify(
        victim, case.image, affine=case.affine, generator=Generator().manual_seed(seed), progress=progress, **options
    )
    scored = certificate.scores(label, outside)
    stem = safe_name(case.subject)
    folder = inside(output, output / stem)
    paths = certificate.save(folder, case.native, f"{stem}_certified", case.restore)
    identity = {"subject": case.subject, "victim": victim.name, "resampled": resample}
    shared = {**identity, **certificate.describe(), "seed": seed}
    seconds = time.perf_counter() - started
    rows = [
        {**shared, "region": row["region"], "dice": before["dice"], **row, "seconds": seconds}
        for before, row in zip(clean, scored)
    ]
    write_json(
        folder / f"{stem}_certificate.json",
        {
            "schema": SCHEMA,
            "claim": CLAIM + RESAMPLED * resample,
            **shared,
            "checkpoint_sha256": file_hash(checkpoint),
            "files": {path.name: file_hash(path) for path in paths},
            "regions": rows,
            "versions": versions(),
        },
    )
    replace_rows(output / "records.csv", rows, KEYS)
    return Certified(case.subject, folder, certificate, rows)
