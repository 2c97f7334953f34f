"""Holm's correction for several tests."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pairs_needed(tests: int, alpha: float = 0.05) -> int:
    """The fewest non-zero pairs with which one of so many two-sided Wilcoxon tests can pass Holm's correction.

    The smallest exact p of n pairs is 2^(1 - n), and Holm's first step compares it with ``alpha / tests``.

    Args:
        tests: size of the family.
        alpha: level of the family.

    Example:
        >>> [pairs_needed(tests) for tests in (1, 3, 9, 36)]
        [6, 7, 9, 11]
    """
    return 1 + math.ceil(math.log2(tests / alpha))


def holm(pvalues: ArrayLike) -> NDArray[np.float64]:
    """Adjusted p-values of Holm's step-down procedure (Holm 1979), valid under any dependence between the tests.

    A test is rejected at level alpha when its adjusted p is ``<= alpha``: a tie at the edge (p * m == alpha) counts as
    rejected, see :func:`rejected`. NaN means "no test was made": it stays NaN and does not count in m.

    Args:
        pvalues: the p-values of one family, any shape, each in [0, 1] or NaN.

    Returns:
        Adjusted p-values in the same shape and order, each at most 1.

    Raises:
        ValueError: a p-value outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03, float("nan")]).tolist()
        [0.03, 0.06, 0.06, nan]
    """
    p = np.asarray(pvalues, dtype=np.float64)
    outside = (p < 0) | (p > 1)
    if outside.any():
        raise ValueError(f"p-values must lie in [0, 1], got {p[outside].ravel()[:5].tolist()}")
    adjusted = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    values = p[tested]
    order = np.argsort(values, kind="stable")
    steps = np.arange(values.size, 0, -1) * values[order]
    stepped = np.empty_like(values)
    stepped[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    adjusted[tested] = stepped
    return adjusted


def rejected(adjusted: ArrayLike, alpha: float = 0.05) -> NDArray[np.bool_]:
    """Which tests are rejected: adjusted p ``<= alpha``, a tie at the edge included; NaN is not rejected.

    The comparison allows a relative 1e-12, since p * m carries the rounding of a product.
    """
    return np.asarray(adjusted, dtype=np.float64) <= alpha * (1 + 1e-12)
