"""Every setting against a baseline over the same subjects, with Holm's correction over a declared family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import tables
from .alignment import align, baseline_setting, label
from .distribution import ALTERNATIVES, MINIMUM_PAIRS, ZERO_METHODS, check_choice, check_fraction
from .multiplicity import holm, rejected
from .ranking import CriticalDifference, critical_difference, friedman, rank_stability
from .records import Records, better_is_higher, penalised
from .resampling import bootstrap_mean_difference
from .signed_rank import wilcoxon

if TYPE_CHECKING:
    from rich.table import Table

NO_TEST = f"none (n < {MINIMUM_PAIRS})"


@dataclass
class Comparison:
    """The comparisons of :func:`compare`. Differences are setting minus baseline: negative means the metric falls."""

    table: pd.DataFrame
    """One row per stratum and setting. The columns of the strata and of ``by``; ``n`` (complete pairs), ``missing``
    (pairs dropped), ``zeros``, ``n_nonzero``, ``truth_empty`` (pairs whose ground truth is empty),
    ``baseline_prediction_empty``, ``prediction_empty``; ``baseline_median``, ``baseline_q25``, ``baseline_q75``,
    ``median``, ``q25``, ``q75``; ``mean_difference``, ``mean_low``, ``mean_high``, ``mean_method``;
    ``hodges_lehmann``, ``hl_low``, ``hl_high``; ``rank_biserial``; ``p``, ``p_holm``, ``method``, ``verdict``."""
    friedman: pd.DataFrame
    """Friedman's test per stratum with more than two settings (``p_holm`` over the strata); empty otherwise."""
    ranks: pd.DataFrame
    """Mean rank and bootstrap stability of every setting per stratum; rank 1 is the best value of the metric."""
    critical_differences: dict[str, CriticalDifference]
    """Per stratum with more than two settings: groups that pairwise Wilcoxon-Holm tests do not tell apart."""
    notes: tuple[str, ...]
    """What a reader of the table has to know; printed under it."""
    by: tuple[str, ...]
    strata: tuple[str, ...]
    baseline: str
    metric: str
    alternative: str
    zero_method: str
    alpha: float
    confidence: float
    tests: int
    """Number m of tests in Holm's family."""

    def to_csv(self, path: str | Path) -> Path:
        """Write ``table`` in full precision; text that a spreadsheet would run as a formula is quoted."""
        tables.write_csv(self.table, path)
        return Path(path)

    def to_markdown(self) -> str:
        """Table and notes in Markdown."""
        return tables.markdown(*tables.display(self), notes=self.notes)

    def to_latex(self) -> str:
        """Table in LaTeX (needs the package booktabs), notes below it."""
        return tables.latex(*tables.display(self), notes=self.notes)

    def to_rich(self) -> Table:
        """Table for a terminal (needs rich), notes as its caption."""
        return tables.rich_table(*tables.display(self), notes=self.notes)

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:  # what a notebook shows
        return self.to_markdown()


def compare(
    records: Records,
    by: str | Sequence[str] = "attack",
    baseline: Any = "clean",
    metric: str = "dice",
    family: Sequence[str] = ("attack", "region"),
    *,
    alternative: str = "two-sided",
    zero_method: str = "pratt",
    alpha: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    subject: str = "subject",
    higher_is_better: bool | None = None,
    resamples: int = 9999,
) -> Comparison:
    """Compare every setting with the baseline over the same subjects, in every stratum, with Holm over all tests.

    The columns ``by`` tell the settings apart. The columns of ``family`` that are not in ``by`` are strata (such as the
    region): settings are compared within each, and Holm's family is all settings x strata. With more than two settings
    there are Friedman's test, a critical-difference summary and the stability of the ranks per stratum as well.

    Fewer than six pairs: effect sizes, but no p-value (and no place in Holm's m). Where no outcome at all could have
    led to significance (every test of the family at its smallest attainable p), the verdict says so instead of
    "not significant". For HD95 no mean difference is given, since penalty distances must not be averaged.

    Args:
        records: tidy records, one row per subject x setting x stratum. Rows whose metric is missing or whose
            ``status`` is not "ok" are dropped pairwise and counted.
        by: column or columns that make a setting, such as "attack", ("attack", "eps") or "victim".
        baseline: value of ``by``; for several columns a tuple, or the value of the first one alone.
        metric: column to compare; a value per subject.
        family: columns whose combinations are the declared family of tests.
        alternative: "two-sided", "greater" (setting above baseline) or "less".
        zero_method: "pratt", "wilcox" or "zsplit", see :func:`wilcoxon`.
        alpha: level of the family, in (0, 1).
        confidence: of all intervals, in (0, 1).
        seed: of the bootstrap; the same seed gives the same table, in whatever order the records are.
        subject: column with the subject ID.
        higher_is_better: for ranks; known for Dice, IoU, HD95 and the like.
        resamples: bootstrap samples of the mean difference.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: missing columns; no baseline in a stratum; several rows for one subject and setting (a column such
            as eps varies, the message names it); subjects that one of the two settings lacks (named); infinite values;
            mixed empty-region conventions; a setting or stratum called like a column of the table (method, p, n ...).
    """
    check_choice("alternative", alternative, ALTERNATIVES)
    check_choice("zero_method", zero_method, ZERO_METHODS)
    check_fraction("alpha", alpha)
    check_fraction("confidence", confidence)
    settings_by = (by,) if isinstance(by, str) else tuple(by)
    declared = (family,) if isinstance(family, str) else tuple(family)
    strata = tuple(c for c in declared if c not in settings_by)
    better = better_is_higher(metric) if higher_is_better is None else higher_is_better

    aligned = align(records, settings_by, strata, baseline, metric, subject)
    base = baseline_setting(aligned.settings, settings_by, baseline)
    rows: list[dict[str, Any]] = []
    tested: list[dict[str, Any]] = []
    ranked: list[pd.DataFrame] = []
    critical: dict[str, CriticalDifference] = {}
    smallest: list[float] = []
    for stratum, blocks in aligned.blocks.items():
        place = dict(zip(strata, stratum))
        for setting, block in blocks.items():
            if setting == base:
                continue
            row, attainable = _row(
                block,
                blocks[base],
                penalised(metric),
                alternative=alternative,
                zero_method=zero_method,
                confidence=confidence,
                seed=seed,
                resamples=resamples,
            )
            taken = sorted({*settings_by, *strata} & {*row, "p_holm", "verdict"})
            if taken:
                raise ValueError(f"the table has a column {taken[0]!r} of its own: rename that column of the records")
            rows.append(place | dict(zip(settings_by, setting)) | row)
            smallest.append(attainable)
        wide = pd.DataFrame({label(settings_by, s): block["_value"] for s, block in blocks.items()})
        if len(blocks) < 2:
            continue
        stable = rank_stability(wide, seed=seed, higher_is_better=better, confidence=confidence).reset_index(drop=True)
        names = pd.DataFrame([place | dict(zip(settings_by, s)) for s in blocks])
        ranked.append(pd.concat([names, stable], axis=1))
        if len(blocks) > 2:
            result = friedman(wide)
            entry = {k: v for k, v in asdict(result).items() if k not in ("mean_ranks", "pvalue")}
            claim: dict[str, Any] = {"p": result.pvalue}
            if result.n < MINIMUM_PAIRS:
                claim = {"p": math.nan, "method": NO_TEST}
            tested.append(place | entry | claim)
            name = label(strata, stratum) or "all"
            critical[name] = critical_difference(wide, alpha=alpha, zero_method=zero_method, higher_is_better=better)
    if not rows:
        raise ValueError(f"nothing to compare: the records hold only the baseline {label(settings_by, base)!r}")
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"].to_numpy())
    best_case = holm(np.where(table["p"].notna(), smallest, np.nan))
    table["verdict"] = [
        _verdict(row, bool(significant), bool(reachable))
        for row, significant, reachable in zip(
            rows, rejected(table["p_holm"], alpha), rejected(best_case, alpha), strict=True
        )
    ]
    table = table[[*(c for c in table.columns if c not in ("method", "verdict")), "method", "verdict"]]
    omnibus = pd.DataFrame(tested)
    if tested:
        omnibus["p_holm"] = holm(omnibus["p"].to_numpy())
    tests = int(table["p"].notna().sum())
    comparison = Comparison(
        table=table,
        friedman=omnibus,
        ranks=pd.concat(ranked, ignore_index=True),
        critical_differences=critical,
        notes=(),
        by=settings_by,
        strata=strata,
        baseline=label(settings_by, base if isinstance(baseline, (tuple, list)) else base[:1]),
        metric=metric,
        alternative=alternative,
        zero_method=zero_method,
        alpha=alpha,
        confidence=confidence,
        tests=tests,
    )
    comparison.notes = tables.notes(
        comparison, seed=seed, resamples=resamples, empty_truth_rule=aligned.empty_truth_rule
    )
    return comparison


def _row(
    block: pd.DataFrame,
    base: pd.DataFrame,
    penalty: bool,
    *,
    alternative: str,
    zero_method: str,
    confidence: float,
    seed: int,
    resamples: int,
) -> tuple[dict[str, Any], float]:
    """One comparison of two blocks aligned by subject, and the smallest p it could have given."""
    complete = block["_value"].notna() & base["_value"].notna()
    ours, theirs = block[complete], base[complete]
    result = wilcoxon(
        block["_value"].to_numpy(),
        base["_value"].to_numpy(),
        alternative=alternative,
        zero_method=zero_method,
        confidence=confidence,
    )
    claimed = result.n >= MINIMUM_PAIRS
    row: dict[str, Any] = {
        "n": result.n,
        "missing": result.missing,
        "zeros": result.zeros,
        "n_nonzero": result.n_nonzero,
    }
    if "truth_empty" in block.columns:
        row["truth_empty"] = int(ours["truth_empty"].sum())
    if "prediction_empty" in block.columns:
        row["baseline_prediction_empty"] = int(theirs["prediction_empty"].sum())
        row["prediction_empty"] = int(ours["prediction_empty"].sum())
    for prefix, values in (("baseline_", theirs["_value"]), ("", ours["_value"])):
        q25, median, q75 = np.quantile(values, (0.25, 0.5, 0.75)) if len(values) else (math.nan,) * 3
        row |= {prefix + "median": median, prefix + "q25": q25, prefix + "q75": q75}
    if penalty:
        mean, interval, how = math.nan, (math.nan, math.nan), "not given: penalty distances"
    else:
        boot = bootstrap_mean_difference(
            ours["_value"].to_numpy() - theirs["_value"].to_numpy(),
            seed,
            resamples,
            confidence=confidence,
            alternative=alternative,
        )
        mean, interval, how = boot.mean_difference, boot.confidence_interval, boot.note or boot.method
    row |= {"mean_difference": mean, "mean_low": interval[0], "mean_high": interval[1], "mean_method": how}
    low, high = result.confidence_interval
    row |= {"hodges_lehmann": result.hodges_lehmann, "hl_low": low, "hl_high": high}
    row |= {"rank_biserial": result.rank_biserial, "p": result.pvalue if claimed else math.nan}
    row["method"] = result.method if claimed else NO_TEST
    return row, result.smallest_p


def _verdict(row: dict[str, Any], significant: bool, reachable: bool) -> str:
    if math.isnan(row["p"]):
        return f"n={row['n']} < {MINIMUM_PAIRS}: no p-value"
    if row["method"] == "identical":
        return "identical"
    if significant:
        return f"significantly {'higher' if row['rank_biserial'] > 0 else 'lower'}"
    if not reachable:
        kind = " non-zero pairs" if row["zeros"] else ""
        return f"cannot reach significance with n={row['n_nonzero']}{kind}"
    return "not significant"
