"""Automatic checks that compute something: a few passes of every victim on the smallest subjects of a study.

Cost per victim and subject: 20 whole-volume forward and 7 backward passes, about 11 steps of an attack, and the study's
own iterative attack once more with twice its steps. Victims that vote over random passes vote twice on top.

Reference:
    Carlini et al., On evaluating adversarial robustness, 2019; Athalye et al., Obfuscated gradients give a false sense
    of security, ICML 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from monai_adv.data import scan
from monai_adv.data.headers import read_header
from monai_adv.errors import ConfigError, MonaiAdvError
from monai_adv.studies import Progress, cases
from monai_adv.studies.check import Check
from monai_adv.studies.config import StudyConfig
from monai_adv.studies.probing import ERROR, NAMES, Stored, probe
from monai_adv.studies.records import read_records
from monai_adv.studies.units import UnitStore, digest, read_json, read_unit, write_json
from monai_adv.studies.victims import at_spacing, load_entry

VERSION = 1
"""Part of every key: counted up when a probe measures something else."""
FILE = "checks.json"


def run_probes(
    study: StudyConfig, on_progress: Callable[[Progress], None] | None = None, subjects: int | None = None
) -> list[Check]:
    """Probe every victim of a study on its smallest subjects and store what was found in ``<output>/checks.json``.

    A victim and subject whose key (weights, files, configuration, stored results) is that of the stored checks is not
    computed again. Nothing but a folder that cannot be written and an interruption is raised: what cannot be computed
    is a FAIL or NOT RUN with the reason.

    Args:
        study: as it was run; before the run its results are not there to be compared.
        on_progress: called before each victim and subject.
        subjects: how many; ``study.checks.subjects`` if None.

    Returns:
        One check per probe, victim and subject; none with ``checks: {probes: false}``.

    Raises:
        WriteError: if the result cannot be written.
    """
    if not study.checks.probes:
        return []
    count = study.checks.subjects if subjects is None else subjects
    path = study.output / FILE
    before = {(row.get("victim"), row.get("subject")): row.get("key") for row in _rows(path)}
    config = _about(study.model_dump(mode="json"))
    table = _table(study.output)
    rows: list[dict[str, Any]] = []
    try:
        items = smallest(study, table, count)
    except (MonaiAdvError, OSError) as error:
        reason = f"no subject can be probed: {error}"
        rows = [_row(Check(name, "NOT RUN", reason, v.name), "", "", config) for v in study.victims for name in NAMES]
        items = []
    total = len(study.victims) * len(items)
    for place, entry in enumerate(study.victims):
        loaded = None
        for number, item in enumerate(items):
            subject = item["subject"]
            if on_progress is not None:
                on_progress(Progress(place * len(items) + number, total, f"checks: {entry.name} {subject}"))
            key = ""
            try:
                loaded = loaded or load_entry(entry, study.device)
                victim, content = loaded
                stored = _stored(study, table, entry.name, subject)
                key = digest([VERSION, content, cases.item_hash(item), config, asdict(stored)])
                if before.get((entry.name, subject)) == key:
                    rows += [row for row in _rows(path) if (row["victim"], row["subject"]) == (entry.name, subject)]
                    continue
                case = cases.load(item, study.data)
                if entry.resample:
                    victim = at_spacing(victim, entry.source, case.spacing)
                found = probe(study, entry.name, victim, case, stored)
                if any(check.detail.startswith(ERROR) for check in found):
                    key = ""  # tried again
            except Exception as error:  # a victim or subject that cannot be had costs only itself
                found = [Check(name, "NOT RUN", f"{type(error).__name__}: {error}", entry.name) for name in NAMES]
                key = ""  # tried again
            rows += [_row(check, subject, key, config) for check in found]
    write_json(path, rows)
    if on_progress is not None:
        on_progress(Progress(total, total, "checks done"))
    return [_check(row) for row in rows]


def load_checks(folder: str | Path) -> list[Check]:
    """The probes that a run folder keeps; none if there are none.

    Those that were computed for another configuration than the one the folder holds now say NOT RUN.

    Args:
        folder: a run folder.
    """
    folder = Path(folder)
    stored = read_json(folder / "study.json")
    now = _about(stored["study"]) if isinstance(stored, dict) and isinstance(stored.get("study"), dict) else None
    found = []
    for row in _rows(folder / FILE):
        check = _check(row)
        if now is not None and row["config"] != now:
            check = Check(
                check.name, "NOT RUN", "computed for an earlier configuration: run the study again", check.victim
            )
        found.append(check)
    return found


def smallest(study: StudyConfig, table: pd.DataFrame | None, count: int) -> list[dict[str, Any]]:
    """Datalist items of the subjects with the fewest voxels; of equal grids those with the smallest files.

    Args:
        study: the study.
        table: its records; subjects without a clean result are left out, as there is nothing to compare.
        count: how many.

    Raises:
        DataError: if the folder cannot be read.
        ConfigError: if no subject is left.
    """
    found = scan(study.data.root, study.data.scheme).items
    items = found if study.data.subjects is None else [i for i in found if i["subject"] in study.data.subjects]
    if table is not None:
        scored = table[(table["attack"] == "clean") & (table["status"] == "ok")]
        items = [item for item in items if item["subject"] in set(scored["subject"])] or items
    sized = []
    for item in items:
        files = [Path(p) for p in (item["image"] if isinstance(item["image"], (list, tuple)) else [item["image"]])]
        # a skull-stripped scan is cropped to the brain, and all of a cohort have one grid: then the bytes tell
        sized.append((_voxels(files[0]), sum(file.stat().st_size for file in files), item["subject"], item))
    if not sized:
        raise ConfigError(f"{study.data.root} has no subject of the study")
    return [item for *_, item in sorted(sized, key=lambda row: row[:3])[:count]]


def _voxels(file: Path) -> int:
    shape = read_header(file, None).shape[:3]
    return int(shape[0] * shape[1] * shape[2])


# ------------------------------------------------------------------------------------------------ what is stored
def _table(folder: Path) -> pd.DataFrame | None:
    try:
        return read_records(folder)
    except ConfigError:
        return None


def _stored(study: StudyConfig, table: pd.DataFrame | None, victim: str, subject: str) -> Stored:
    """What the run says of a victim and subject, and the iterative attack that left the least Dice."""
    if table is None:
        return Stored()
    own = table[(table["victim"] == victim) & (table["subject"] == subject) & (table["status"] == "ok")]
    clean = own[own["attack"] == "clean"].set_index("region")["dice"]
    return Stored({str(region): float(dice) for region, dice in clean.items()}, *_strongest(study, own, victim))


def _strongest(study: StudyConfig, own: pd.DataFrame, victim: str) -> tuple[str | None, float, float, int]:
    """Title, budget, mean Dice and seed of the iterative attack to repeat with twice its steps."""
    candidates = []
    for entry in study.attacks:
        if not entry.runs_on(victim):
            continue
        eps = max(entry.eps(study.budgets.eps))
        attack = study.create(entry, eps)
        if not (attack.white_box and hasattr(attack, "steps") and not attack.targeted):
            continue
        if attack.threat.norm == "parameter" or eps == float("inf") or entry.options.get("control"):
            continue
        rows = own[(own["attack"] == entry.title) & (own["eps"] == eps)]
        if len(rows):
            candidates.append((float(rows["dice"].mean()), entry.title, eps, rows.iloc[0]))
    if not candidates:
        return None, float("nan"), float("nan"), 0
    dice, title, eps, row = min(candidates, key=lambda c: c[0])
    names = ("subject", "victim", "attack", "method", "eps", "units", "norm", "setting")
    unit = read_unit(UnitStore(study.output / "units").path({name: row[name] for name in names})) or {}
    return title, eps, dice, int(unit.get("seed", 0))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Stored checks; none if the file is missing or damaged."""
    content = read_json(path)
    known = {"name", "status", "detail", "victim", "subject", "key", "config"}
    return [row for row in content if isinstance(row, dict) and known <= set(row)] if isinstance(content, list) else []


def _row(check: Check, subject: str, key: str, config: str) -> dict[str, Any]:
    return {**asdict(check), "subject": subject, "key": key, "config": config}


def _check(row: Mapping[str, Any]) -> Check:
    return Check(row["name"], row["status"], row["detail"], row["victim"])


def _about(dump: Mapping[str, Any]) -> str:
    """Hash of what of a configuration decides the probes; paths are not it, contents are in the key."""
    data = {k: v for k, v in dump.get("data", {}).items() if k in ("scheme", "orientation", "crop")}
    paths = ("checkpoint", "bundle", "trust")
    victims = [{k: v for k, v in entry.items() if k not in paths} for entry in dump.get("victims", [])]
    return digest([data, victims, *(dump.get(k) for k in ("attacks", "budgets", "seed", "device"))])
