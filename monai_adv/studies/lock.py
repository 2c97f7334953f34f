"""One process per run folder and shard: locks of the operating system, which a killed process cannot leave behind."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from monai_adv.data.files import write_advice
from monai_adv.errors import ConfigError, WriteError
from monai_adv.studies.shards import Shard
from monai_adv.studies.units import read_json

FOLDER = "locks"


@contextmanager
def run_lock(folder: Path, shard: Shard) -> Iterator[None]:
    """Hold a shard of a run folder.

    Shards of one number run beside each other; a run of the whole study, or of another number of shards, does not: it
    would compute the same units again.

    Args:
        folder: the run folder, made if it does not exist.
        shard: which part.

    Raises:
        ConfigError: if another process holds it; says which, where and since when.
        WriteError: if the folder cannot be written.
    """
    name = "run" if shard.whole else f"shard-{shard.name}"
    with locked(folder, name):
        for path in sorted((folder / FOLDER).glob("*.lock")):
            same = path.stem.endswith(f"-of-{shard.count}") or path.stem == "merge"
            if path.stem != name and not (same and not shard.whole) and path.stem != "merge":
                with locked(folder, path.stem, timeout=1, mine=False):  # two processes may look at the same moment
                    pass
        yield


@contextmanager
def merge_lock(folder: Path) -> Iterator[None]:
    """Hold the tables of a run folder; waits for another process that writes them."""
    with locked(folder, "merge", timeout=60):
        yield


@contextmanager
def locked(folder: Path, name: str, *, timeout: float = 0, mine: bool = True) -> Iterator[None]:
    """Hold ``locks/NAME.lock`` of a folder.

    Args:
        folder: the run folder.
        name: of the lock.
        timeout: seconds to wait.
        mine: say in ``NAME.json`` who holds it.

    Raises:
        ConfigError: if another process holds it.
        WriteError: if the folder cannot be written.
    """
    path = folder / FOLDER / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=timeout)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{folder}: {_holder(path)} is at work on it ({name}); wait for it or stop it") from None
    except OSError as error:
        raise WriteError(f"cannot write {path}: {write_advice(path, error)}") from error
    who = path.with_suffix(".json")
    try:
        if mine:
            since = datetime.now(timezone.utc).isoformat(timespec="seconds")
            with suppress(OSError):  # only for messages; a full disk is told of by what matters
                who.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "since": since}))
        yield
    finally:
        if mine:
            with suppress(OSError):
                who.unlink()
        lock.release()


def _holder(path: Path) -> str:
    known = read_json(path.with_suffix(".json"))
    if not isinstance(known, dict):
        return "another process"
    return f"process {known.get('pid')} on {known.get('host')}, since {known.get('since')},"
