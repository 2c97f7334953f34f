"""A folder of simulated subjects in the form of BraTS 2017-2020, made once and reused while it is intact."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from monai_adv.data.simulation.acquisition import CONTRASTS
from monai_adv.data.simulation.fields import derive_seed
from monai_adv.data.simulation.files import (
    Job,
    check_folder,
    copy_notice,
    is_finished,
    write_cohort_file,
    write_subject,
)
from monai_adv.data.simulation.geometry import Geometry
from monai_adv.data.simulation.subject import simulate_subject
from monai_adv.data.simulation.template import template_folder
from monai_adv.errors import ConfigError, DataError

SCHEME = "brats2017"
"""Label scheme of the written files: 1 NCR, 2 oedema, 4 enhancing."""


def simulate_cohort(
    out: str | os.PathLike[str],
    subjects: int = 12,
    spacing: float = 2.0,
    seed: int = 0,
    *,
    geometry: Geometry | None = None,
    workers: int | None = None,
    progress: bool = False,
    first: int = 0,
) -> list[dict[str, object]]:
    """Write a cohort of simulated subjects as NIfTI files named as in BraTS 2017-2020, and list them.

    Subject `i` of a seed is the same in every cohort that contains it, however many subjects are asked for. Subjects
    already in the folder are reused when the same recipe made them and their files have the recorded checksums;
    everything else is made again. Each subject comes with a JSON file of its facts; `cohort.json` lists the folder.

    Args:
        out: folder to write to; it is created.
        subjects: number of subjects.
        spacing: edge of a voxel in mm, 1.0 to 4.0; not used with `geometry`.
        seed: 0 to 999, part of the names; other seeds give other subjects.
        geometry: the voxel grid; None for the smallest one of `spacing` that holds the head.
        workers: processes; None or 1 for this process only. More than one starts processes by spawning, for which
            a script must guard its code with ``if __name__ == "__main__":``.
        progress: show a progress bar, on a terminal.
        first: index of the first subject, to continue a cohort or to keep training and test subjects apart.

    Returns:
        A datalist: one dictionary per subject with `image` (paths of T1, T1c, T2, FLAIR), `label` (path), `subject`
        and `scheme`.

    Raises:
        ConfigError: an argument is out of range.
        DataError: nilearn is missing, or the folder holds a cohort of another geometry.

    Example:
        >>> items = simulate_cohort("cohort", subjects=2, spacing=2.5)  # doctest: +SKIP
        >>> [item["subject"] for item in items]  # doctest: +SKIP
        ['Sim000_00000', 'Sim000_00001']
    """
    for name, value, low, high in (
        ("subjects", subjects, 1, 99999),
        ("seed", seed, 0, 999),
        ("first", first, 0, 99999),
    ):
        if not low <= value <= high:
            raise ConfigError(f"simulate_cohort: {name} must lie between {low} and {high}, not {value}.")
    if workers is not None and workers < 1:
        raise ConfigError(f"simulate_cohort: workers must be 1 or more, not {workers}.")
    grid = Geometry.from_spacing(spacing) if geometry is None else geometry
    folder = Path(out)
    check_folder(folder, grid)
    jobs = [_job(folder, seed, index, grid) for index in range(first, first + subjects)]
    pending = [job for job in jobs if not is_finished(job)]
    if pending:
        template_folder()  # complain before any process is started
        folder.mkdir(parents=True, exist_ok=True)
        copy_notice(folder)
        bar = Console(stderr=True, quiet=not (progress and sys.stderr.isatty()))
        done = _produce_all(pending, workers or 1)
        for _ in track(done, "Simulating subjects", total=len(pending), console=bar, disable=bar.quiet):
            pass
    write_cohort_file(folder, jobs)
    return [_item(job) for job in jobs]


def _job(folder: Path, seed: int, index: int, geometry: Geometry) -> Job:
    case = f"Sim{seed:03d}_{index:05d}"
    return Job(folder, case, derive_seed("monai_adv.cohort", seed, index), seed, index, geometry)


def _item(job: Job) -> dict[str, object]:
    return {
        "image": [str(job.path(name)) for name in CONTRASTS],
        "label": str(job.path("seg")),
        "subject": job.case,
        "scheme": SCHEME,
    }


def _produce(job: Job) -> str:
    write_subject(job, simulate_subject(job.subject_seed, job.geometry))
    return job.case


def _produce_all(jobs: list[Job], workers: int) -> Iterator[str]:
    """Make the subjects, here or in spawned processes, in whatever order they get ready."""
    if min(workers, len(jobs)) == 1:
        yield from map(_produce, jobs)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        futures = [pool.submit(_produce, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "A worker process of simulate_cohort died. In a script, put the code that calls it under "
                '`if __name__ == "__main__":`; if memory is short, use fewer workers (workers=1 needs no guard).'
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
