"""Run a worker script in two processes, as a launcher of torch.distributed does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_two(worker: Path, root: Path, *arguments: str, timeout: float, environment: Mapping[str, str] = {}) -> None:
    """Call ``worker root rank *arguments`` as rank 0 and rank 1, and wait for both; one that fails is an error."""
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(worker), str(root), str(rank), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in running:
            _, message = process.communicate(timeout=timeout)
            assert process.returncode == 0, message
    finally:
        for process in running:
            process.kill()
