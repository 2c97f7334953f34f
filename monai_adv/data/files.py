"""Files that are either the old one or the whole new one, whatever happens in between."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from monai_adv.errors import WriteError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[io.BufferedWriter]:
    """Open a file that appears under its name only when the block ends without an error.

    Args:
        path: destination; missing folders are made.

    Yields:
        A binary stream on a hidden temporary file in the same folder, synced and renamed at the end.

    Raises:
        WriteError: if the folder is read-only, the disk is full, or the file cannot be written for another reason.
    """
    destination = Path(path)
    temporary = destination.with_name(f".{destination.name}.{uuid.uuid4().hex}.tmp")  # shared folders: no pid
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, destination)
    except OSError as error:
        raise WriteError(f"cannot write {destination}: {write_advice(destination, error)}") from error
    finally:
        with suppress(OSError):  # gone already, or never made
            temporary.unlink()


def write_advice(destination: Path, error: OSError) -> str:
    """What went wrong when a file was written, and what to do."""
    file = next((str(p) for p in destination.parents if os.path.lexists(p) and not p.is_dir()), None)
    if file is not None:
        return f"{file} is a file, not a folder: give another output"
    if destination.is_dir():
        return "it is a folder: give the name of a file"
    return (
        f"{error.strerror or error}; make the folder writable or free some space, then run the same command again: "
        "what is finished is kept"
    )


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that a file could be written, before hours are spent on what goes into it.

    Raises:
        WriteError: if its folder cannot be made or written to, or if there is a folder of that name.
    """
    if Path(path).is_dir():
        raise WriteError(f"cannot write {path}: it is a folder: give the name of a file")
    probe = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex}.probe")
    with atomic_file(probe):
        pass
    probe.unlink()


def inside(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """A path, if it lies below a folder once links and ``..`` are followed.

    Args:
        folder: may itself be a link, to another disk for instance.
        path: need not exist yet.

    Raises:
        WriteError: if it lies elsewhere.

    Example:
        >>> inside("run/units", "run/units/s1/clean.json").name
        'clean.json'
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise WriteError(f"{path} leads out of {folder}, where nothing is written: is a link in the way? Remove it")
    return Path(path)


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write bytes through :func:`atomic_file`."""
    with atomic_file(path) as stream:
        stream.write(content)
