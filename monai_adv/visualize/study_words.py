"""What the report of a run says in words: its result, its threat model, where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from monai_adv.stats import Comparison, pairs_needed
from monai_adv.studies.analysis import Analysis
from monai_adv.studies.check import Check
from monai_adv.studies.config import StudyConfig
from monai_adv.studies.units import UnitStore, read_unit

from .study_tables import scored

IDENTITY = ("subject", "victim", "attack", "method", "eps", "units", "norm", "setting")
_FEW = 2  # more victims have a line each
SUPPORTS = {"foreground": "foreground: non-zero voxels of each channel", "all": "every voxel, background too"}
BOUNDS = {"data": "each channel stays between the clean image's smallest and largest value", "None": "none"}


def summary(records: pd.DataFrame, analysis: Analysis, checks: Sequence[Check], problems: Sequence[str]) -> list[str]:
    """The result in plain words, one paragraph each."""
    rows = scored(records)
    victims = list(dict.fromkeys(rows["victim"]))
    lines = []
    for victim in victims:
        part = rows[rows["victim"] == victim]
        comparison = analysis.comparisons.get(str(victim))
        lines.append(_of_many(part, comparison) if len(victims) > _FEW else _of_few(part, comparison))
    if len(victims) > _FEW:
        said = "Mean Dice over regions, clean and in the worst setting; comparisons significant by Holm's correction:"
        lines.insert(0, f"{len(victims)} victims, {rows['subject'].nunique()} subjects. {said}")
    bad = [c for c in checks if c.status in ("FAIL", "WARN")]
    if bad:
        named = [f"{c.status}: {c.name}{f' ({c.victim})' if c.victim else ''}" for c in bad]
        lines.append(f"Automatic checks: {'; '.join(dict.fromkeys(named))}. Their numbers stand below.")
    if problems:
        lines.append("Not scored: " + " | ".join(problems))
    lines.append("These numbers state a vulnerability under the threat model below; a stronger attack may find more.")
    return lines


def _of_few(part: pd.DataFrame, comparison: Comparison | None) -> str:
    """One victim, region by region."""
    clean = part[part["attack"] == "clean"].groupby("region", sort=False)["dice"].mean()
    means = part[part["attack"] != "clean"].groupby(["setting", "region"], sort=False)["dice"].mean()
    said = []
    for region in clean.index:
        left = means[means.index.get_level_values("region") == region].droplevel("region")
        if len(left):
            said.append(f"{region} from {clean[region]:.3f} to {left.min():.3f} ({left.idxmin()})")
    n, victim = part["subject"].nunique(), part["victim"].iloc[0]
    fell = "; ".join(said) or "nothing was attacked"
    return f"{victim}, {n} subjects: mean Dice fell at most as follows: {fell}. {_tests(comparison)}"


def _of_many(part: pd.DataFrame, comparison: Comparison | None) -> str:
    """One victim in one line."""
    means = (
        part.groupby(["attack", "setting", "region"], sort=False)["dice"].mean().groupby(["attack", "setting"]).mean()
    )
    clean = means[means.index.get_level_values("attack") == "clean"].mean()
    attacked = means[means.index.get_level_values("attack") != "clean"]
    fell = f" to {attacked.min():.3f} ({attacked.droplevel('attack').idxmin()})" if len(attacked) else ""
    tests = "not compared" if comparison is None else "{} of {} significant".format(*_significant(comparison))
    return f"{part['victim'].iloc[0]}: {clean:.3f}{fell}; {tests}."


def _tests(comparison: Comparison | None) -> str:
    if comparison is None:
        return "Not compared."
    significant, tested = _significant(comparison)
    if not tested:
        return "Too few subjects for any claim of significance: effect sizes only."
    said = (
        f"{significant} of {tested} comparisons with {comparison.baseline} are significant at {comparison.alpha:g} "
        "after Holm's correction."
    )
    if not significant and comparison.table["verdict"].dropna().astype(str).str.startswith("cannot reach").any():
        most, needed = int(comparison.table["n"].max()), pairs_needed(tested, comparison.alpha)
        said += f" {most} subjects cannot reach it over {tested} tests, whatever they show; {needed} could."
    return said


def _significant(comparison: Comparison) -> tuple[int, int]:
    """Comparisons that are significant, and those that were tested."""
    tested = comparison.table[comparison.table["p_holm"].notna()]
    return int((tested["p_holm"] <= comparison.alpha).sum()), len(tested)


def threat(folder: Path, study: StudyConfig, records: pd.DataFrame) -> dict[str, Any]:
    """What was attacked and how."""
    described: dict[str, Any] = {
        "norm and units": f"{study.budgets.norm}, in {study.budgets.units} of the support, per channel",
        "budgets": ", ".join(f"{e:g}" for e in study.budgets.eps),
        "modalities": "all four" if study.budgets.channels is None else f"channels {study.budgets.channels}",
        "support": SUPPORTS[study.budgets.support],
        "bounds": BOUNDS.get(str(study.budgets.bounds), f"{study.budgets.bounds} in scanner units"),
        "knowledge": "white box: gradient through preprocessing, sliding-window inference and network",
        "what is perturbed": "the file's voxels in scanner units, before the normalisation",
    }
    if study.budgets.proportions is not None:
        described["budgets of the modalities"] = "eps times " + ", ".join(f"{p:g}" for p in study.budgets.proportions)
    if study.budgets.quantize is not None:
        described["stored values"] = f"attacks use only values that {study.budgets.quantize} files hold"
    for victim in study.victims:
        defenses = {"behind a filter": victim.purify, "smoothed": victim.smooth}
        front = [f"{name} {json.dumps(options)}" for name, options in defenses.items() if options]
        described[f"victim {victim.name}"] = ", ".join([victim.source.name, *front])
    store = UnitStore(folder / "units")
    rows = scored(records)
    for row in rows[rows["attack"] != "clean"].drop_duplicates("attack").to_dict("records"):
        unit = read_unit(store.path({str(k): row[k] for k in IDENTITY})) or {}
        options = {k: v for k, v in unit.get("attack", {}).items() if k != "threat"}
        described[f"attack {row['attack']}"] = ", ".join(f"{k}={v}" for k, v in options.items())
    return described


def provenance(study: StudyConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Seed, versions and the commands that make the run again."""
    return {
        "seed": study.seed,
        "fingerprint": stored["fingerprint"],
        **{f"version of {k}": v for k, v in stored["versions"].items()},
        "commands": f"monai-adv run study.yaml; monai-adv compare {study.output}; monai-adv report {study.output}",
    }
