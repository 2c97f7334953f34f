"""The files of a simulated cohort: written whole or not at all, and checked before they are reused."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import scipy
import torch

from monai_adv import __version__
from monai_adv.data.files import write_atomic
from monai_adv.data.simulation.acquisition import CONTRASTS
from monai_adv.data.simulation.geometry import Geometry
from monai_adv.data.simulation.subject import RECIPE, SimulatedSubject
from monai_adv.errors import DataError

NOTICE = "LICENSE-ICBM152.txt"
COHORT_FILE = "cohort.json"

_MNI = 4  # NIFTI_XFORM_MNI_152, the code of sform and qform
_IMAGE_MAXIMUM = np.iinfo(np.int16).max


@dataclass(frozen=True)
class Job:
    """A subject to be made.

    Args:
        folder: of the cohort.
        case: name of the subject.
        subject_seed: seed of the subject itself, derived from the cohort's seed and the index.
        seed: of the cohort.
        index: of the subject in the cohort.
        geometry: the voxel grid.
    """

    folder: Path
    case: str
    subject_seed: int
    seed: int
    index: int
    geometry: Geometry

    def path(self, name: str) -> Path:
        """The file of a contrast or of the label (`seg`)."""
        return self.folder / self.case / f"{self.case}_{name}.nii.gz"

    @property
    def metadata(self) -> Path:
        """The JSON file that describes the subject; it is written last."""
        return self.folder / self.case / f"{self.case}.json"


def write_subject(job: Job, subject: SimulatedSubject) -> None:
    """Write images (int16), label (uint8) and, last, the metadata with the checksums of the others."""
    job.metadata.parent.mkdir(parents=True, exist_ok=True)
    job.metadata.unlink(missing_ok=True)  # it vouches for the files
    images = np.clip(np.rint(subject.image), 0, _IMAGE_MAXIMUM).astype(np.int16)
    checksums = {}
    for name, data in [*zip(CONTRASTS, images), ("seg", subject.label)]:
        content = nifti_bytes(data, subject.affine)
        write_atomic(job.path(name), content)
        checksums[job.path(name).name] = hashlib.sha256(content).hexdigest()
    facts = {
        "subject": job.case,
        "cohort_seed": job.seed,
        "index": job.index,
        **subject.info,
        "label_scheme": {"1": "NCR", "2": "ED", "4": "ET"},
        "versions": {
            "monai_adv": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "sha256": checksums,
    }
    write_atomic(job.metadata, _json_bytes(facts))


def is_finished(job: Job) -> bool:
    """Whether the subject is there, made by this recipe with this seed and grid, and unchanged since."""
    facts = _read_json(job.metadata)
    wanted = {"recipe": RECIPE, "seed": job.subject_seed, "geometry": job.geometry.as_dict()}
    if facts is None or any(facts.get(key) != value for key, value in wanted.items()):
        return False
    checksums = facts.get("sha256")
    paths = [job.path(name) for name in (*CONTRASTS, "seg")]
    if not isinstance(checksums, dict) or set(checksums) != {p.name for p in paths}:
        return False
    return all(p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == checksums[p.name] for p in paths)


def check_folder(folder: Path, geometry: Geometry) -> None:
    """Refuse to mix two geometries in one cohort.

    Raises:
        DataError: `folder` is a file, or holds a cohort on another grid.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; a cohort needs a folder.")
    known = _read_json(folder / COHORT_FILE)
    if known is not None and known.get("geometry", geometry.as_dict()) != geometry.as_dict():
        raise DataError(
            f"{folder} holds a cohort with the geometry {known['geometry']}, not {geometry.as_dict()}: write the new "
            "one to another folder, or remove the old one first."
        )


def write_cohort_file(folder: Path, jobs: list[Job]) -> None:
    """Describe the folder: its geometry and every subject in it, those of earlier calls included."""
    before = _read_json(folder / COHORT_FILE) or {}
    known = before.get("subjects") if before.get("recipe") == RECIPE else None
    cases = {job.case for job in jobs} | {c for c in (known or {}) if (folder / c / f"{c}.json").is_file()}
    subjects: dict[str, Any] = {}
    for case in sorted(cases):
        facts = _read_json(folder / case / f"{case}.json") or {}
        subjects[case] = {k: facts.get(k) for k in ("cohort_seed", "index", "seed", "grade", "volumes_ml")}
    cohort = {
        "description": "Simulated brain MRI with gliomas (not real patients), made by monai_adv",
        "recipe": RECIPE,
        "geometry": jobs[0].geometry.as_dict(),
        "naming": "BraTS 2017-2020",
        "notice": NOTICE,
        "subjects": subjects,
    }
    content = _json_bytes(cohort)
    path = folder / COHORT_FILE
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)


def copy_notice(folder: Path) -> None:
    """Put the copyright notice of the template beside what is derived from it."""
    notice = resources.files(__package__ or "") / "assets" / NOTICE
    write_atomic(folder / NOTICE, notice.read_bytes())


def nifti_bytes(data: np.ndarray, affine: np.ndarray) -> bytes:
    """A compressed NIfTI-1 file, the same bytes for the same data (no time stamp), in mm, with sform and qform."""
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, _MNI)
    image.set_qform(affine, _MNI)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=buffer, mtime=0) as file:
        file.write(image.to_bytes())
    return buffer.getvalue()


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file or it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
