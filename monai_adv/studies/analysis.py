"""From the records of a run to its tables of paired statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from monai_adv.data.files import write_atomic
from monai_adv.errors import ConfigError
from monai_adv.stats import Comparison, compare, holm, read_metrics_saver, wilcoxon
from monai_adv.studies.config import CompareConfig
from monai_adv.studies.defended import Declared, defense_table, published_claims
from monai_adv.studies.records import csv_bytes, read_records
from monai_adv.studies.scoring import METRICS, is_scores, read_scores
from monai_adv.studies.stored import stored_study
from monai_adv.studies.units import safe_name

ORDER = ("clean", "noise", "fgsm", "ifgsm")
"""Attacks whose mean Dice is expected to fall in this order at one budget."""
MINIMUM = 6
"""Subjects below which no p-value is claimed."""


@dataclass
class Analysis:
    """The comparisons of a run.

    Attributes:
        comparisons: one per victim, every attack and budget against the baseline in every region; Holm's family is
            attack x budget x region within the victim.
        victims: comparisons between victims under each setting where the run has more than one, else None.
        ordering: neighbouring steps of clean > noise > FGSM > I-FGSM, tested one-sided at one budget.
        notes: what could not be compared, and why.
        defenses: mean Dice of every victim under every setting, where the study has defenses; else empty.
        claims: published claims on defenses and whether they hold here, likewise.
    """

    comparisons: dict[str, Comparison]
    victims: Comparison | None
    ordering: pd.DataFrame
    notes: list[str] = field(default_factory=list)
    defenses: pd.DataFrame = field(default_factory=pd.DataFrame)
    claims: pd.DataFrame = field(default_factory=pd.DataFrame)


def analyse(
    records: pd.DataFrame,
    config: CompareConfig | None = None,
    eps: float | None = None,
    declared: Declared | None = None,
) -> Analysis:
    """Compare the settings of a run.

    Args:
        records: tidy records, see :func:`monai_adv.studies.read_records`.
        config: metric, baseline and level of the family.
        eps: budget of the ordering table; the largest one if None.
        declared: the study's defenses; a victim that no attack adapted to is called NOT ADAPTIVE in every table.

    Raises:
        ConfigError: if the records do not allow the comparison; the message says why.
    """
    config = config or CompareConfig()
    given = records if declared is None else declared.sorted(records)
    records = given if declared is None else declared.tagged(given)
    if not records["region"].notna().any():
        raise ConfigError("no unit of this run has a result: nothing can be compared")
    options: dict[str, Any] = {
        "metric": config.metric, "alternative": config.alternative, "zero_method": config.zero_method,
        "alpha": config.alpha,
    }  # fmt: skip
    comparisons: dict[str, Comparison] = {}
    between = None
    notes: list[str] = []
    for victim, part in records.groupby("victim", sort=False):
        try:
            comparisons[str(victim)] = compare(
                _complete(part, config.baseline),
                by=("attack", "eps"),
                baseline=config.baseline,
                family=("attack", "eps", "region"),
                **options,
            )
        except (ValueError, KeyError) as error:
            notes.append(f"victim {victim} cannot be compared: {error}")
    if not comparisons:
        raise ConfigError("; ".join(notes))
    names = list(comparisons)
    if declared is not None:  # against the undefended victim
        names = list(dict.fromkeys([*(name for name in declared.order() if name in comparisons), *comparisons]))
    if len(names) > 1:
        known = records[records["victim"].isin(names)]
        scored = known[known["region"].notna()].groupby("victim")["subject"].unique()
        everywhere = set(known.loc[known["victim"] == names[0], "setting"])  # an attack on one defense has no pair
        common = set.intersection(*(set(subjects) for subjects in scored))
        try:
            between = compare(
                known[known["subject"].isin(common) & known["setting"].isin(everywhere)],
                by="victim",
                baseline=names[0],
                family=("victim", "setting", "region"),
                **options,
            )
        except (ValueError, KeyError) as error:
            notes.append(f"the victims cannot be compared with each other: {error}")
    analysis = Analysis(comparisons, between, ordering(records, eps, config.alpha), notes)
    if declared is not None and declared.any:
        notes += declared.notes()
        analysis.defenses = defense_table(given, declared.kinds, declared.lacking)
        analysis.claims = published_claims(given, declared.kinds, declared.attacks, config.alpha)
    return analysis


def analyse_run(folder: str | Path, **changes: Any) -> Analysis:
    """The comparisons of a run folder, as its study declared them: what ``monai-adv compare FOLDER`` shows.

    Args:
        folder: as :func:`monai_adv.studies.run_study` or ``monai-adv run`` left it.
        **changes: fields of :class:`monai_adv.studies.CompareConfig` to replace, e.g. ``alpha=0.01``.

    Raises:
        ConfigError: if the folder holds no run or no unit with a result, for an unknown field, or a metric or baseline
            that the records do not have.

    Example:
        ``print(analyse_run("runs/brats").comparisons["U-Net"])``
    """
    folder = Path(folder)
    config, stored = CompareConfig(), dict[str, Any]()
    if (folder / "study.json").is_file():  # that of a bundle has none
        study, stored = stored_study(folder)
        config = study.compare
    try:
        chosen = CompareConfig.model_validate({**config.model_dump(), **changes})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{wrong}; fields: {', '.join(CompareConfig.model_fields)}") from error
    return analyse(read_records(folder), chosen, declared=Declared.of(stored))


def analyse_raw(
    paths: Sequence[Path],
    config: CompareConfig | None = None,
    baseline: str | None = None,
    *,
    metric: str | None = None,
    **options: Any,
) -> Analysis:
    """Compare settings that have a table each: ``*_raw.csv`` of MONAI's ``MetricsSaver``, or ``scores.csv``.

    Args:
        paths: a table per evaluator, or per folder of predictions, of the same cases.
        config: level of the family and the like; its metric and baseline are not used.
        baseline: name of the table that the others are compared with; the first one if None.
        metric: what is compared; what the files' names say if None, and Dice of ``scores.csv``.
        **options: see :func:`monai_adv.stats.read_metrics_saver`; names also of ``scores.csv``.

    Raises:
        ConfigError: if they cannot be read or compared; the message says why.
    """
    config = config or CompareConfig()
    if len(paths) < 2:
        raise ConfigError(
            "a comparison needs two tables or more: *_raw.csv of a clean evaluator and of an attacked one, or "
            "scores.csv of two folders of predictions"
        )
    try:
        if any(is_scores(path) for path in paths):
            unused = sorted(set(options) - {"names"})
            if unused:
                raise ConfigError(f"{', '.join(f'--{name}' for name in unused)}: for *_raw.csv, {paths[0]} is none")
            records = read_scores(paths, options.get("names"))
            metric = metric or "dice"
            if metric not in METRICS:
                raise ConfigError(f"metric {metric!r} is not in {paths[0]}: one of {', '.join(METRICS)}")
        else:
            records = read_metrics_saver(*paths, metric=metric, **options)
            metric = str(records.columns[-1])
        names = list(dict.fromkeys(records["attack"]))
        comparison = compare(
            records, baseline=names[0] if baseline is None else baseline, metric=metric,
            alternative=config.alternative, zero_method=config.zero_method, alpha=config.alpha,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Analysis({comparison.metric: comparison}, None, pd.DataFrame())


def _complete(part: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Rows of subjects that have the baseline: a subject that failed as a whole is not a missing pair.

    A failed unit of such a subject is kept as its row without a region, and counts as a missing pair.
    """
    have = set(part.loc[(part["attack"] == baseline) & part["region"].notna(), "subject"])
    if not have:
        raise ConfigError(f"baseline {baseline!r} is not in the records: {', '.join(sorted(set(part['attack'])))}")
    return part[part["subject"].isin(have)]


def ordering(records: pd.DataFrame, eps: float | None = None, alpha: float = 0.05) -> pd.DataFrame:
    """Is Dice in the expected order clean > noise > FGSM > I-FGSM? One-sided paired tests between neighbours.

    Args:
        records: tidy records.
        eps: budget; the largest one in the records if None.
        alpha: level for Holm over all rows.

    Returns:
        One row per victim, region and neighbouring pair: means, Hodges-Lehmann difference, p, p_holm and whether the
        order holds significantly; no p below six subjects.
    """
    records = records[records["region"].notna() & records["method"].isin(ORDER)]
    attacked = records[records["attack"] != "clean"]
    if attacked.empty:
        return pd.DataFrame()
    titles = records.drop_duplicates("method").set_index("method")["attack"]  # the first of each method
    expected = [titles[name] for name in ORDER if name in titles]
    budget = float(attacked["eps"].max()) if eps is None else eps
    chosen = records[(records["attack"] == "clean") | np.isclose(records["eps"], budget)]
    rows = []
    for (victim, region), part in chosen.groupby(["victim", "region"], sort=False):
        wide = part.pivot_table(index="subject", columns="attack", values="dice", aggfunc="first")
        present = [name for name in expected if name in wide.columns]
        for higher, lower in zip(present, present[1:]):
            test = wilcoxon(wide[higher].to_numpy(), wide[lower].to_numpy(), alternative="greater")
            rows.append(
                {
                    "victim": victim, "region": region, "eps": budget, "expected": f"{higher} > {lower}", "n": test.n,
                    "mean_higher": wide[higher].mean(), "mean_lower": wide[lower].mean(),
                    "hodges_lehmann": test.hodges_lehmann, "p": test.pvalue if test.n >= MINIMUM else float("nan"),
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    if not table.empty:
        table["p_holm"] = holm(table["p"].to_numpy())
        table["holds"] = (table["mean_higher"] > table["mean_lower"]) & (table["p_holm"] <= alpha)
    return table


def shown_ordering(table: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`ordering` to be read: with too few subjects nothing is said of whether the order holds."""
    words = np.where(table["holds"], "yes", "no")
    return table.assign(holds=np.where(table["p"].isna(), f"n < {MINIMUM}: not tested", words))


def write_analysis(folder: Path, analysis: Analysis) -> list[Path]:
    """Write every table of an analysis as CSV, Markdown and LaTeX into ``folder/tables``."""
    written = []
    tables = {f"comparison_{victim}": c for victim, c in analysis.comparisons.items()}
    if analysis.victims is not None:
        tables["comparison_between_victims"] = analysis.victims
    for name, comparison in tables.items():
        contents = {
            "csv": csv_bytes(comparison.table),
            "md": comparison.to_markdown().encode(),
            "tex": comparison.to_latex().encode(),
        }
        for ending, content in contents.items():
            path = folder / "tables" / f"{safe_name(name)}.{ending}"
            write_atomic(path, content)
            written.append(path)
    plain = {"ordering": analysis.ordering, "defenses": analysis.defenses, "claims": analysis.claims}
    for name, table in plain.items():
        if not table.empty:
            path = folder / "tables" / f"{name}.csv"
            write_atomic(path, csv_bytes(table))
            written.append(path)
    return written
