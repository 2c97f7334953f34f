"""The reader of the pages' commands sees what a shell would run, and a page that is wrong is not overlooked."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_pages import commands
from command_runner import run_here
from command_world import Store
from test_commands import is_whole, made_small, run_all

PAGE = """# Title

Run `monai-adv attacks` or `A=1 monai-adv check ROOT`; `monai-adv run` and `monai-adv train --dims 2` are mentions,
`monai-adv train ...` too. A span over two lines: `monai-adv check
FOLDER`. A double one: ``monai-adv datalist x``.

    monai-adv train "two words" -o a.pt   # a comment
    monai-adv compare \\
        runs/x && monai-adv report runs/x

More prose, and a tree:

    a/tree
      of_files   # no command

- A list

      monai-adv merge runs/x

```bash
N=$(monai-adv datalist B)
for T in 1 2; do
    monai-adv train B -o t_$T.pt > log_$T.txt
done
```

```console
$ monai-adv attacks
noise  what it prints
```

```python
monai-adv("no command")
```

```text
nothing of ours
```
"""


def test_a_page_is_read_as_a_shell_reads_it() -> None:
    found = commands(PAGE, "page", is_whole, {})
    assert [(command.line, *command.argv) for command in found][:8] == [
        (3, "monai-adv", "attacks"),
        (3, "monai-adv", "check", "ROOT"),
        (4, "monai-adv", "check", "FOLDER"),
        (5, "monai-adv", "datalist", "x"),
        (7, "monai-adv", "train", "two words", "-o", "a.pt"),
        (8, "monai-adv", "compare", "runs/x"),
        (9, "monai-adv", "report", "runs/x"),
        (18, "monai-adv", "merge", "runs/x"),
    ]
    assert [(command.text, command.stdout) for command in found][8:] == [
        ("monai-adv datalist B", None),
        ("monai-adv train B -o t_1.pt", "log_1.txt"),
        ("monai-adv train B -o t_2.pt", "log_2.txt"),
        ("monai-adv attacks", None),
    ]
    assert found[1].env == (("A", "1"),)


@pytest.mark.parametrize(
    ("span", "says"),
    [
        ("monai-adv train --dimz 2", "No such option"),
        ("monai-adv attack FOLDER --checkpoint x", "output"),
        ("monai-adv atack FOLDER", "no command atack"),
        ("monai-adv train B --patch few", "valid integer"),
    ],
)
def test_inline_code_that_cannot_run_is_no_mention(span: str, says: str) -> None:
    with pytest.raises(Exception, match=says):
        commands(f"See `{span}`.\n", "page", is_whole, {})


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("monai-adv check BraTS2021 --outputs x.csv", "No such option"),
        ("python benchmarks/renamed.py", "No such file"),
        ("monai-adv datalist BraTS2021 -o x.json && monai-adv table elsewhere -o t", "elsewhere"),
        ("monai-adv check BraTS2021 | pretty", "nobody knows how to run 'pretty'"),
    ],
)
def test_a_wrong_command_of_a_page_fails(block: str, says: str, tmp_path: Path) -> None:
    found = commands(f"Text\n\n    {block}\n", "page", is_whole, {})
    store = Store(tmp_path / "store", lambda words, folder: None)
    with pytest.raises(AssertionError, match=says):
        run_all(found, "", store, tmp_path / "page")


def test_what_a_command_promises_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_adv.data.files.write_atomic", lambda path, content: None)
    found = commands("    monai-adv datalist BraTS2021 -o list.json\n", "page", is_whole, {})
    with pytest.raises(AssertionError, match=r"list\.json is not there"):
        run_all(found, "", Store(tmp_path / "store", lambda words, folder: None), tmp_path / "page")


def test_rules_change_the_options_they_name_only() -> None:
    words = ["monai-adv", "train", "B", "-o", "a.pt", "--channels", "16,32", "--steps", "700", "--dims", "2"]
    assert made_small(words)[:6] == words[:6]
    assert "700" not in made_small(words)
    assert made_small(words)[-2:] == ["--patch", "16"]
    assert made_small(["monai-adv", "train-synthesis"]) != made_small(["monai-adv", "train"])
    assert made_small(["monai-adv", "attacks"]) == ["monai-adv", "attacks"]


def test_a_command_leaves_this_process_as_it_was(tmp_path: Path) -> None:
    before = Path.cwd()
    assert run_here(["python", "-c", "import os; os.chdir('/'); print(os.environ['HOME'])"], tmp_path, {}).out == (
        f"{tmp_path}\n"
    )
    assert Path.cwd() == before
