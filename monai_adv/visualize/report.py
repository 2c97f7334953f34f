"""The self-contained HTML report: one file, nothing loaded from elsewhere, a volume viewer and tables inside."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from monai_adv.data.files import atomic_file
from monai_adv.stats import tables as stats_tables

from .style import figure_bytes
from .viewer import LEGEND, ViewerContent

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

_ZOOM = 0.75  # pixels of the page per pixel of a figure
_STATUS = {"PASS": "pass", "WARN": "warn", "FAIL": "fail", "NOT RUN": "notrun"}


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str | Sequence[str],
    threat: Mapping[str, Any],
    tables: Mapping[str, Any] | Sequence[tuple[str, Any]],
    figures: Mapping[str, Figure | bytes] | Sequence[tuple[str, Figure | bytes]],
    provenance: Mapping[str, Any],
    checks: pd.DataFrame | Iterable[Mapping[str, Any]] | None = None,
    limitations: Sequence[str] = LIMITATIONS,
    pictures: Mapping[str, Figure | bytes] | Sequence[tuple[str, Figure | bytes]] = (),
    viewer: ViewerContent | None = None,
    subjects: pd.DataFrame | None = None,
) -> Path:
    """Write the report as one HTML file that needs no network and no other file, and can be read without its scripts.

    Every string is escaped. Figures are embedded as PNG. A content security policy in the page forbids anything to
    be loaded, and any script but those of this package (they are named by their SHA-256). The file appears complete
    or not at all.

    Args:
        path: the .html file; missing folders are made.
        title: headline.
        summary: the result in plain words, one string per paragraph.
        threat: what was attacked and how: victim, threat model (norm, budgets, units, support), attacks with their
            parameters. A mapping or a list of mappings as value becomes a nested table.
        tables: caption -> DataFrame (its index is not shown) or Comparison of `monai_adv.stats` (with its notes).
        figures: caption -> figure, or its PNG.
        provenance: versions, seeds, hashes, commands. Values that span several lines or stand under a key that
            contains "command" are set as code.
        checks: automatic checks as rows with ``check`` (or ``name``), ``status`` (PASS, WARN, FAIL, NOT RUN) and any
            further columns, such as ``value``, ``threshold``, ``n``, ``note``. With None the report says that no
            check was run.
        limitations: paragraphs on what the results do not say.
        pictures: caption -> figure of a single subject; they stand below the viewer and are all there is of volumes
            where a browser has no WebGL 2.
        viewer: volumes to scroll through, see `viewer_content`; no viewer if None.
        subjects: a table that the reader sorts and filters (by its columns of text); None for no such table.

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
    scrolled = viewer is not None and bool(viewer.scenes)
    scripts = {
        "tables": _script("templates/tables.js") if subjects is not None else None,
        "viewer": _script("templates/viewer.js") if scrolled else None,
        "niivue": _script("assets/niivue/niivue.umd.js") if scrolled else None,
    }
    page = environment.get_template("report.html.j2").render(
        title=title,
        written=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        policy=_policy([text for text in scripts.values() if text is not None]),
        style=_script("templates/report.css"),
        scripts=scripts,
        summary=[summary] if isinstance(summary, str) else list(summary),
        threat=[_entry(key, value) for key, value in threat.items()],
        tables=[_table(caption, content) for caption, content in _pairs(tables)],
        figures=[_figure(caption, figure) for caption, figure in _pairs(figures)],
        pictures=[_figure(caption, figure, 1.0) for caption, figure in _pairs(pictures)],
        viewer=viewer,
        viewer_data=_json({"scenes": viewer.scenes, "classes": LEGEND}) if viewer is not None and scrolled else None,
        legend=LEGEND,
        licence=_read("assets/niivue/LICENSE") + "\n" + _read("assets/niivue/THIRD_PARTY.txt") if scrolled else None,
        subject_data=None if subjects is None else _json(_sortable(subjects)),
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


def _figure(caption: str, figure: Figure | bytes, zoom: float = _ZOOM) -> dict[str, Any]:
    """A figure as base64, with the size at which its letters are as large as the page's."""
    png = figure if isinstance(figure, bytes) else figure_bytes(figure)
    width, height = (round(zoom * n) for n in struct.unpack(">II", png[16:24]))  # of the PNG's first chunk
    return {"caption": caption, "png": base64.b64encode(png).decode("ascii"), "width": width, "height": height}


def _read(name: str) -> str:
    return (resources.files("monai_adv.visualize") / name).read_text(encoding="utf-8")


def _script(name: str) -> Markup:
    """A script or style of this package, as it stands in the page.

    Raises:
        ValueError: if it holds what would end its element.
    """
    text = _read(name)
    if re.search(r"</style" if name.endswith(".css") else r"</script|<!--", text, re.IGNORECASE):
        raise ValueError(f"{name} cannot stand inside a page: it holds the end of an element")
    return Markup(text)


def _policy(scripts: Sequence[str]) -> str:
    """Content security policy: nothing is loaded, only the given scripts run."""
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts]
    rules = ["default-src 'none'", "img-src data: blob:", "style-src 'unsafe-inline'", "base-uri 'none'",
             "form-action 'none'"]  # fmt: skip
    if scripts:
        rules += [f"script-src {' '.join(hashes)}", "connect-src data: blob:"]
    return "; ".join(rules)


def _json(content: Any) -> Markup:
    """Plain data for a script element: nothing in it can end the element."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _sortable(frame: pd.DataFrame) -> dict[str, Any]:
    """A table as numbers and text, the decimals of each column (None for text) and the columns to filter by."""
    columns: list[list[Any]] = []
    digits: list[int | None] = []
    for name in frame.columns:
        values = frame[name]
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            shown = 0 if pd.api.types.is_integer_dtype(values) else 3 if values.abs().max() < 10 else 2
            columns.append([round(float(v), 6) if math.isfinite(v) else None for v in values.astype(float)])
            digits.append(shown)
        else:
            columns.append([None if pd.isna(v) else str(v) for v in values])
            digits.append(None)
    few = [i for i, c in enumerate(columns) if i and digits[i] is None and len(set(c)) <= 200]
    return {"headers": [str(c).replace("_", " ") for c in frame.columns], "digits": digits, "filters": few,
            "rows": [list(row) for row in zip(*columns)]}  # fmt: skip


def _entry(key: str, value: Any) -> dict[str, Any]:
    """One line of a list of facts: text, code or a nested table."""
    if isinstance(value, Mapping):
        rows = [[str(name), _text(entry)] for name, entry in value.items()]
        return {"key": key, "kind": "rows", "value": {"headers": [], "rows": rows, "numeric": [False, False]}}
    if isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
        return {"key": key, "kind": "rows", "value": frame_cells(pd.DataFrame(list(value)))}
    text = _text(value)
    return {"key": key, "kind": "code" if "\n" in text or "command" in key.lower() else "text", "value": text}


def _table(caption: str, content: Any) -> dict[str, Any]:
    """A table ready to print: a frame, or a comparison with its notes."""
    if isinstance(content, pd.DataFrame):
        return {"caption": caption, "notes": [], **frame_cells(content)}
    headers, rows = stats_tables.display(content)
    numeric = [all(_looks_numeric(row[column]) for row in rows) for column in range(len(headers))]
    return {"caption": caption, "notes": list(content.notes), "headers": headers, "rows": rows, "numeric": numeric}


def frame_cells(frame: pd.DataFrame) -> dict[str, Any]:
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
    return {**frame_cells(frame), "statuses": [_STATUS[status] for status in statuses], "counts": counts}
