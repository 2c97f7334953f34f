"""Markdown pages as a reader meets them: headings, links, code, tables of contents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FRAGMENT = "# fragment: "
_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<info>.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: what stands behind the fence, its lines, and the line of the page it begins on."""

    info: str
    text: str
    line: int

    @property
    def fragment(self) -> bool:
        """Whether it says that it does not run by itself."""
        return self.text.startswith(FRAGMENT)


def pages() -> list[Path]:
    """Every page that is written, not made while the site is built."""
    written = [p for p in sorted(DOCS.rglob("*.md")) if not {"_build", "tutorials"} & set(p.relative_to(DOCS).parts)]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *written]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    opened: tuple[str, int, str, list[str]] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened = fence["marks"], number, fence["info"].strip(), []
        elif fence and fence["marks"].startswith(opened[0]) and not fence["info"].strip():
            found.append(Block(opened[2], "\n".join(opened[3]) + "\n", opened[1]))
            opened = None
        else:
            opened[3].append(line)
    assert opened is None, f"the fence of line {opened and opened[1]} is not closed"
    return found


def prose(text: str) -> str:
    """A page without fenced and indented blocks and without inline code."""
    for block in blocks(text):
        text = text.replace(block.text, "\n", 1)
    lines = text.splitlines()
    kept = [line for i, line in enumerate(lines) if not (line.startswith("    ") and _begins_code(lines, i))]
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", "\n".join(kept))


def _begins_code(lines: list[str], i: int) -> bool:
    """Whether an indented line is code: behind an empty line that is in no list, or behind such code."""
    while i > 0 and lines[i - 1].startswith("    "):
        i -= 1
    before = next((line for line in reversed(lines[:i]) if line.strip()), "")
    return i > 0 and not lines[i - 1].strip() and not re.match(r"\s*([-*]|\d+\.) |\s", before)


def slugs(text: str) -> set[str]:
    """Anchors of the headings, as code hosts and MyST make them."""
    found: set[str] = set()
    without_code = text
    for block in blocks(text):
        without_code = without_code.replace(block.text, "\n", 1)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", without_code, flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")
        number = 1
        while (unique := slug if number == 1 else f"{slug}-{number - 1}") in found:
            number += 1
        found.add(unique)
    return found


def links(text: str) -> Iterator[str]:
    """Targets of links and pictures, those with a scheme left out."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            yield target


def broken(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere, each with the reason."""
    found = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            found.append(f"{target}: there is no such file")
        elif anchor and anchor not in slugs(text if file == page else file.read_text(encoding="utf-8")):
            found.append(f"{target}: {file.name} has no such heading")
    return found


def listed(page: Path) -> Iterator[Path]:
    """The pages that the tables of contents of a page name."""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.info == "{toctree}":
            for line in block.text.splitlines():
                name = line.strip()
                if name and not name.startswith(":"):
                    yield (page.parent / name).with_suffix(".md")
