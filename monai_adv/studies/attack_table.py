"""One table of all attacks of one or several runs: what each did to Dice, with what change, at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monai_adv.attacks import ATTACKS, option_defaults
from monai_adv.data import REGIONS
from monai_adv.data.files import write_atomic
from monai_adv.errors import ConfigError
from monai_adv.studies.records import csv_bytes, read_records

SIZES = ("linf_std", "l2_std", "ssim")
COSTS = ("forwards", "backwards", "seconds")


def attack_table(records: pd.DataFrame) -> pd.DataFrame:
    """Means over subjects per victim and setting, the strongest attack first within a budget.

    Args:
        records: tidy records, see :func:`monai_adv.studies.records.read_records`; only units with a result count.

    Returns:
        One row per victim and setting: ``n`` subjects, mean Dice per region and over regions (``dice``), the
        perturbation's norms (for L-inf also the smallest, median and largest subject: the distribution of what a
        minimum-norm attack needs) and SSIM, success rate, passes and seconds per subject, ``rank`` by mean Dice within
        victim and budget (1 is strongest; noise and clean take part) and ``wins``, the number of subjects for which
        the setting has the lowest Dice of its budget (ties count for all).
    """
    scored = records[(records["status"] == "ok") & records["region"].notna()]
    if scored.empty:
        raise ConfigError("no unit of these records has a result")
    keys = ["victim", "attack", "method", "eps", "units", "norm", "setting"]
    cases = scored.groupby([*keys, "subject"], sort=False, dropna=False)
    per_case = cases[["dice", *SIZES, *COSTS]].mean()
    per_case["success"] = cases["success"].first().map({True: 1.0, False: 0.0, "True": 1.0, "False": 0.0})
    table = per_case.groupby(level=keys, sort=False, dropna=False).mean()
    table.insert(0, "n", per_case.groupby(level=keys, sort=False, dropna=False).size())
    regions = scored.pivot_table(index=keys, columns="region", values="dice", aggfunc="mean", sort=False, dropna=True)
    spread = per_case["linf_std"].groupby(level=keys, sort=False, dropna=False)
    for name, share in (("min", 0.0), ("median", 0.5), ("max", 1.0)):
        table[f"linf_std_{name}"] = spread.quantile(share)
    named = [r for r in REGIONS if r in regions]
    regions = regions[named + [r for r in regions if r not in named]].add_prefix("dice_")
    table = table.join(regions)
    by_budget = ["victim", "eps", "units", "norm"]
    table["rank"] = table.groupby(level=by_budget, dropna=False)["dice"].rank(method="min")
    lowest = per_case["dice"].groupby(level=[*by_budget, "subject"], dropna=False).transform("min")
    table["wins"] = (per_case["dice"] <= lowest + 1e-9).groupby(level=keys, sort=False, dropna=False).sum()
    sizes = ["linf_std", "linf_std_min", "linf_std_median", "linf_std_max", *SIZES[1:]]
    columns = ["n", *regions.columns, "dice", *sizes, "success", *COSTS, "rank", "wins"]
    order = ["victim", "norm", "units", "eps", "dice"]
    return table.reset_index().sort_values(order, kind="stable")[[*keys, *columns]].reset_index(drop=True)


def read_runs(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Records of several runs in one frame; what they share (the clean rows) is taken once.

    Raises:
        ConfigError: if two runs have different results for one setting, so that they are not of one victim or data.
    """
    frames = [read_records(path) for path in paths]
    keys = ["subject", "victim", "setting", "region"]
    together = pd.concat(frames, ignore_index=True)
    together = together[together["region"].notna()]
    spread = together.groupby(keys)["dice"].agg(lambda d: d.max() - d.min())
    if (spread > 1e-9).any():
        raise ConfigError(f"the runs differ in {spread.idxmax()}: are they of the same victim, data and seed?")
    return together.drop_duplicates(keys).reset_index(drop=True)


def write_attack_table(paths: Sequence[str | Path], folder: str | Path) -> tuple[pd.DataFrame, list[Path]]:
    """Write ``attack_table.csv`` and ``attack_table.md`` of one or several runs to a folder."""
    table = attack_table(read_runs(paths))
    folder = Path(folder)
    write_atomic(folder / "attack_table.csv", csv_bytes(table))
    write_atomic(folder / "attack_table.md", markdown(table).encode())
    return table, [folder / "attack_table.csv", folder / "attack_table.md"]


def markdown(table: pd.DataFrame) -> str:
    """The table for readers: rounded, a block per victim and kind of budget."""
    blocks = []
    for (victim, norm, units, eps), part in table.groupby(["victim", "norm", "units", "eps"], sort=False, dropna=False):
        size = float(eps)  # type: ignore[arg-type]
        where = "clean" if size == 0 else f"{norm}, " + ("unbounded" if np.isinf(size) else f"eps {size:g} {units}")
        regions = [c for c in part.columns if c.startswith("dice_")]
        head = ["attack", *(c.removeprefix("dice_") for c in regions), "mean Dice", "L-inf std", "L2 std", "SSIM",
                "success", "forwards", "backwards", "s", "strongest for"]  # fmt: skip
        lines = [f"### {victim}, {where} (n = {int(part['n'].max())})", "", _row(head), _row(["---"] * len(head))]
        for row in part.to_dict("records"):
            lines.append(_row([
                row["attack"], *(f"{row[c]:.3f}" for c in regions), f"{row['dice']:.3f}", _size(row),
                f"{row['l2_std']:.3g}", f"{row['ssim']:.4f}", _share(row["success"]), f"{row['forwards']:.0f}",
                f"{row['backwards']:.0f}", f"{row['seconds']:.1f}", f"{row['wins']:.0f} of {row['n']}",
            ]))  # fmt: skip
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def catalogue() -> str:
    """The documentation's table of attacks as Markdown, made from the classes themselves."""
    head = ["name", "what it is", "reference", "targeted", "budget", "options of its own (default)"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, kind in ATTACKS.items():
        first = (kind.__doc__ or "").strip().splitlines()[0]
        if kind.units is not None:
            default = "" if kind.default_eps is None else f", default {kind.default_eps[0]:g}"
            budget = f"{kind.units}{default}"
        else:
            norms = " or ".join({"linf": "L-inf", "l2": "L2"}[n] for n in kind.norms)
            budget = norms if kind.default_eps is None else f"{norms}, unbounded unless given"
        options = ", ".join(f"{k} ({v})" for k, v in option_defaults(name).items())
        mode = {"both": "both", "targeted": "targeted", "untargeted": "untargeted"}[kind.modes]
        lines.append(_row([f"`{name}`", first, kind.reference, mode, budget, options or "none"]))
    return "\n".join(lines) + "\n"


def _size(row: Mapping[Any, Any]) -> str:
    """Largest change of a voxel: the mean over subjects, or median and range where subjects differ."""
    low, middle, high = (row[f"linf_std_{name}"] for name in ("min", "median", "max"))
    if high <= 1.01 * low:
        return f"{row['linf_std']:.3g}"
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.0%}"
