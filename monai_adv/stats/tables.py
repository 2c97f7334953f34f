"""Comparison tables for spreadsheets, Markdown, LaTeX and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pandas as pd

from .alignment import label
from .records import penalised

if TYPE_CHECKING:
    from rich.table import Table

    from .comparison import Comparison

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\n": " ",
    "∞": r"$\infty$",
}


def csv_cell(value: Any) -> Any:
    """A value as it may stand in a CSV file: a text that a spreadsheet would compute gets a leading apostrophe.

    Example:
        >>> csv_cell("=1+1"), csv_cell("case-1"), csv_cell(-0.5)
        ("'=1+1", 'case-1', -0.5)
    """
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")  # a lone CR is a new row to readers, yet not quoted
    return f"'{text}" if value.startswith(_FORMULA) else text


def write_csv(frame: pd.DataFrame, path: str | Path | IO[str]) -> None:
    """Write a frame as CSV; a text that starts like a formula (= + - @) gets a leading apostrophe, numbers stay.

    Args:
        frame: any table; its index is not written.
        path: file or text stream to write to.
    """
    safe = frame.copy()
    for column in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[column].dtype):
            safe[column] = safe[column].map(csv_cell)
    safe.columns = [csv_cell(c) for c in safe.columns]
    safe.to_csv(path, index=False, lineterminator="\n", encoding="utf-8")


def format_p(p: float) -> str:
    """p in three significant digits, "<0.0001" below that; "-" where no test was made.

    Example:
        >>> format_p(0.00390625), format_p(2e-9)
        ('0.00391', '<0.0001')
    """
    if math.isnan(p):
        return "-"
    return "<0.0001" if p < 1e-4 else f"{p:.3g}"


def _equals(p: float, name: str) -> str:
    text = format_p(p)
    return f"{name} {text[0]} {text[1:]}" if text.startswith("<") else f"{name} = {text}"


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no "-0.000"


def _with_interval(value: float, low: float, high: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    if math.isnan(low):
        return _number(value, digits)
    return f"{_number(value, digits)} [{_number(low, digits)}, {_number(high, digits)}]"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def display(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of a comparison as text, for reading; the CSV has the full precision.

    Columns that say nothing (no pair missing, no empty truth) are left out.
    """
    table, digits = comparison.table, 1 if penalised(comparison.metric) else 3
    percent = f"{100 * comparison.confidence:g} %"
    keys = [*comparison.strata, *comparison.by]
    optional = [c for c in ("missing", "zeros", "truth_empty", "prediction_empty") if c in table and table[c].any()]
    means = bool(table["mean_difference"].notna().any())
    headers = [*keys, "n", *(c.replace("_", " ") for c in optional)]
    headers += [f"{comparison.metric}, {comparison.baseline}", comparison.metric]
    headers += [f"mean difference [{percent}]"] if means else []
    headers += [f"Hodges-Lehmann [{percent}]", "rank-biserial", "p", "p Holm", "method", "verdict"]
    rows = []
    for _, row in table.iterrows():
        cells = [_plain(row[c]) for c in keys] + [str(row["n"])] + [str(int(row[c])) for c in optional]
        for prefix in ("baseline_", ""):
            cells.append(_with_interval(row[prefix + "median"], row[prefix + "q25"], row[prefix + "q75"], digits))
        if means:
            cells.append(_with_interval(row["mean_difference"], row["mean_low"], row["mean_high"], digits))
        cells.append(_with_interval(row["hodges_lehmann"], row["hl_low"], row["hl_high"], digits))
        cells += [_number(row["rank_biserial"], 2), format_p(row["p"]), format_p(row["p_holm"])]
        rows.append([*cells, row["method"], row["verdict"]])
    return headers, rows


def notes(comparison: Comparison, *, seed: int, resamples: int, empty_truth_rule: str) -> tuple[str, ...]:
    """What a reader of the table has to know, one sentence each."""
    c, table = comparison, comparison.table
    family = " x ".join([*c.by, *c.strata])
    lines = [
        f"Differences are setting minus {c.baseline}, over the same subjects; medians [quartiles].",
        f"Wilcoxon signed-rank, {c.alternative}, zeros by {c.zero_method}; Holm over {c.tests} tests ({family}), "
        f"significant if adjusted p <= {c.alpha:g}.",
    ]
    if table["mean_difference"].notna().any():
        lines.append(f"Interval of the mean: BCa bootstrap over subjects, {resamples} resamples, seed {seed}.")
        degenerate = table["mean_method"].str.endswith("percentile interval").sum()
        if degenerate:
            lines.append(f"Bootstrap: {degenerate} interval(s) are percentile intervals, the sample was degenerate.")
    elif penalised(c.metric):
        lines.append("No mean differences: an empty region scores a penalty distance, which must not be averaged.")
    dropped = int(table["missing"].sum())
    if dropped:
        lines.append(f"{dropped} pair(s) were dropped because a value is missing (see the column missing).")
    if empty_truth_rule == "scored":
        lines.append("Cases with an empty ground truth are scored (BraTS convention) and counted in truth empty.")
    elif empty_truth_rule == "dropped":
        lines.append("Cases with an empty ground truth have no value and count as missing.")
    for _, row in c.friedman.iterrows():
        place = label(c.strata, tuple(row[s] for s in c.strata))
        lines.append(
            f"Friedman{', ' + place if place else ''}: chi2({row['settings'] - 1}) = {_number(row['statistic'], 2)}, "
            f"{_equals(row['p'], 'p')} ({_equals(row['p_holm'], 'Holm over strata')}), "
            f"Kendall's W = {_number(row['kendall_w'], 2)}, n = {row['n']} ({row['method']})."
        )
    for place, summary in c.critical_differences.items():
        groups = "; ".join("{" + ", ".join(map(str, group)) + "}" for group in summary.groups) or "none"
        lines.append(f"Not told apart, {place}: {summary.note or groups}.")
    if c.critical_differences:
        percent = f"{100 * c.confidence:g} %"
        groups_of = c.ranks.groupby(list(c.strata), sort=False) if c.strata else [((), c.ranks)]
        for key, ranks in groups_of:
            place = label(c.strata, key if isinstance(key, tuple) else (key,))
            entries = ", ".join(
                f"{label(c.by, tuple(row[b] for b in c.by))}: {row['rank']} [{row['rank_low']}, {row['rank_high']}]"
                for _, row in ranks.sort_values("mean_rank", kind="stable").iterrows()
            )
            lines.append(f"Ranks [{percent}, bootstrap over subjects]{', ' + place if place else ''}: {entries}.")
    return tuple(lines)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]], *, notes: Sequence[str] = ()) -> str:
    """Pipe table, columns padded, notes as a list below it."""

    def escape(text: str) -> str:
        text = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        return re.sub(r"\s*[\r\n]+\s*", " ", text)

    grid = [[escape(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*grid)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in grid]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n" + ("\n" + "\n".join(f"- {escape(n)}" for n in notes) + "\n" if notes else "")


def latex_escape(text: str) -> str:
    """Escape text for LaTeX; minus signs of numbers and infinity become mathematics."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    # A row that starts with a bracket or a star would be read as an argument of the line break before it.
    escaped = "{}" + escaped if escaped.startswith(("[", "*")) else escaped
    return re.sub(r"(?<![\w.])-(?=\d|\$\\infty)", r"$-$", escaped)


def latex(headers: Sequence[str], rows: Sequence[Sequence[str]], *, notes: Sequence[str] = ()) -> str:
    """booktabs tabular, notes as small text below it."""
    lines = ["% needs \\usepackage{booktabs}", r"\begin{tabular}{" + "l" * len(headers) + "}", r"\toprule"]
    body = [" & ".join(map(latex_escape, row)) + r" \\" for row in (headers, *rows)]
    lines += [body[0], r"\midrule", *body[1:], r"\bottomrule", r"\end{tabular}"]
    if notes:
        lines += ["", r"\par\smallskip{\footnotesize " + " ".join(map(latex_escape, notes)) + r"\par}"]
    return "\n".join(lines) + "\n"


def rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, notes: Sequence[str] = ()) -> Table:
    """Table for a terminal; cells are plain text, square brackets are not read as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=Text("\n".join(notes)) if notes else None, caption_justify="left")
    for header in headers:
        table.add_column(Text(header))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
