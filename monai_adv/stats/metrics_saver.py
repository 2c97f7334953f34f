"""Reading what MONAI's ``MetricsSaver`` writes: ``*_raw.csv``, a row per case and a column per class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

_METRICS = (  # the first that fits the file's name
    ("nsd", r"nsd|surface_dice"),
    ("dice", r"dice"),
    ("iou", r"iou|jaccard"),
    ("hd95", r"hd95"),
    ("hausdorff", r"hd|hausdorff"),
    ("assd", r"assd"),
    ("asd", r"asd|surface_dist(ance)?"),
)
JOINS = ("path", "name")


def read_metrics_saver(
    *paths: str | Path,
    names: Sequence[str] | None = None,
    metric: str | None = None,
    regions: Sequence[str] | None = None,
    mean: bool = False,
    join: str = "path",
) -> pd.DataFrame:
    """Tidy records of the ``*_raw.csv`` of one or several evaluators, joined on the filename and never on the row.

    Args:
        *paths: files of ``monai.handlers.MetricsSaver(..., metric_details=...)`` of the same cases: a clean evaluator's
            and attacked ones', say.
        names: what each file is a result of, the ``attack`` of its rows; the folder or file names that tell them apart
            if None.
        metric: name of the value's column; found in the file names if None (``val_mean_dice_raw.csv`` holds ``dice``).
        regions: names of the class columns in their order; the file's own (``class0`` ...) if None.
        mean: whether MONAI's mean over the classes is a region too; it follows from them, and so is left out.
        join: "path" (two cases are one if their whole filenames are equal) or "name" (if the names without folder and
            ending are: for files that were written to another folder).

    Returns:
        Rows with ``subject``, ``attack``, ``region`` and the metric, for :func:`compare`.

    Raises:
        ValueError: a file that is no such table; filenames that are missing, given twice, row numbers instead of names,
            or not the same in all files. The message names file and cases.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name, dice in (("clean", 0.9), ("pgd", 0.2)):
        ...         path = Path(folder, name, "val_mean_dice_raw.csv")
        ...         path.parent.mkdir()
        ...         _ = path.write_text(f"filename,class0,mean\\na.nii.gz,{dice},{dice}\\n")
        ...     files = [Path(folder, name, "val_mean_dice_raw.csv") for name in ("clean", "pgd")]
        ...     print(read_metrics_saver(*files).to_string(index=False))
         subject attack region  dice
        a.nii.gz  clean class0   0.9
        a.nii.gz    pgd class0   0.2
    """
    if not paths:
        raise ValueError("give at least one *_raw.csv of MetricsSaver")
    if join not in JOINS:
        raise ValueError(f"join must be one of {', '.join(JOINS)}, got {join!r}")
    files = [Path(path) for path in paths]
    names = setting_names(files) if names is None else list(names)
    if len(names) != len(files) or len(set(names)) != len(names):
        raise ValueError(f"{len(files)} files need as many different names, got {', '.join(names)}")
    metric = metric_name(files) if metric is None else metric
    tables = {name: _table(file, join) for name, file in zip(names, files)}
    _check_same(tables, files)
    records = []
    for (name, table), file in zip(tables.items(), files):
        found = [c for c in table.columns if mean or c != "mean"]
        given = found if regions is None else [*regions, *(["mean"] if mean else [])]
        if len(given) != len(found):
            raise ValueError(f"{file} has the columns {', '.join(found)}; {len(given)} regions do not name them")
        for column, region in zip(found, given):
            row = {"subject": table.index, "attack": name, "region": region, metric: table[column].to_numpy()}
            records.append(pd.DataFrame(row))
    return pd.concat(records, ignore_index=True)


def setting_names(files: Sequence[Path]) -> list[str]:
    """What tells files apart: the folder each lies in, or else its own name.

    Example:
        >>> setting_names([Path("runs/clean/dice_raw.csv"), Path("runs/pgd/dice_raw.csv")])
        ['clean', 'pgd']
        >>> setting_names([Path("runs/clean_dice_raw.csv"), Path("runs/pgd_dice_raw.csv")])
        ['clean_dice', 'pgd_dice']
    """
    folders = [file.absolute().parent.name for file in files]
    stems = [file.stem.removesuffix("_raw") for file in files]
    both = [f"{folder}/{stem}" for folder, stem in zip(folders, stems)]
    for choice in (folders, stems, both):
        if len(set(choice)) == len(files):
            return choice
    raise ValueError(f"the names of {', '.join(map(str, files))} do not tell them apart: give names (--name)")


def metric_name(files: Sequence[Path]) -> str:
    """The metric that the file names speak of."""
    found = []
    for file in files:
        stem = file.stem.removesuffix("_raw").lower()
        known = [name for name, pattern in _METRICS if re.search(rf"(?<![a-z])({pattern})(?![a-z])", stem)]
        found.append(known[0] if known else None)
    if len(set(found)) != 1 or found[0] is None:
        said = ", ".join(f"{file.name}: {name or 'none'}" for file, name in zip(files, found))
        raise ValueError(f"the file names do not say one metric ({said}): give metric (--metric)")
    return found[0]


def _table(file: Path, join: str) -> pd.DataFrame:
    """One file: a float64 column per class, indexed by case."""
    try:
        header, *lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file} is empty") from error
    delimiter = header[len("filename") :][:1]
    columns = header.split(delimiter)[1:] if delimiter else []
    if not header.startswith("filename") or delimiter.isalnum() or len(columns) < 2 or columns[-1] != "mean":
        raise ValueError(f"{file} is no raw table of MONAI's MetricsSaver: its header is {header!r}")
    cases, values = [], []
    for number, line in enumerate(lines, 2):
        case, *row = line.rsplit(delimiter, len(columns))  # MONAI quotes nothing, and a path may hold a comma
        try:
            values.append([float(value) for value in row])
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        if len(row) != len(columns):
            raise ValueError(f"{file}, line {number} has {len(row)} of {len(columns)} values: {line!r}")
        cases.append(case)
    if not cases:
        raise ValueError(f"{file} has no case")
    _check_cases(file, cases)
    if join == "name":
        cases = [re.sub(r"\.nii(\.gz)?$|\.(nrrd|mha|mhd)$", "", re.split(r"[/\\]", case)[-1]) for case in cases]
    twice = sorted({case for case in cases if cases.count(case) > 1}) if len(set(cases)) < len(cases) else []
    if twice:
        raise ValueError(
            f"{file} has {_some(twice)} more than once: a duplicated case is a wrong p-value. A distributed sampler "
            "repeats cases for equal lengths unless it is made with even_divisible=False"
            + (", or names are equal in different folders: use join='path'" if join == "name" else "")
        )
    return pd.DataFrame(np.array(values), index=cases, columns=columns)


def _check_cases(file: Path, cases: Sequence[str]) -> None:
    lost = [str(number) for number, case in enumerate(cases, 2) if case.strip() in ("", "None")]
    numbered = list(cases) == [str(index) for index in range(len(cases))]
    if lost or numbered:
        what = "row numbers instead of filenames" if numbered else f"no filename in line(s) {_some(lost)}"
        raise ValueError(
            f"{file} has {what}, and rows cannot be joined by their place. Give the evaluator's MetricsSaver "
            "batch_transform=lambda batch: [case['image'].meta for case in batch]"
        )


def _check_same(tables: dict[str, pd.DataFrame], files: Sequence[Path]) -> None:
    first, *others = tables.items()
    for (name, table), file in zip(others, files[1:]):
        if list(table.columns) != list(first[1].columns):
            raise ValueError(
                f"{file} has the columns {', '.join(table.columns)}, {files[0]} has {', '.join(first[1].columns)}"
            )
        missing = [case for case in first[1].index if case not in table.index]
        extra = [case for case in table.index if case not in first[1].index]
        said = [f"{label} lacks {_some(gone)}" for label, gone in ((name, missing), (first[0], extra)) if gone]
        if said:
            hint = ". If only their folders differ, use join='name'" if len(missing) == len(first[1]) else ""
            raise ValueError(f"the files are not of the same cases: {'; '.join(said)}{hint}")


def _some(cases: Sequence[str]) -> str:
    return ", ".join(cases[:10]) + (f" and {len(cases) - 10} more" if len(cases) > 10 else "")
