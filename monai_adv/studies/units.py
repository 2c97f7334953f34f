"""Units of work on disk: one file per subject, victim, attack and budget, written atomically, trusted by content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai_adv.data.files import write_atomic
from monai_adv.handlers import jsonable

SCHEMA = 1


def canonical(content: Any) -> str:
    """JSON with one spelling, for hashes."""
    return json.dumps(jsonable(content), sort_keys=True, separators=(",", ":"), allow_nan=True)


def digest(content: Any) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def safe_name(text: str) -> str:
    """A file name for an identifier: letters, digits, dot, dash and underscore only, never a path."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip(".")
    return cleaned[:100] or "_"


def write_json(path: Path, content: Any) -> None:
    """Write plain data as readable JSON, atomically."""
    write_atomic(path, json.dumps(jsonable(content), indent=2).encode())


def read_json(path: Path) -> Any:
    """Plain data of a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
        body = {"schema": SCHEMA, "key": key, "identity": jsonable(identity), **jsonable(content)}
        body["checksum"] = digest(body)
        write_atomic(self.path(identity), json.dumps(body, indent=1).encode())

    def read(self, identity: Mapping[str, Any], key: str) -> dict[str, Any] | None:
        """A unit's content, or None if there is none that can be trusted for this key."""
        content = read_unit(self.path(identity))
        return content if content is not None and content["key"] == key else None

    def all(self) -> list[dict[str, Any]]:
        """Every trustworthy unit, sorted by its file's name."""
        found = (read_unit(path) for path in sorted(self.folder.glob("*/*.json")))
        return [content for content in found if content is not None]


def read_unit(path: Path) -> dict[str, Any] | None:
    """A unit file's content if it is whole."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return None
    checksum = content.pop("checksum", None)
    return content if checksum == digest(content) else None
