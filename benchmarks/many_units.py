"""Listing, resuming and merging a study of many finished units: time and peak memory.

    python benchmarks/many_units.py            # 1,000 and 10,000 units

The units are not computed: results of the usual size are written straight through the store. Every phase runs in a
process of its own; "grown" is its peak memory beyond what its imports and the victim took.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

PER_SUBJECT = 100
PHASES = ("list", "resume", "merge")


def content(folder: Path) -> dict[str, Any]:
    """A study of 100 units per subject: the clean image and 33 attacks at three budgets."""
    attacks = [{"name": "ifgsm", "label": f"ifgsm {k}", "steps": 10 + k} for k in range(33)]
    return {
        "data": {"root": str(folder / "data")},
        "victims": [{"name": "tiny", "checkpoint": str(folder / "tiny.pt")}],
        "attacks": attacks,
        "budgets": {"eps": [0.05, 0.1, 0.2]},
        "figures": {"montages": 0},
        "output": str(folder / "run"),
    }


def prepare(folder: Path, subjects: int) -> None:
    """Write cohort, checkpoint and the result of every unit."""
    from kill_nine import tiny_cohort, tiny_victim

    from monai_adv.studies import study_from
    from monai_adv.studies.runner import make_plan
    from monai_adv.studies.units import UnitStore

    tiny_cohort(folder / "data", subjects)
    tiny_victim(folder / "tiny.pt")
    plan = make_plan(study_from(content(folder)))
    plan.read_keys()
    store = UnitStore(folder / "run" / "units")
    numbers = ("dice", "hd95", "iou", "voxel_accuracy", "linf_std", "linf_range", "linf_absolute", "l2_std",
               "l2_range", "l2_absolute", "outside_max", "ssim", "psnr", "zero_gradient", "seconds")  # fmt: skip
    for _, groups in plan.units():
        for unit in (unit for group in groups for unit in group):
            row = {**unit.identity, "status": "ok", **dict.fromkeys(numbers, 0.123456789 + unit.eps)}
            row |= {"truth_voxels": 1000, "prediction_voxels": 900, "truth_empty": False, "prediction_empty": False}
            row |= {"success": True, "forwards": 12, "backwards": 10}
            trace = [{"step": k, "restart": 0, "loss": 0.1 * k, "score": 0.9, "zero_gradient": 0.0} for k in range(20)]
            rows = [{**row, "region": region} for region in ("WT", "TC", "ET")]
            store.write(unit.identity, unit.key, {"status": "ok", "rows": rows, "trace": trace})


def phase(name: str, folder: Path) -> dict[str, Any]:
    """Run one phase; what it took."""
    from monai_adv.studies import merge_study, run_study, study_from
    from monai_adv.studies.records import write_records
    from monai_adv.studies.runner import make_plan

    study = study_from(content(folder))
    make_plan(study.model_copy(update={"data": study.data.model_copy(update={"subjects": ["BraTS2021_00000"]})}))
    write_records(folder / "warm", [])  # what pandas and pyarrow load at the first call
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, busy = time.perf_counter(), time.process_time()
    if name == "list":
        plan = make_plan(study)
        plan.read_keys()
        count = sum(len(group) for _, groups in plan.units() for group in groups)
    elif name == "resume":
        result = run_study(study)
        assert result.computed == 0
        assert not result.problems
        count = result.reused
    else:
        count = merge_study(folder / "run").units
    took, busy = time.perf_counter() - started, time.process_time() - busy
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"phase": name, "units": count, "seconds": took, "cpu": busy, "grown": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--in-process", action="store_true", help="quick, for a try: memory then says nothing")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phase:
        print(json.dumps(phase(given.phase, given.folder)))
        return
    print(f"{'units':>7} {'phase':<7}{'seconds':>9}{'CPU':>7}{'grown, MiB':>12}")
    for units in given.units:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), max(1, units // PER_SUBJECT))
            for name in PHASES:
                if given.in_process:
                    found = phase(name, Path(folder))
                else:
                    command = [sys.executable, __file__, "--phase", name, "--folder", folder]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    found = json.loads(done.stdout.splitlines()[-1])
                row = (
                    f"{found['units']:>7} {name:<8}{found['seconds']:>9.2f}{found['cpu']:>7.2f}{found['grown']:>12.1f}"
                )
                print(row, flush=True)


if __name__ == "__main__":
    main()
