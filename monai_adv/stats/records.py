"""Reading tidy records: one row = subject x victim x attack x budget x region."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

Records = pd.DataFrame | Iterable[Mapping[str, Any]]

MEASURES = frozenset(
    {
        *("dice", "hd95", "iou", "truth_voxels", "prediction_voxels", "truth_empty", "voxel_accuracy", "ssim", "psnr"),
        *("linf_std", "linf_range", "linf_absolute", "l2_std", "l2_range", "l2_absolute", "success", "status"),
        *("seconds", "forwards", "backwards", "error", "message"),
    }
)
"""Columns that are measured; all others say what was measured (which subject, model, attack, budget ...)."""

_LOWER_IS_BETTER = ("hd", "hausdorff", "asd", "assd", "masd", "linf", "l2", "mse", "rmse", "loss")
_HIGHER_IS_BETTER = ("dice", "iou", "jaccard", "nsd", "voxel_accuracy", "ssim", "psnr")
_LESION_WISE = "lesion_"


def tidy(records: Records, columns: Sequence[str]) -> pd.DataFrame:
    """Data frame of ``records`` that surely has ``columns``; a fresh index, the caller's frame is not changed.

    Raises:
        ValueError: no rows, columns are missing, or it is the path of a table.
    """
    if isinstance(records, (str, os.PathLike)):
        raise ValueError(
            f"{os.fspath(records)!r} is a path: give its rows, e.g. pandas.read_csv(path, dtype={{'subject': str}})"
        )
    frame = records.reset_index(drop=True) if isinstance(records, pd.DataFrame) else pd.DataFrame(list(records))
    if frame.empty:
        raise ValueError("there are no records to compare")
    absent = [c for c in columns if c not in frame.columns]
    if absent:
        raise ValueError(
            f"the records have no column {', '.join(map(repr, absent))}; "
            f"they have: {', '.join(map(str, frame.columns))}"
        )
    return frame


def measured(frame: pd.DataFrame, metric: str, subject: str) -> pd.Series:
    """The metric as float64, NaN where it is missing or the unit's status is not "ok".

    Raises:
        ValueError: not numeric, or infinite values.
    """
    try:
        values = numbers(frame[metric])
    except (TypeError, ValueError) as error:
        raise ValueError(f"the column {metric!r} must hold numbers: {error}") from error
    values = values.where(ok(frame))
    infinite = np.isinf(values)
    if infinite.any():
        who = ", ".join(sorted({str(s) for s in frame.loc[infinite, subject]})[:10])
        raise ValueError(
            f"{metric} is infinite for subject(s) {who}; apply an empty-region convention first "
            "(BraTS: Dice 0 and HD95 373.13 when exactly one of prediction and truth is empty)"
        )
    return values


def numbers(column: pd.Series) -> pd.Series:
    """The column as float64; ``None`` and ``pandas.NA`` become NaN."""
    return pd.Series(pd.to_numeric(column).to_numpy(dtype=np.float64, na_value=np.nan), index=column.index)


def ok(frame: pd.DataFrame) -> pd.Series:
    """Which rows come from a unit that ran through; all of them where there is no status."""
    if "status" not in frame.columns:
        return pd.Series(True, index=frame.index)
    return (frame["status"] == "ok").fillna(False).astype(bool)


def flags(column: pd.Series) -> pd.Series:
    """Booleans of a column that may have come from a CSV file; a missing flag is False."""
    text = column.astype(str).str.strip().str.lower()
    return text.isin(("true", "1", "1.0"))


def empty_truth_rule(frame: pd.DataFrame, values: pd.Series, metric: str) -> str:
    """What became of the cases whose ground truth is empty: "scored" (BraTS), "dropped" (NaN) or "none" (no such case).

    Raises:
        ValueError: some are scored and some are NaN: two conventions in one table.
    """
    if "truth_empty" not in frame.columns:
        return "unknown"
    empty = flags(frame["truth_empty"]) & ok(frame)
    if not empty.any():
        return "none"
    scored = values[empty].notna()
    if scored.all():
        return "scored"
    if not scored.any():
        return "dropped"
    raise ValueError(
        f"{metric}: of {int(empty.sum())} rows with an empty ground truth {int(scored.sum())} are scored and the "
        "others are NaN; two empty-region conventions are mixed, score all records by one"
    )


def penalised(metric: str) -> bool:
    """Whether the metric gives a penalty distance for an empty region, so that its mean has no meaning (HD95)."""
    return metric.lower().removeprefix(_LESION_WISE).startswith(("hd", "hausdorff"))


def better_is_higher(metric: str) -> bool:
    """Whether a high value of a known metric is good.

    Raises:
        ValueError: the metric is unknown.
    """
    name = metric.lower().removeprefix(_LESION_WISE)
    if name.startswith(_HIGHER_IS_BETTER):
        return True
    if name.startswith(_LOWER_IS_BETTER):
        return False
    raise ValueError(f"say higher_is_better=True or False: it is not known for the metric {metric!r}")
