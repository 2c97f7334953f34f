"""What the help of every command says, as it is shown on a terminal of 80 columns, and docs/cli.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_caller import call

from monai_adv.attacks import ATTACKS
from monai_adv.cli import app
from monai_adv.cli_help import PAGES
from monai_adv.cli_reference import commands, parameters, reference

ROOT = Path(__file__).parents[2]
COMMANDS = commands(app)
GROUP: Any = typer.main.get_command(app)


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str, width: int = 80) -> str:
    """The help as it is printed."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
    assert call(monkeypatch, *words) == 0
    return capsys.readouterr().out


def test_every_command_has_its_place_in_the_order_of_the_help() -> None:
    assert list(COMMANDS) == [name for name in PAGES if name in COMMANDS]
    assert set(COMMANDS) == set(PAGES)


def test_the_commands_are_grouped_and_summed_up_in_one_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(monkeypatch, capsys, "--help")
    lines = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    listed = [line.split()[0] for line in lines if line.split()[0] in COMMANDS]
    assert listed == list(COMMANDS)
    for name in COMMANDS:  # a summary that is broken goes on in a line that begins with no command
        after = lines[lines.index(next(line for line in lines if line.startswith(f"{name} "))) + 1 :]
        assert not after or after[0].split()[0] in COMMANDS, f"the summary of {name} is more than a line"
    panels = re.findall(r"╭─ (.+?) ─", text)
    assert panels == ["Options", *dict.fromkeys(PAGES[name].panel for name in COMMANDS)]
    assert shown(monkeypatch, capsys, "-h") == text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_option_and_ends_with_examples(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(monkeypatch, capsys, name, "--help", width=width)
    assert max(map(len, text.splitlines())) <= width
    for parameter in parameters(COMMANDS[name]):
        assert parameter.spelt[0] in text
        assert parameter.info.help, f"{parameter.spelt[0]} says nothing"
        assert parameter.info.help.endswith("."), f"{parameter.spelt[0]}: {parameter.info.help}"
        assert parameter.value or parameter.kind is bool, f"{parameter.spelt[0]} shows no word for its value"
    lines = [line.rstrip() for line in text.splitlines()]
    examples = lines[lines.index(" Examples") + 1 :]
    assert tuple(line.strip() for line in examples[: len(PAGES[name].examples)]) == PAGES[name].examples
    assert any(f"monai-adv {name}" in example for example in PAGES[name].examples)
    assert "Example:" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_help_refers_to_is_there(name: str) -> None:
    assert 1 <= len(PAGES[name].examples) <= 3
    for page in PAGES[name].read.split(", "):
        assert (ROOT / page).is_file(), page
    for example in PAGES[name].examples:  # understood as they stand; the pages of the documentation are run elsewhere
        program, command, *words = shlex.split(example)
        assert program == "monai-adv"
        with GROUP.commands[command].make_context(command, words) as context:
            attack = context.params.get("name") if command == "attack" else context.params.get("attack")
            assert attack is None or attack in ATTACKS


def test_the_page_of_the_documentation_is_up_to_date() -> None:
    made = reference(app)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == made, "run python docs/update_tables.py"
    for name, function in COMMANDS.items():
        assert f"### monai-adv {name}\n" in made
        for parameter in parameters(function):
            assert parameter.spelt[0] in made
