"""Bootstrap over subjects."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from .distribution import ALTERNATIVES, check_choice, check_fraction, differences


@dataclass(frozen=True)
class BootstrapResult:
    """Mean difference and its bootstrap confidence interval."""

    mean_difference: float
    confidence_interval: tuple[float, float]
    method: str
    """One of "BCa", "percentile" or "none" (fewer than two pairs)."""
    note: str
    """Why the method is not BCa; empty otherwise."""
    n: int
    missing: int


def bootstrap_mean_difference(
    d: ArrayLike,
    seed: int = 0,
    resamples: int = 9999,
    *,
    confidence: float = 0.95,
    alternative: str = "two-sided",
) -> BootstrapResult:
    """Mean of paired differences with a seeded bootstrap interval over subjects (``scipy.stats.bootstrap``).

    Bias-corrected and accelerated (Efron 1987); degenerate samples (all differences equal) fall back to the
    percentile interval, and ``note`` says so.

    Args:
        d: differences, shape (n,), one per subject; NaN is dropped and counted.
        seed: of a generator of its own; the global random state is untouched.
        resamples: number of bootstrap samples.
        confidence: in (0, 1).
        alternative: "two-sided", "greater" (lower bound only) or "less" (upper bound only).

    Returns:
        A :class:`BootstrapResult`; the interval is NaN for fewer than two pairs.

    Raises:
        ValueError: infinite values, or an option out of range.

    Example:
        >>> bootstrap_mean_difference([0.25, 0.25, 0.25]).note
        'all differences are equal: percentile interval'
    """
    check_choice("alternative", alternative, ALTERNATIVES)
    check_fraction("confidence", confidence)
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1")
    values, missing = differences(d)
    n = int(values.size)
    if n < 2:
        mean = float(values.mean()) if n else math.nan
        return BootstrapResult(mean, (math.nan, math.nan), "none", f"n={n}: no bootstrap interval", n, missing)

    low, high, method, why = bootstrap_interval(
        values, np.mean, seed, resamples, confidence=confidence, alternative=alternative
    )
    return BootstrapResult(float(values.mean()), (low, high), method, why, n, missing)


def bootstrap_interval(
    values: NDArray[Any],
    statistic: Callable[..., Any],
    seed: int = 0,
    resamples: int = 9999,
    *,
    confidence: float = 0.95,
    alternative: str = "two-sided",
) -> tuple[float, float, str, str]:
    """Seeded bootstrap interval of any statistic of subjects (``scipy.stats.bootstrap``).

    Bias-corrected and accelerated (Efron 1987); where that is degenerate the percentile interval, and the note says so.

    Args:
        values: one entry per subject, shape (n,); their indices, where a subject is more than a number.
        statistic: of resampled values, with or without an ``axis``.
        seed: of a generator of its own; the global random state is untouched.
        resamples: number of bootstrap samples.
        confidence: in (0, 1).
        alternative: "two-sided", "greater" (lower bound only) or "less" (upper bound only).

    Returns:
        Low, high, the method ("BCa" or "percentile") and why it is not BCa (empty if it is).
    """

    def interval(method: str) -> tuple[float, float]:
        options: dict[str, Any] = {
            "n_resamples": resamples,
            "confidence_level": confidence,
            "alternative": alternative,
            "method": method,
            "random_state": np.random.default_rng(seed),
        }
        # SciPy warns and returns NaN for degenerate samples: that case is handled, and reported, below.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            low, high = stats.bootstrap((values,), statistic, **options).confidence_interval
        return float(low), float(high)

    constant = bool(np.ptp(values) == 0)
    bounds = (math.nan, math.nan) if constant else interval("BCa")
    if not any(map(math.isnan, bounds)):
        return (*bounds, "BCa", "")
    why = "all differences are equal" if constant else "BCa is degenerate for this sample"
    return (*interval("percentile"), "percentile", f"{why}: percentile interval")
