"""Effect sizes of paired differences: Hodges-Lehmann with its exact interval, and the rank-biserial correlation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from .distribution import (
    ALTERNATIVES,
    EXACT_LIMIT,
    ROUNDING,
    FloatArray,
    check_choice,
    check_fraction,
    differences,
    sign_flip_distribution,
    signed_ranks,
)


def walsh_averages(d: FloatArray) -> FloatArray:
    """Sorted averages (d_i + d_j) / 2 of all pairs i <= j; n (n + 1) / 2 of them."""
    i, j = np.triu_indices(d.size)
    return np.sort(np.round((d[i] + d[j]) / 2, ROUNDING + 1) + 0.0)


def _cut(n: int, tail: float) -> int:
    """Largest k with P(W <= k) <= tail for n untied ranks; -1 where there is none."""
    if n > EXACT_LIMIT:
        mean, sd = n * (n + 1) / 4, math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return math.floor(mean + float(norm.ppf(tail)) * sd - 0.5)
    below = np.cumsum(sign_flip_distribution(np.arange(1, n + 1)))
    return int(np.searchsorted(below, tail, side="right")) - 1


def hodges_lehmann(
    x: ArrayLike, y: ArrayLike | None = None, *, confidence: float = 0.95, alternative: str = "two-sided"
) -> tuple[float, tuple[float, float]]:
    """Pseudo-median of the differences (median of the Walsh averages) and its exact confidence interval.

    The interval inverts the signed-rank test (Hollander, Wolfe and Chicken, *Nonparametric Statistical Methods*,
    section 3.3): closed, between two order statistics of the Walsh averages, with a coverage of at least
    ``confidence`` for every symmetric distribution, conservative under ties. It is unbounded where the number of pairs
    cannot give that confidence (95 % two-sided: fewer than six), and one-sided for a one-sided alternative. Above 500
    pairs the order statistics come from the normal approximation.

    Args:
        x: values of the first setting, shape (n,), or the differences when ``y`` is omitted; zeros are kept.
        y: values of the second setting, shape (n,).
        confidence: in (0, 1).
        alternative: "two-sided", "greater" (lower bound only) or "less" (upper bound only).

    Returns:
        The estimate and (low, high), in the unit of the metric; NaN without pairs.

    Raises:
        ValueError: unpaired lengths, infinite values or an unknown option.

    Example:
        >>> hodges_lehmann([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
        (0.35, (0.1, 0.6))
    """
    check_choice("alternative", alternative, ALTERNATIVES)
    check_fraction("confidence", confidence)
    d, _ = differences(x, y)
    if d.size == 0:
        return math.nan, (math.nan, math.nan)
    walsh = walsh_averages(d)
    tail = 1 - confidence
    k = _cut(d.size, tail / 2 if alternative == "two-sided" else tail)
    low, high = (float(walsh[k]), float(walsh[walsh.size - 1 - k])) if k >= 0 else (-math.inf, math.inf)
    if alternative == "greater":
        high = math.inf
    elif alternative == "less":
        low = -math.inf
    return float(np.median(walsh)), (low, high)


def rank_biserial(x: ArrayLike, y: ArrayLike | None = None, *, zero_method: str = "pratt") -> float:
    """Matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-) (Kerby 2014).

    Args:
        x: values of the first setting, shape (n,), or the differences when ``y`` is omitted.
        y: values of the second setting, shape (n,).
        zero_method: "pratt", "wilcox" or "zsplit", as in :func:`wilcoxon`.

    Returns:
        Between -1 (every difference negative) and 1; 0 when all differences are zero; NaN without pairs.

    Example:
        >>> rank_biserial([1, 2, 3, -4])
        0.2
    """
    d, _ = differences(x, y)
    ranks = signed_ranks(d, zero_method)
    if d.size == 0:
        return math.nan
    total = ranks.plus + ranks.minus
    return (ranks.plus - ranks.minus) / total if total else 0.0
