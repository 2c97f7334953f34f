"""Shell completion: installed and asked as a shell does, fast, and of names that there are."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from monai_adv import cli_options
from monai_adv.attacks import ATTACKS
from monai_adv.attacks.mask import STEPS
from monai_adv.attacks.universal_training import MODES
from monai_adv.bundle.overlay import OVERLAYS
from monai_adv.data import MODALITIES, LabelScheme
from monai_adv.defenses.certificate import CORRECTIONS
from monai_adv.engines import METHODS
from monai_adv.losses import LOSSES, RULES
from monai_adv.networks.factory import NETWORKS
from monai_adv.stats.metrics_saver import JOINS
from monai_adv.studies.export import STORES
from monai_adv.studies.universal import ALL
from monai_adv.threats.threat import THREATS
from monai_adv.threats.units import UNITS

PROGRAM = Path(sys.executable).with_name("monai-adv")
CASES = {
    "monai-adv at": ["attack", "attacks"],
    "monai-adv attack cohort --attack if": ["ifgsm"],
    "monai-adv run --attack as": ["asm", "asma"],
    "monai-adv attack cohort --norm ": ["l2", "linf"],
    "monai-adv train cohort --method v": ["vafa_at"],
    "monai-adv train cohort --network S": ["SegResNet", "SwinUNETR"],
    "monai-adv universal cohort --modality T": ["T1", "T1c", "T2"],
    "monai-adv attack cohort --subject BraTS": ["BraTS2021_00000", "BraTS2021_00001"],
    "monai-adv check cohort --sch": ["--scheme"],
    "monai-adv attack cohort --checkpoint ": [],  # files, which the shell itself offers
}


@pytest.mark.skipif(shutil.which("bash") is None or not PROGRAM.exists(), reason="needs bash and the installed program")
def test_bash_completes_after_install_completion(tmp_path: Path) -> None:
    for name in ("BraTS2021_00001", "BraTS2021_00000"):
        (tmp_path / "cohort" / name).mkdir(parents=True)
    asked = "\n".join(f"ask {' '.join(map(shlex.quote, words(line)))}" for line in CASES)
    script = f"""
        {shlex.quote(str(PROGRAM))} --install-completion > /dev/null || exit 1
        source "$HOME/.bashrc"
        complete -p monai-adv >&2
        ask() {{
            COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
            _monai_adv_completion monai-adv
            echo "${{COMPREPLY[*]}}"
        }}
        {asked}
    """
    path = f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path), "PATH": path},
    )  # fmt: skip
    assert "-o default" in done.stderr, done.stderr  # where nothing is offered, files are
    answers = done.stdout.splitlines()
    assert {line: sorted(answer.split()) for line, answer in zip(CASES, answers, strict=True)} == CASES


def words(line: str) -> list[str]:
    """The words of a line as bash counts them; the last, which is completed, may be empty."""
    return [*line.split(), ""] if line.endswith(" ") else line.split()


@pytest.mark.parametrize(
    ("shell", "environment", "offers"),
    [
        ("zsh", {"_TYPER_COMPLETE_ARGS": "monai-adv attack x --attack if"}, '"ifgsm"'),
        ("fish", {"_TYPER_COMPLETE_ARGS": "monai-adv attack x --attack if", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
         "ifgsm"),
        ("bash", {"COMP_WORDS": "monai-adv --ver", "COMP_CWORD": "1"}, "--version"),
    ],
)  # fmt: skip
def test_completion_imports_nothing_heavy(shell: str, environment: dict[str, str], offers: str) -> None:
    code = """if True:
        import sys
        from monai_adv import cli
        sys.argv = ["monai-adv"]
        try:
            cli.main()
        finally:
            heavy = {"torch", "monai", "numpy", "pandas", "scipy", "itk", "matplotlib", "ignite"} & set(sys.modules)
            print(sorted(heavy), file=sys.stderr)
    """
    environment = {**os.environ, **environment, "_MONAI_ADV_COMPLETE": f"complete_{shell}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr.strip() == "[]"
    assert offers in done.stdout


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_version_and_help_import_nothing_heavy(option: str) -> None:
    code = f"""if True:
        import sys
        from monai_adv import cli
        sys.argv = ["monai-adv", {option!r}]
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code
        print(sorted({{"torch", "monai", "numpy", "pandas", "scipy", "itk", "matplotlib"}} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("written", "registered"),
    [
        (cli_options.ATTACKS, ATTACKS),
        (cli_options.MODALITIES, (*MODALITIES, ALL)),
        (cli_options.Units, UNITS),
        (cli_options.Norm, [name for name in THREATS if name != "parameter"]),
        (cli_options.Scheme, LabelScheme.names()),
        (cli_options.Loss, LOSSES),
        (cli_options.Network, NETWORKS),
        (cli_options.Method, (*METHODS, "offline")),
        (cli_options.Overlay, OVERLAYS),
        (cli_options.Store, STORES),
        (cli_options.MaskMode, STEPS),
        (cli_options.UniversalMode, MODES),
        (cli_options.Correction, CORRECTIONS),
        (cli_options.Join, JOINS),
        (cli_options.RULES, ("next", *RULES)),  # `next` is the ablation's own word
    ],
    ids=lambda value: str(list(value) if isinstance(value, (dict, tuple, list)) else value)[:40],
)
def test_the_names_written_out_for_completion_are_those_there_are(written: Any, registered: Any) -> None:
    names = written if isinstance(written, tuple) else get_args(written)
    assert len(set(names)) == len(names)
    assert set(names) == set(registered)
