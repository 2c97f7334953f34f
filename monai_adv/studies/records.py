"""The tidy table of a run: a pure function of its unit files, written piece by piece."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from monai_adv.data.files import atomic_file, write_atomic
from monai_adv.errors import ConfigError
from monai_adv.stats import write_csv
from monai_adv.studies.units import UnitStore, read_checked, write_checked
from monai_adv.victims.checkpoint import file_hash

FIRST = (
    "subject", "victim", "attack", "method", "eps", "units", "norm", "setting", "region", "dice", "hd95", "iou",
    "truth_voxels", "prediction_voxels", "truth_empty", "prediction_empty", "voxel_accuracy", "linf_std",
    "linf_range", "linf_absolute", "l2_std", "l2_range", "l2_absolute", "outside_max", "ssim", "psnr", "success",
    "zero_gradient", "status",
)  # fmt: skip
TEXT = ("subject", "victim", "attack", "method", "units", "norm", "setting", "region", "status")
WHOLE = ("truth_voxels", "prediction_voxels", "forwards", "backwards")
FLAGS = ("truth_empty", "prediction_empty", "success")
UNIT = ("subject", "victim", "attack", "eps")
COSTS = ("seconds", "forwards", "backwards")
"""What a unit took: of the clock and of which budgets were computed together, not of the unit alone."""
CHECKSUMS = "merged.json"
ROWS = 1000
"""Rows that are held in memory."""


def write_records(folder: Path, units: Iterable[Mapping[str, Any]]) -> int:
    """Write ``records.csv``, ``records.parquet`` and ``timings.csv`` of units, and their checksums.

    The records are the same bytes for the same units; what a unit took stands in the timings. A unit without a result
    has one row without a region.

    Args:
        folder: the run folder.
        units: contents of unit files in the order of the table, see :func:`in_order`; only some rows of them are held.

    Returns:
        The number of rows.

    Raises:
        WriteError: if a file cannot be written; all of them are then as they were.
    """
    names = ("records.csv", "records.parquet", "timings.csv")
    total = 0
    with ExitStack() as stack:
        table, parquet, timings = (stack.enter_context(atomic_file(folder / name)) for name in names)
        arrow = pa.schema([(name, _arrow_type(name)) for name in FIRST])
        compressed = pa.BufferOutputStream()  # small; a writer whose file fails cannot be closed any more
        writer = pq.ParquetWriter(compressed, arrow)
        table.write(csv_bytes(_frame([], FIRST)))
        timings.write(csv_bytes(_frame([], (*UNIT, *COSTS))))
        for rows, costs in _pieces(units):
            total += len(rows)
            table.write(_body(_frame(rows, FIRST)))
            timings.write(_body(_frame(costs, (*UNIT, *COSTS))))
            columns = [pa.array([row.get(n) for row in rows], _arrow_type(n), from_pandas=True) for n in FIRST]
            writer.write_table(pa.Table.from_arrays(columns, schema=arrow), row_group_size=len(rows))
        writer.close()
        parquet.write(compressed.getvalue())
        for stream in (table, parquet, timings):  # a full disk is met before any of them takes its place
            stream.flush()
            os.fsync(stream.fileno())
    write_checked(folder / CHECKSUMS, {"rows": total, "files": {name: file_hash(folder / name) for name in names}})
    return total


def in_order(store: UnitStore, wanted: Iterable[tuple[Mapping[str, Any], str]]) -> Iterator[dict[str, Any]]:
    """Contents of the wanted units that are there, in the order of the table.

    Args:
        store: where they are.
        wanted: identity and key of each. Units of other keys (a subject that left the data, a file or a victim that
            changed) stay on disk and are not read.
    """
    for identity, key in sorted(wanted, key=lambda unit: tuple(unit[0][name] for name in UNIT)):
        content = store.read(identity, key)
        if content is not None:
            yield content


def _pieces(units: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Rows and costs, some units at a time; where a piece ends depends on the units alone."""
    rows: list[Mapping[str, Any]] = []
    costs: list[Mapping[str, Any]] = []
    for unit in units:
        own = unit["rows"] or [{**unit["identity"], "status": unit["status"]}]
        rows += sorted(own, key=lambda row: (row.get("region") is None, row.get("region") or ""))
        costs.append({name: own[0].get(name) for name in (*UNIT, *COSTS)})
        if len(rows) >= ROWS:
            yield rows, costs
            rows, costs = [], []
    if rows:
        yield rows, costs


def _arrow_type(name: str) -> Any:
    if name in TEXT:
        return pa.string()
    return pa.int64() if name in WHOLE else pa.bool_() if name in FLAGS else pa.float64()


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Rows with the types of the columns, whatever of them is missing."""
    content: dict[str, Any] = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        if name in TEXT:
            content[name] = pd.Series(values, dtype=object)
        elif name in WHOLE or name in FLAGS:
            content[name] = pd.array(values, dtype="Int64" if name in WHOLE else "boolean")
        else:
            content[name] = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return pd.DataFrame(content)


def _body(frame: pd.DataFrame) -> bytes:
    """A table as CSV without the line of names."""
    return csv_bytes(frame).split(b"\n", 1)[1]


def replace_rows(path: Path, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Add rows to a table on disk, in place of those that have the same keys.

    Args:
        path: CSV; made if it does not exist.
        rows: what to add.
        keys: columns that say which row is which; the table is sorted by them. One that the table on disk has not yet
            is not asked.
    """
    table = pd.DataFrame(list(rows))
    if path.is_file():
        before = pd.read_csv(path, dtype={"subject": str, "victim": str})
        shared = [key for key in keys if key in before]
        new = set(zip(*(table[key] for key in shared)))
        kept = [row not in new for row in zip(*(before[key] for key in shared))]
        table = pd.concat([before[kept], table], ignore_index=True)
    write_atomic(path, csv_bytes(table.sort_values(list(keys), kind="stable")))


def csv_bytes(table: pd.DataFrame) -> bytes:
    """A table as CSV in which no text is run by a spreadsheet as a formula."""
    buffer = io.StringIO()
    write_csv(table, buffer)
    return buffer.getvalue().encode()


def read_records(path: str | Path) -> pd.DataFrame:
    """Records of a run folder, or of a CSV file with the same columns; with the timings where a run has them.

    Raises:
        ConfigError: if there is no such table, or it is not as the run wrote it.
    """
    path = Path(path)
    file = path / "records.csv" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; make it with `monai-adv run study.yaml`")
    timings = file.with_name("timings.csv")
    try:
        content = _whole(file)
        table = pd.read_csv(io.BytesIO(content), dtype={"subject": str, "victim": str})
        strange = [name for name in ("subject", "attack") if name not in table]
        if strange:
            raise KeyError(f"it has no column {', '.join(strange)}")
        missing = [name for name in COSTS if name not in table]
        if missing and set(UNIT) <= set(table):
            if file.name == "records.csv" and timings.is_file():
                took = pd.read_csv(io.BytesIO(_whole(timings)), dtype={"subject": str, "victim": str})
                table = table.merge(took[[*UNIT, *missing]], on=list(UNIT), how="left", validate="many_to_one")
            table = table.assign(**{name: np.nan for name in missing if name not in table})
    except (KeyError, ValueError, pd.errors.ParserError) as error:
        why = error.args[0] if isinstance(error, KeyError) else error
        raise ConfigError(f"{file} is not a table of records: {why}; give the folder of a run, or its CSV") from error
    return table


def _whole(file: Path) -> bytes:
    """The bytes of a table, as long as they are those that were written.

    Raises:
        ConfigError: if they are not.
    """
    for attempt in range(10):
        content = file.read_bytes()
        known = read_checked(file.with_name(CHECKSUMS))
        wanted = None if known is None else known["files"].get(file.name)
        if wanted is None or wanted == hashlib.sha256(content).hexdigest():
            return content
        if attempt < 9:
            time.sleep(0.1)  # a run may be writing it anew
    raise ConfigError(
        f"{file} is damaged or was changed after it was written; make it again from the units: `monai-adv merge "
        f"{file.parent}`"
    )
