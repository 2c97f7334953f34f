"""``public-names``: the reference of a subpackage, exactly the names of its ``__all__``, in its order.

A name that is added to ``__all__`` appears by itself; one without a docstring (of a constant: the text below it, where
it is made) is a warning, and with ``-W`` an error.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from abc import ABC
from types import ModuleType
from typing import Any, Generic

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

logger = logging.getLogger(__name__)


def names_of(module: ModuleType) -> list[str]:
    """Public names: those of ``__all__``, or all that a module without one defines itself."""
    found = getattr(module, "__all__", None)
    if found is not None:
        return list(found)
    own = [n for n, o in vars(module).items() if getattr(o, "__module__", None) == module.__name__]
    return [n for n in own if not n.startswith("_")]


def is_data(value: Any) -> bool:
    """Whether a public name is a constant: no class and no function."""
    return not (inspect.isclass(value) or inspect.isroutine(value))


def comment_of(module: ModuleType, name: str) -> list[str]:
    """The text below a constant where it is made, which may be a module below this one."""
    for candidate in _sources(module, name):
        found = ModuleAnalyzer.for_module(candidate).find_attr_docs().get(("", name))
        if found:
            return list(found)
    return []


def _sources(module: ModuleType, name: str) -> list[str]:
    """Modules of the package that hold the very same object under this name, itself first."""
    value = getattr(module, name)
    inside = [m for m in sorted(sys.modules) if m.startswith(module.__name__ + ".")]
    same = [m for m in inside if getattr(sys.modules[m], name, None) is value]
    return [module.__name__, *same]


def documented(module: ModuleType, name: str) -> bool:
    """Whether a public name says what it is."""
    value = getattr(module, name)
    return bool(comment_of(module, name)) if is_data(value) else bool(inspect.getdoc(value))


class PublicNames(SphinxDirective):
    """``.. public-names:: package [package or object ...]``: what further stands on the page, by its full name."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        parsed: list[nodes.Node] = []
        for path in self.arguments[0].split():
            module, names = _named(path)
            self.env.note_dependency(inspect.getsourcefile(module) or path)
            lines = [""]
            if names is None:
                names = names_of(module)
                lines += [*(inspect.getdoc(module) or "").splitlines(), "", f".. py:module:: {path}", ""]
            for name in names:
                lines += self._entry(module, name)
            parsed += self.parse_text_to_nodes(StringList(lines, source=module.__file__ or path))
        return parsed

    def _entry(self, module: ModuleType, name: str) -> list[str]:
        value, path = getattr(module, name), f"{module.__name__}.{name}"
        if not documented(module, name):
            logger.warning(f"{path} is public and has no docstring", location=self.get_location())
            return []
        if is_data(value):
            shown = repr(value)
            option = [f"   :value: {shown}"] if len(shown) <= 100 else []
            return ["", f".. py:data:: {name}", *option, "", *(f"   {line}" for line in comment_of(module, name)), ""]
        home = _home(value)
        if home is not None and not module.__name__.startswith(
            home
        ):  # lives in another subpackage and is documented there
            return ["", f"``{name}`` is :py:obj:`{home}.{name}`.", ""]
        kind = "autoclass" if inspect.isclass(value) else "autofunction"
        options = (
            ["   :members:", "   :special-members: __call__", "   :show-inheritance:"] if kind == "autoclass" else []
        )
        return ["", f".. {kind}:: {path}", *options, ""]


def _named(path: str) -> tuple[ModuleType, list[str] | None]:
    """A package with None, or the module of an object with the object's name."""
    try:
        return importlib.import_module(path), None
    except ModuleNotFoundError:
        home, _, name = path.rpartition(".")
        return importlib.import_module(home), [name]


def _home(value: Any) -> str | None:
    """The subpackage that documents a name which several export: that of the module in which it is made."""
    parts = value.__module__.split(".")
    home = ".".join(parts[:2])
    inside = parts[0] == "monai_adv" and len(parts) > 2
    return home if inside and value.__name__ in importlib.import_module(home).__all__ else None


def public_bases(app: Sphinx, name: str, obj: type, options: Any, bases: list[type]) -> None:
    """Bases as a reader meets them: of a private one its own bases, without the machinery of Python."""
    bases[:] = _bases(obj)


def _bases(kind: type) -> list[type]:
    shown = []
    for base in kind.__bases__:
        private = base.__module__.startswith("monai_adv.") and _home(base) is None
        shown += [b for b in (base.__bases__ if private else (base,)) if b not in (object, ABC, Generic)]
    return shown


def untyped(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Types stand in annotations: words before a colon in "Returns" or in the first line of a property are none."""
    lines[:] = [_starred(line) for line in lines]
    text = inspect.getdoc(obj)
    if text is None or what not in ("property", "attribute", "function", "method", "class"):
        return
    if what in ("property", "attribute"):  # napoleon has taken them apart already: read them as those of a method
        what = "method"
    body, returned = _returns(text.splitlines())
    if not returned and what != "method":
        return
    document = GoogleDocstring(body, app.config, app, what, name, obj, options)
    lines[:] = [_starred(line) for line in (*document.lines(), *returned, "")]


def _starred(line: str) -> str:
    """A shape such as (C, *spatial) outside of literals: its star begins no emphasis."""
    parts = line.split("``")
    parts[::2] = [re.sub(r"(?<=[( ])\*(?=\w+\))", r"\\*", part) for part in parts[::2]]
    return "``".join(parts)


def _returns(lines: list[str]) -> tuple[list[str], list[str]]:
    """The lines without the section "Returns" or "Yields", and that section as a field."""
    for start, line in enumerate(lines):
        if line in ("Returns:", "Yields:"):
            end = next((i for i in range(start + 1, len(lines)) if lines[i].strip() and lines[i][0] != " "), len(lines))
            text = inspect.cleandoc("\n".join(lines[start + 1 : end])).splitlines()
            field = ["", f":returns: {text[0]}", *(f"    {more}" if more else "" for more in text[1:]), ""]
            return lines[:start] + lines[end:], field
    return lines, []


def by_short_name(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A short name of another subpackage or of a base class, or a name by the module in which it is made."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target:
        return None
    own = target.startswith("monai_adv.")
    tails = [target.rpartition(".")[2] if own else target]
    if "py:class" in node and node.get("py:module"):
        kind = getattr(importlib.import_module(node["py:module"]), (node["py:class"] or "").partition(".")[0], object)
        tails = [f"{base.__name__}.{target}" for base in inspect.getmro(kind)] + tails
    objects = env.get_domain("py").objects
    for tail in tails:
        found = {o.node_id: (n, o) for n, o in objects.items() if n.endswith("." + tail) and not o.aliased}
        if len(found) == 1:
            name, entry = next(iter(found.values()))
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)
    return None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive and what it needs of autodoc and napoleon."""
    app.add_directive("public-names", PublicNames)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-docstring", untyped, priority=900)  # after napoleon
    app.connect("missing-reference", by_short_name)
    return {"parallel_read_safe": True}
