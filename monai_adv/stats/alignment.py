"""Bringing records into blocks of the same subjects, or saying why that cannot be done."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from .records import MEASURES, Records, empty_truth_rule, flags, measured, numbers, tidy

Key = tuple[Hashable, ...]


class Aligned(NamedTuple):
    """Per stratum and setting a frame indexed by subject; the same subjects in the same order within a stratum."""

    blocks: dict[Key, dict[Key, pd.DataFrame]]
    settings: list[Key]
    empty_truth_rule: str


def label(columns: Sequence[str], key: Key) -> str:
    """Readable name of a key: the values, numbers with the name of their column.

    Example:
        >>> label(("attack", "eps"), ("ifgsm", 0.1))
        'ifgsm eps=0.1'
    """
    return " ".join(
        v if isinstance(v, str) else f"{c}={v:g}" if isinstance(v, float) else f"{c}={v}" for c, v in zip(columns, key)
    )


def baseline_setting(settings: Sequence[Key], by: Sequence[str], baseline: Any) -> Key:
    """The one setting that ``baseline`` means: a tuple in full, or the value of the first column.

    Raises:
        ValueError: there is none, or several.
    """
    if isinstance(baseline, (tuple, list)):
        found = [s for s in settings if s == tuple(baseline)]
    else:
        found = [s for s in settings if s[0] == baseline]
    if not found:
        known = ", ".join(label(by, s) for s in settings[:12])
        raise ValueError(f"the baseline {baseline!r} is no value of {', '.join(by)}; the records have: {known}")
    if len(found) > 1:
        several = ", ".join(map(repr, found[:6]))
        raise ValueError(f"the baseline {baseline!r} means {len(found)} settings; give one as a tuple: {several}")
    return found[0]


def align(
    records: Records, by: tuple[str, ...], strata: tuple[str, ...], baseline: Any, metric: str, subject: str
) -> Aligned:
    """Split records into strata and settings over the same subjects.

    A unit that failed before there were any regions may have one row with an empty stratum: it counts as missing in
    every stratum. A setting that has no row at all in a stratum was not part of the design there and is left out.

    Args:
        records: tidy records.
        by: columns that make a setting.
        strata: columns that make a stratum.
        baseline: as for :func:`compare`.
        metric: column with the values.
        subject: column with the subject ID.

    Returns:
        The aligned blocks; each frame has the metric, NaN where not measured, in the column ``_value``, and the flags
        ``truth_empty`` and ``prediction_empty`` where the records say so.

    Raises:
        ValueError: see :func:`compare`.
    """
    frame = tidy(records, [subject, *by, *strata, metric])
    frame = frame.assign(**{"_value": measured(frame, metric, subject)})
    for column in (subject, *by):
        gaps = int(frame[column].isna().sum())
        if gaps:
            raise ValueError(
                f"the column {column!r} is empty in {gaps} row(s); every row must say which {column} it is"
            )
    unplaced = frame[list(strata)].isna().any(axis=1)
    lost = frame[unplaced]
    if lost["_value"].notna().any():
        who = ", ".join(sorted({str(s) for s in lost.loc[lost["_value"].notna(), subject]})[:10])
        raise ValueError(f"{', '.join(strata)} is empty in rows that have a {metric} (subject {who})")
    _check_unique(frame, by, strata, baseline, subject)
    settings: list[Key] = list(dict.fromkeys(frame[list(by)].itertuples(index=False, name=None)))
    base = baseline_setting(settings, by, baseline)
    rule = empty_truth_rule(frame, frame["_value"], metric)
    extra = {}
    if "truth_empty" in frame.columns:
        extra["truth_empty"] = flags(frame["truth_empty"])
    if "prediction_voxels" in frame.columns:
        extra["prediction_empty"] = numbers(frame["prediction_voxels"]) == 0
    frame = frame[[subject, *by, *strata, "_value"]].assign(**extra)
    placed, lost = frame[~unplaced], frame[unplaced]
    keys: list[Key] = list(dict.fromkeys(placed[list(strata)].itertuples(index=False, name=None))) if strata else [()]
    blocks: dict[Key, dict[Key, pd.DataFrame]] = {}
    for key in keys:
        part = placed
        also = lost
        for column, value in zip(strata, key):
            part = part[part[column] == value]
            also = also[also[column].isna() | (also[column] == value)]
        part = pd.concat([part, also]) if len(also) else part
        found: dict[Key, pd.DataFrame] = {}
        for setting in settings:
            rows = part
            for column, value in zip(by, setting):
                rows = rows[rows[column] == value]
            if len(rows):
                found[setting] = rows.set_index(subject).sort_index(key=lambda index: index.astype(str))
        blocks[key] = _checked(found, base, by, strata, key, subject)
    return Aligned(blocks, settings, rule)


def _checked(
    found: dict[Key, pd.DataFrame], base: Key, by: tuple[str, ...], strata: tuple[str, ...], key: Key, subject: str
) -> dict[Key, pd.DataFrame]:
    """The settings of one stratum, all over the baseline's subjects."""
    where = f" in the stratum {label(strata, key)}" if strata else ""
    if base not in found:
        raise ValueError(
            f"there is no baseline {label(by, base)!r}{where}; the baseline must exist in every stratum. A column that "
            f"has another value for the baseline belongs into by, not into family (here by={by!r}, strata={strata!r})"
        )
    subjects = found[base].index
    for setting, rows in found.items():
        if not rows.index.equals(subjects):
            parts = []
            for who, other, name in ((subjects, rows.index, setting), (rows.index, subjects, base)):
                absent = [str(s) for s in who.difference(other, sort=False)]
                if absent:
                    more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
                    parts.append(f"{label(by, name)!r} lacks {', '.join(absent[:10])}{more}")
            raise ValueError(
                f"the settings do not cover the same {subject}s{where}: {'; '.join(parts)}. Finish the missing units, "
                "or leave these subjects out of all settings"
            )
    return found


def _check_unique(
    frame: pd.DataFrame, by: tuple[str, ...], strata: tuple[str, ...], baseline: Any, subject: str
) -> None:
    """Refuse several rows for one subject, stratum and setting, and say which columns tell them apart."""
    unit = [subject, *strata, *by]
    repeated = frame.duplicated(unit, keep=False)
    if not repeated.any():
        return
    rows = frame[repeated]
    groups = rows.groupby(unit, sort=False, dropna=False)
    varying = [
        str(c)
        for c in frame.columns
        if c not in unit and c not in MEASURES and c != "_value" and (groups[c].nunique(dropna=False) > 1).any()
    ]
    example = ", ".join(f"{c}={rows.iloc[0][c]}" for c in unit)
    head = f"{int(repeated.sum())} rows share their {', '.join(unit)} (for instance {example})"
    if not varying:
        raise ValueError(f"{head}; a unit that is counted twice makes a wrong p-value, keep one row of each")
    # A readable label such as "setting" repeats what the plain columns say: offer it last.
    order = sorted(varying, key=lambda c: c == "setting")
    needed = list(order)
    for column in reversed(order):
        rest = [c for c in needed if c != column]
        if rest and frame.duplicated([*unit, *rest]).sum() == frame.duplicated([*unit, *needed]).sum():
            needed = rest
    first = baseline[0] if isinstance(baseline, (tuple, list)) else baseline
    control = frame[frame[by[0]] == first]
    # A column in which the baseline itself varies (victim) is a stratum; the others (eps) are part of the setting.
    splits = [c for c in needed if control[c].nunique() > 1]
    more = [c for c in needed if c not in splits]
    advice = [f"by={(*by, *more)!r}"] if more else []
    advice += [f"family={(*by, *more, *splits, *strata)!r}"] if splits else []
    raise ValueError(
        f"{head}; they differ in: {', '.join(varying)}. Tell them apart with {' and '.join(advice)}, select one, or "
        "average over repetitions (such as seeds) first"
    )
