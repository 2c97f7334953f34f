"""What one automatic check found, and how checks are tabled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from monai_adv.data.files import write_atomic
from monai_adv.studies.records import csv_bytes

STATUSES = ("PASS", "WARN", "FAIL", "NOT RUN")
COMPLETE = "every unit has a result"


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        status: "PASS", "WARN" (the strength of an attack is in doubt), "FAIL" (the run is invalid) or "NOT RUN".
        detail: the number, its threshold, n, and what it means where it is not as it should be.
        victim: whose check it is; empty for one of the whole study.
    """

    name: str
    status: str
    detail: str
    victim: str = ""


def exit_code(checks: Sequence[Check], problems: Sequence[str] = ()) -> int:
    """Exit code of a run: 3 if a check failed, else 1 if something has no result, else 0.

    Args:
        checks: of the run.
        problems: what the run could not score. That alone, and the check that says so, invalidates no other result: 1.

    Example:
        >>> exit_code([Check("a", "WARN", "")]), exit_code([], ["s1: cannot be read"])
        (0, 1)
        >>> exit_code([Check("a", "FAIL", "")], ["s1: cannot be read"])
        3
    """
    failed = [check.name for check in checks if check.status == "FAIL"]
    if any(name != COMPLETE for name in failed):
        return 3
    return 1 if failed or problems else 0


def checks_table(checks: Sequence[Check]) -> pd.DataFrame:
    """One row per check, the worst first, otherwise in the order given: status, check, victim, detail."""
    worst = {status: place for place, status in enumerate(("FAIL", "WARN", "NOT RUN", "PASS"))}
    rows = [asdict(check) for check in sorted(checks, key=lambda check: worst[check.status])]
    table = pd.DataFrame(rows, columns=["status", "name", "victim", "detail"])
    return table.rename(columns={"name": "check"})


def write_checks(folder: Path, checks: Sequence[Check]) -> Path:
    """Write ``tables/checks.csv`` of a run folder; returns its path."""
    path = folder / "tables" / "checks.csv"
    write_atomic(path, csv_bytes(checks_table(checks)))
    return path
