"""Run a page's commands in this process, as far as that is possible."""

from __future__ import annotations

import configparser
import contextlib
import importlib.metadata
import io
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

from monai_adv import cli


@dataclass(frozen=True)
class Outcome:
    """What became of a command: exit code, what it wrote to standard output and to standard error."""

    code: int
    out: str
    err: str


def run_here(argv: list[str], folder: Path, env: Mapping[str, str]) -> Outcome:
    """``monai-adv ...`` or ``python`` with a file, ``-m MODULE`` or ``-c CODE`` in this process, in a folder.

    Args:
        argv: program and arguments.
        folder: working directory.
        env: variables on top of this process's.
    """
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        _state(folder, env), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings()
    ):  # fmt: skip
        if argv[1] == "-m":  # MONAI's own program warns of every bundle
            warnings.simplefilter("ignore")
        try:
            if argv[0] == "monai-adv":
                sys.argv = argv
                cli.main()
            elif argv[1] == "-m":
                sys.argv = argv[2:]
                runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
            elif argv[1] == "-c":
                sys.argv = argv[1:2]
                exec(compile(argv[2], "<string>", "exec"), {"__name__": "__main__"})
            else:
                sys.argv = argv[1:]
                sys.path.insert(0, str((folder / argv[1]).parent))
                runpy.run_path(str(folder / argv[1]), run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                err.write(ended.code)
    return Outcome(code, out.getvalue(), err.getvalue())


def run_apart(argv: list[str], folder: Path, env: Mapping[str, str]) -> Outcome:
    """A command in a process of its own."""
    argv = [sys.executable, *argv[1:]] if argv[0].startswith("python") else argv
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(argv, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def check_requirements(argv: list[str], folder: Path) -> Outcome:
    """``pip install`` without a network: files are there, extras and packages exist under these names.

    Args:
        argv: the command.
        folder: the repository.
    """
    words = iter(argv[argv.index("install") + 1 :])
    for word in words:
        if word == "--index-url":
            assert next(words).startswith("https://")
        elif word in ("-c", "-r"):
            named_file = next(words)
            assert (folder / named_file).is_file(), f"no such file: {named_file}"
        elif not word.startswith("-"):
            named = Requirement(word.replace(".", "monai_adv", 1) if word.startswith(".") else word)
            if named.name == "monai_adv":
                setup = configparser.ConfigParser()
                setup.read(folder / "setup.cfg")
                known = set(setup["options.extras_require"])
                assert named.extras <= known, f"{named.name} has no extra {named.extras - known}"
            else:
                assert importlib.metadata.version(named.name)  # the suite has whatever a page tells to install
    return Outcome(0, "", "")


def check_suite(argv: list[str], folder: Path, env: Mapping[str, str]) -> Outcome:
    """``python -m pytest`` without the suite: folders and variables must be known to it, and it must start.

    Args:
        argv: the command.
        folder: the repository.
        env: variables in front of it.
    """
    paths = [word for word in argv[3:] if not word.startswith("-")]
    sources = "".join(path.read_text() for path in (folder / "tests").glob("*.py"))
    for path in paths:
        assert (folder / path).exists(), f"there is no {path}"
    for name in env:
        assert name in sources, f"nothing in tests reads {name}"
    if paths:
        return Outcome(0, "", "")
    return run_apart([*argv, "--collect-only", "tests/test_architecture.py"], folder, env)


@contextlib.contextmanager
def _state(folder: Path, env: Mapping[str, str]) -> Iterator[None]:
    """Folder, arguments, path, variables and numerical settings as they were, whatever a command does to them."""
    where, argv, path = Path.cwd(), sys.argv, list(sys.path)
    env = {"HOME": str(folder), **env}  # nothing is to be written into the user's
    variables = {name: os.environ.get(name) for name in env}
    random = torch.random.get_rng_state()
    os.chdir(folder)
    os.environ.update(env)
    try:
        with np.errstate():
            yield
    finally:
        os.chdir(where)
        sys.argv, sys.path[:] = argv, path
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.random.set_rng_state(random)


def touched(path: Path) -> dict[str, tuple[int, int]]:
    """A path and all files below it, each with the time of its last change and its size."""
    files = [path, *(p for p in path.rglob("*") if p.is_file())] if path.exists() else []
    return {str(file): (file.stat().st_mtime_ns, file.stat().st_size) for file in files}
