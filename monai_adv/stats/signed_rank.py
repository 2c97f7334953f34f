"""Wilcoxon's signed-rank test for paired subjects, exact also with ties and zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .distribution import (
    ALTERNATIVES,
    EXACT_LIMIT,
    ZERO_METHODS,
    FloatArray,
    check_choice,
    check_fraction,
    differences,
    exact_pvalue,
    signed_ranks,
    smallest_pvalue,
)
from .effect import hodges_lehmann, rank_biserial


@dataclass(frozen=True)
class WilcoxonResult:
    """One paired comparison: the test, its effect sizes, and what was left out."""

    pvalue: float
    """p in (0, 1]; NaN without pairs."""
    statistic: float
    """min(W+, W-) for the two-sided test, W+ for a one-sided one (SciPy's convention)."""
    method: str
    """One of "exact", "normal approximation", "identical" (all differences zero, p = 1) or "too few" (no pairs)."""
    n: int
    """Complete pairs, zeros included."""
    n_nonzero: int
    zeros: int
    missing: int
    """Pairs dropped because a value was missing."""
    ties: int
    """Non-zero differences that share their absolute value with another one."""
    hodges_lehmann: float
    """Pseudo-median of the differences; without the zeros for ``zero_method="wilcox"`` (unless all are zero)."""
    confidence_interval: tuple[float, float]
    """Exact interval of the pseudo-median from the Walsh averages."""
    rank_biserial: float
    smallest_p: float
    """Smallest p attainable with this number of non-zero pairs."""
    mean_difference: float
    alternative: str
    zero_method: str
    confidence: float


def signed_rank_test(
    d: FloatArray, alternative: str = "two-sided", zero_method: str = "pratt"
) -> tuple[float, float, str]:
    """p, statistic and method of the signed-rank test of rounded differences, without any effect size."""
    check_choice("alternative", alternative, ALTERNATIVES)
    ranks = signed_ranks(d, zero_method)
    statistic = min(ranks.plus, ranks.minus) if alternative == "two-sided" else ranks.plus
    if d.size == 0:
        return math.nan, math.nan, "too few"
    if ranks.weights.size == 0:
        return 1.0, statistic, "identical"
    if d.size <= EXACT_LIMIT:
        return exact_pvalue(ranks, alternative), statistic, "exact"
    options: dict[str, Any] = {"zero_method": zero_method, "alternative": alternative, "method": "approx"}
    result = stats.wilcoxon(d, **options)
    return float(result.pvalue), statistic, "normal approximation"


def wilcoxon(
    x: ArrayLike,
    y: ArrayLike | None = None,
    *,
    alternative: str = "two-sided",
    zero_method: str = "pratt",
    confidence: float = 0.95,
) -> WilcoxonResult:
    """Wilcoxon signed-rank test of paired values, with effect sizes.

    The p-value is that of the conditional sign-flip distribution: given the observed absolute differences, all 2^n
    assignments of signs are equally likely. It is exact with ties and zeros too, where
    ``scipy.stats.wilcoxon(method="exact")`` is not, and equals SciPy's where there are none. Above 500 pairs SciPy's
    normal approximation is used, and ``method`` says so. Differences are rounded to 1e-9 before ranking.

    Pratt's handling of zeros is the default: a zero says "the attack did nothing", which is information.

    The unit is the subject: average over seeds, slices and windows first. The function gives the p of any number of
    pairs; :func:`compare` claims none below six.

    Reference: Pratt (1959), "Remarks on zeros and ties in the Wilcoxon signed rank procedures", JASA 54.

    Args:
        x: values of the first setting, shape (n,), one per subject, or the differences when ``y`` is omitted.
        y: values of the second setting, shape (n,), in the same order of subjects.
        alternative: "two-sided", "greater" (x tends to be larger than y) or "less".
        zero_method: "pratt", "wilcox" or "zsplit".
        confidence: of the Hodges-Lehmann interval, in (0, 1).

    Returns:
        A :class:`WilcoxonResult`; differences are ``x - y``.

    Raises:
        ValueError: unpaired lengths or labels, infinite values or an unknown option.

    Example:
        >>> result = wilcoxon([0.71, 0.64, 0.80, 0.55, 0.62, 0.70], [0.90, 0.88, 0.91, 0.85, 0.89, 0.93])
        >>> result.pvalue, result.method, result.rank_biserial
        (0.03125, 'exact', -1.0)
    """
    check_choice("zero_method", zero_method, ZERO_METHODS)
    check_fraction("confidence", confidence)
    d, missing = differences(x, y)
    pvalue, statistic, method = signed_rank_test(d, alternative, zero_method)
    nonzero = d[d != 0]
    located = nonzero if zero_method == "wilcox" and nonzero.size else d
    estimate, interval = hodges_lehmann(located, confidence=confidence, alternative=alternative)
    counts = np.unique(np.abs(nonzero), return_counts=True)[1]
    return WilcoxonResult(
        pvalue=pvalue,
        statistic=statistic,
        method=method,
        n=int(d.size),
        n_nonzero=int(nonzero.size),
        zeros=int(d.size - nonzero.size),
        missing=missing,
        ties=int(counts[counts > 1].sum()),
        hodges_lehmann=estimate,
        confidence_interval=interval,
        rank_biserial=rank_biserial(d, zero_method=zero_method),
        smallest_p=smallest_pvalue(int(nonzero.size), alternative),
        mean_difference=float(d.mean()) if d.size else math.nan,
        alternative=alternative,
        zero_method=zero_method,
        confidence=confidence,
    )
