"""Automatic checks of a run: invariants that must hold, and signs that an attack is weaker than it should be.

What only computing can tell is in :mod:`monai_adv.studies.probes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_adv.attacks import ATTACKS
from monai_adv.errors import ConfigError
from monai_adv.studies.check import COMPLETE, STATUSES, Check, checks_table, exit_code, write_checks
from monai_adv.studies.check_saved import saved_checks
from monai_adv.studies.check_strength import Objectives, finite, strength_checks
from monai_adv.studies.defended import Declared
from monai_adv.studies.probes import load_checks
from monai_adv.studies.records import read_records
from monai_adv.studies.units import UnitStore, read_json, read_unit

__all__ = [
    "STATUSES",
    "Check",
    "check_run",
    "checks_table",
    "exit_code",
    "load_checks",
    "run_checks",
    "write_checks",
]

SLACK = 1.002
"""Largest norm in eps: scanner intensities in float32 round the last step by up to some 1e-3 of a small budget."""
IDENTITY = ["subject", "victim", "attack", "method", "eps", "units", "norm", "setting"]
INSIDE = (("ET", "TC"), ("TC", "WT"))  # regions of which one holds the other


def check_run(folder: str | Path) -> list[Check]:
    """Every check of a run folder: of its table, its unit files, its saved volumes, and the probes that it keeps.

    Args:
        folder: as ``monai-adv run`` left it.

    Raises:
        ConfigError: if the folder holds no run.
    """
    folder = Path(folder)
    stored = read_json(folder / "study.json")
    if not isinstance(stored, dict):
        raise ConfigError(f"{folder} holds no study.json: it is no run folder of `monai-adv run`")
    records, problems = read_records(folder), read_json(folder / "problems.json") or []
    found = run_checks(records, problems, stored=stored, units=_units_of(folder, records))
    return [*found, *saved_checks(folder, records, stored), *load_checks(folder)]


def _units_of(folder: Path, records: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """What the checks need of the unit files that the table is made of."""
    store = UnitStore(folder / "units")
    for row in records[IDENTITY].drop_duplicates().to_dict("records"):
        unit = read_unit(store.path({str(name): value for name, value in row.items()}))
        if unit is not None:
            steps = [{k: step[k] for k in ("restart", "loss", "score")} for step in unit.get("trace") or []]
            yield {"identity": unit["identity"], "status": unit["status"], "attack": unit.get("attack"), "trace": steps}


def run_checks(
    records: pd.DataFrame,
    problems: Sequence[str] = (),
    *,
    stored: Mapping[str, Any] | None = None,
    units: Iterable[Mapping[str, Any]] = (),
) -> list[Check]:
    """Checks that a table of records allows. A FAIL invalidates the run, a WARN says that strength is in doubt.

    Args:
        records: tidy records.
        problems: what the run could not score, one line each.
        stored: the run's ``study.json``: what the attacks aim at, and which victims are defended.
        units: contents of the unit files, whose traces hold the objectives.
    """
    ok = records[(records["status"] == "ok") & records["region"].notna()]
    attacked = ok[ok["attack"] != "clean"]
    if attacked.empty:
        return [Check(COMPLETE, "FAIL", "no attacked unit has a result")]
    declared = None if stored is None else Declared.of(stored)
    budgets = {} if stored is None else stored.get("study", {}).get("budgets", {})
    objectives = Objectives(units)
    checks = [
        _failures(records, problems),
        _budget(attacked, max([1.0, *(budgets.get("proportions") or [])])),
        _outside(attacked),
        _finite(records, ok, attacked, objectives),
        _labels(ok),
    ]
    return checks + strength_checks(attacked, objectives, declared)


def _failures(records: pd.DataFrame, problems: Sequence[str]) -> Check:
    bad = records[records["status"] != "ok"]
    counts = [f"{n} {status}" for status, n in bad["status"].value_counts().items()]
    counts += [f"{len(problems)} problems named in the summary"] if problems else []
    return Check(COMPLETE, "FAIL" if counts else "PASS", ", ".join(counts) or f"{len(records)} rows")


def _budget(attacked: pd.DataFrame, largest: float) -> Check:
    name = "perturbation within the budget"
    # Gaussian noise has the budget as its standard deviation and no largest value
    own = attacked[(attacked["method"] != "noise") & (attacked["norm"] != "parameter") & np.isfinite(attacked["eps"])]
    if own.empty:
        return Check(name, "NOT RUN", "no attack but noise and such without a norm ball")
    parts = own.groupby(["norm", "units"], sort=False)
    sizes = pd.concat([part[f"{norm}_{units}"] / part["eps"] for (norm, units), part in parts])
    worst, allowed = float(sizes.max(skipna=False)), SLACK * largest  # NaN is no size that may pass
    detail = f"largest {worst:.6f} of eps, allowed {allowed:g}, n={len(own)}, as scored"
    return Check(name, "PASS" if worst <= allowed else "FAIL", detail)


def _outside(attacked: pd.DataFrame) -> Check:
    name = "zero outside the support"
    moving = [method for method, kind in ATTACKS.items() if kind.moves_voxels]  # anatomy leaves its old place
    own = attacked[~attacked["method"].isin(moving)]
    if own.empty:
        return Check(name, "NOT RUN", "only attacks that move the anatomy")
    worst = float(own["outside_max"].max(skipna=False))
    return Check(
        name, "PASS" if worst == 0 else "FAIL", f"largest change {worst:g}, allowed 0, n={len(own)}, as scored"
    )


def _finite(records: pd.DataFrame, ok: pd.DataFrame, attacked: pd.DataFrame, objectives: Objectives) -> Check:
    name = "everything finite"
    numbers = [(c, ok[c]) for c in ("dice", "voxel_accuracy")]
    numbers += [(c, attacked[c]) for c in ("linf_absolute", "l2_absolute", "outside_max")]
    bad = [column for column, values in numbers if not finite(values)]
    bad += [f"loss of {setting}" for setting in sorted(objectives.broken)]
    excluded = records[records["status"] == "invalid_nonfinite"]
    count = len(excluded.drop_duplicates(["subject", "victim", "attack", "eps"]))
    detail = (
        f"{len(bad)} of {len(numbers)} columns of {len(ok)} rows and {objectives.steps} steps not finite, allowed 0"
    )
    detail += f": {', '.join(bad)}" if bad else ""
    detail += f"; {count} units excluded as invalid_nonfinite" if count else ""
    return Check(name, "FAIL" if bad else "WARN" if count else "PASS", detail)


def _labels(ok: pd.DataFrame) -> Check:
    """Every victim and setting saw the same truth, and its regions lie in each other as the scheme has them."""
    name = "labels fit the head"
    moving = [method for method, kind in ATTACKS.items() if kind.moves_voxels]
    own = ok[~ok["method"].isin(moving)]
    truth = own.groupby(["subject", "region"])["truth_voxels"].agg(["min", "max"])
    wrong = [f"{subject} {region}: {a:g} and {b:g} true voxels" for (subject, region), a, b in truth.itertuples()
             if a != b]  # fmt: skip
    sizes = truth["max"].unstack("region")
    for small, large in INSIDE:
        if {small, large} <= set(sizes.columns):
            outside = sizes.index[sizes[small] > sizes[large]]
            wrong += [f"{subject}: more true {small} than {large}" for subject in outside]
    detail = f"{len(wrong)} of {len(truth)} regions of subjects with another truth under another setting or victim, or "
    detail += f"larger than the region that holds them, allowed 0, n={len(sizes)} subjects"
    return Check(name, "FAIL" if wrong else "PASS", detail + (f": {'; '.join(wrong[:3])}" if wrong else ""))
