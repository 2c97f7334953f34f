"""From unit files to the tables of a run: what any number of shards computed becomes one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_adv.errors import ConfigError
from monai_adv.studies.lock import merge_lock
from monai_adv.studies.plan import KEYS, PLAN
from monai_adv.studies.records import UNIT, write_records
from monai_adv.studies.units import UnitStore, read_checked, write_json

SHOWN = 5


@dataclass
class Merged:
    """What the tables were made from.

    Attributes:
        folder: the run folder.
        units: units in the tables.
        missing: units of the study that have no result yet: how many.
        problems: one line per subject or unit that failed, and about what is missing.
    """

    folder: Path
    units: int = 0
    missing: int = 0
    problems: list[str] = field(default_factory=list)


class Failures:
    """Units without a result, a line for each of a subject's errors."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def add(self, content: Mapping[str, Any]) -> None:
        """Take note of a unit's content, unless its status is ok."""
        if content["status"] != "ok":
            who = content["identity"]
            key = str(who["subject"]), str(content.get("error", ""))
            self._found.setdefault(key, []).append((content["status"], f"{who['victim']} {who['setting']}"))

    def lines(self) -> list[str]:
        """What went wrong."""
        lines = []
        for (subject, error), units in self._found.items():
            statuses = {status for status, _ in units}
            status = next((s for s in sorted(statuses) if s != "skipped"), "skipped")
            where = subject if len(units) > 1 else f"{subject}, {units[0][1]}"
            count = f" ({len(units)} units)" if len(units) > 1 else ""
            lines.append(f"{where}: {status}: {error}{count}")
        return lines


def merge_study(folder: str | Path, *, partial: bool = False) -> Merged:
    """Write the tables of a run folder from its units, ``plan.json`` and the keys that every shard left.

    Nothing else is read: neither images nor weights. Of units that are missing the others are merged, and the problems
    name them.

    Args:
        folder: the run folder.
        partial: the run was interrupted: what is missing is no problem.

    Raises:
        ConfigError: if the folder holds no plan.
        WriteError: if a table cannot be written.
    """
    folder = Path(folder)
    plan = read_checked(folder / PLAN)
    if plan is None:
        raise ConfigError(
            f"{folder / PLAN} is missing or damaged: run the study again (monai-adv run study.yaml), which keeps "
            "finished units"
        )
    result, failures, absent = Merged(folder), Failures(), _Absent()
    with merge_lock(folder):
        keys, problems = _keys(folder, plan["digest"])
        result.problems += problems
        write_records(folder, _contents(folder, plan, keys, result, failures, absent))
        result.missing = absent.count
        result.problems += failures.lines()
        if absent.count and not partial:
            result.problems.append(absent.line())
        write_json(folder / "problems.json", result.problems)
    return result


class _Absent:
    """Units that have no result yet."""

    def __init__(self) -> None:
        self.count, self.first = 0, list[str]()

    def add(self, identity: Mapping[str, Any]) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{identity['subject']} {identity['victim']} {identity['setting']}")

    def line(self) -> str:
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return (
            f"{self.count} units have no result yet: {'; '.join(self.first)}{more}; run the study or its shards again"
        )


def _keys(folder: Path, plan: str) -> tuple[dict[str, dict[int, str] | None], list[str]]:
    """Of every subject the keys of its units by the setting's index (None: its files cannot be read), and problems."""
    keys: dict[str, dict[int, str] | None] = {}
    problems: dict[str, None] = {}
    for path in sorted((folder / KEYS).glob("*.json")):
        known = read_checked(path)
        if known is None or known["plan"] != plan:
            continue  # damaged or of another plan: its units count as missing
        problems |= dict.fromkeys(known["problems"])
        while known["keys"]:
            subject, found = known["keys"].popitem()
            if found is None:
                keys.setdefault(subject, None)
            else:
                mine = keys.get(subject) or {}
                keys[subject] = mine | {int(index): key for index, key in found.items()}
    return keys, list(problems)


def _contents(
    folder: Path,
    plan: Mapping[str, Any],
    keys: Mapping[str, Mapping[int, str] | None],
    result: Merged,
    failures: Failures,
    absent: _Absent,
) -> Iterator[dict[str, Any]]:
    """Contents of units in the order of the table, one at a time."""
    store = UnitStore(folder / "units")
    settings = list(enumerate(plan["settings"]))
    settings.sort(key=lambda pair: tuple(pair[1][name] for name in UNIT[1:]))
    for subject in sorted(plan["subjects"]):
        known = keys.get(subject, {})
        if known is None:
            continue  # named as a problem
        for index, setting in settings:
            identity = {"subject": subject, **setting}
            content = store.read(identity, known[index]) if index in known else None
            if content is None:
                absent.add(identity)
                continue
            result.units += 1
            failures.add(content)
            yield content
