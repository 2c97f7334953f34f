"""Dice against the budget: how far each attack pushes each region."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from monai_adv.stats.records import Records, measured, tidy

from .style import CLEAN, RC, NotebookFigure, attack_styles, in_order

_UNITS = {
    "std": "standard deviations of the support",
    "range": "share of the robust range",
    "absolute": "units of the image",
}
_LOG_FROM = 16  # from this ratio of the largest to the smallest budget on, a linear axis hides the small ones


def curve_table(records: Records, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean Dice over subjects with its interval for every victim, region, attack and budget: what the curves draw.

    Args:
        records: see `dice_curves`.
        confidence: of the intervals (percentile bootstrap over subjects).
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        Columns victim, region, attack, eps, n, mean, low, high; no interval for a single subject.

    Raises:
        ValueError: if columns are missing or no row has a value.
    """
    frame = tidy(records, ["subject", "attack", "eps", "region", "dice"])
    frame = frame.assign(dice=measured(frame, "dice", "subject"), attack=frame["attack"].astype(str))
    kept = frame[frame["dice"].notna()]
    if kept.empty:
        raise ValueError("No record has a Dice value to draw; all units failed or were excluded.")
    kept = kept.assign(
        attack=_line_names(kept),
        victim=kept["victim"].astype(str) if "victim" in kept else "",
        region=kept["region"].astype(str),
        eps=kept["eps"].astype(float),
    )
    keys = ["victim", "region", "attack", "eps"]
    values = kept.groupby([*keys, "subject"], sort=False)["dice"].mean()
    rows = [
        (*key, len(part), *_interval(part.to_numpy(), confidence, resamples, seed))
        for key, part in values.groupby(keys, sort=False)
    ]
    return pd.DataFrame(rows, columns=[*keys, "n", "mean", "low", "high"])


def dice_curves(records: Records, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Figure:
    """Draw the mean Dice over subjects against eps: a panel per region, a line per attack.

    Bands are percentile bootstrap intervals of the mean over subjects, each attack's its own; they describe the
    sample and are no test (differences are paired: see the table). The noise control is grey and dashed, the clean
    level a horizontal line. Where there are several victims, each has a row of panels.

    Args:
        records: tidy records; used columns: subject, attack, eps, region, dice and, where
            present, victim, norm, units, status (only "ok" counts). Rows with the attack "clean" give the clean
            level. Several rows of one subject in one setting are averaged first.
        confidence: of the bands.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: if columns are missing, no row has a value, or budgets are in several units.
    """
    units = _one_unit(tidy(records, ["subject", "attack", "eps", "region", "dice"]))
    table = curve_table(records, confidence=confidence, resamples=resamples, seed=seed)
    victims, regions = list(dict.fromkeys(table["victim"])), list(dict.fromkeys(table["region"]))
    attacks = in_order([line for line in table["attack"] if line != "clean"])
    styles = attack_styles(attacks)
    budgets = np.sort(table.loc[table["attack"] != "clean", "eps"].unique())
    positive = budgets[budgets > 0]
    logarithmic = positive.size > 1 and positive[-1] / positive[0] > _LOG_FROM

    with matplotlib.rc_context(RC):
        size = (max(5.0, 3.1 * len(regions) + 0.6), 2.9 * len(victims) + 1.0)
        figure = NotebookFigure(figsize=size, layout="constrained")
        grid = figure.subplots(len(victims), len(regions), squeeze=False, sharex=True, sharey=True)
        for row, victim in enumerate(victims):
            for column, region in enumerate(regions):
                axes = grid[row, column]
                part = table[(table["victim"] == victim) & (table["region"] == region)]
                _panel(axes, part, attacks, styles, logarithmic)
                name = f"{victim}: {region}" if len(victims) > 1 else region
                axes.set_title(f"{name} ({_count(part)})")
                if column == 0:
                    axes.set_ylabel("Dice, mean over subjects")
        for axes in grid[-1]:
            axes.set_xticks(budgets if logarithmic or 0 in budgets else [0, *budgets])
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            if budgets.size > 5:
                axes.tick_params(axis="x", labelrotation=45)
        figure.supxlabel(f"budget eps ({_UNITS.get(units, units) if units else 'as recorded'})", fontsize=9)
        handles: dict[str, Any] = {}
        for axes in grid.ravel():
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
        ordered = [name for name in ("clean", *attacks) if name in handles]
        columns = min(len(ordered), max(2, int(size[0] // 1.3)))
        figure.legend([handles[name] for name in ordered], ordered, loc="outside upper center", ncols=columns)
    return figure


def _one_unit(frame: pd.DataFrame) -> str:
    """The unit of the budgets, "" if the records do not say."""
    if "units" not in frame:
        return ""
    units = frame.loc[frame["attack"] != "clean", "units"].dropna().astype(str).unique()
    if len(units) > 1:
        raise ValueError(f"Budgets are in several units ({', '.join(units)}); draw the records of one unit at a time.")
    return str(units[0]) if len(units) else ""


def _line_names(frame: pd.DataFrame) -> pd.Series:
    """Name of each row's line: the attack, with its norm where one attack was run in several."""
    if "norm" not in frame:
        return frame["attack"]
    norms = frame.groupby("attack")["norm"].transform("nunique")
    several = (norms > 1) & (frame["attack"] != "clean")
    return frame["attack"].where(~several, frame["attack"] + " (" + frame["norm"].astype(str) + ")")


def _count(part: pd.DataFrame) -> str:
    """Number of subjects, as a range where settings differ in it."""
    if part.empty:
        return "n = 0"
    low, high = int(part["n"].min()), int(part["n"].max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _interval(values: np.ndarray, confidence: float, resamples: int, seed: int) -> tuple[float, float, float]:
    """Mean and percentile bootstrap interval of the mean."""
    if values.size < 2:
        return float(values.mean()), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(values.mean()), float(low), float(high)


def _panel(
    axes: Axes, part: pd.DataFrame, attacks: list[str], styles: dict[str, dict[str, Any]], logarithmic: bool
) -> None:
    """One region: clean level, one line and band per attack."""
    shown = ["eps", "mean", "low", "high"]
    clean = part.loc[part["attack"] == "clean", shown]
    level = None if clean.empty else tuple(clean.iloc[0][1:])
    if level:
        axes.axhline(level[0], color=CLEAN, linewidth=1.0, zorder=1, label="clean")
    for attack in attacks:
        rows = part[part["attack"] == attack].sort_values("eps")
        points = [tuple(row) for row in rows[shown].itertuples(index=False)]
        if level and not logarithmic and points and points[0][0] > 0:
            points.insert(0, (0.0, *level))  # no budget, no change: every attack starts at the clean level
        if not points:
            continue
        x, mean, low, high = np.array(points).T
        style = styles[attack]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.14, linewidth=0)
        marked = [index for index, eps in enumerate(x) if eps > 0]
        axes.plot(x, mean, label=attack, markersize=4.5, linewidth=1.6, markevery=marked, **style)
    if logarithmic:
        axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
