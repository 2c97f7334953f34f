from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from monai_adv.errors import ConfigError, WriteError
from monai_adv.studies import Shard, run_study, study_from
from monai_adv.studies.lock import merge_lock, run_lock

WHOLE = Shard(1, 1)


@contextmanager
def holder(folder: Path, shard: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a shard; killed at the end."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("lock_holder.py")), str(folder), shard]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]


def test_a_second_process_is_told_who_holds_the_folder_and_a_killed_one_holds_nothing(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["attacks"] = [{"name": "noise"}]
    run = tmp_path / "run"
    with holder(run, "1/1") as process:
        with pytest.raises(ConfigError, match=f"process {process.pid} on {platform.node()}, since 20.*is at work"):
            run_study(study_from(content))
        with pytest.raises(ConfigError, match=f"process {process.pid} "), run_lock(run, Shard(1, 2)):
            pass
        assert not (run / "study.json").exists()  # nothing was touched
    assert (run / "locks" / "run.json").exists()  # what the killed one left does not matter
    assert run_study(study_from(content)).computed == 9
    assert not (run / "locks" / "run.json").exists()


def test_shards_of_one_number_run_beside_each_other_and_nothing_else(tmp_path: Path) -> None:
    with run_lock(tmp_path, Shard(1, 2)), run_lock(tmp_path, Shard(2, 2)):
        for other in (Shard(1, 2), Shard(2, 2), WHOLE, Shard(1, 3), Shard(2, 12)):
            with pytest.raises(ConfigError, match=f"process {os.getpid()} "), run_lock(tmp_path, other):
                pass
        with merge_lock(tmp_path):
            pass
    with run_lock(tmp_path, WHOLE), merge_lock(tmp_path):
        pass
    with run_lock(tmp_path, Shard(2, 3)):
        pass


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(WriteError, match=r"cannot write .*run\.lock: .*is a file, not a folder"),
        run_lock(tmp_path / "file" / "run", WHOLE),
    ):
        pass
