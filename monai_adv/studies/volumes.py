"""Volumes kept for figures: clean and attacked images and predictions of the drawn subjects."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from monai_adv.data.files import inside, write_atomic
from monai_adv.studies.units import digest, safe_name


def volumes_path(folder: Path, identity: Mapping[str, Any]) -> Path:
    """File of a unit's volumes in a run folder."""
    name = safe_name(f"{identity['victim']}_{identity['attack']}_{identity['eps']:g}")
    path = folder / "volumes" / safe_name(str(identity["subject"])) / f"{name}-{digest(identity)[:10]}.npz"
    return inside(folder / "volumes", path)


def save_volumes(path: Path, volumes: Mapping[str, Any], key: str) -> None:
    """Write arrays and the unit's key, atomically."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in volumes.items()}
    np.savez_compressed(buffer, key=np.array(key), **arrays)
    write_atomic(path, buffer.getvalue())


def volumes_key(path: Path) -> str | None:
    """Key of the unit whose volumes a file holds, or None if it is missing or damaged."""
    content = load_volumes(path)
    return None if content is None else str(content["key"])


def load_volumes(path: Path) -> dict[str, Any] | None:
    """Arrays of a unit, or None if the file is missing or damaged."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:  # closed if it is damaged too
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None
