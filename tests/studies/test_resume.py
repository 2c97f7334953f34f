from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from monai_adv.errors import ConfigError, WriteError
from monai_adv.studies import merge_study, read_records, run_study, runner, study_from
from monai_adv.studies.records import CHECKSUMS

TABLES = ("records.csv", "records.parquet")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def content(content: dict[str, Any]) -> dict[str, Any]:
    """10 units of two subjects."""
    subjects = ["BraTS2021_00000", "BraTS2021_00001"]
    return {**content, "attacks": content["attacks"][:2], "data": {**content["data"], "subjects": subjects}}


def tables(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in TABLES]


def test_failed_units_are_left_and_named_until_they_are_retried(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = runner._compute

    def stumble(study: Any, victim: Any, case: Any, units: Any, *others: Any) -> Any:
        for done in compute(study, victim, case, units, *others):
            if done[0].identity["attack"] == "fgsm" and case.subject == "BraTS2021_00001" and done[0].eps == 0.8:
                raise ValueError("something unforeseen")
            yield done

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_compute", stumble)
        first = run_study(study_from(content))
        assert first.computed == 9
        assert first.problems == ["BraTS2021_00001, tiny fgsm 0.8 std: failed: something unforeseen"]
    again = run_study(study_from(content))
    assert (again.computed, again.reused, again.problems) == (0, 10, first.problems)
    retried = run_study(study_from(content), retry_failed=True)
    assert (retried.computed, retried.reused, retried.problems) == (1, 9, [])
    run_study(study_from({**content, "output": str(tmp_path / "whole")}))
    assert tables(tmp_path / "run") == tables(tmp_path / "whole")


def test_no_resume_refuses_a_folder_with_units(content: dict[str, Any], tmp_path: Path) -> None:
    assert run_study(study_from(content), resume=False).computed == 10
    with pytest.raises(ConfigError, match="holds units already"):
        run_study(study_from(content), resume=False)


def test_every_artefact_cut_anywhere_is_made_again_or_refused(content: dict[str, Any], tmp_path: Path) -> None:
    run, draw = tmp_path / "run", random.Random(0)
    run_study(study_from(content))
    wanted = tables(run)
    artefacts = [sorted((run / "units").rglob("*.json"))[4], sorted((run / "volumes").rglob("*.npz"))[1]]
    artefacts += [run / name for name in ("plan.json", "keys/1-of-1.json", "study.json", "problems.json", CHECKSUMS)]
    artefacts += [run / name for name in (*TABLES, "timings.csv")]
    for path in artefacts:
        whole = path.read_bytes()
        path.write_bytes(whole[: draw.randrange(len(whole))])
        if path.name in ("records.csv", "timings.csv"):
            with pytest.raises(ConfigError, match=f"{path.name} is damaged.*monai-adv merge"):
                read_records(run)
            merge_study(run)
            read_records(run)
        elif path.name == "plan.json":
            with pytest.raises(ConfigError, match=r"plan\.json is missing or damaged: run the study again"):
                merge_study(run)
        elif path.name == "1-of-1.json":
            assert merge_study(run).missing == 10  # named, and the exit code is 1
        result = run_study(study_from(content))
        assert result.computed == (path.parent.parent.name in ("units", "volumes")), path
        assert result.problems == []
        assert tables(run) == wanted, path
        if path.name != "timings.csv" and path.suffix != ".npz" and "units" not in path.parts:
            assert path.read_bytes() == whole, path


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond a size, as on a full disk: the system's own error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_among_the_units_is_a_clear_error_and_loses_nothing(
    content: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    content["attacks"] = [{"name": "noise", "repeats": 60}]  # whose trace is long
    content |= {"budgets": {"eps": [0.5]}, "figures": {"montages": 0}}
    content["data"]["subjects"] = ["BraTS2021_00000"]
    with largest_file(6000), pytest.raises(WriteError, match=r"cannot write .*units.*File too large.*free some space"):
        run_study(study_from(content))
    assert not list(run.rglob("*.tmp"))
    after = run_study(study_from(content))
    assert (after.reused, after.computed, after.problems) == (1, 1, [])  # the clean image was done


def test_a_full_disk_among_the_tables_is_a_clear_error_and_keeps_the_old_ones(
    content: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    content["figures"] = {"montages": 0}
    run_study(study_from({**content, "attacks": content["attacks"][:1]}))
    before = tables(run)
    whole = run_study(study_from({**content, "output": str(tmp_path / "whole")})).folder
    sizes = {path: path.stat().st_size for path in whole.rglob("*") if path.is_file()}
    table = sizes.pop(whole / "records.csv")
    other = max(size for path, size in sizes.items() if path.suffix == ".json")
    assert other < table
    with largest_file(table - 1), pytest.raises(WriteError, match=r"cannot write .*File too large.*free some space"):
        run_study(study_from(content))
    assert tables(run) == before
    assert len(read_records(run)) == 18  # and they can be read
    assert run_study(study_from(content)).computed == 0
    assert tables(run) == tables(whole)


def test_a_read_only_folder_is_a_clear_error(content: dict[str, Any], tmp_path: Path) -> None:
    folder = (
        Path("/sys/monai_adv") if os.geteuid() == 0 else tmp_path / "closed" / "run"
    )  # root may write anywhere else
    if os.geteuid() != 0:
        folder.parent.mkdir(mode=0o500)
    with pytest.raises(WriteError, match=r"cannot write .*make the folder writable"):
        run_study(study_from({**content, "output": str(folder)}))


def test_a_unit_of_a_random_victim_does_not_depend_on_what_was_computed_before_it(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["victims"][0]["smooth"] = {"sigma": 0.25, "samples": 2}
    content["data"]["subjects"] = ["BraTS2021_00000"]
    content["attacks"] = [{"name": "pgd", "steps": 2}]
    run_study(study_from(content))
    wanted = tables(tmp_path / "run")
    for path in (tmp_path / "run" / "units").rglob("*pgd_0.8*.json"):
        path.unlink()
    assert run_study(study_from(content)).computed == 1
    assert tables(tmp_path / "run") == wanted


def test_kill_nine_at_random_moments_ends_in_the_same_tables() -> None:
    """Three kills here; ``benchmarks/kill_nine.py`` does fifty."""
    script = ROOT / "benchmarks" / "kill_nine.py"
    kills = os.environ.get("MONAI_ADV_KILLS", "3")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--kills", kills],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
    assert " 0 differ" in done.stdout


def test_problems_of_an_earlier_run_are_not_kept(content: dict[str, Any], tmp_path: Path) -> None:
    run_study(study_from(content))
    assert json.loads((tmp_path / "run" / "problems.json").read_text()) == []
