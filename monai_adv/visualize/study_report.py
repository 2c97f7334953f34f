"""Tables, figures and the report of a run folder, made from its stored units alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from monai_adv.errors import ConfigError
from monai_adv.stats import summarise
from monai_adv.studies.analysis import Analysis, analyse, write_analysis
from monai_adv.studies.checks import Check, run_checks
from monai_adv.studies.config import StudyConfig
from monai_adv.studies.defended import Declared
from monai_adv.studies.records import read_records
from monai_adv.studies.units import UnitStore, read_json, safe_name, write_json
from monai_adv.studies.volumes import load_volumes, volumes_path
from monai_adv.threats import UNITS
from monai_adv.visualize.curves import dice_curves
from monai_adv.visualize.montage import montage
from monai_adv.visualize.paired import paired_plot
from monai_adv.visualize.report import write_report
from monai_adv.visualize.style import save_figure


def write_study_report(folder: str | Path) -> tuple[Analysis, Path]:
    """Write ``tables/``, ``figures/``, ``summary.json`` and ``report.html`` of a run folder.

    Args:
        folder: as ``monai-adv run`` left it.

    Returns:
        The comparisons and the path of the report.

    Raises:
        ConfigError: if the folder holds no run, or none of its units has a result.
    """
    folder = Path(folder)
    stored = read_json(folder / "study.json")
    if stored is None:
        raise ConfigError(f"{folder} holds no study.json: it is no run folder of `monai-adv run`")
    study = StudyConfig.model_validate(stored["study"])
    stated, declared = read_records(folder), Declared.of(stored)
    analysis = analyse(stated, study.compare, study.figures.eps, declared)
    records = declared.tagged(stated)
    write_analysis(folder, analysis)
    problems = read_json(folder / "problems.json") or []
    checks = run_checks(records, problems)
    problems += analysis.notes

    figures = {**_figures(records, analysis, study), **_montages(folder, stated, study)}
    for caption, (name, figure) in figures.items():
        save_figure(figure, folder / "figures" / name)
        figures[caption] = (name, figure)
    path = folder / "report.html"
    write_report(
        path,
        title=study.title,
        summary=_summary(records, analysis, checks, problems),
        threat=_threat(folder, study, records),
        tables=_tables(analysis, records),
        figures={caption: figure for caption, (_, figure) in figures.items()},
        provenance=_provenance(study, stored),
        checks=[{"check": c.name, "status": c.status, "detail": c.detail} for c in checks],
    )
    write_json(folder / "summary.json", _machine_summary(study, records, analysis, checks, problems))
    return analysis, path


SUPPORTS = {"foreground": "foreground: non-zero voxels of each channel", "all": "every voxel, background too"}
BOUNDS = {"data": "each channel stays between the clean image's smallest and largest value", "None": "none"}


def _scored(records: pd.DataFrame) -> pd.DataFrame:
    return records[(records["status"] == "ok") & records["region"].notna()]


def _figures(records: pd.DataFrame, analysis: Analysis, study: StudyConfig) -> dict[str, tuple[str, Figure]]:
    scored = _scored(records)
    found = {
        f"Mean Dice against eps (in {study.budgets.units} per channel), with 95 % bootstrap bands over subjects; the "
        "noise control is dashed": ("dice_curves", dice_curves(_following(scored, study)))
    }
    eps = study.figures.eps if study.figures.eps is not None else max(study.budgets.eps)
    for victim, comparison in analysis.comparisons.items():
        part = scored[scored["victim"] == victim]
        caption = f"{victim}: Dice of every subject at eps {eps:g} {study.budgets.units}; brackets are Holm-adjusted"
        found[caption] = (safe_name(f"paired_{victim}"), paired_plot(part, comparison, eps=eps))
    return found


def _following(scored: pd.DataFrame, study: StudyConfig) -> pd.DataFrame:
    """Rows of the clean images and of the attacks that were run at the study's own budgets."""
    own = [a.title for a in study.attacks if not a.follows]
    return scored[~scored["attack"].isin(own)]


def _montages(folder: Path, records: pd.DataFrame, study: StudyConfig) -> dict[str, tuple[str, Figure]]:
    """One montage per drawn subject, victim and attack; noise is left out."""
    found: dict[str, tuple[str, Figure]] = {}
    scored = _scored(records)
    drawn = {a.title: study.drawn_eps(a.title) for a in study.attacks}
    keys = ["subject", "victim", "attack", "method", "eps", "units", "norm", "setting"]
    units = scored[keys].drop_duplicates()
    at_drawn = units["eps"] == units["attack"].map(drawn)
    for row in units[at_drawn & (units["method"] != "noise")].to_dict("records"):
        identity = {str(k): v for k, v in row.items()}
        attacked = load_volumes(volumes_path(folder, identity))
        same = (units["subject"] == identity["subject"]) & (units["victim"] == identity["victim"])
        found_clean = units[same & (units["attack"] == "clean")].to_dict("records")
        if attacked is None or not found_clean:
            continue
        clean = load_volumes(volumes_path(folder, {str(k): v for k, v in found_clean[0].items()}))
        if clean is None:
            continue
        title = f"{identity['subject']}, {identity['victim']}, {identity['setting']}"
        figure = montage(
            clean["image"],
            attacked["image"],
            clean["truth"],
            clean["prediction"],
            attacked["prediction"],
            spacing=[float(s) for s in clean["spacing"]],
            affine=clean["affine"],
            title=title,
            units=identity["units"] if identity["units"] in UNITS else "std",
            moved_truth=None if np.array_equal(attacked["truth"], clean["truth"]) else attacked["truth"],
            dice=_dice_pairs(scored, identity),
        )
        found[f"{title}: the axial slice whose prediction changed most"] = (safe_name(f"montage_{title}"), figure)
    return found


def _dice_pairs(scored: pd.DataFrame, identity: Mapping[Any, Any]) -> dict[str, tuple[float, float]]:
    own = scored[(scored["subject"] == identity["subject"]) & (scored["victim"] == identity["victim"])]
    clean = own[own["attack"] == "clean"].set_index("region")["dice"]
    attacked = own[own["setting"] == identity["setting"]].set_index("region")["dice"]
    return {str(region): (float(clean[region]), float(attacked[region])) for region in clean.index}


def _tables(analysis: Analysis, records: pd.DataFrame) -> dict[str, Any]:
    tables: dict[str, Any] = {"Mean Dice per region and setting (n subjects)": mean_table(records)}
    for victim, comparison in analysis.comparisons.items():
        tables[
            f"{victim}: every setting against {comparison.baseline}, Wilcoxon signed-rank over subjects, Holm over "
            f"{comparison.tests} tests"
        ] = comparison
    if analysis.victims is not None:
        tables["Victims against each other under each setting"] = analysis.victims
    if not analysis.defenses.empty:
        tables["Defense x attack: mean Dice over the subjects that every victim has"] = analysis.defenses
    if not analysis.claims.empty:
        tables[
            "Published claims (Liu et al. 2019) and whether they hold here: mean Dice over regions, exact one-sided "
            "Wilcoxon signed-rank over subjects, Holm over the tests of each claim (column tests)"
        ] = analysis.claims
    if not analysis.ordering.empty:
        tables[
            "Expected order clean > noise > FGSM > I-FGSM: one-sided tests between neighbours, Holm over the rows"
        ] = analysis.ordering
    tables["Size of the perturbations (mean over subjects)"] = size_table(records)
    return tables


def mean_table(records: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice, with and without subjects whose truth is empty, and median HD95 in mm, per victim and setting."""
    scored = _scored(records)
    order = scored.drop_duplicates(["victim", "attack", "eps"])[["victim", "setting"]]
    dice = scored.pivot_table(index=["victim", "setting"], columns="region", values="dice", aggfunc="mean")
    described = summarise(scored, by=("victim", "setting", "region")).set_index(["victim", "setting", "region"])
    without = described["mean_nonempty"].unstack("region")
    empty = described["truth_empty"].unstack("region")
    hd95 = scored.pivot_table(index=["victim", "setting"], columns="region", values="hd95", aggfunc="median")
    count = scored.groupby(["victim", "setting"])["subject"].nunique()
    regions = [r for r in ("WT", "TC", "ET") if r in dice.columns] or list(dice.columns)
    table = dice[regions].add_prefix("Dice ")
    for region in regions:  # BraTS scores an empty truth 1 or 0, so the mean without such cases stands beside it
        if empty[region].gt(0).any():
            table[f"Dice {region} without empty truth"] = without[region]
            table[f"empty truth {region}"] = empty[region].astype(int)
    table = table.join(hd95[regions].add_prefix("median HD95 ")).join(count.rename("n"))
    rows = pd.MultiIndex.from_frame(_in_order(order, scored))
    return table.loc[rows].reset_index()


def size_table(records: pd.DataFrame) -> pd.DataFrame:
    """Perturbation norms in all three units, SSIM and PSNR per victim and setting."""
    scored = _scored(records)
    attacked = scored[scored["attack"] != "clean"]
    columns = ["linf_std", "linf_range", "linf_absolute", "l2_std", "ssim", "psnr", "seconds"]
    table = attacked.groupby(["victim", "setting"])[columns].mean()
    rows = pd.MultiIndex.from_frame(_in_order(attacked.drop_duplicates(["victim", "setting"]), scored))
    return table.loc[rows].reset_index()


def _in_order(pairs: pd.DataFrame, scored: pd.DataFrame) -> pd.DataFrame:
    """Victim and setting pairs, clean first, controls next, then by attack and budget."""
    known = scored.drop_duplicates(["victim", "setting"]).merge(pairs[["victim", "setting"]].drop_duplicates())
    first = {"clean": 0, "noise": 1, "fgsm": 2, "ifgsm": 3}
    known = known.assign(rank=known["method"].map(first).fillna(9))
    return known.sort_values(["victim", "rank", "attack", "eps"], kind="stable")[["victim", "setting"]]


def _summary(records: pd.DataFrame, analysis: Analysis, checks: list[Check], problems: list[str]) -> list[str]:
    scored = _scored(records)
    lines = []
    for victim, part in scored.groupby("victim", sort=False):
        clean = part[part["attack"] == "clean"].groupby("region")["dice"].mean()
        means = part[part["attack"] != "clean"].groupby(["setting", "region"])["dice"].mean()
        worst = means.groupby("region").idxmin()
        said = []
        for region in clean.index:
            setting = worst[region][0]
            said.append(f"{region} from {clean[region]:.3f} to {means[(setting, region)]:.3f} ({setting})")
        n = part["subject"].nunique()
        lines.append(f"{victim}, {n} subjects: mean Dice fell at most as follows: {'; '.join(said)}.")
        table = analysis.comparisons[str(victim)].table
        tested = table[table["p_holm"].notna()]
        if tested.empty:
            lines.append("Too few subjects for any claim of significance: effect sizes only.")
        else:
            alpha = analysis.comparisons[str(victim)].alpha
            significant = int((tested["p_holm"] <= alpha).sum())
            lines.append(
                f"{significant} of {len(tested)} comparisons with {analysis.comparisons[str(victim)].baseline} are "
                f"significant at {alpha:g} after Holm's correction."
            )
    bad = [c for c in checks if c.status in ("FAIL", "WARN")]
    if bad:
        lines.append("Automatic checks: " + "; ".join(f"{c.status}: {c.name} ({c.detail})" for c in bad) + ".")
    if problems:
        lines.append("Not scored: " + " | ".join(problems))
    lines.append("These numbers state a vulnerability under the threat model below; a stronger attack may find more.")
    return lines


def _threat(folder: Path, study: StudyConfig, records: pd.DataFrame) -> dict[str, Any]:
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
    seen = set()
    for unit in UnitStore(folder / "units").all():
        name = unit["identity"]["attack"]
        if "attack" in unit and name not in seen:
            seen.add(name)
            options = {k: v for k, v in unit["attack"].items() if k != "threat"}
            described[f"attack {name}"] = ", ".join(f"{k}={v}" for k, v in options.items())
    return described


def _provenance(study: StudyConfig, stored: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seed": study.seed,
        "fingerprint": stored["fingerprint"],
        **{f"version of {k}": v for k, v in stored["versions"].items()},
        "commands": f"monai-adv run study.yaml; monai-adv compare {study.output}; monai-adv report {study.output}",
    }


def _machine_summary(
    study: StudyConfig, records: pd.DataFrame, analysis: Analysis, checks: list[Check], problems: list[str]
) -> dict[str, Any]:
    means = _scored(records).groupby(["victim", "attack", "eps", "region"])["dice"].mean().reset_index()
    return {
        "title": study.title,
        "mean_dice": means.to_dict("records"),
        "comparisons": {
            victim: c.table.replace({np.nan: None}).to_dict("records") for victim, c in analysis.comparisons.items()
        },
        "ordering": analysis.ordering.replace({np.nan: None}).to_dict("records"),
        "defenses": analysis.defenses.replace({np.nan: None}).to_dict("records"),
        "claims": analysis.claims.replace({np.nan: None}).to_dict("records"),
        "checks": [vars(c) for c in checks],
        "problems": problems,
    }
