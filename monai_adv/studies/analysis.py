"""From the records of a run to its tables of paired statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_adv.data.files import write_atomic
from monai_adv.errors import ConfigError
from monai_adv.stats import Comparison, compare, holm, wilcoxon
from monai_adv.studies.config import CompareConfig
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
    """

    comparisons: dict[str, Comparison]
    victims: Comparison | None
    ordering: pd.DataFrame


def analyse(records: pd.DataFrame, config: CompareConfig | None = None, eps: float | None = None) -> Analysis:
    """Compare the settings of a run.

    Args:
        records: tidy records, see :func:`monai_adv.studies.read_records`.
        config: metric, baseline and level of the family.
        eps: budget of the ordering table; the largest one if None.

    Raises:
        ConfigError: if the records do not allow the comparison; the message says why.
    """
    config = config or CompareConfig()
    usable = records[records["region"].notna()]
    if usable.empty:
        raise ConfigError("no unit of this run has a result: nothing can be compared")
    options: dict[str, Any] = {
        "metric": config.metric, "alternative": config.alternative, "zero_method": config.zero_method,
        "alpha": config.alpha,
    }  # fmt: skip
    try:
        comparisons = {
            str(victim): compare(
                _complete(part, config.baseline),
                by=("attack", "eps"),
                baseline=config.baseline,
                family=("attack", "eps", "region"),
                **options,
            )
            for victim, part in usable.groupby("victim", sort=False)
        }
        names = list(comparisons)
        between = None
        if len(names) > 1:
            between = compare(usable, by="victim", baseline=names[0], family=("victim", "setting", "region"), **options)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"the records cannot be compared: {error}") from error
    return Analysis(comparisons, between, ordering(usable, eps, config.alpha))


def _complete(part: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Rows of subjects that have the baseline: a subject that failed as a whole is not a missing pair."""
    have = set(part.loc[part["attack"] == baseline, "subject"])
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
        order holds; no p below six subjects.
    """
    attacked = records[records["attack"] != "clean"]
    if attacked.empty:
        return pd.DataFrame()
    budget = float(attacked["eps"].max()) if eps is None else eps
    chosen = records[(records["attack"] == "clean") | np.isclose(records["eps"], budget)]
    rows = []
    for (victim, region), part in chosen.groupby(["victim", "region"], sort=False):
        wide = part.pivot_table(index="subject", columns="attack", values="dice", aggfunc="first")
        present = [name for name in ORDER if name in wide.columns]
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


def write_analysis(folder: Path, analysis: Analysis) -> list[Path]:
    """Write every table of an analysis as CSV, Markdown and LaTeX into ``folder/tables``."""
    written = []
    tables = {f"comparison_{victim}": c for victim, c in analysis.comparisons.items()}
    if analysis.victims is not None:
        tables["comparison_between_victims"] = analysis.victims
    for name, comparison in tables.items():
        base = folder / "tables" / safe_name(name)
        base.parent.mkdir(parents=True, exist_ok=True)
        comparison.to_csv(base.with_suffix(".csv"))
        write_atomic(base.with_suffix(".md"), comparison.to_markdown().encode())
        write_atomic(base.with_suffix(".tex"), comparison.to_latex().encode())
        written += [base.with_suffix(ending) for ending in (".csv", ".md", ".tex")]
    if not analysis.ordering.empty:
        path = folder / "tables" / "ordering.csv"
        write_atomic(path, analysis.ordering.to_csv(index=False, float_format="%.6g").encode())
        written.append(path)
    return written
