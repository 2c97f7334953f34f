"""Trust in a bundle: its configuration is a program, and running it is the user's decision, bound to its content."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monai_adv.errors import ConfigError

CODE = (".py", ".pyc", ".so", ".pyd", ".zip", ".egg")


def bundle_hash(folder: str | Path) -> str:
    """SHA-256 of what a bundle can execute: every file of ``configs/`` and every module anywhere in it.

    Weights, data, documents and results do not count: they are read, never run.

    Args:
        folder: the bundle.

    Raises:
        ConfigError: if the folder is no bundle, or links to a folder whose content the hash could not hold.
    """
    folder = bundle_folder(folder)
    digest = hashlib.sha256()
    for path in sorted(_executable(folder), key=lambda p: p.relative_to(folder).as_posix()):
        name, content = path.relative_to(folder).as_posix().encode(), path.read_bytes()
        digest.update(f"{len(name)} {len(content)} ".encode() + name + content)  # lengths: no two trees look alike
    return digest.hexdigest()


def require_trust(folder: str | Path, trust: str | None) -> str:
    """The bundle's hash, if it is the one that is trusted.

    Args:
        folder: the bundle.
        trust: what the user trusts: the SHA-256 in hex.

    Raises:
        ConfigError: if nothing or something else is trusted; it says the hash and how to give it.
    """
    folder, found = bundle_folder(folder), bundle_hash(folder)
    if trust is None:
        raise ConfigError(
            f"the configuration of the bundle {folder} is a program and would be executed. Read its configs/ and "
            f"scripts/, then trust exactly this content:\n  --trust {found}\n"
            f"(in Python trust={found!r}); nothing of it has been executed\n{describe(folder)}"
        )
    if not isinstance(trust, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", trust.strip()):
        raise ConfigError(f"trust {trust!r} is no SHA-256 in hex; the bundle's is {found}")
    if trust.strip().lower() != found:
        raise ConfigError(
            f"the bundle {folder} has the SHA-256 {found}, not the trusted {trust.strip().lower()}: its configuration "
            "or scripts are not what was trusted. Nothing of it has been executed; read them again before you "
            "trust them"
        )
    return found


def describe(folder: str | Path) -> str:
    """What the metadata of a bundle say, without executing anything."""
    metadata = read_metadata(folder)
    lines = [f"{key}: {metadata[key]}" for key in ("name", "task", "version", "monai_version") if metadata.get(key)]
    weights = [p.name for p in sorted((bundle_folder(folder) / "models").glob("*")) if p.is_file()]
    return "\n".join(["metadata.json says:", *(f"  {line}" for line in lines), f"  models/: {', '.join(weights)}"])


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """``configs/metadata.json`` of a bundle, empty where there is none; plain JSON, nothing is executed.

    Raises:
        ConfigError: if it is no JSON object.
    """
    path = bundle_folder(folder) / "configs" / "metadata.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return content


def bundle_folder(folder: str | Path) -> Path:
    """The folder of a bundle, absolute.

    Raises:
        ConfigError: if it has no ``configs`` folder.
    """
    path = Path(folder).resolve()
    if not os.path.isdir(path / "configs"):
        raise ConfigError(f"{folder} is no MONAI bundle: it has no folder configs/; give the folder that holds it")
    return path


def _executable(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        inside = "configs" in here.relative_to(folder).parts[:1]
        links = [name for name in folders if (here / name).is_symlink()]
        if links:
            raise ConfigError(f"{here / links[0]} links to a folder, whose content cannot be bound to a hash: copy it")
        # what Python has compiled is not read from there while a bundle is loaded
        folders[:] = [name for name in folders if name not in ("__pycache__", ".git")]
        yield from (here / name for name in files if inside or name.lower().endswith(CODE))
