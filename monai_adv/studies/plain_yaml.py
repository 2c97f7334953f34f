"""YAML that users write, as plain data: nothing is executed, size and depth are bounded, one kind of error."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from monai_adv.errors import ConfigError, did_you_mean

MAX_CHARACTERS = 1 << 20
"""Longer texts are no configuration."""
MAX_VALUES = 100_000
"""Values after every alias is written out: a few lines of aliases of aliases stand for billions."""
MAX_DEPTH = 50
"""Lists and mappings inside each other."""
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value")}


def parse_yaml(text: str, where: str) -> Any:
    """Plain data of YAML: numbers, texts, booleans, null, lists and mappings.

    Args:
        text: the YAML.
        where: what it is, for the message of an error.

    Raises:
        ConfigError: if it is not YAML, too long, too deep, stands for too much data, or holds anything but plain data,
            a key twice in one mapping, or characters that no file can hold.

    Example:
        >>> parse_yaml("{eps: [0.1, 0.5], norm: linf}", "budgets")
        {'eps': [0.1, 0.5], 'norm': 'linf'}
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where} is not valid YAML for a configuration: it has {len(text)} characters")
    loader = yaml.SafeLoader("")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Walk(where).visit(node)
        return loader.construct_document(node)
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{where} is not valid YAML for a configuration: too many brackets in each other") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where} is not valid YAML: {said}{place}{_hint(said)}") from error
    except Exception as error:  # PyYAML stumbles over numbers and dates that are none in many ways
        raise ConfigError(f"{where} is not valid YAML: {str(error) or type(error).__name__}") from error
    finally:
        loader.dispose()


def read_yaml(path: Path, what: str) -> Any:
    """Plain data of a YAML file.

    Args:
        path: the file, in UTF-8.
        what: it should hold, for the message of an error: "study".

    Raises:
        ConfigError: if there is no such file, or see :func:`parse_yaml`.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{what} {path} {_no_file(path)}")
        return parse_yaml(path.read_text(encoding="utf-8"), f"{what} {path}")
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is no text in UTF-8, and so no YAML file: {error}") from error


def _no_file(path: Path) -> str:
    """Why there is no YAML file of that name, and what to give."""
    if (path / "study.json").is_file():
        return f"is a run folder: give the YAML file it was made by, or see it again by `monai-adv report {path}`"
    if path.is_dir():
        return "is a folder: give a YAML file"
    near = [file.name for file in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
    return f"does not exist{did_you_mean(path.name, near)}"


def _hint(said: str) -> str:
    """What most often lies behind a message of PyYAML's."""
    if "'\\t'" in said:
        return "; YAML is indented by spaces, never by tabs"
    if "mapping values are not allowed" in said or "expected <block end>" in said or "block mapping" in said:
        return "; keys of one mapping begin in the same column, and what belongs to a key is indented further"
    return ""


class _Walk:
    """Judges the nodes of a document before any data is made of them."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.known: dict[int, tuple[int, int]] = {}  # values and depth below a node, aliases written out

    def visit(self, node: Any) -> tuple[int, int]:
        """Values and depth below a node."""
        found = self.known.get(id(node))
        if found == (0, 0):
            raise self.error(node, "a list or mapping holds itself")
        if found is not None:
            return found
        self.known[id(node)] = (0, 0)  # being visited
        values, depth = 1, 0
        for child in self.children(node):
            below = self.visit(child)
            values, depth = values + below[0], max(depth, below[1] + 1)
            if values > MAX_VALUES:
                raise self.error(node, f"its aliases stand for more than {MAX_VALUES} values")
            if depth > MAX_DEPTH:
                raise self.error(node, f"more than {MAX_DEPTH} lists and mappings in each other")
        self.known[id(node)] = (values, depth)
        return values, depth

    def children(self, node: Any) -> list[Any]:
        if node.tag not in _PLAIN:
            kind = node.tag.removeprefix(_TAG)
            raise self.error(node, f"a value of type {kind!r}; put it in quotes if it is text")
        if isinstance(node, yaml.SequenceNode):
            return list(node.value)
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = [key for key, count in keys.items() if count > 1]
            if twice:
                raise self.error(node, f"the key {twice[0]!r} is there {keys[twice[0]]} times; only one could count")
            return [part for pair in node.value for part in pair]
        bad = next((c for c in node.value if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        if bad is not None:
            raise self.error(node, f"the character {bad!r}, which no name or page can hold")
        return []

    def error(self, node: Any, what: str) -> ConfigError:
        mark = node.start_mark
        return ConfigError(
            f"{self.where} is not valid YAML for a configuration: {what} (line {mark.line + 1}, column "
            f"{mark.column + 1})"
        )
