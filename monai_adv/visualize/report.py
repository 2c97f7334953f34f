"""The self-contained HTML report of a study: one file, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import datetime
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from monai_adv.data.files import atomic_file
from monai_adv.stats import tables as stats_tables

from .style import figure_bytes

LIMITATIONS = (
    "These numbers describe the vulnerability of one pipeline under the threat model stated above, on these subjects. "
    "An attack gives a lower bound on vulnerability: a stronger or a better adapted one may do more harm.",
    "A small effect in this report is no evidence of robustness, of safety or of compliance with any regulation.",
    "Adversarial perturbations are worst cases. They do not say how often a scanner, a protocol or a pathology "
    "produces such an error by itself; the noise control shows what random changes of the same size do.",
    "The tests are paired over subjects. With few subjects only large and consistent effects can become significant; "
    "'not significant' does not mean 'no effect'.",
    "Research software, not a medical device: nothing here is meant for decisions about patients.",
)
"""What every report says about the reach of its results."""

_STATUS = {"PASS": "pass", "WARN": "warn", "FAIL": "fail", "NOT RUN": "notrun"}


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str | Sequence[str],
    threat: Mapping[str, Any],
    tables: Mapping[str, Any] | Sequence[tuple[str, Any]],
    figures: Mapping[str, Figure] | Sequence[tuple[str, Figure]],
    provenance: Mapping[str, Any],
    checks: pd.DataFrame | Iterable[Mapping[str, Any]] | None = None,
    limitations: Sequence[str] = LIMITATIONS,
) -> Path:
    """Write the report as one HTML file that needs no network, no script and no other file.

    Every string is escaped. Figures are embedded as PNG. A content security policy in the page forbids anything to
    be loaded. The file appears complete or not at all.

    Args:
        path: the .html file; missing folders are made.
        title: headline.
        summary: the result in plain words, one string per paragraph.
        threat: what was attacked and how: victim, threat model (norm, budgets, units, support), attacks with their
            parameters. A mapping or a list of mappings as value becomes a nested table.
        tables: caption -> DataFrame (its index is not shown) or Comparison of `monai_adv.stats` (with its notes).
        figures: caption -> figure.
        provenance: versions, seeds, hashes, commands. Values that span several lines or stand under a key that
            contains "command" are set as code.
        checks: automatic checks as rows with ``check`` (or ``name``), ``status`` (PASS, WARN, FAIL, NOT RUN) and any
            further columns, such as ``value``, ``threshold``, ``n``, ``note``. With None the report says that no
            check was run.
        limitations: paragraphs on what the results do not say.

    Returns:
        The path.

    Raises:
        ValueError: if a check has no or an unknown status.
        DataError: if the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("monai_adv.visualize", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        written=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        summary=[summary] if isinstance(summary, str) else list(summary),
        threat=[_entry(key, value) for key, value in threat.items()],
        tables=[_table(caption, content) for caption, content in _pairs(tables)],
        figures=[
            {"caption": caption, "png": base64.b64encode(figure_bytes(figure)).decode("ascii")}
            for caption, figure in _pairs(figures)
        ],
        checks=None if checks is None else _checks(checks),
        provenance=[_entry(key, value) for key, value in provenance.items()],
        limitations=list(limitations),
    )
    target = Path(path)
    with atomic_file(target) as stream:
        stream.write(page.encode("utf-8"))
    return target


def _pairs(items: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return list(items.items()) if isinstance(items, Mapping) else [(caption, item) for caption, item in items]


def _entry(key: str, value: Any) -> dict[str, Any]:
    """One line of a list of facts: text, code or a nested table."""
    if isinstance(value, Mapping):
        rows = [[str(name), _text(entry)] for name, entry in value.items()]
        return {"key": key, "kind": "rows", "value": {"headers": [], "rows": rows, "numeric": [False, False]}}
    if isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
        return {"key": key, "kind": "rows", "value": _cells(pd.DataFrame(list(value)))}
    text = _text(value)
    return {"key": key, "kind": "code" if "\n" in text or "command" in key.lower() else "text", "value": text}


def _table(caption: str, content: Any) -> dict[str, Any]:
    """A table ready to print: a frame, or a comparison with its notes."""
    if isinstance(content, pd.DataFrame):
        return {"caption": caption, "notes": [], **_cells(content)}
    headers, rows = stats_tables.display(content)
    numeric = [all(_looks_numeric(row[column]) for row in rows) for column in range(len(headers))]
    return {"caption": caption, "notes": list(content.notes), "headers": headers, "rows": rows, "numeric": numeric}


def _cells(frame: pd.DataFrame) -> dict[str, Any]:
    """Headers and cells of a frame as text."""
    names = [str(column) for column in frame.columns]
    columns = [_column(name, list(frame.iloc[:, index])) for index, name in enumerate(names)]
    return {
        "headers": [name.replace("_", " ") for name in names],
        "rows": [list(row) for row in zip(*columns)],
        "numeric": [
            pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype) for dtype in frame.dtypes
        ],
    }


def _column(name: str, values: list[Any]) -> list[str]:
    """Cells of one column: numbers of ordinary size with the same decimals, so that they can be compared by eye."""
    floats = [float(v) for v in values if isinstance(v, float | np.floating) and math.isfinite(v)]
    if name not in ("p", "p_holm", "pvalue", "eps") and floats:
        largest = max(map(abs, floats))
        digits = 0 if all(v.is_integer() for v in floats) else 3 if largest < 10 else 2 if largest < 1000 else 1
        if largest >= 0.05:
            return [
                f"{v:.{digits}f}" if isinstance(v, float | np.floating) and math.isfinite(v) else _text(v)
                for v in values
            ]
    return [_text(value, name) for value in values]


def _looks_numeric(text: str) -> bool:
    return text.lstrip("-<∞").split(" ")[0].replace(".", "", 1).replace("e-", "", 1).isdigit() or text in ("-", "∞")


def _text(value: Any, column: str = "") -> str:
    """A value as a reader wants it: p-values as p-values, numbers in few digits, lists joined, nothing as a dash."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if value is None or value is pd.NA or value is pd.NaT:
        return "-"
    if isinstance(value, float | np.floating):
        number = float(value)
        if column in ("p", "p_holm", "pvalue"):
            return stats_tables.format_p(number)
        if math.isnan(number):
            return "-"
        if math.isinf(number):
            return "∞" if number > 0 else "-∞"
        return f"{number:.4g}" if number == 0 or 1e-3 <= abs(number) < 1e6 else f"{number:.3e}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return ", ".join(_text(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value))
    return str(value)


def _checks(checks: pd.DataFrame | Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Checks as a table with a class for each status, and how many ended how."""
    frame = checks if isinstance(checks, pd.DataFrame) else pd.DataFrame([dict(check) for check in checks])
    if frame.empty:
        return {"headers": [], "rows": [], "numeric": [], "statuses": [], "counts": []}
    if "status" not in frame:
        raise ValueError(f"The checks have no status; they have {', '.join(map(str, frame.columns))}.")
    statuses = [str(status).upper().replace("_", " ") for status in frame["status"]]
    unknown = sorted(set(statuses) - set(_STATUS))
    if unknown:
        raise ValueError(f"Unknown status {', '.join(unknown)} of a check; known are {', '.join(_STATUS)}.")
    order = [name for name in ("status", "check", "name") if name in frame]
    frame = frame.assign(status=statuses)[[*order, *(c for c in frame.columns if c not in order)]]
    counts = [{"status": s, "kind": _STATUS[s], "number": statuses.count(s)} for s in _STATUS if s in statuses]
    return {**_cells(frame), "statuses": [_STATUS[status] for status in statuses], "counts": counts}
