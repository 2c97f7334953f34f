"""More than two settings on the same subjects: Friedman's test, stable ranks, groups that cannot be told apart."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from .distribution import MINIMUM_PAIRS, ROUNDING, FloatArray, check_fraction, smallest_pvalue
from .multiplicity import holm, rejected
from .signed_rank import signed_rank_test


@dataclass(frozen=True)
class FriedmanResult:
    """Friedman's test of a table of subjects x settings."""

    statistic: float
    pvalue: float
    method: str
    """One of "chi-square approximation", "identical" (every subject rates all settings equal, p = 1) or "too few"."""
    n: int
    settings: int
    missing: int
    """Subjects dropped because a value was missing."""
    kendall_w: float
    """Kendall's coefficient of concordance: 0 no agreement between subjects, 1 the same order in every one."""
    mean_ranks: pd.Series = field(repr=False)
    """Mean rank of every setting; rank 1 is the smallest value."""


@dataclass(frozen=True)
class CriticalDifference:
    """Summary in the style of a critical-difference diagram (Demsar 2006), with pairwise Wilcoxon-Holm tests."""

    mean_ranks: pd.Series
    """Mean rank of every setting, best (1) first."""
    pvalues: pd.DataFrame
    """Holm-adjusted two-sided p of every pair of settings, over all pairs of this table; NaN on the diagonal."""
    groups: tuple[tuple[Hashable, ...], ...]
    """Largest sets of two or more settings in which no pair is distinguished; best first."""
    n: int
    missing: int
    alpha: float
    note: str
    """Why nothing could be distinguished (too few subjects); empty otherwise."""


def complete_table(table: pd.DataFrame | ArrayLike) -> tuple[pd.DataFrame, int]:
    """Rounded table without the subjects (rows) that lack a value, and the number of those.

    Raises:
        ValueError: not two-dimensional, not numeric, infinite values, or a setting or subject listed twice.
    """
    if not isinstance(table, pd.DataFrame) and np.ndim(np.asarray(table)) != 2:
        raise ValueError("a table of subjects x settings is needed: one row per subject, one column per setting")
    frame = table if isinstance(table, pd.DataFrame) else pd.DataFrame(np.asarray(table))
    for what, index in (("subject", frame.index), ("setting", frame.columns)):
        if not index.is_unique:
            twice = sorted({str(v) for v in index[index.duplicated()]})
            raise ValueError(f"{what}(s) listed twice in the table: {', '.join(twice[:10])}")
    frame = frame.astype(float)
    if np.isinf(frame.to_numpy()).any():
        raise ValueError("the table holds infinite values; apply an empty-region convention first")
    complete = frame.dropna()
    return complete.round(ROUNDING), len(frame) - len(complete)


def friedman(table: pd.DataFrame | ArrayLike) -> FriedmanResult:
    """Friedman's rank test: do three or more settings differ on the same subjects? (``friedmanchisquare``)

    The p is SciPy's tie-corrected chi-square approximation; it is rough for few subjects.

    Args:
        table: shape (subjects, settings), settings in columns; subjects with a missing value are dropped and counted.

    Returns:
        A :class:`FriedmanResult`; "too few" with p = NaN for fewer than two complete subjects.

    Raises:
        ValueError: fewer than three settings (use :func:`wilcoxon`), or a table that is not one.

    Example:
        >>> result = friedman([[0.9, 0.8, 0.3], [0.8, 0.7, 0.2], [0.9, 0.6, 0.1], [0.7, 0.6, 0.4]])
        >>> result.statistic, result.kendall_w
        (8.0, 1.0)
    """
    frame, missing = complete_table(table)
    n, k = frame.shape
    if k < 3:
        raise ValueError(f"Friedman's test needs three or more settings, got {k}; compare two with wilcoxon()")
    ranks = frame.rank(axis=1)
    means = ranks.mean()
    if n < 2:
        return FriedmanResult(math.nan, math.nan, "too few", n, k, missing, math.nan, means)
    if (frame.nunique(axis=1) == 1).all():
        return FriedmanResult(0.0, 1.0, "identical", n, k, missing, 0.0, means)
    statistic, pvalue = stats.friedmanchisquare(*frame.to_numpy().T)
    concordance = float(statistic) / (n * (k - 1))
    return FriedmanResult(
        float(statistic), float(pvalue), "chi-square approximation", n, k, missing, concordance, means
    )


def _best_first_ranks(frame: pd.DataFrame, higher_is_better: bool) -> pd.DataFrame:
    return frame.rank(axis=1, ascending=not higher_is_better)


def rank_stability(
    table: pd.DataFrame | ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
    *,
    higher_is_better: bool = True,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """How stable the ranking of settings is: bootstrap over subjects of the ranks.

    Settings are ranked within every subject, ranks are averaged over subjects, the averages are ranked (rank then
    aggregate, as in Friedman's test). Subjects are then drawn with replacement and the ranking is repeated.

    Args:
        table: shape (subjects, settings); subjects with a missing value are dropped.
        resamples: number of bootstrap samples.
        seed: of a generator of its own.
        higher_is_better: rank 1 is the highest value (Dice) or the lowest (HD95).
        confidence: of the percentile interval of the rank, in (0, 1).

    Returns:
        One row per setting, in the table's order: ``mean_rank``, ``rank`` (equal mean ranks share the better one),
        ``rank_low`` and ``rank_high``, ``first_share`` and ``same_share``: the share of resamples in which the
        setting comes first, or keeps its rank. NaN without subjects.

    Raises:
        ValueError: a table that is not one, or an option out of range.
    """
    check_fraction("confidence", confidence)
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1")
    frame, _ = complete_table(table)
    columns = ["mean_rank", "rank", "rank_low", "rank_high", "first_share", "same_share"]
    if frame.empty:
        return pd.DataFrame(np.nan, index=frame.columns, columns=columns)
    within = _best_first_ranks(frame, higher_is_better).to_numpy()
    n = len(within)
    # Twice a mid-rank and a count are integers: sums are exact, and ties stay ties in every resample.
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    resampled = stats.rankdata(draws @ within, method="min", axis=1)
    observed = stats.rankdata(within.sum(axis=0), method="min")
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail], axis=0, method="inverted_cdf")
    data: dict[str, NDArray[Any]] = {
        "mean_rank": within.mean(axis=0),
        "rank": observed.astype(int),
        "rank_low": low.astype(int),
        "rank_high": high.astype(int),
        "first_share": (resampled == 1).mean(axis=0),
        "same_share": (resampled == observed).mean(axis=0),
    }
    return pd.DataFrame(data, index=frame.columns)


def _maximal_cliques(adjacent: list[set[int]]) -> list[tuple[int, ...]]:
    """Bron-Kerbosch with pivot; vertices in ascending order within a clique."""
    found: list[tuple[int, ...]] = []

    def extend(clique: set[int], candidates: set[int], excluded: set[int]) -> None:
        if not candidates and not excluded:
            found.append(tuple(sorted(clique)))
            return
        pivot = max(sorted(candidates | excluded), key=lambda v: len(adjacent[v] & candidates))
        for vertex in sorted(candidates - adjacent[pivot]):
            extend(clique | {vertex}, candidates & adjacent[vertex], excluded & adjacent[vertex])
            candidates = candidates - {vertex}
            excluded = excluded | {vertex}

    extend(set(), set(range(len(adjacent))), set())
    return sorted(found)


def critical_difference(
    table: pd.DataFrame | ArrayLike,
    *,
    alpha: float = 0.05,
    zero_method: str = "pratt",
    higher_is_better: bool = True,
) -> CriticalDifference:
    """Mean ranks, and the groups of settings that Holm-adjusted pairwise Wilcoxon tests do not tell apart.

    Wilcoxon-Holm instead of Nemenyi's test, which compares two settings by their mean ranks among all the others
    (Benavoli, Corani and Mangili 2016, JMLR 17). Holm's family here is all pairs of settings of this table.

    Args:
        table: shape (subjects, settings); subjects with a missing value are dropped and counted.
        alpha: level of the family, in (0, 1).
        zero_method: as in :func:`wilcoxon`.
        higher_is_better: rank 1 is the highest value (Dice) or the lowest (HD95).

    Returns:
        A :class:`CriticalDifference`. With fewer than six subjects there are no p-values and no groups.

    Raises:
        ValueError: fewer than two settings, or a table that is not one.
    """
    check_fraction("alpha", alpha)
    frame, missing = complete_table(table)
    n, k = frame.shape
    if k < 2:
        raise ValueError(f"two or more settings are needed to tell them apart, got {k}")
    ranks = _best_first_ranks(frame, higher_is_better).mean().sort_values(kind="stable")
    names = list(ranks.index)
    matrix = pd.DataFrame(np.nan, index=ranks.index, columns=ranks.index)
    if n < MINIMUM_PAIRS:
        note = f"n={n} < {MINIMUM_PAIRS} subjects: no p-values, no groups"
        return CriticalDifference(ranks, matrix, (), n, missing, alpha, note)
    values: FloatArray = frame[names].to_numpy()
    pairs = list(combinations(range(k), 2))
    raw = [
        signed_rank_test(np.round(values[:, i] - values[:, j], ROUNDING) + 0.0, zero_method=zero_method)[0]
        for i, j in pairs
    ]
    adjusted = holm(raw)
    adjacent: list[set[int]] = [set() for _ in names]
    for (i, j), p, differ in zip(pairs, adjusted, rejected(adjusted, alpha)):
        matrix.iloc[i, j] = matrix.iloc[j, i] = p
        if not differ:
            adjacent[i].add(j)
            adjacent[j].add(i)
    groups = tuple(tuple(names[v] for v in clique) for clique in _maximal_cliques(adjacent) if len(clique) > 1)
    reachable = rejected(smallest_pvalue(n) * len(pairs), alpha)
    note = "" if reachable else f"cannot reach significance with n={n} and {len(pairs)} pairs"
    return CriticalDifference(ranks, matrix, groups, n, missing, alpha, note)
