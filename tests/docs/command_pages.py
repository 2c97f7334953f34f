"""The shell commands of a Markdown page, read by a shell.

What counts as a command:

- every line of a fence marked bash, sh, shell or zsh, and what follows ``$`` in one marked console;
- every line of an indented block, or of a fence marked text or not at all, one line of which begins with a launcher
  or a tool of the shell;
- an inline code span that begins with a launcher (``NAME=value`` in front of it allowed) and is *whole*: it has all
  that its command line requires. A span that lacks a required part is a *mention* (``monai-adv run``); its subcommand
  and options must exist all the same.

The commands of a page are handed to bash, which knows comments, continued lines, quotes, ``&&``, variables and loops;
it finds no program and writes down what it would have called.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

LAUNCHERS = ("monai-adv", "python", "python3", "pip", "pytest", "torchrun", "srun", "sbatch")
SHELLS = ("bash", "sh", "shell", "zsh")
TRANSCRIPTS = ("console", "shell-session")
UNMARKED = ("", "text", "none")
TOOLS = ("mkdir", "ln", "cp", "mv", "ls", "cat", "cd", "source", "export", "git")
HERE = "{here}"  # stands for the folder the shell was in
BEGINS = re.compile(rf"(?:[A-Za-z_]\w*=\S*\s+)*(?:{'|'.join(LAUNCHERS)})(?:\s|$)")
BLOCK_BEGINS = re.compile(rf"(?:[A-Za-z_]\w*=\S*\s+)*(?:{'|'.join(LAUNCHERS + TOOLS)})(?:\s|$)")
FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,}|:{3,})\s*(?P<mark>.*)$")
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:[^`\n]|\n(?!\s*\n))+?)(?<!`)\1(?!`)")
# every word that is no builtin of the shell comes here; a redirected output is found by what is printed
PRELUDE = """PATH=/nowhere
command_not_found_handle() {
    printf 'call-%s' "$BASHPID"
    local line="${BASH_LINENO[${#BASH_LINENO[@]} - 1]}"
    { printf '%s\\0' "$line" "call-$BASHPID" "$#" "$@"; export -p; printf '\\0'; } >> "$RECORD"
}
cd() { command_not_found_handle cd "$@"; }
source() { command_not_found_handle source "$@"; }
set -eu
"""


@dataclass(frozen=True)
class Command:
    """One call of a program, as the shell would make it.

    Args:
        page: where it stands, for messages.
        line: line of the page.
        argv: program and arguments.
        env: variables set in front of it, or exported above.
        stdout: file that its output is redirected to.
    """

    page: str = field(compare=False)
    line: int = field(compare=False)
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    stdout: str | None = None

    @property
    def shape(self) -> str:
        """Its words without numbers: the same for every round of a loop."""
        return re.sub(r"\d+", "", self.text)

    @property
    def text(self) -> str:
        return shlex.join(self.argv)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def commands(text: str, page: str, whole: Callable[[list[str]], bool], env: dict[str, str]) -> list[Command]:
    """All commands of a page in their order.

    Args:
        text: Markdown.
        page: its name.
        whole: says whether the words of an inline span are a whole command; raises where an option does not exist.
        env: variables that the page expects to be set.

    Raises:
        AssertionError: what bash says of the page's commands.
    """
    lines = text.splitlines()
    script = [""] * len(lines)  # line by line as the page, so that the shell's line numbers are the page's
    prose = list(lines)
    for first, block in _blocks(lines):
        for offset in range(len(block)):
            prose[first + offset] = ""
        for offset, code in enumerate(_shell_lines(block)):
            script[first + offset] = code
    for match in SPAN.finditer("\n".join(prose)):
        code = " ".join(match[2].split())
        if not BEGINS.match(code) or "..." in code:
            continue
        number = "\n".join(prose).count("\n", 0, match.start())
        words = shlex.split(code)
        while "=" in words[0]:
            words.pop(0)
        if whole(words):
            script[number] = f"{script[number]}; {code}" if script[number] else code
    return _read(script, page, env)


def _blocks(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """First line (from 0) and lines of every fenced and indented block; the fences are part of it."""
    index = 0
    while index < len(lines):
        fence = FENCE.match(lines[index])
        if fence is not None and not fence["fence"].startswith(":"):
            end, closing = index + 1, rf"\s*{fence['fence'][0]}{{{len(fence['fence'])},}}\s*"
            while end < len(lines) and not re.fullmatch(closing, lines[end]):
                end += 1
            yield index, lines[index : end + 1]
            index = end + 1
        elif lines[index].startswith("    ") and (index == 0 or not lines[index - 1].strip()):
            end = index
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield index, lines[index:end]
            index = end
        else:
            index += 1


def _shell_lines(block: list[str]) -> list[str]:
    """The block's lines as a shell gets them, empty where there is nothing for it."""
    fence = FENCE.match(block[0])
    mark = "" if fence is None else fence["mark"].strip().split(",")[0]
    mark = re.sub(r"^\{(?:code-block|code|sourcecode)\}\s*", "", mark).split(" ")[0].lower()
    inner = [""] + [line.strip() for line in block[1:-1]] + [""] if fence else [line.strip() for line in block]
    if mark in TRANSCRIPTS:
        found, going = [], False
        for line in inner:
            taken = line.startswith("$ ") or (going and line.startswith("> "))
            found.append(line[2:] if taken else "")
            going = taken and line.endswith("\\")
        return found
    if mark in SHELLS or (mark in UNMARKED and any(BLOCK_BEGINS.match(line) for line in inner)):
        return [re.sub(r"^\$ ", "", line) if not line.startswith(":") else "" for line in inner]
    return [""] * len(block)


def _read(script: list[str], page: str, env: dict[str, str]) -> list[Command]:
    """What bash would call."""
    shift = PRELUDE.count("\n")
    with tempfile.TemporaryDirectory() as place:
        record = Path(place) / "record"
        record.touch()
        work = Path(place) / "work"
        work.mkdir()
        clean = {"PATH": "/usr/bin:/bin", "RECORD": str(record), "HOME": place, **env}
        words = ["bash", "-c", PRELUDE + "\n".join(script)]
        done = subprocess.run(words, cwd=work, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page}: {done.stderr}"
        targets = {path.read_text(): str(path.relative_to(work)) for path in work.rglob("*") if path.is_file()}
        parts = iter(record.read_text().split("\0")[:-1])
    found = []
    for line in parts:
        call, count = next(parts), int(next(parts))
        argv = tuple(next(parts).replace(place + "/work", HERE) for _ in range(count))
        found.append(Command(page, int(line) - shift, argv, _exported(next(parts), clean), targets.get(call)))
    return found


def _exported(listing: str, known: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Variables of ``export -p`` that are not known already."""
    found = re.findall(r'^declare -x (\w+)="(.*)"$', listing, flags=re.MULTILINE)
    return tuple((name, value) for name, value in found if name not in {*known, "OLDPWD", "PWD", "SHLVL", "_"})
