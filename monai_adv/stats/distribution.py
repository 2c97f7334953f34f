"""Paired differences, their signed ranks, and the exact distribution of the ranks' sum under random signs."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

ROUNDING = 9
"""Decimals kept of a difference: in floating point, equal Dice differences come out unequal and break ties."""
EXACT_LIMIT = 500
"""Largest number of pairs for which the exact distribution is computed (about a fifth of a second)."""
MINIMUM_PAIRS = 6
"""Below this number of pairs no p-value is claimed: with five, even 5 of 5 gives a two-sided p of .0625."""

ALTERNATIVES = ("two-sided", "greater", "less")
ZERO_METHODS = ("pratt", "wilcox", "zsplit")

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


def check_fraction(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name}={value!r} must lie strictly between 0 and 1")


def vector(values: ArrayLike, name: str) -> FloatArray:
    """One-dimensional float64 array of ``values``; missing entries become NaN, infinite ones are refused.

    Args:
        values: numbers; ``None`` and ``pandas.NA`` are missing.
        name: what to call the argument in an error.

    Returns:
        Array of shape (n,).

    Raises:
        ValueError: not one-dimensional, not numeric, or infinite. An infinite HD95 is the worst outcome of all, to
            drop it would flatter the network: apply an empty-region convention first.
    """
    series = values if isinstance(values, pd.Series) else pd.Series(np.atleast_1d(_one_dimensional(values, name)))
    try:
        array = pd.to_numeric(series).to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers: {error}") from error
    if np.isinf(array).any():
        raise ValueError(
            f"{name} has {int(np.isinf(array).sum())} infinite value(s); apply an empty-region convention first "
            "(BraTS: Dice 0 and HD95 373.13 when exactly one of prediction and truth is empty)"
        )
    return array


def _one_dimensional(values: ArrayLike, name: str) -> NDArray[np.object_] | FloatArray:
    array = np.asarray(values)
    if array.ndim > 1:
        raise ValueError(f"{name} must be one-dimensional (one value per subject), got shape {array.shape}")
    return array


def differences(x: ArrayLike, y: ArrayLike | None = None) -> tuple[FloatArray, int]:
    """Paired differences ``x - y`` (or ``x`` itself), rounded to 1e-9, without the incomplete pairs.

    Two Series labelled by subject (a non-integer index) must carry the same labels in the same order.

    Args:
        x: values of the first setting, shape (n,), or the differences themselves when ``y`` is omitted.
        y: values of the second setting, shape (n,), paired with ``x`` by position.

    Returns:
        The differences of the complete pairs, and how many pairs were dropped because a value was missing.

    Raises:
        ValueError: lengths or subject labels differ, or values are infinite.
    """
    if y is None:
        d = vector(x, "d")
    else:
        if isinstance(x, pd.Series) and isinstance(y, pd.Series):
            _check_labels(x.index, y.index)
        first, second = vector(x, "x"), vector(y, "y")
        if first.shape != second.shape:
            raise ValueError(f"x has {first.size} values and y has {second.size}: the test is paired, one per subject")
        d = first - second
    complete = d[~np.isnan(d)]
    return np.round(complete, ROUNDING) + 0.0, int(d.size - complete.size)


def _check_labels(first: pd.Index, second: pd.Index) -> None:
    if pd.api.types.is_integer_dtype(first.dtype) and pd.api.types.is_integer_dtype(second.dtype):
        return  # row numbers, not subject IDs
    if not first.equals(second):
        only = [str(s) for s in first.symmetric_difference(second, sort=False)]
        what = f"only in one of them: {', '.join(only[:10])}" if only else "same labels in a different order"
        raise ValueError(f"x and y are labelled by different subjects ({what}); align them by subject first")


class SignedRanks(NamedTuple):
    """Signed mid-ranks of differences: ``weights`` are twice the mid-ranks of the non-zero ones, thus integers."""

    weights: IntArray
    positive: NDArray[np.bool_]
    plus: float
    """Sum of the ranks of the positive differences (with zsplit: plus half of the zeros' ranks)."""
    minus: float


def signed_ranks(d: FloatArray, zero_method: str = "pratt") -> SignedRanks:
    """Rank the absolute differences and split them by sign.

    Args:
        d: rounded differences, shape (n,), no NaN.
        zero_method: "wilcox" drops zeros before ranking; "pratt" ranks them, then drops their ranks; "zsplit" ranks
            them and gives half of their ranks to either side.

    Returns:
        The signed ranks of the non-zero differences.
    """
    check_choice("zero_method", zero_method, ZERO_METHODS)
    nonzero = d != 0
    if zero_method == "wilcox":
        ranks = rankdata(np.abs(d[nonzero]))
        split = 0.0
    else:
        everything = rankdata(np.abs(d))
        ranks = everything[nonzero]
        split = float(everything[~nonzero].sum()) / 2 if zero_method == "zsplit" else 0.0
    positive = d[nonzero] > 0
    return SignedRanks(
        weights=np.rint(2 * ranks).astype(np.int64),
        positive=positive,
        plus=float(ranks[positive].sum()) + split,
        minus=float(ranks[~positive].sum()) + split,
    )


@lru_cache(maxsize=16)
def _distribution(weights: tuple[int, ...]) -> FloatArray:
    total = sum(weights)
    probability = np.zeros(total + 1)
    probability[0] = 1.0
    top = 0
    for weight in weights:  # ascending, so that the early steps touch few entries
        probability[weight : top + weight + 1] += probability[: top + 1].copy()
        top += weight
        probability[: top + 1] *= 0.5
    probability.setflags(write=False)
    return probability


def sign_flip_distribution(weights: IntArray) -> FloatArray:
    """Exact distribution of the sum of the integer ``weights`` whose fair coin shows heads.

    Dynamic programming over the attainable sums, O(n * sum); up to 53 weights every probability is exact in float64,
    beyond that the relative error stays near n * 1e-16 because only positive numbers are added.

    Args:
        weights: positive integers, shape (n,), n <= 1000 (beyond, 2^-n underflows).

    Returns:
        Probabilities of the sums 0, 1, ..., ``weights.sum()``.

    Example:
        >>> sign_flip_distribution(np.array([1, 2])).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return _distribution(tuple(sorted(int(w) for w in weights)))


def exact_pvalue(ranks: SignedRanks, alternative: str = "two-sided") -> float:
    """Exact p of the signed-rank sum, conditional on the observed ties and zeros.

    Every one of the 2^n assignments of signs to the non-zero ranks is equally likely under the null hypothesis. The
    distribution is symmetric, the two-sided p is twice the smaller tail.

    Args:
        ranks: from :func:`signed_ranks`.
        alternative: "two-sided", "greater" (differences tend to be positive) or "less".

    Returns:
        p in (0, 1]; 1 if no difference is non-zero.
    """
    check_choice("alternative", alternative, ALTERNATIVES)
    if ranks.weights.size == 0:
        return 1.0
    divisor = int(np.gcd.reduce(ranks.weights))  # without ties every doubled rank is even: half the table
    weights = ranks.weights // divisor
    observed = int(weights[ranks.positive].sum())
    probability = sign_flip_distribution(weights)
    upper, lower = float(probability[observed:].sum()), float(probability[: observed + 1].sum())
    p = {"greater": upper, "less": lower, "two-sided": 2 * min(upper, lower)}[alternative]
    return min(1.0, p)


def smallest_pvalue(n_nonzero: int, alternative: str = "two-sided") -> float:
    """Smallest p that ``n_nonzero`` non-zero pairs can give: 2^(1-n) two-sided, 2^-n one-sided.

    Example:
        >>> smallest_pvalue(5), smallest_pvalue(6)
        (0.0625, 0.03125)
    """
    check_choice("alternative", alternative, ALTERNATIVES)
    return min(1.0, math.ldexp(1.0, (1 if alternative == "two-sided" else 0) - n_nonzero))
