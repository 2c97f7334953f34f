"""README and docs hold together: links, tables of contents, tables made from the program, public names, citations."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import markdown_pages as md
import pytest

import monai_adv
from monai_adv.attacks import ATTACKS
from monai_adv.defenses import FILTERS
from monai_adv.engines import METHODS

IDS = {"ids": lambda path: str(path.relative_to(md.ROOT))}
SUBPACKAGES = [m.name for m in pkgutil.iter_modules(monai_adv.__path__, "monai_adv.") if m.ispkg]


@pytest.mark.parametrize("page", md.pages(), **IDS)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert md.broken(page, page.read_text(encoding="utf-8")) == []


def test_a_link_that_leads_nowhere_is_found() -> None:
    page = md.DOCS / "attacks.md"
    text = "# A `b`: c\n[x](nowhere.md) [y](defenses.md#no-heading) [z](#a-b-c) [w](#b)\n`[v](in_code.md)`\n"
    assert md.broken(page, text) == [
        "nowhere.md: there is no such file",
        "defenses.md#no-heading: defenses.md has no such heading",
        "#b: attacks.md has no such heading",
    ]


def test_every_page_is_in_a_table_of_contents() -> None:
    known, todo = set[Path](), [md.DOCS / "index.md"]
    while todo:
        page = todo.pop()
        known.add(page)
        todo += [p for p in md.listed(page) if p not in known and "*" not in p.name]
    assert sorted(known) == sorted(p for p in md.pages() if p.is_relative_to(md.DOCS))


def test_what_is_made_is_up_to_date() -> None:
    """The tables of attacks and of keys, and the page of the commands, are what the program says of itself."""
    sys.path.insert(0, str(md.DOCS))
    try:
        update_tables = importlib.import_module("update_tables")
    finally:
        sys.path.remove(str(md.DOCS))
    for name, text in update_tables.pages().items():
        assert (md.DOCS / name).read_text(encoding="utf-8") == text, f"run python docs/update_tables.py for {name}"


@pytest.mark.parametrize("name", [*SUBPACKAGES, "monai_adv.errors"])
def test_every_subpackage_has_a_page_of_its_public_names(name: str) -> None:
    page = md.DOCS / "api" / f"{name.removeprefix('monai_adv.')}.md"
    (block,) = md.blocks(page.read_text(encoding="utf-8"))
    assert (block.info, block.text.split()[2]) == ("{eval-rst}", name)
    module = importlib.import_module(name)
    for more in block.text.split()[3:]:
        home, _, attribute = more.rpartition(".")
        assert hasattr(importlib.import_module(home), attribute), more
    public = getattr(module, "__all__", [n for n, o in vars(module).items() if getattr(o, "__module__", "") == name])
    assert [n for n in public if not documented(module, n)] == []
    assert len(set(public)) == len(public), "a name is there twice"


def documented(module: Any, name: str) -> bool:
    """Whether a class or function has a docstring of its own, or a constant a text below it where it is made."""
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return bool((value.__doc__ or "").strip())
    places = [m for n, m in sorted(sys.modules.items()) if n.startswith(module.__name__)]
    return any(text_below(m, name) for m in places if getattr(m, name, None) is value)


def text_below(module: Any, name: str) -> bool:
    """Whether a module assigns a name and says in a text below what it is."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, following in zip(body, body[1:]):
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return isinstance(following, ast.Expr) and isinstance(getattr(following.value, "value", None), str)
    return False


def first_cells(page: str, heading: str) -> dict[str, list[str]]:
    """Names in code in the first column of the table below a heading, with the other cells."""
    text = (md.DOCS / page).read_text(encoding="utf-8")
    part = re.split(r"^#+ ", text.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return {name: row[1:] for row in rows for name in re.findall(r"`([\w.]+)`", row[0])}


def test_every_attack_and_defense_has_its_reference() -> None:
    cited, described = first_cells("cite.md", "Attacks"), first_cells("defenses.md", "Training")
    assert set(cited) == set(ATTACKS)
    assert all(row[0] for row in cited.values())
    assert set(described) == {*METHODS, "offline"}
    assert all(row[-1] for name, row in described.items() if name != "plain")
    assert set(first_cells("cite.md", "Defenses")) >= set(described) - {"plain"}
    assert set(first_cells("defenses.md", "Purification and detection")) == set(FILTERS)


def test_the_site_is_configured_by_what_is_committed() -> None:
    """Nothing that a build makes is tracked, and the notebooks' copies are not taken for pages."""
    found = subprocess.run(
        ["git", "ls-files", "docs/_build", "docs/tutorials"], cwd=md.ROOT, capture_output=True, text=True
    )
    if found.returncode:
        pytest.skip("not a git checkout")
    assert found.stdout == ""
