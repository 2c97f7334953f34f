"""Mean Dice drop of every setting in every region at one glance."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import RC, NotebookFigure

_PER_ROW = 4
_CELL_WIDTH, _CELL_HEIGHT = 0.66, 0.27  # inches


def drop_table(records: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice drop per victim, setting and region, over the subjects that have both the clean and the attacked value.

    Args:
        records: scored rows with subject, victim, attack, setting, region and dice.

    Returns:
        Columns victim, setting, region, n, clean, attacked, drop (clean minus attacked: positive is harm), in the
        order of the records, with a row of the region "mean" (over regions) after the regions of each setting.
    """
    keys = ["victim", "region", "subject"]
    clean = records[records["attack"] == "clean"].groupby(keys)["dice"].mean().rename("clean")
    attacked = records[records["attack"] != "clean"].groupby(["setting", *keys], sort=False)["dice"].mean()
    both = attacked.rename("attacked").reset_index().merge(clean.reset_index(), on=keys).dropna()
    both["drop"] = both["clean"] - both["attacked"]
    by = ["victim", "setting", "region"]
    means = both.groupby(by, sort=False)[["clean", "attacked", "drop"]].mean()
    means.insert(0, "n", both.groupby(by, sort=False)["subject"].nunique())
    table = means.reset_index()
    if table.empty:
        return table
    overall = table.groupby(by[:2], sort=False).agg(
        n=("n", "min"), clean=("clean", "mean"), attacked=("attacked", "mean"), drop=("drop", "mean")
    )
    with_mean = pd.concat([table, overall.assign(region="mean").reset_index()], ignore_index=True)
    place = with_mean.groupby(by[:2], sort=False).ngroup()
    return with_mean.loc[place.sort_values(kind="stable").index].reset_index(drop=True)


def drop_heatmap(table: pd.DataFrame, *, rows: str = "setting", what: str = "mean Dice drop") -> Figure:
    """Draw a table of drops as numbers on colour, a panel per victim on one colour scale.

    Args:
        table: as :func:`drop_table` gives it; ``victim``, the column named by ``rows``, ``region`` and ``drop``.
        rows: the column whose values are the rows of the picture.
        what: words beside the colour bar.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: if the table has no row.
    """
    if table.empty:
        raise ValueError("No attacked subject has a Dice value to draw.")
    victims = list(dict.fromkeys(table["victim"]))
    columns = min(len(victims), _PER_ROW)
    lines = -(-len(victims) // columns)
    settings, regions = list(dict.fromkeys(table[rows])), list(dict.fromkeys(table["region"]))
    largest = max(float(table["drop"].max()), 0.05)
    label = min(3.2, 0.075 * max(len(str(s)) for s in settings) + 0.25)
    size = (label + columns * (_CELL_WIDTH * len(regions) + 0.25) + 0.9,
            lines * (_CELL_HEIGHT * len(settings) + 0.75) + 0.2)  # fmt: skip
    with matplotlib.rc_context(RC):
        figure = NotebookFigure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for unused in grid.ravel()[len(victims) :]:
            unused.remove()
        for axes, victim in zip(grid.ravel(), victims):
            wide = table[table["victim"] == victim].pivot(index=rows, columns="region", values="drop")
            values = wide.reindex(index=settings, columns=regions).to_numpy(dtype=float)
            picture = _panel(axes, values, regions, settings, largest)
            axes.set_title(str(victim) if len(victims) > 1 else "", fontsize=9)
        bar = figure.colorbar(picture, ax=list(grid.ravel()[: len(victims)]), shrink=0.8, pad=0.015)
        bar.set_label(what)
        bar.outline.set_visible(False)
    return figure


def _panel(
    axes: Axes, values: np.ndarray, regions: Sequence[str], settings: Sequence[str], largest: float
) -> matplotlib.image.AxesImage:
    picture = axes.imshow(np.ma.masked_invalid(values), cmap="OrRd", vmin=0.0, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = value > 0.6 * largest
            text = f"{value if abs(value) >= 5e-4 else 0.0:.3f}"  # no "-0.000"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    axes.set_xticks(range(len(regions)), regions)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(settings)), settings)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(-0.5, len(regions)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(settings)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    if "mean" in regions and len(regions) > 1:
        axes.axvline(len(regions) - 1.5, color="white", linewidth=4)
    return picture
