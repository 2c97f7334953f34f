"""The signed-rank test against SciPy, against brute force over all 2^n signs, and against golden values."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from monai_adv.stats import hodges_lehmann, rank_biserial, wilcoxon
from monai_adv.stats.distribution import EXACT_LIMIT

A = [0.36, 0.27, 0.23, 0.55, 0.24, 0, 0.34, 0.42, 0.23, 0.34, 0, 0]
C = [6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
ALTERNATIVES = ["two-sided", "greater", "less"]
ZERO_METHODS = ["pratt", "wilcox", "zsplit"]


def midranks(values):
    """Mid-ranks as fractions, by counting."""
    return [Fraction(2 * sum(v < value for v in values) + sum(v == value for v in values) + 1, 2) for value in values]


def brute_force(d, zero_method, alternative):
    """p of integer differences by enumeration of all signs of the non-zero ones, in exact arithmetic."""
    if zero_method == "wilcox":
        d = [v for v in d if v]
    ranks = midranks([abs(v) for v in d])
    shared = sum((r for v, r in zip(d, ranks) if v == 0), Fraction(0)) / 2 if zero_method == "zsplit" else 0
    nonzero = [(v, r) for v, r in zip(d, ranks) if v]
    observed = sum((r for v, r in nonzero if v > 0), Fraction(0)) + shared
    sums = [
        sum((r for keep, (_, r) in zip(signs, nonzero) if keep), Fraction(0)) + shared
        for signs in itertools.product((False, True), repeat=len(nonzero))
    ]
    greater = Fraction(sum(s >= observed for s in sums), len(sums))
    less = Fraction(sum(s <= observed for s in sums), len(sums))
    return {"greater": greater, "less": less, "two-sided": min(Fraction(1), 2 * min(greater, less))}[alternative]


@pytest.mark.parametrize(
    ("zero_method", "biserial", "location", "statistic"),
    [("wilcox", 1, 0.325, 0), ("pratt", 1, 0.2625, 0), ("zsplit", 12 / 13, 0.2625, 3)],
)
def test_golden_a(zero_method, biserial, location, statistic):
    result = wilcoxon(A, zero_method=zero_method)
    assert result.pvalue == 2 / 2**9 == result.smallest_p
    assert (result.n, result.n_nonzero, result.zeros, result.ties, result.missing) == (12, 9, 3, 4, 0)
    assert result.rank_biserial == pytest.approx(biserial, abs=1e-15)
    assert result.hodges_lehmann == pytest.approx(location, abs=1e-12)
    assert result.mean_difference == pytest.approx(0.248333, abs=1e-6)
    assert result.statistic == statistic
    assert result.method == "exact"


def test_golden_c():
    assert (wilcoxon(C).statistic, wilcoxon(C).pvalue) == (24, 0.041259765625)
    greater = wilcoxon(C, alternative="greater")
    assert (greater.statistic, greater.pvalue) == (96, 0.0206298828125)


def test_rounding_restores_ties_that_floating_point_breaks():
    x, y = np.array([0.5, 0.825, 0.375, 0.5]), np.array([0.525, 0.775, 0.325, 0.55])
    assert stats.wilcoxon(x - y, alternative="greater", method="exact").pvalue == 0.5625
    assert wilcoxon(x, y, alternative="greater").pvalue == 0.5
    assert wilcoxon(x, y).ties == 3


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("n", [1, 2, 5, 6, 9, 14, 25, 51, 120])
def test_equals_scipy_without_ties_and_zeros(n, alternative):
    rng = np.random.default_rng(n)
    for shift in (-0.4, 0.0, 0.3):
        d = np.round(rng.normal(shift, 1, n), 7)
        assert len({*np.abs(d), 0.0}) == n + 1
        expected = stats.wilcoxon(d, alternative=alternative, method="exact")
        result = wilcoxon(d, alternative=alternative)
        assert result.pvalue == pytest.approx(expected.pvalue, rel=1e-11)
        assert result.statistic == expected.statistic
        assert (result.method, result.ties, result.zeros) == ("exact", 0, 0)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("zero_method", ZERO_METHODS)
def test_equals_enumeration_with_ties_and_zeros(zero_method, alternative):
    rng = np.random.default_rng(3)
    tied = 0
    for n in (1, 2, 4, 6, 7, 8):
        for _ in range(5):
            d = rng.integers(-3, 5, n).tolist()
            result = wilcoxon(np.array(d) * 0.05, alternative=alternative, zero_method=zero_method)
            assert result.pvalue == float(brute_force(d, zero_method, alternative)), d
            tied += result.ties > 0 and result.zeros > 0
    assert tied > 5


def test_p_is_at_most_one():
    # Ranks 1.5 and 1.5: three of the four sign assignments reach the observed sum from either side.
    assert brute_force([1, -1], "pratt", "greater") == Fraction(3, 4)
    assert wilcoxon([1, -1]).pvalue == 1.0


def test_handling_of_zeros_matters():
    d = [0, 0, 0, -1, -2, 3, 4, 5, 6]
    assert wilcoxon(d, zero_method="wilcox").pvalue != wilcoxon(d, zero_method="pratt").pvalue


def test_x_and_y_are_the_same_as_their_differences_and_swap_the_sign():
    rng = np.random.default_rng(0)
    x, y = np.round(rng.random((2, 15)), 2)
    pair, swapped = wilcoxon(x, y), wilcoxon(y, x)
    assert pair == wilcoxon(np.round(x - y, 2))
    assert swapped.pvalue == pair.pvalue
    assert swapped.rank_biserial == -pair.rank_biserial
    assert swapped.hodges_lehmann == pytest.approx(-pair.hodges_lehmann)
    assert swapped.confidence_interval == pytest.approx([-v for v in reversed(pair.confidence_interval)])
    assert wilcoxon(x, y, alternative="less").pvalue == wilcoxon(y, x, alternative="greater").pvalue


@pytest.mark.parametrize("zero_method", ZERO_METHODS)
@pytest.mark.parametrize("n", [1, 5, 14, 30])
def test_identical(n, zero_method):
    result = wilcoxon(np.full(n, 0.8), np.full(n, 0.8), zero_method=zero_method)
    assert (result.pvalue, result.method, result.zeros, result.n_nonzero) == (1.0, "identical", n, 0)
    assert (result.hodges_lehmann, result.rank_biserial, result.smallest_p) == (0.0, 0.0, 1.0)


def test_missing_pairs_are_dropped_and_counted():
    x = [0.9, None, 0.7, float("nan"), 0.8, pd.NA]
    y = [0.5, 0.5, 0.6, 0.5, None, 0.1]
    result = wilcoxon(x, y)
    assert (result.n, result.missing) == (2, 4)
    assert result.mean_difference == pytest.approx(0.25)
    nothing = wilcoxon([np.nan, np.nan])
    assert (nothing.method, nothing.n, nothing.missing) == ("too few", 0, 2)
    assert math.isnan(nothing.pvalue)
    assert math.isnan(nothing.hodges_lehmann)


@pytest.mark.parametrize(("alternative", "five", "six"), [("two-sided", 1 / 16, 1 / 32), ("greater", 1 / 32, 1 / 64)])
def test_smallest_attainable_p(alternative, five, six):
    for n, smallest in ((5, five), (6, six)):
        result = wilcoxon([*range(1, n + 1), 0], alternative=alternative)
        assert result.smallest_p == smallest == result.pvalue


def test_normal_approximation_is_scipys_and_says_so():
    rng = np.random.default_rng(1)
    d = np.round(rng.normal(0.05, 1, EXACT_LIMIT + 1), 2)
    result = wilcoxon(d)
    assert result.method == "normal approximation"
    assert result.pvalue == stats.wilcoxon(d, zero_method="pratt", method="approx").pvalue
    near = wilcoxon(d[:-1])
    assert near.method == "exact"
    approximate = stats.wilcoxon(d[:-1], zero_method="pratt", method="approx").pvalue
    assert near.pvalue == pytest.approx(approximate, rel=0.02)


def test_tiny_tails_keep_their_precision():
    assert wilcoxon(np.arange(1, 301)).pvalue == pytest.approx(2.0**-299, rel=1e-10)


def test_labelled_series_must_match():
    x = pd.Series([0.9, 0.8], index=["a", "b"])
    with pytest.raises(ValueError, match="only in one of them: b, c"):
        wilcoxon(x, pd.Series([0.1, 0.2], index=["a", "c"]))
    with pytest.raises(ValueError, match="different order"):
        wilcoxon(x, pd.Series([0.1, 0.2], index=["b", "a"]))
    rows = wilcoxon(pd.Series([0.9, 0.8]), pd.Series([0.1, 0.2], index=[7, 8]))
    assert rows.mean_difference == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1, 2, 3], [1, 2]), {}, "x has 3 values and y has 2"),
        (([[1, 2], [3, 4]],), {}, "one-dimensional"),
        (([1, np.inf],), {}, "infinite"),
        ((["a", "b"],), {}, "must hold numbers"),
        (([1, 2],), {"alternative": "both"}, "alternative='both'"),
        (([1, 2],), {"zero_method": "drop"}, "zero_method='drop'"),
        (([1, 2],), {"confidence": 95}, "confidence=95"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        wilcoxon(*arguments, **options)


def brute_force_interval(d, confidence, alternative):
    """Interval from the enumerated distribution of the rank sum of n untied differences."""
    n = len(d)
    walsh = sorted((a + b) / 2 for i, a in enumerate(d) for b in d[i:])
    sums = [sum(s) for s in itertools.product(*((0, r) for r in range(1, n + 1)))]
    tail = (1 - confidence) / (2 if alternative == "two-sided" else 1)
    cuts = [k for k in range(len(walsh)) if sum(s <= k for s in sums) / 2**n <= tail]
    low, high = (walsh[cuts[-1]], walsh[-1 - cuts[-1]]) if cuts else (-math.inf, math.inf)
    return (-math.inf if alternative == "less" else low, math.inf if alternative == "greater" else high)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.96875, 0.99])
@pytest.mark.parametrize("n", [1, 4, 5, 6, 9, 11])
def test_interval_equals_enumeration(n, confidence, alternative):
    d = np.round(np.random.default_rng(n).normal(0.1, 1, n), 3)
    estimate, interval = hodges_lehmann(d, confidence=confidence, alternative=alternative)
    assert interval == pytest.approx(brute_force_interval(d.tolist(), confidence, alternative), abs=1e-9)
    assert estimate == pytest.approx(np.median([(a + b) / 2 for i, a in enumerate(d) for b in d[i:]]))


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_interval_holds_exactly_the_shifts_that_the_test_does_not_reject(alternative):
    d = np.round(np.random.default_rng(5).normal(0.3, 1, 10), 4)
    result = wilcoxon(d, alternative=alternative)
    low, high = result.confidence_interval
    ends = [v for v in (low, high) if math.isfinite(v)]
    assert len(ends) == (2 if alternative == "two-sided" else 1)
    for end in ends:
        outward = -1e-5 if end == low else 1e-5
        assert wilcoxon(d - end - outward, alternative=alternative).pvalue <= 0.05
        assert wilcoxon(d - end + outward, alternative=alternative).pvalue > 0.05


def test_interval_of_many_pairs_continues_the_exact_one():
    d = np.round(np.random.default_rng(2).normal(0.1, 1, EXACT_LIMIT + 1), 6)
    exact, approximate = hodges_lehmann(d[:-1])[1], hodges_lehmann(d)[1]
    assert approximate == pytest.approx(exact, abs=0.01)
    assert approximate != exact


def test_rank_biserial_by_hand():
    assert rank_biserial([1, 2, 3, -4]) == pytest.approx((6 - 4) / 10)
    assert rank_biserial([0.1, 0.2], [0.3, 0.5]) == -1
    assert rank_biserial([0, 1, -2], zero_method="pratt") == pytest.approx((2 - 3) / 5)
    assert rank_biserial([0, 1, -2], zero_method="wilcox") == pytest.approx((1 - 2) / 3)
    assert rank_biserial([0, 1, -2], zero_method="zsplit") == pytest.approx((2 - 3) / 6)
    assert rank_biserial([0, 0]) == 0
    assert math.isnan(rank_biserial([np.nan]))
