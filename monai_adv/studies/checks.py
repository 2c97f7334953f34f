"""Automatic checks of a run: invariants that must hold, and signs that an attack is weaker than it should be.

Reference:
    Carlini et al., On evaluating adversarial robustness, 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from monai_adv.attacks import ATTACKS


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        status: "PASS", "WARN", "FAIL" or "NOT RUN".
        detail: the number, its threshold, n.
    """

    name: str
    status: str
    detail: str


def run_checks(records: pd.DataFrame, problems: Sequence[str] = ()) -> list[Check]:
    """Checks that a table of records allows. A FAIL invalidates the run, a WARN says that strength is in doubt.

    Args:
        records: tidy records.
        problems: what the run could not score, one line each.
    """
    ok = records[records["status"] == "ok"]
    attacked = ok[ok["attack"] != "clean"]
    if attacked.empty:
        return [Check("any attacked unit", "FAIL", "no attacked unit has a result")]
    checks = [_failures(records, problems), _budget(attacked), _outside(attacked)]
    checks += [
        _pairwise(attacked, "iterative at least as strong as one step", "ifgsm", "fgsm"),
        _pairwise(attacked, "attack stronger than noise of its size", "fgsm", "noise"),
        _monotone(attacked),
        _zero_gradient(attacked),
    ]
    return checks


def _failures(records: pd.DataFrame, problems: Sequence[str]) -> Check:
    bad = records[records["status"] != "ok"]
    counts = [f"{n} {status}" for status, n in bad["status"].value_counts().items()]
    counts += [f"{len(problems)} problems named in the summary"] if problems else []
    return Check("every unit has a result", "FAIL" if counts else "PASS", ", ".join(counts) or f"{len(records)} rows")


def _budget(attacked: pd.DataFrame) -> Check:
    name = "perturbation within the budget"
    # Gaussian noise has the budget as its standard deviation and no largest value
    own = attacked[(attacked["method"] != "noise") & (attacked["norm"] != "parameter") & np.isfinite(attacked["eps"])]
    if own.empty:
        return Check(name, "NOT RUN", "no attack but noise and such without a norm ball")
    sizes = np.array([row[f"{row['norm']}_{row['units']}"] / row["eps"] for _, row in own.iterrows()], dtype=float)
    worst = float(sizes.max())
    # scanner intensities in float32 round the last step by up to some 1e-3 of a small budget
    detail = f"largest {worst:.6f} of eps, allowed 1.002, n={len(own)}"
    return Check(name, "PASS" if worst <= 1.002 else "FAIL", detail)


def _outside(attacked: pd.DataFrame) -> Check:
    name = "zero outside the support"
    moving = [method for method, kind in ATTACKS.items() if kind.moves_voxels]  # anatomy leaves its old place
    own = attacked[~attacked["method"].isin(moving)]
    if own.empty:
        return Check(name, "NOT RUN", "only attacks that move the anatomy")
    worst = float(own["outside_max"].max())
    return Check(name, "PASS" if worst == 0 else "FAIL", f"largest change {worst:g}, allowed 0")


def _pairwise(attacked: pd.DataFrame, name: str, stronger: str, weaker: str) -> Check:
    keys = ["subject", "victim", "eps", "region"]
    a = attacked[attacked["method"] == stronger].set_index(keys)["dice"]
    b = attacked[attacked["method"] == weaker].set_index(keys)["dice"]
    a, b = (s[~s.index.duplicated()] for s in (a, b))  # the first of several attacks of one method
    both = pd.concat([a, b], axis=1, keys=["strong", "weak"]).dropna()
    if both.empty:
        return Check(name, "NOT RUN", f"needs {stronger} and {weaker}")
    means = both.groupby(level=["victim", "eps", "region"]).mean()
    wrong = means[means["strong"] > means["weak"] + 0.01]
    detail = f"{stronger} against {weaker}: {len(wrong)} of {len(means)} cells reversed by more than .01 mean Dice"
    return Check(name, "WARN" if len(wrong) else "PASS", detail)


def _monotone(attacked: pd.DataFrame) -> Check:
    name = "Dice falls with eps"
    own = attacked[attacked["method"] != "noise"]
    means = own.groupby(["victim", "attack", "region", "eps"])["dice"].mean().unstack("eps").sort_index(axis=1)
    if means.shape[1] < 2:
        return Check(name, "NOT RUN", "needs two budgets")
    rises = means.diff(axis=1).iloc[:, 1:]
    wrong = int((rises > 0.01).to_numpy().sum())
    detail = f"{wrong} of {rises.size} steps rise by more than .01, largest rise {float(np.nanmax(rises)):.4f}"
    return Check(name, "WARN" if wrong else "PASS", detail)


def _zero_gradient(attacked: pd.DataFrame) -> Check:
    name = "share of exactly zero gradients"
    known = attacked["zero_gradient"].dropna()
    if known.empty:
        return Check(name, "NOT RUN", "no gradient was taken")
    worst = float(known.max())
    detail = f"largest share of support voxels {worst:.4f}, threshold .10 (gradient masking)"
    return Check(name, "WARN" if worst > 0.1 else "PASS", detail)
