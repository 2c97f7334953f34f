"""Budget, support and bounds of what a run left on disk: volumes kept for figures, and exported NIfTI files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_adv.attacks import ATTACKS
from monai_adv.data.headers import read_header
from monai_adv.data.loading import read_volume
from monai_adv.errors import MonaiAdvError
from monai_adv.studies.check import Check
from monai_adv.studies.config import StudyConfig
from monai_adv.studies.units import read_json
from monai_adv.studies.volumes import load_volumes, volumes_path
from monai_adv.threats import Ball, Threat, create_threat

SLACK = 1.002  # as scored: float32 rounds scanner intensities
EXPORTED = "monai_adv.adversarial_case/"


@dataclass
class Saved:
    """One saved image and what it was allowed to be.

    Attributes:
        where: subject and setting, for messages.
        clean, image: ``(1, C, *spatial)``.
        threat: the set of allowed images; its norm is not asked where ``sized`` is false.
        moves: whether the anatomy moved, so that the background changed too.
        sized: whether the norm can be measured.
    """

    where: str
    clean: Tensor
    image: Tensor
    threat: Threat
    moves: bool
    sized: bool


def saved_checks(folder: Path, records: pd.DataFrame, stored: Mapping[str, Any]) -> list[Check]:
    """Whether saved images keep the threat: norm within the budget, zero outside the support, bounds respected.

    Looked at are the volumes of the drawn subjects, and exported cases (``*_attack.json``) below the folder.

    Args:
        folder: a run folder.
        records: its records.
        stored: its ``study.json``.
    """
    sizes: dict[str, float] = {}
    outside: dict[str, float] = {}
    beyond: dict[str, float] = {}
    unread: list[str] = []
    for found in _all(folder, records, stored, unread):
        try:
            ball = found.threat.bind(found.clean)
            if found.sized:
                sizes[found.where] = float(ball.size(found.image)) / found.threat.eps
            if not found.moves:
                change = (found.image - found.clean).abs()
                outside[found.where] = float(torch.where(ball.mask, torch.zeros_like(change), change).max())
            if ball.low is not None or ball.high is not None:
                beyond[found.where] = beyond_bounds(ball, found.image)
        except (MonaiAdvError, RuntimeError) as error:
            unread.append(f"{found.where}: {error}")
    left = f"; not compared: {'; '.join(unread[:3])}" if unread else ""
    return [
        _check("perturbation within the budget, as saved", sizes, SLACK, "largest norm over eps", left),
        _check("zero outside the support, as saved", outside, 0.0, "largest change", left),
        _check("bounds respected, as saved", beyond, 0.0, "furthest beyond a bound", left),
    ]


def _check(name: str, numbers: Mapping[str, float], allowed: float, what: str, left: str) -> Check:
    if not numbers:
        return Check(name, "NOT RUN", f"no saved volume or exported file tells{left}")
    worst = max(numbers, key=lambda where: np.nan_to_num(numbers[where], nan=np.inf))
    status = "PASS" if numbers[worst] <= allowed else "FAIL"
    detail = f"{what} {numbers[worst]:.6g} ({worst}), allowed {allowed:g}, n={len(numbers)} images{left}"
    return Check(name, status, detail)


def beyond_bounds(ball: Ball, image: Tensor) -> float:
    """How far an image leaves the bounds of its threat, in its own units; 0 inside."""
    worst = torch.zeros((), dtype=image.dtype, device=image.device)
    if ball.low is not None:
        worst = torch.maximum(worst, (ball.low - image).max())
    if ball.high is not None:
        worst = torch.maximum(worst, (image - ball.high).max())
    return float(worst)


def _all(folder: Path, records: pd.DataFrame, stored: Mapping[str, Any], unread: list[str]) -> Iterator[Saved]:
    try:
        study = StudyConfig.model_validate(stored["study"])
        yield from _drawn(folder, records, study)
    except (MonaiAdvError, ValueError, KeyError) as error:  # such as a surrogate that is gone
        unread.append(f"volumes: {error}".splitlines()[0])
    for path in sorted(folder.rglob("*_attack.json")):
        document = read_json(path)
        if isinstance(document, dict) and str(document.get("schema", "")).startswith(EXPORTED):
            try:
                yield _exported(path, document)
            except (MonaiAdvError, OSError, ValueError, KeyError, TypeError) as error:
                unread.append(f"{path.name}: {error}".splitlines()[0])


def _drawn(folder: Path, records: pd.DataFrame, study: StudyConfig) -> Iterator[Saved]:
    """Volumes kept for figures, beside the clean ones of the same subject and victim."""
    keys = ["subject", "victim", "attack", "method", "eps", "units", "norm", "setting"]  # a unit's identity
    entries = {entry.title: entry for entry in study.attacks}
    for (subject, victim), rows in records[keys].drop_duplicates().groupby(["subject", "victim"], sort=False):
        units = [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]
        clean = next((load_volumes(volumes_path(folder, u)) for u in units if u["attack"] == "clean"), None)
        for unit in units if clean is not None else ():
            entry = entries.get(unit["attack"])
            attacked = None if entry is None else load_volumes(volumes_path(folder, unit))
            if entry is None or attacked is None or clean is None:
                continue
            threat = study.create(entry, unit["eps"]).threat
            # Gaussian noise has the budget as its standard deviation and no largest value
            sized = unit["norm"] != "parameter" and np.isfinite(unit["eps"]) and unit["method"] != "noise"
            before, after = (torch.from_numpy(np.asarray(v["image"], np.float32))[None] for v in (clean, attacked))
            where = f"{subject} {victim} {unit['setting']}"
            yield Saved(where, before, after, threat, ATTACKS[unit["method"]].moves_voxels, bool(sized))


def _exported(path: Path, document: Mapping[str, Any]) -> Saved:
    """A case that ``monai-adv attack`` wrote, against the files that it was made from."""
    written = [path.parent / name for name in document["adversarial"]]
    sources = [Path(name) for name in document["sources"]]
    if len(sources) != len(written) + 1:  # one per modality, and the label
        raise ValueError("the source is one file of four modalities")
    images = []
    for files in (sources[: len(written)], written):
        volumes = [read_volume(read_header(file)).as_tensor() for file in files]
        images.append(torch.cat(volumes)[None].float())
    described = {k: v for k, v in document["threat"].items() if k != "quantize"}  # not asked of a finished image
    threat = create_threat(described.pop("norm"), **described)
    # another crop has another standard deviation where the background counts
    sized = threat.norm != "parameter" and np.isfinite(threat.eps) and document["attack"]["name"] != "noise"
    sized = sized and (threat.support == "foreground" or threat.units == "absolute")
    moves = ATTACKS[document["attack"]["name"]].moves_voxels
    return Saved(f"{document['subject']} {path.name}", images[0], images[1], threat, moves, bool(sized))
