"""A run in one JSON document for other programs, and the schema it keeps to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from monai_adv import __version__
from monai_adv.attacks import attack_class
from monai_adv.handlers import jsonable
from monai_adv.stats import Comparison, summarise
from monai_adv.studies.analysis import Analysis
from monai_adv.studies.check import Check
from monai_adv.studies.config import FILES, StudyConfig
from monai_adv.studies.defended import TAG, Declared
from monai_adv.studies.provenance import versions
from monai_adv.studies.records import CHECKSUMS, UNIT
from monai_adv.studies.units import read_checked, read_json

SCHEMA_ID = "urn:monai_adv:schema:summary:1"
SCHEMA_VERSION = 1
STATEMENT = (
    "Empirical lower bounds on vulnerability under the stated threat model; a stronger attack may find more, and "
    "nothing follows for attacks outside it."
)
_SETTING = ["victim", "attack", "method", "eps", "units", "norm", "setting"]
_FIXED = ("region", "victim", "defense", "n")


def summary_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of what :func:`machine_summary` returns.

    Example:
        >>> summary_schema()["$id"]
        'urn:monai_adv:schema:summary:1'
    """
    name = f"summary-{SCHEMA_VERSION}.schema.json"
    text = (resources.files("monai_adv.studies") / "schemas" / name).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def machine_summary(
    study: StudyConfig,
    records: pd.DataFrame,
    analysis: Analysis,
    checks: Sequence[Check],
    problems: Sequence[str],
    *,
    folder: Path | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json``: plain data that keeps to :func:`summary_schema`; what is not known is None.

    Args:
        study: the study.
        records: tidy records of the run.
        analysis: its comparisons.
        checks: its automatic checks.
        problems: what could not be scored, one line each.
        folder: the run folder, for what its ``study.json`` knows; ``study.output`` if None.
    """
    folder = study.output if folder is None else folder
    stored = read_json(folder / "study.json")
    stored = stored if isinstance(stored, dict) else {"study": study.model_dump(mode="json")}
    declared = Declared.of(stored)
    records = declared.tagged(records)
    found = {
        "schema": SCHEMA_ID,
        "schema_version": SCHEMA_VERSION,
        "package": {"name": "monai_adv", "version": __version__},
        "title": study.title,
        "statement": STATEMENT,
        "threat_model": study.budgets.model_dump(mode="json"),
        "attacks": [_attack(study, index) for index in range(len(study.attacks))],
        "data": {"folder": study.data.root.name, **study.data.model_dump(mode="json", exclude={"root", "subjects"})},
        "victims": _victims(study, records, declared, stored),
        "units": _units(records),
        "mean_dice": mean_dice(records).to_dict("records"),
        "family": {**study.compare.model_dump(), "tests": {v: c.tests for v, c in analysis.comparisons.items()}},
        "comparisons": {victim: _rows(comparison) for victim, comparison in analysis.comparisons.items()},
        "between_victims": _rows(analysis.victims),
        "ordering": analysis.ordering.to_dict("records"),
        "defenses": [
            {**{k: row[k] for k in _FIXED}, "dice": {str(k): v for k, v in row.items() if k not in _FIXED}}
            for row in analysis.defenses.to_dict("records")
        ],
        "claims": analysis.claims.to_dict("records"),
        "checks": [asdict(check) for check in checks],
        "problems": list(problems),
        "provenance": _provenance(study, stored, folder),
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def mean_dice(records: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice of every victim under every setting, region by region.

    Args:
        records: tidy records.

    Returns:
        One row per victim, attack, eps and region: n, dice, dice_nonempty (without subjects whose truth is empty),
        truth_empty (how many those are), drop (clean minus attacked, over the subjects that have both) and pairs (how
        many those are); NaN where a number is not known.
    """
    rows = records[(records["status"] == "ok") & records["region"].notna()]
    if rows.empty:
        return pd.DataFrame()
    by = [*_SETTING, "region"]
    found = summarise(rows, by=by)
    found = found.rename(columns={"mean": "dice", "mean_nonempty": "dice_nonempty"})
    clean = rows[rows["attack"] == "clean"].set_index(["subject", "victim", "region"])["dice"]
    before = clean.reindex(pd.MultiIndex.from_frame(rows[["subject", "victim", "region"]])).to_numpy()
    fell = rows.assign(fell=before - rows["dice"]).groupby(by, sort=False, dropna=False)["fell"]
    paired = fell.agg(["mean", "count"]).reset_index().rename(columns={"mean": "drop", "count": "pairs"})
    table = found[[*by, "n", "dice", "dice_nonempty", "truth_empty"]].merge(paired, on=by, validate="one_to_one")
    return table.astype({"n": int, "pairs": int})


def _victims(
    study: StudyConfig, records: pd.DataFrame, declared: Declared, stored: Mapping[str, Any]
) -> list[dict[str, Any]]:
    lacking, hashes = declared.lacking, stored.get("hashes", {})
    found = []
    for entry in study.victims:
        label = entry.name + (TAG if entry.name in lacking else "")
        own = records[records["victim"] == label]
        scored = own[(own["status"] == "ok") & own["region"].notna()]
        found.append(
            {
                "name": entry.name,
                "label": label,
                "source": entry.source.name,
                "sha256": hashes.get(entry.name),
                "kind": "checkpoint" if entry.bundle is None else "bundle",
                "defense": declared.kinds.get(entry.name, "none"),
                "adaptive": entry.name not in lacking,
                "lacking": lacking.get(entry.name),
                "deployment": entry.model_dump(
                    mode="json", exclude={"name", "checkpoint", "bundle", "trust", "defense"}, exclude_defaults=True
                ),
                "regions": list(dict.fromkeys(scored["region"])),
                "n_subjects": scored["subject"].nunique(),
            }
        )
    return found


def _attack(study: StudyConfig, index: int) -> dict[str, Any]:
    entry = study.attacks[index]
    return {
        "name": entry.title,
        "method": entry.name,
        "white_box": bool(attack_class(entry.name).white_box),
        "eps": entry.eps(study.budgets.eps),
        "only": entry.only,
        "options": _without_folders(entry.options),
    }


def _without_folders(options: Any, key: str = "") -> Any:
    """Options whose files are named without the folders of this machine."""
    if isinstance(options, Mapping):
        return {str(k): _without_folders(v, str(k)) for k, v in options.items()}
    if isinstance(options, (list, tuple)):
        return [_without_folders(v) for v in options]
    return Path(options).name if key in (*FILES, "file") and isinstance(options, str) else options


def _units(records: pd.DataFrame) -> dict[str, Any]:
    statuses = records.drop_duplicates(list(UNIT))["status"].value_counts()
    counts = {str(status): int(count) for status, count in statuses.items()}
    return {"scored": counts.pop("ok", 0), "without_result": counts}


def _rows(comparison: Comparison | None) -> list[dict[Any, Any]]:
    return [] if comparison is None else comparison.table.to_dict("records")


def _provenance(study: StudyConfig, stored: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    merged = read_checked(folder / CHECKSUMS) or {}
    return {
        "seed": study.seed,
        "fingerprint": stored.get("fingerprint", study.fingerprint()),
        "records_sha256": merged.get("files", {}).get("records.csv"),
        "versions": stored.get("versions") or versions(),
        "commands": ["monai-adv run study.yaml", f"monai-adv report {study.output.name}"],
    }


def _plain(value: Any) -> Any:
    """Data that every JSON parser reads: no NaN, no infinity."""
    value = jsonable(value)
    if isinstance(value, Mapping):
        return {key: _plain(content) for key, content in value.items()}
    if isinstance(value, list):
        return [_plain(content) for content in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if value is pd.NA or value is pd.NaT else str(value)
