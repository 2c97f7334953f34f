"""Fill data/cohort with the simulated cohort; subjects that are there already are kept.

Run as ``python data/fill.py [--subjects 12] [--spacing 2.0] [--seed 0] [--workers 1]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from monai_adv.data import check_folder, simulate_cohort

COHORT = Path(__file__).resolve().parent / "cohort"


def main(arguments: list[str] | None = None, out: Path = COHORT) -> int:
    """Simulate, then check what was written; the exit code is 1 when a file is not as it should be."""
    parser = argparse.ArgumentParser(description="Fill data/cohort with simulated brain MRI with gliomas.")
    parser.add_argument("--subjects", type=int, default=12, help="number of subjects (12)")
    parser.add_argument("--spacing", type=float, default=2.0, help="voxel edge in mm (2.0)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other subjects (0)")
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    options = parser.parse_args(arguments)
    items = simulate_cohort(
        out, options.subjects, options.spacing, options.seed, workers=options.workers, progress=True
    )
    report = check_folder(out)
    print(
        report.to_frame()[["subject", "status", "shape", "spacing", "WT_ml", "TC_ml", "ET_ml"]].to_string(index=False)
    )
    for finding in report.findings:
        print(f"{finding.severity}: {finding}")
    print(f"{len(items)} subjects in {out}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
