"""The commands as they describe themselves, for docs/cli.md and for the tests."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, ParameterInfo

from monai_adv.cli_help import PAGES, command_name


@dataclass(frozen=True)
class Parameter:
    """An argument or an option of a command.

    Args:
        name: of the function's argument.
        spelt: how it is given: ``("--output", "-o")``; the metavar of an argument.
        kind: its type without None and list.
        default: what holds if it is left out; ``inspect.Parameter.empty`` where it must be given.
        info: typer's description: help, metavar, limits.
    """

    name: str
    spelt: tuple[str, ...]
    kind: Any
    default: Any
    info: ParameterInfo

    @property
    def is_argument(self) -> bool:
        """Whether it is told by its place."""
        return isinstance(self.info, ArgumentInfo)

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a closed set; empty for any other."""
        if isinstance(self.kind, type) and issubclass(self.kind, Enum):
            return tuple(str(member.value) for member in self.kind)
        return tuple(str(value) for value in get_args(self.kind)) if get_origin(self.kind) is Literal else ()

    @property
    def value(self) -> str:
        """What stands for its value in the help; empty for a flag."""
        if self.kind is bool:
            return ""
        return self.info.metavar or "|".join(self.choices)


def commands(app: typer.Typer) -> dict[str, Callable[..., Any]]:
    """The functions behind the commands of an app, in the order of the help."""
    return {command_name(info): info.callback for info in app.registered_commands if info.callback is not None}


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    """The arguments and options of a command."""
    hints = get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(hints[name])[:2]
        found.append(Parameter(name, _spelt(name, info, _bare(kind)), _bare(kind), parameter.default, info))
    return found


def _bare(kind: Any) -> Any:
    """A type without None and without the list around it."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _spelt(name: str, info: ParameterInfo, kind: Any) -> tuple[str, ...]:
    if isinstance(info, ArgumentInfo):
        return (info.metavar or name,)
    first = (info.default,) if isinstance(info.default, str) else ()  # where typer keeps the first name given
    given = tuple(part for declared in (*first, *(info.param_decls or ())) for part in declared.split("/"))
    return given or (f"--{name.replace('_', '-')}",)


def reference(app: typer.Typer) -> str:
    """The commands with their arguments, options, defaults and examples as Markdown, the page docs/cli.md."""
    parts, panel = [_HEAD], ""
    for name, function in commands(app).items():
        page = PAGES[name]
        if page.panel != panel:
            panel = page.panel
            parts.append(f"## {panel}\n")
        parts.append(_section(name, function, page.examples))
    return "\n".join(parts)


_HEAD = """# The command line

Every command with its arguments, options and defaults, as `monai-adv COMMAND --help` tells them. The option
`--install-completion` of `monai-adv` teaches bash, zsh, fish or PowerShell the names of commands, options, attacks,
methods, networks and subjects; `-h` is short for `--help`.

What may be repeated is written once for each value. Exit codes: 0 all is well; 1 an error, or a subject without a
result; 2 a command line that cannot be understood; 3 an automatic check of a study failed; 130 and 143 interrupted.

This page is made from the program by `python docs/update_tables.py`.
"""


def _section(name: str, function: Callable[..., Any], examples: tuple[str, ...]) -> str:
    lines = [f"### monai-adv {name}", ""]
    for paragraph in (inspect.getdoc(function) or "").split("\n\n"):
        lines += [" ".join(paragraph.split()), ""]
    shown = [p for p in parameters(function) if not p.info.hidden]
    if shown:
        lines += ["| argument or option | what it is | default |", "|---|---|---|"]
        lines += [f"| {_cell(p)} | {_text(_told(p))} | {_text(_default(p))} |" for p in shown]
        lines += [""]
    return "\n".join([*lines, "```bash", *examples, "```", ""])


def _cell(parameter: Parameter) -> str:
    names = ", ".join(parameter.spelt)
    return _text(f"`{names}`" if parameter.is_argument or not parameter.value else f"`{names} {parameter.value}`")


def _told(parameter: Parameter) -> str:
    """Its help and the limits of its number."""
    low, high = parameter.info.min, parameter.info.max
    text = parameter.info.help or ""
    if low in (None, 0, 1) and high is None:  # a count
        return text
    return f"{text} {f'At least {low:g}.' if high is None else f'From {low:g} to {high:g}.'}"


def _text(text: str) -> str:
    """For a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.info.show_default, str):
        return parameter.info.show_default
    if parameter.kind is bool:
        return f"`{parameter.spelt[0 if parameter.default else 1]}`" if len(parameter.spelt) > 1 else ""
    default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    return "" if default is None else f"`{default}`"
