"""The site is made of files that are also read where they lie: notebooks are copied in, links outward are kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx


def copy_notebooks(app: Sphinx) -> None:
    """``tutorials/*.ipynb`` to ``docs/tutorials``, with links that lead from there; others there are removed."""
    source, target = Path(app.srcdir).parent / "tutorials", Path(app.srcdir) / "tutorials"
    target.mkdir(exist_ok=True)
    wanted = {path.name: inward(path.read_text(encoding="utf-8")) for path in sorted(source.glob("*.ipynb"))}
    for stale in target.glob("*.ipynb"):
        if stale.name not in wanted:
            stale.unlink()
    for name, text in wanted.items():
        place = target / name
        if not place.exists() or place.read_text(encoding="utf-8") != text:
            place.write_text(text, encoding="utf-8")


def inward(text: str) -> str:
    """Links of a file beside docs/ (``../docs/x.md``) as links of the same file one folder deeper, inside docs/."""
    text = re.sub(r"\]\(\.\./(?!docs/)", r"](../../", text)
    return text.replace("](../docs/", "](../")


def links_outward(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links of a page to files outside docs/: a notebook is a page of the site, anything else a file to download."""
    folder = (Path(app.srcdir) / docname).parent

    def place(match: re.Match[str]) -> str:
        file = (folder / match["path"]).resolve()
        if file.is_relative_to(app.srcdir) or not file.is_file():
            return match[0]
        if file.suffix == ".ipynb":
            return f"]({'../' * docname.count('/')}tutorials/{file.name})"
        return f"](path:{match['path']})"

    source[0] = re.sub(r"\]\((?P<path>(?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)", place, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect both."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", links_outward)
    return {"parallel_read_safe": True}
