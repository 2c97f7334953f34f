"""Units of work on disk: one file per subject, victim, attack and budget, written atomically, trusted by content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_adv.data.files import inside, write_atomic
from monai_adv.handlers import jsonable

SCHEMA = 1
_MARK = b', "checksum": "'


def digest(content: Any) -> str:
    """SHA-256 of JSON with one spelling."""
    text = json.dumps(jsonable(content), sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def safe_name(text: str) -> str:
    """A file name for an identifier: letters, digits, dot, dash and underscore only, never a path."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip(".")
    if len(cleaned) > 100:  # what is cut off may be all that tells two names apart
        cleaned = f"{cleaned[:87]}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return cleaned or "_"


def write_json(path: Path, content: Any) -> None:
    """Write plain data as readable JSON, atomically."""
    write_atomic(path, json.dumps(jsonable(content), indent=2).encode())


def read_json(path: Path) -> Any:
    """Plain data of a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


class UnitStore:
    """Results of units in a folder; a unit is done when its file parses, its checksum holds and its key matches.

    Args:
        folder: where unit files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, identity: Mapping[str, Any]) -> Path:
        """File of a unit; readable, and unique by a hash of the identity."""
        parts = [str(identity[k]) for k in ("subject", "victim", "attack")] + [f"{identity['eps']:g}"]
        return self.folder / safe_name(parts[0]) / f"{safe_name('_'.join(parts[1:]))}-{digest(identity)[:10]}.json"

    def write(self, identity: Mapping[str, Any], key: str, content: Mapping[str, Any]) -> None:
        """Store a unit's content (with its "status") under its key."""
        path = inside(self.folder, self.path(identity))
        write_checked(path, {"schema": SCHEMA, "key": key, "identity": identity, **content})

    def read(self, identity: Mapping[str, Any], key: str) -> dict[str, Any] | None:
        """A unit's content, or None if there is none that can be trusted for this key."""
        content = read_unit(self.path(identity))
        return content if content is not None and content["key"] == key else None

    def any(self) -> bool:
        """Whether there is any unit file, whole or not."""
        return next(self.folder.glob("*/*.json"), None) is not None


def read_unit(path: Path) -> dict[str, Any] | None:
    """A unit file's content if it is whole."""
    content = read_checked(path)
    return content if content is not None and content.get("schema") == SCHEMA else None


def write_checked(path: Path, content: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write plain data with a checksum of all that stands before it in the file, atomically."""
    text = json.dumps(jsonable(content), indent=indent).removesuffix("}").rstrip().encode()
    write_atomic(path, text + _MARK + hashlib.sha256(text).hexdigest().encode() + b'"}')


def read_checked(path: Path) -> dict[str, Any] | None:
    """What :func:`write_checked` wrote, or None if the file is missing or not whole."""
    try:
        text = path.read_bytes()
        content = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    checksum = content.pop("checksum", None)
    if checksum == hashlib.sha256(text[: text.rfind(_MARK)]).hexdigest():
        return content
    # files of earlier versions have that of their content
    return content if checksum == digest(content) else None
