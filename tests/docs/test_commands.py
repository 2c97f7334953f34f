"""Every command of README.md, CONTRIBUTING.md, data/README.md, docs/ and the command line's own examples is run.

The commands of a page run one after the other in a folder of their own, prepared as the text assumes, with the same
names: what one writes, the next one reads. Each has to end with exit code 0 and to leave what it promises. What would
take too long is run with the options of ``SMALL`` and the settings of ``SETTINGS`` and ``LESS``, which are the whole
difference. What no machine of the suite can run stands in ``NOT_RUN``, and the part of it that is ours runs all the
same. A command that fits nowhere fails.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from command_pages import BEGINS, Command, commands
from command_runner import Outcome, check_requirements, check_suite, run_apart, run_here, touched
from command_world import LESS, ROOT, STUDY, Store, World, say

from monai_adv import cli
from monai_adv.studies import study_from

PAGES = ["README.md", "CONTRIBUTING.md", "data/README.md"] + sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "docs").rglob("*.md")
    if not any(part.startswith("_") for part in path.relative_to(ROOT).parts)
)
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]

# What is run smaller than it stands there: the command's first words -> options set (None: a flag; "if given" ones only
# where the text has them). Nothing else about a command changes.
SMALL: dict[str, dict[str, str | None]] = {
    "monai-adv demo": {"--subjects": "1"},
    "monai-adv simulate": {"--subjects": "3", "--spacing": "4", "--workers?": "1"},
    "monai-adv train": {"--steps": "4", "--patch": "16", "--channels?": "4,8"},
    "monai-adv train-synthesis": {"--steps": "2", "--patch": "16"},
    "monai-adv victim": {"--window?": "16"},
    "monai-adv run studies/": {"--dry-run": None},  # the YAML as it is but for data and checkpoints
    "monai-adv certify": {"--subject": "BraTS2021_00000"},
    "monai-adv attack": {"--subject": "BraTS2021_00000"},
    "monai-adv universal": {"--steps": "2", "--modality": "all"},
    "monai-adv ablation": {"--steps": "2", "--figures": "1"},
    "python data/fill.py": {"--subjects": "2", "--spacing": "4", "--workers?": "1"},
    "python -m venv": {"--without-pip": None},
    "python docs/make_cohort_picture.py": {"--seeds": "2", "--spacing": "4"},
    "python benchmarks/attack_step.py": {"--pairs": "1", "--steps": "1", "--size": "16", "--attacks": "ifgsm",
                                         "--window": "16"},
    "python benchmarks/detection.py": {"--subjects": "2"},
    "python benchmarks/from_disk.py": {"--steps": "1", "--subject": "BraTS2021_00000"},
    "python benchmarks/kill_nine.py": {"--kills": "1"},
    "python benchmarks/many_units.py": {"--units": "100", "--in-process": None},
    "python benchmarks/native_resolution.py": {"--steps": "1"},
    "python benchmarks/saturation.py": {"--every": "3"},
    # what each of the benchmark's processes does, in this one
    "python benchmarks/sliding_window_gradient.py --part memory": {"--child": "recompute 1", "--window": "16",
                                                                   "--features": "4 8"},
    "python benchmarks/sliding_window_gradient.py": {"--methods": "recompute", "--windows": "1 2", "--window": "16",
                                                     "--features": "4 8", "--repeats": "1", "--timed-windows": "1"},
    "python benchmarks/synthesis.py": {"--drops": "0.3", "--subjects": "2", "--optimize-steps": "1",
                                       "--refine-steps": "1", "--pgd-steps": "1", "--classifier-steps": "2"},
    "python benchmarks/tiles_against_deployed.py": {"--steps": "1", "--every": "3"},
}  # fmt: skip
# Rounds of a loop that are run, beside those that a later command reads the results of.
ROUNDS = 1
# The same of what no option reaches: every study has ``LESS``, the demonstration's also voxels of 4 mm, and this.
SETTINGS: dict[str, dict[str, Any]] = {
    "monai-adv demo": {
        "monai_adv.studies.demo.SPACING": 4.0,
        "monai_adv.studies.demo.study_from": lambda content: study_from(
            {
                **content,
                **LESS,
                "attacks": [{**attack, **({"steps": 2} if "steps" in attack else {})} for attack in content["attacks"]],
                "budgets": {**content["budgets"], "eps": [0.2]},
            }
        ),
    }
}
# In a process of its own: it forks.
APART = ("python benchmarks/kill_nine.py",)
# No network, no cluster: what is done instead.
NOT_RUN = {
    "python -m pip install": "needs a network; its files and extras must exist",
    "pip install": "needs a network; its files and extras must exist",
    "monai-adv --install-completion": "writes into the user's shell; tests/cli/test_completion.py runs it",
    "python -m pytest": "is this suite; it collects one file, and the folders and variables given must exist",
    "python -m sphinx": "takes minutes; the folder it is given must be one that Sphinx builds",
    "torchrun": "what it launches is run once per process, with the variables it sets",
    "srun": "needs a cluster; what it launches is run once per task, with the variables it sets",
    "sbatch": "needs a cluster; what it wraps is run, the batch script is another block of the page",
}
# Where something else than 0 is right, because the text says so: exit code and what the command must say.
EXIT_CODES = {
    ("docs/scaling.md", "monai-adv run study.yaml --no-resume"): (1, "holds units already"),
    ("docs/howto/my_bundle.md", "monai-adv run --bundle DIR"): (1, "nothing of it has been executed"),
}
# Inline code that begins like a command and is none.
MENTIONS = (
    "python -m monai.bundle run",
    "python -m monai.bundle run --config_file",
    "python -W error",
    "python -m pytest",
)
# What the batch script of a page finds in its environment.
VARIABLES = {"SLURM_CPUS_PER_TASK": "1"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    def run(words: list[str], folder: Path) -> None:
        done = run_here(["monai-adv", *words], folder, {})
        assert done.code == 0, done.err

    return Store(tmp_path_factory.mktemp("store"), run)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_do_what_it_says(page: str, store: Store, tmp_path: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    run_all(commands(text, page, is_whole, VARIABLES), text, store, tmp_path / "page")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_do_what_they_say(name: str, store: Store, tmp_path: Path) -> None:
    found, text = examples([name], store.folder)
    assert any(command.argv[1] == name for command in found), f"monai-adv {name} --help has no example of it"
    for page in re.findall(r"\S+\.md", text):
        assert (ROOT / page).is_file(), page
    run_all([command for command in found if command.text not in store.passed], "", store, tmp_path / "page")


@pytest.mark.slow
def test_the_first_steps_of_the_help_do_what_they_say(store: Store, tmp_path: Path) -> None:
    found, _ = examples([], store.folder)
    assert found
    assert all(is_whole(list(command.argv)) for command in found)
    found = [command for command in found if "--install-completion" not in command.argv]  # writes into the user's home
    run_all([command for command in found if command.text not in store.passed], "", store, tmp_path / "page")


def run_all(found: list[Command], text: str, store: Store, folder: Path) -> None:
    """Run a page's commands in one folder; all that fail are named together.

    A command that another page has run already is run again where a later command of this page reads what it writes.
    """
    study = yaml.safe_dump({**(shown_study(text) or STUDY), **LESS})
    outputs = [promised([say(word) for word in command.argv], study) for command in found]
    world = World(folder, store, {path for paths in outputs for path in paths}, study)
    problems = []
    for command in chosen(found, outputs, study, store.passed):
        started = cpu_seconds()
        try:
            run_one(command, world)
            store.passed.add(key_of(command, study))
        except Exception as error:
            problems.append(f"{command}\n  {type(error).__name__}: {error}")
        print(f"{cpu_seconds() - started:5.1f} s  {command}")
    assert not problems, "\n".join(problems)


def chosen(found: list[Command], outputs: list[list[str]], study: str, passed: set[str]) -> list[Command]:
    """The commands to run: new ones, once, the first rounds of a loop; and what these read."""
    rounds, fresh = Counter[tuple[int, str]](), []
    for index, command in enumerate(found):
        rounds[command.line, command.shape] += 1
        again = rounds[command.line, command.shape] > ROUNDS or command in found[:index]
        fresh.append(not again and key_of(command, study) not in passed)
    kept, read = [], set[str]()
    for index in reversed(range(len(found))):
        command = found[index]
        writes = any(word == path or path.startswith(f"{word}/") for path in outputs[index] for word in read)
        if fresh[index] or (writes and command not in found[:index]) or command.argv[0] == "cd":
            kept.append(command)
            words = {say(part) for word in command.argv for part in (word, word.split("=")[-1], *word.split())}
            read |= words - set(outputs[index])
            if "study.yaml" in words:  # data, victims, and with an option also what was computed before
                inside = set(re.findall(r"[\w./-]+", study))
                read |= inside - ({yaml.safe_load(study)["output"]} if command.argv[-1] == "study.yaml" else set())
    return kept[::-1]


def key_of(command: Command, study: str) -> str:
    """What tells commands of different pages apart."""
    return command.text + (study if {"study.yaml", "STUDY"} & set(command.argv) else "")


def run_one(command: Command, world: World) -> None:
    """Run one command and look for what it promises."""
    argv = [world.say(word) for word in command.argv]
    if argv[0] == "cd":
        world.here = world.here / argv[1]
        assert world.here.is_dir(), f"there is no folder {argv[1]}"
        return
    env = {name: value for name, value in command.env if name != "OMP_NUM_THREADS"}
    for words, more in launched(argv):
        for word in words:
            world.provide(word)
        if words[0] == "monai-adv" and words[1] in COMMANDS:
            world.prepare(words, parameters(words))
        small = made_small(words)
        alone = not {"RANK", "SLURM_PROCID"} & set(more)  # a shard leaves no tables
        promises = [world.here / path for path in promised(words, world.study)] if alone else []
        for path in promises:
            if path.is_file():  # it has to be written anew; a folder may be added to
                path.unlink()
        before = {path: touched(path) for path in promises}
        done = run_words(small, world.here, {**env, **more})
        code, says = EXIT_CODES.get((command.page, command.text), (0, ""))
        assert done.code == code, f"exit code {done.code} of {shlex.join(small)}\n{done.out[-800:]}\n{done.err[-1500:]}"
        assert says in " ".join((done.out + done.err).split())
        if code:
            continue
        if words[0] == "monai-adv":
            assert done.out.strip(), "nothing was printed"
        if command.stdout is not None:
            (world.here / command.stdout).write_text(done.out)
        for path in promises:
            after = touched(path)
            assert after, f"{path.name} is not there after {shlex.join(small)}\n{done.out[-800:]}"
            assert after != before[path], f"{path.name} was not written by {shlex.join(small)}"


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(os.times()[:4])


def run_words(argv: list[str], folder: Path, env: dict[str, str]) -> Outcome:
    """Run a command in the way that suits it."""
    text = shlex.join(argv)
    if text.startswith(tuple(NOT_RUN)):
        found = instead(argv, env)
    elif argv[0] == "source":
        assert (folder / argv[1]).is_file(), f"there is no {argv[1]}"
        found = Outcome(0, "", "")
    elif text.startswith(APART) or argv[0] in ("mkdir", "ln", "cp", "mv", "ls", "cat"):
        found = run_apart(argv, folder, env)
    elif argv[0] == "monai-adv" or argv[0].startswith("python"):
        with pytest.MonkeyPatch.context() as patch:
            for first in SETTINGS:
                for name, value in SETTINGS[first].items() if text.startswith(first) else ():
                    patch.setattr(name, value)
            found = run_here(argv, folder, env)
    else:
        raise AssertionError(f"nobody knows how to run {text!r}: add it to the tables of {Path(__file__).name}")
    return found


def instead(argv: list[str], env: dict[str, str]) -> Outcome:
    """What ``NOT_RUN`` says is done."""
    if "pip" in argv:
        return check_requirements(argv, ROOT)
    if "pytest" in argv:
        return check_suite(argv, ROOT, env)
    if "sphinx" in argv:
        assert (ROOT / argv[-2] / "conf.py").is_file(), f"{argv[-2]} has no conf.py"
    return Outcome(0, "not run", "")


def made_small(argv: list[str]) -> list[str]:
    """The command with the options of ``SMALL``."""
    text, found = " ".join(argv), list(argv)
    first = max((words for words in SMALL if f"{text} ".startswith(words)), key=len, default=None)
    if first is None or (not first.endswith("/") and not f"{text} ".startswith(f"{first} ")):
        return found
    for name, value in SMALL[first].items():
        option, values = name.rstrip("?"), [] if value is None else value.split()
        if option in found:
            start = found.index(option)
            most = len(found) if argv[0] == "python" else start + 1 + len(values)  # several values in benchmarks only
            end = next((k for k in range(start + 1, most) if found[k].startswith("-")), most)
            found[start:end] = [option, *values]
        elif not name.endswith("?"):
            found += [option, *values]
    return found


def launched(argv: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """What a launcher would start, process by process, with the variables it would set."""
    if argv[0] == "torchrun":
        from torch.distributed.run import parse_args

        given = parse_args(argv[1:])
        count = int(given.nproc_per_node)
        words = [given.training_script, *given.training_script_args]
        assert given.no_python
        return [(words, {"RANK": str(k), "WORLD_SIZE": str(count), "LOCAL_RANK": str(k)}) for k in range(count)]
    if argv[0] == "srun":
        words = argv[argv.index("monai-adv") :]
        count = 1
        for name in ("--nodes", "--ntasks-per-node"):
            count *= int(argv[argv.index(name) + 1]) if name in argv else 1
        return [(words, {"SLURM_PROCID": str(k), "SLURM_NTASKS": str(count)}) for k in range(count)]
    if argv[0] == "sbatch":
        return [(shlex.split(argv[argv.index("--wrap") + 1]), {})] if "--wrap" in argv else []
    if "--shard" in argv:  # the text assumes that the other parts are computed too, elsewhere
        place = argv.index("--shard") + 1
        index, _, count = argv[place].partition("/")
        order = [k for k in range(1, int(count) + 1) if k != int(index)] + [int(index)]
        return [([*argv[:place], f"{k}/{count}", *argv[place + 1 :]], {}) for k in order]
    return [(argv, {})]


def promised(argv: list[str], study: str) -> list[str]:
    """What is there after a command: its ``-o``, or what its page says of it."""
    if argv[0] != "monai-adv" or argv[1] not in COMMANDS or "--help" in argv:
        found = [argv[k + 1] for k, word in enumerate(argv[:-1]) if word in ("-o", "--output", "--output_dir")]
        places = {"python benchmarks/from_disk.py": 4, "python -m venv": 3, "mkdir": -1, "ln": -1, "cp": -1, "mv": -1}
        found += [argv[place] for first, place in places.items() if f"{' '.join(argv)} ".startswith(f"{first} ")]
        return found + (["data/cohort/cohort.json"] if argv[:2] == ["python", "data/fill.py"] else [])
    given = parameters(argv)
    found = [str(given["output"])] if given.get("output") else []
    if argv[1] == "simulate":
        found.append(f"{given['folder']}/cohort.json")
    if argv[1] == "demo":
        found.append(f"{given['folder']}/run/report.html")
    if argv[1] in ("merge", "report"):
        found.append(f"{given['run_folder']}/report.html")
    if argv[1] == "compare" and not found:
        first = Path(given["results"][0])
        found.append(str((first.parent if first.suffix else first) / "tables"))
    if argv[1] == "run" and given["bundle"]:
        found = found or ["bundle_run"]
    if argv[1] == "run" and str(given["study"]) == "study.yaml" and not (given["shard"] or given["dry_run"]):
        output = yaml.safe_load(study)["output"]
        found += [f"{output}/records.csv", f"{output}/report.html"]
    return found


def parameters(argv: list[str]) -> dict[str, Any]:
    """The parameters of a command of ``monai-adv`` by name, without a complaint about what is missing."""
    found: dict[str, Any] = COMMANDS[argv[1]].make_context(argv[1], argv[2:], resilient_parsing=True).params
    return found


def shown_study(text: str) -> dict[str, Any] | None:
    """The study that a page shows as YAML, if it shows one that only needs what is provided."""
    for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
        content = yaml.safe_load(block)
        if isinstance(content, dict) and {"data", "victims", "attacks"} <= set(content):
            return content
    return None


def is_whole(words: list[str]) -> bool:
    """Whether inline code is a command, not the mention of one; what it names must exist in both cases.

    A mention of ``monai-adv`` gives no argument; a command gives all its arguments and required options.
    """
    words = [say(word) for word in words]
    if len(words) == 1 or shlex.join(words) in MENTIONS:
        return False
    if words[0] != "monai-adv" or words[1].startswith("-"):
        return True
    assert words[1] in COMMANDS, f"monai-adv has no command {words[1]}"
    if "--help" in words:
        return True
    command = COMMANDS[words[1]]
    arguments = [p.name for p in command.params if p.param_type_name == "argument"]
    context = command.make_context(words[1], [], resilient_parsing=True)
    context.resilient_parsing = False
    try:
        given, *_ = command.make_parser(context).parse_args(words[2:])
    except Exception as error:  # typer has a click of its own
        if type(error).__name__ == "BadOptionUsage":  # an option without its value
            return False
        raise
    arguments = [*arguments, "bundle"] if words[1] == "run" else arguments  # a study, or --bundle
    needs = words[1] == "run" or any(p.required for p in command.params)
    if needs and not any(isinstance(given.get(name), (str, list, tuple)) and given[name] for name in arguments):
        return False
    command.make_context(words[1], words[2:])
    return True


def examples(words: list[str], folder: Path) -> tuple[list[Command], str]:
    """The commands below ``Examples`` in the help of a command, or of all, and that part of the help."""
    shown = run_here(["monai-adv", *words, "--help"], folder, {"COLUMNS": "100"})
    assert shown.code == 0
    *_, text = re.split(r"Examples|First steps", shown.out)
    lines = [line.strip(" \u2502") for line in text.splitlines()]
    page = "\n\n".join(f"    {line}" for line in lines if BEGINS.match(line))
    return commands(page, shlex.join(["monai-adv", *words, "--help"]), is_whole, VARIABLES), text
