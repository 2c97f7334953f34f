"""Imports go down the list of DESIGN only, and `import monai_adv` stays light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import monai_adv

ROOT = Path(monai_adv.__file__).parent
# a folder may import those with a smaller number
ORDER = {
    "errors": 0, "metrics": 1, "stats": 1, "data": 2, "transforms": 3, "networks": 4, "inferers": 4, "victims": 5,
    "threats": 6, "losses": 6, "attacks": 7, "defenses": 8, "engines": 9, "handlers": 9, "bundle": 10, "studies": 11,
    "visualize": 12, "cli": 13, "__main__": 14,
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Folders of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
            if node.module == "monai_adv":
                names = [f"monai_adv.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {folder(name.split(".")[1]) for name in names if name.startswith("monai_adv.")}
    return found - {"__version__"}


def folder(name: str) -> str:
    """The place of a file or folder in the order; the command line may be several files, ``cli*.py``."""
    return "cli" if name.startswith("cli") else name


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    place = folder(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    if place == "__init__":
        assert imports(path) == set()
        return
    wrong = {name for name in imports(path) if name != place and ORDER[name] >= ORDER[place]}
    assert not wrong, f"{place} must not import {wrong}"
    if place in ("metrics", "stats"):
        assert imports(path) <= {place}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 420
