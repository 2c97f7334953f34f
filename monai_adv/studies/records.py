"""The tidy table of a run: a pure function of its unit files."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from monai_adv.data.files import write_atomic
from monai_adv.errors import ConfigError
from monai_adv.stats import write_csv
from monai_adv.studies.units import UnitStore

FIRST = (
    "subject", "victim", "attack", "method", "eps", "units", "norm", "setting", "region", "dice", "hd95", "iou",
    "truth_voxels", "prediction_voxels", "truth_empty", "prediction_empty", "voxel_accuracy", "linf_std",
    "linf_range", "linf_absolute", "l2_std", "l2_range", "l2_absolute", "outside_max", "ssim", "psnr", "success",
    "zero_gradient", "status", "seconds", "forwards", "backwards",
)  # fmt: skip


def collect(store: UnitStore, keys: Collection[str]) -> pd.DataFrame:
    """Rows of the units with these keys, in a fixed order; a failed unit has one row without a region.

    Units of other keys (a subject that left the data, a file or a victim that changed) stay on disk and are not read.
    """
    rows: list[dict[str, Any]] = []
    for unit in store.all():
        if unit["key"] in keys:
            rows += unit["rows"] or [{**unit["identity"], "status": unit["status"]}]
    table = pd.DataFrame(rows).reindex(columns=list(FIRST))
    keys = ["subject", "victim", "attack", "eps", "region"]
    return table.sort_values(keys, kind="stable", na_position="last").reset_index(drop=True)


def write_records(folder: Path, store: UnitStore, keys: Collection[str]) -> pd.DataFrame:
    """Merge the units with these keys into ``records.csv``; numbers keep every digit."""
    table = collect(store, keys)
    write_atomic(folder / "records.csv", csv_bytes(table))
    return table


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
    """Records of a run folder, or of a CSV file with the same columns.

    Raises:
        ConfigError: if there is no such table.
    """
    path = Path(path)
    file = path / "records.csv" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; make it with `monai-adv run study.yaml`")
    try:
        return pd.read_csv(file, dtype={"subject": str, "victim": str})
    except (ValueError, pd.errors.ParserError) as error:
        raise ConfigError(f"{file} is not a table of records: {error}") from error
