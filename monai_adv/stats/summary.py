"""Description of a metric per group, honest about empty regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .records import Records, empty_truth_rule, flags, measured, numbers, ok, penalised, tidy


def summarise(
    records: Records,
    by: str | Sequence[str] = ("attack", "region"),
    metric: str = "dice",
    *,
    subject: str = "subject",
) -> pd.DataFrame:
    """Count, mean with and without the empty-truth cases, median and quartiles of a metric in every group.

    Under the BraTS convention an empty ground truth scores Dice 1 for an empty prediction and 0 for a single
    hallucinated voxel, so a mean over such cases is another number than one without them: both are given. The
    penalty that HD95 gets for an empty region (373.13 mm) must not be averaged: for HD95 the means are left out, the
    median and the number of empty predictions stand in their place.

    Args:
        records: tidy records. Used where present: ``status`` (only "ok" counts), ``truth_empty``,
            ``prediction_voxels``.
        by: column or columns that make the groups.
        metric: the column to describe.
        subject: the column with the subject ID (for messages).

    Returns:
        One row per group, in order of appearance: the columns of ``by``, ``n`` (scored rows), ``missing`` (NaN or not
        ok), ``truth_empty`` and ``prediction_empty`` (numbers of cases, NaN if the records do not say),
        ``empty_truth_rule`` ("scored", "dropped", "none", "unknown"), ``mean``, ``mean_nonempty`` (both but for
        HD95), ``median``, ``median_nonempty``, ``q25``, ``q75``.

    Raises:
        ValueError: missing columns, infinite values or mixed empty-region conventions.
    """
    keys = [by] if isinstance(by, str) else list(by)
    frame = tidy(records, [*keys, metric, subject])
    frame = frame.assign(**{"_value": measured(frame, metric, subject)})
    empty_truth_rule(frame, frame["_value"], metric)  # over all groups: refuses a mixture of conventions
    rows: list[dict[str, Any]] = []
    for key, group in frame.groupby(keys, sort=False, dropna=False):
        values = group["_value"]
        known = "truth_empty" in group.columns
        nonempty = values[~flags(group["truth_empty"])] if known else values
        row: dict[str, Any] = dict(zip(keys, key if isinstance(key, tuple) else (key,)))
        row |= {
            "n": int(values.notna().sum()),
            "missing": int(values.isna().sum()),
            "truth_empty": int((flags(group["truth_empty"]) & ok(group)).sum()) if known else np.nan,
            "prediction_empty": empty_predictions(group),
            "empty_truth_rule": empty_truth_rule(group, values, metric),
        }
        if not penalised(metric):
            row |= {"mean": values.mean(), "mean_nonempty": nonempty.mean() if known else np.nan}
        row |= {
            "median": values.median(),
            "median_nonempty": nonempty.median() if known else np.nan,
            "q25": values.quantile(0.25),
            "q75": values.quantile(0.75),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def empty_predictions(group: pd.DataFrame) -> float:
    """Number of ok rows whose prediction holds no voxel; NaN where the records do not say."""
    if "prediction_voxels" not in group.columns:
        return np.nan
    return int(((numbers(group["prediction_voxels"]) == 0) & ok(group)).sum())
