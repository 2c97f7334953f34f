"""The subjects behind a comparison: paired rainclouds and the adjusted p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from monai_adv.stats.alignment import label
from monai_adv.stats.records import Records, measured, penalised, tidy
from monai_adv.stats.tables import format_p

from .style import CLEAN, PALETTE, RC, NotebookFigure, attack_styles, in_order

_METRICS = {"dice": "Dice", "iou": "IoU", "hd95": "HD95 (mm)", "ssim": "SSIM", "psnr": "PSNR (dB)"}
_COLUMNS = 4  # more panels than this are set in rows of three
_VIOLIN_FROM = 4  # values
_WIDEST = 14.5  # inches: beyond that letters are too small on a page
_STEP = 0.115  # height of a bracket as a share of the metric's span


def paired_plot(records: Records, comparison: Any, eps: float | None = None) -> Figure:
    """Draw every subject's metric over the settings that a comparison compared, and what the tests said.

    A panel per stratum (as a rule the region), a raincloud per setting (Allen et al. 2019): points, those of one
    subject joined; a box with the quartiles, whiskers to the last point within 1.5 box lengths; to its right half a
    violin, the kernel density estimate between the smallest and the largest value. Brackets run from the baseline to
    each setting and carry the Holm-adjusted p: stars only where the comparison's verdict is significant (``*`` p <=
    alpha, ``**`` p <= .01, ``***`` p <= .001), "n.s." where not, "n too small" where no p-value could have been
    significant or none is claimed.

    Args:
        records: the tidy records that were compared.
        comparison: what `monai_adv.stats.compare` gave for them (its ``table``, ``by``, ``strata``, ``baseline``,
            ``metric`` and ``alpha`` are used).
        eps: draw the settings of this budget only; if None, each attack's largest budget. Without a column eps in
            the records all settings are drawn.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: if the records lack a column or hold no value, or no setting has this eps.
    """
    by, strata, metric = tuple(comparison.by), tuple(comparison.strata), str(comparison.metric)
    frame, table, settings, baseline = _selected(records, comparison, eps)
    panels = list(dict.fromkeys(frame[list(strata)].itertuples(index=False, name=None))) if strata else [()]

    names, budget = _names(settings, by)

    with matplotlib.rc_context(RC):
        width = max(2.8, 0.8 * len(settings) + 0.5)
        columns = min(len(panels) if len(panels) <= _COLUMNS else 3, max(1, int(_WIDEST // width)))
        rows = math.ceil(len(panels) / columns)
        size = (width * columns + 0.5, (3.4 + 0.24 * len(settings)) * rows)
        figure = NotebookFigure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for unused in grid.ravel()[len(panels) :]:
            unused.remove()
        drawn = list(zip(grid.ravel(), panels))
        for axes, stratum in drawn:
            part = _where(frame, strata, stratum)
            wide = _wide(part, by, settings, metric)
            _points(axes, wide, [_colour(setting, by, settings) for setting in settings])
            axes.set_title(f"{_label(stratum) or _METRICS.get(metric, metric)} ({_count(wide)})")
            axes.set_xticks(range(len(settings)), names)
            if len(settings) > 4 or max(map(len, names)) > 8:
                axes.tick_params(axis="x", labelrotation=35)
                for text in axes.get_xticklabels():
                    text.set_ha("right")
                    text.set_rotation_mode("anchor")
        _scale([axes for axes, _ in drawn], frame[metric], metric, brackets=len(settings) - 1)
        for axes in grid[:, 0]:
            axes.set_ylabel(_METRICS.get(metric, metric))
        if baseline is not None:
            low, high = _span(frame[metric], metric)
            for axes, stratum in drawn:
                part = _where(table, strata, stratum)
                level = high + 0.5 * _STEP * (high - low)
                for position, setting in enumerate(settings):
                    found = _where(part, by, setting)
                    if setting != baseline and len(found):
                        text = verdict_text(found.iloc[0], alpha=float(comparison.alpha))
                        _bracket(axes, 0, position, level, 0.18 * _STEP * (high - low), text)
                        level += _STEP * (high - low)
        test = f"brackets: Wilcoxon signed-rank against {names[0]}, Holm-adjusted p" if baseline else ""
        figure.supxlabel("; ".join(part for part in (budget, test) if part), fontsize=8, color="#555555")
    return figure


def paired_table(records: Records, comparison: Any, eps: float | None = None) -> pd.DataFrame:
    """The values that `paired_plot` draws: one row per stratum, setting and subject.

    Args:
        records: see `paired_plot`.
        comparison: see `paired_plot`.
        eps: see `paired_plot`.

    Returns:
        Columns of the strata and of the settings, ``subject``, and the metric; rows without a value are left out.
    """
    by, strata, metric = tuple(comparison.by), tuple(comparison.strata), str(comparison.metric)
    frame, _, settings, _ = _selected(records, comparison, eps)
    keys = [*strata, *by, "subject"]
    means = frame.groupby(keys, sort=False)[metric].mean().dropna().reset_index()
    drawn = [row in settings for row in means[list(by)].itertuples(index=False, name=None)]
    return means[drawn].reset_index(drop=True)


def _selected(
    records: Records, comparison: Any, eps: float | None
) -> tuple[pd.DataFrame, pd.DataFrame, list[tuple[Any, ...]], tuple[Any, ...] | None]:
    """Records and rows of the comparison at the wanted budget, the settings to draw, and the baseline among them."""
    by, strata, metric = tuple(comparison.by), tuple(comparison.strata), str(comparison.metric)
    frame = tidy(records, [*by, *strata, metric, "subject"])
    frame = frame.assign(**{metric: measured(frame, metric, "subject")})
    table = comparison.table
    frame, table = _at_budget(frame, eps), _at_budget(table, eps, like=frame)
    if not frame[metric].notna().any():
        raise ValueError(f"No record has a value of {metric} to draw.")
    settings = _settings(frame, by)
    compared = {tuple(row) for row in table[list(by)].itertuples(index=False)}
    baselines = [setting for setting in settings if setting not in compared]
    baseline = next((s for s in baselines if str(comparison.baseline) in (label(by, s), label(by, s[:1]))), None)
    settings = [s for s in settings if s in compared or s == baseline]
    if baseline is not None:
        settings.sort(key=lambda setting: setting != baseline)
    return frame, table, settings, baseline


def verdict_text(row: Any, alpha: float = 0.05) -> str:
    """Say what a bracket says, from a row of a comparison's table.

    Args:
        row: with ``p_holm``, ``verdict`` and ``n``.
        alpha: level of the family.

    Example:
        >>> verdict_text({"p_holm": 0.0029, "verdict": "significantly lower", "n": 12})
        '** p=0.0029'
        >>> verdict_text({"p_holm": 0.31, "verdict": "not significant", "n": 12})
        'n.s. p=0.31'
        >>> verdict_text({"p_holm": float("nan"), "verdict": "n=5 < 6: no p-value", "n": 5})
        'n too small (5)'
    """
    p, verdict = float(row["p_holm"]), str(row["verdict"])
    if math.isnan(p) or verdict.startswith("cannot reach"):
        return f"n too small ({int(row['n'])})"
    if verdict.startswith("identical"):
        return "identical"
    written = format_p(p)
    written = f"p{written}" if written.startswith("<") else f"p={written}"
    if not verdict.startswith("significant"):
        return f"n.s. {written}"
    stars = "***" if p <= min(0.001, alpha) else "**" if p <= min(0.01, alpha) else "*"
    return f"{stars} {written}"


def _at_budget(frame: pd.DataFrame, eps: float | None, like: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows of the wanted budget and the clean rows; each attack's largest budget by default."""
    if "eps" not in frame:
        return frame
    budgets = frame["eps"].astype(float)
    if like is not None:  # a comparison's table: the budgets that its records kept
        return frame[budgets.isin(like["eps"].astype(float))] if "eps" in like else frame
    clean = budgets == 0
    if eps is not None:
        wanted = np.isclose(budgets, eps)
        if not wanted.any():
            raise ValueError(f"No record has eps {eps:g}; there are {', '.join(f'{e:g}' for e in budgets.unique())}.")
    elif "attack" in frame:
        wanted = budgets == budgets.groupby(frame["attack"]).transform("max")
    else:
        wanted = budgets == budgets.max()
    return frame[clean | wanted]


def _settings(frame: pd.DataFrame, by: Sequence[str]) -> list[tuple[Any, ...]]:
    """Distinct settings: clean and controls first where the attack is among the columns."""
    found = list(dict.fromkeys(frame[list(by)].itertuples(index=False, name=None)))
    if "attack" in by:
        place = list(by).index("attack")
        order = in_order([setting[place] for setting in found])
        found.sort(key=lambda setting: order.index(str(setting[place])))
    return found


def _label(setting: Sequence[Any] | None) -> str:
    """Readable name of a setting or stratum."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in setting or ())


def _names(settings: Sequence[tuple[Any, ...]], by: Sequence[str]) -> tuple[list[str], str]:
    """Tick labels, without the budget where all attacked settings share it, and a note that gives it then."""
    if "eps" not in by:
        return [_label(setting) for setting in settings], ""
    place = list(by).index("eps")
    positive = {float(setting[place]) for setting in settings if setting[place]}
    dropped = {0.0} | (positive if len(positive) == 1 else set())
    names = [_label([v for i, v in enumerate(s) if i != place or float(v) not in dropped]) for s in settings]
    return names, f"eps = {positive.pop():g}" if len(positive) == 1 else ""


def _colour(setting: tuple[Any, ...], by: Sequence[str], settings: Sequence[tuple[Any, ...]]) -> str:
    if "attack" in by:
        place = list(by).index("attack")
        return str(attack_styles([str(s[place]) for s in settings])[str(setting[place])]["color"])
    position = list(settings).index(setting)
    return CLEAN if position == 0 else PALETTE[(position - 1) % len(PALETTE)]


def _where(frame: pd.DataFrame, columns: Sequence[str], values: Sequence[Any]) -> pd.DataFrame:
    for column, value in zip(columns, values):
        frame = frame[frame[column] == value]
    return frame


def _wide(part: pd.DataFrame, by: Sequence[str], settings: Sequence[tuple[Any, ...]], metric: str) -> np.ndarray:
    """(subjects, settings) with NaN where a subject has no value."""
    subjects = {subject: row for row, subject in enumerate(dict.fromkeys(part["subject"]))}
    wide = np.full((len(subjects), len(settings)), np.nan)
    for column, setting in enumerate(settings):
        for subject, value in _where(part, by, setting).groupby("subject")[metric].mean().items():
            wide[subjects[subject], column] = value
    return wide


def _count(wide: np.ndarray) -> str:
    counts = np.isfinite(wide).sum(axis=0)
    return f"n = {counts.max()}" if counts.min() == counts.max() else f"n = {counts.min()} to {counts.max()}"


def _points(axes: Axes, wide: np.ndarray, colours: Sequence[str]) -> None:
    """Joined points, boxes, and half a violin to the right of each box."""
    positions = np.arange(wide.shape[1])
    for values in wide:
        axes.plot(positions, values, color="#9a9a9a", linewidth=0.6, alpha=0.7, zorder=1)
    for position, colour in zip(positions, colours):
        values = wide[:, position]
        values = values[np.isfinite(values)]
        axes.plot(np.full(values.size, position), values, "o", color=colour, markersize=3.6, alpha=0.75, zorder=3)
        if values.size > 1:
            line = {"color": colour, "linewidth": 1.2}
            axes.boxplot(
                [values],
                positions=[position],
                widths=0.2,
                showfliers=False,
                patch_artist=True,
                boxprops={"facecolor": colour, "alpha": 0.16, "edgecolor": colour},
                medianprops={**line, "linewidth": 2.2},
                whiskerprops=line,
                capprops=line,
                manage_ticks=False,
                zorder=2,
            )
        if values.size >= _VIOLIN_FROM and np.ptp(values) > 1e-9:  # a density of fewer or of equal values says nothing
            parts = axes.violinplot(
                [values], positions=[position + 0.14], widths=0.66, side="high", showextrema=False, points=80
            )
            for body in parts["bodies"]:  # type: ignore[attr-defined]
                body.set(facecolor=colour, edgecolor="none", alpha=0.3, zorder=1)
    axes.set_xlim(-0.45, wide.shape[1] - 0.4)


def _span(values: pd.Series, metric: str) -> tuple[float, float]:
    """Range of the metric's axis without the brackets."""
    if metric in ("dice", "iou"):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    low = min(0.0, low) if penalised(metric) else low
    return low, high if high > low else low + 1.0


def _scale(panels: Sequence[Axes], values: pd.Series, metric: str, brackets: int) -> None:
    low, high = _span(values, metric)
    for axes in panels:
        axes.set_ylim(low - 0.03 * (high - low), high + (brackets + 0.9) * _STEP * (high - low))
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= high + 1e-9])
        axes.spines["left"].set_bounds(low, high)
        axes.grid(axis="y")
        axes.set_axisbelow(True)


def _bracket(axes: Axes, left: float, right: float, level: float, tip: float, text: str) -> None:
    axes.plot([left, left, right, right], [level - tip, level, level, level - tip], color="#444444", linewidth=0.8)
    axes.text((left + right) / 2, level, text, ha="center", va="bottom", fontsize=7.5, color="#222222")
