"""Tables of a run for the report, and as CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from monai_adv.data.files import write_atomic
from monai_adv.stats import summarise, tables
from monai_adv.studies.analysis import Analysis, shown_ordering
from monai_adv.studies.records import csv_bytes
from monai_adv.studies.units import safe_name

from .report import frame_cells
from .style import in_order

REGIONS = ("WT", "TC", "ET")


def scored(records: pd.DataFrame) -> pd.DataFrame:
    """Rows with a result."""
    return records[(records["status"] == "ok") & records["region"].notna()]


def mean_table(records: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice, with and without subjects whose truth is empty, and median HD95 in mm, per victim and setting."""
    rows = scored(records)
    dice = rows.pivot_table(index=["victim", "setting"], columns="region", values="dice", aggfunc="mean")
    described = summarise(rows, by=("victim", "setting", "region")).set_index(["victim", "setting", "region"])
    without = described["mean_nonempty"].unstack("region")
    empty = described["truth_empty"].unstack("region")
    hd95 = rows.pivot_table(index=["victim", "setting"], columns="region", values="hd95", aggfunc="median")
    count = rows.groupby(["victim", "setting"])["subject"].nunique()
    regions = _regions(rows)
    table = dice[regions].add_prefix("Dice ")
    for region in regions:  # BraTS scores an empty truth 1 or 0, so the mean without such cases stands beside it
        if empty[region].gt(0).any():
            table[f"Dice {region} without empty truth"] = without[region]
            table[f"empty truth {region}"] = empty[region].astype(int)
    table = table.join(hd95.reindex(columns=regions).add_prefix("median HD95 ")).join(count.rename("n"))
    return table.loc[_in_order(rows)].reset_index()


def size_table(records: pd.DataFrame) -> pd.DataFrame:
    """Perturbation norms in all three units, SSIM and PSNR per victim and setting, and seconds where recorded."""
    rows = scored(records)
    attacked = rows[rows["attack"] != "clean"]
    columns = ["linf_std", "linf_range", "linf_absolute", "l2_std", "ssim", "psnr", "seconds"]
    columns = [c for c in columns if c in attacked and attacked[c].notna().any()]
    table = attacked.groupby(["victim", "setting"])[columns].mean()
    return table.loc[_in_order(attacked)].reset_index()


def subject_table(records: pd.DataFrame) -> pd.DataFrame:
    """One row per subject, victim and setting: Dice and HD95 of every region, and the fall of the mean Dice.

    A unit without a result has its status and no numbers.
    """
    keys = ["subject", "victim", "setting"]
    rows = scored(records)
    regions = _regions(rows)
    dice = rows.pivot_table(index=keys, columns="region", values="dice")[regions]
    clean = rows[rows["attack"] == "clean"].groupby(keys[:2])["dice"].mean()
    table = dice.add_prefix("Dice ").assign(mean=dice.mean(axis=1)).rename(columns={"mean": "mean Dice"})
    before = pd.Series([clean.get(key[:2], float("nan")) for key in table.index], index=table.index, dtype=float)
    table["drop"] = before - table["mean Dice"]
    hd95 = rows.pivot_table(index=keys, columns="region", values="hd95", dropna=False).reindex(columns=regions)
    table = table.join(hd95.add_prefix("HD95 "))
    table["linf std"] = rows.groupby(keys)["linf_std"].max()
    every = records.drop_duplicates(keys)
    ranks = {setting: i for i, setting in enumerate(_settings(records))}
    victims = {victim: i for i, victim in enumerate(dict.fromkeys(records["victim"]))}
    every = every.assign(v=every["victim"].map(victims), s=every["setting"].map(ranks))
    every = every.sort_values(["subject", "v", "s"], kind="stable")
    result = table.reindex(pd.MultiIndex.from_frame(every[keys])).reset_index()
    return result.assign(status=every["status"].to_numpy())


def _regions(rows: pd.DataFrame) -> list[str]:
    have = list(dict.fromkeys(rows["region"]))
    return [r for r in REGIONS if r in have] + [r for r in have if r not in REGIONS]


def _settings(records: pd.DataFrame) -> list[str]:
    """Settings: clean, controls, then attacks in the order of the records, each by its budget."""
    attacks = in_order(list(records["attack"]))
    known = records.drop_duplicates("setting")
    known = known.assign(place=[attacks.index(str(a)) for a in known["attack"]])
    return list(known.sort_values(["place", "eps"], kind="stable")["setting"])


def _in_order(rows: pd.DataFrame) -> pd.MultiIndex:
    """Pairs of victim and setting: victims in the order of the records, settings see `_settings`."""
    have = set(rows[["victim", "setting"]].itertuples(index=False, name=None))
    settings = _settings(rows)
    pairs = [(v, s) for v in dict.fromkeys(rows["victim"]) for s in settings if (v, s) in have]
    return pd.MultiIndex.from_tuples(pairs, names=["victim", "setting"])


def result_tables(analysis: Analysis, records: pd.DataFrame) -> dict[str, tuple[str, Any]]:
    """File name -> (caption, table or comparison), in the order of the report."""
    found: dict[str, tuple[str, Any]] = {
        "means": ("Mean Dice per region and setting (n subjects)", mean_table(records))
    }
    if not analysis.defenses.empty:
        found["defenses"] = "Defense x attack: mean Dice over the subjects that every victim has", analysis.defenses
    if not analysis.claims.empty:
        found["claims"] = (
            "Published claims (Liu et al. 2019) and whether they hold here: mean Dice over regions, exact one-sided "
            "Wilcoxon signed-rank over subjects, Holm over the tests of each claim (column tests)",
            analysis.claims,
        )
    if not analysis.ordering.empty:
        found["ordering"] = (
            "Expected order clean > noise > FGSM > I-FGSM: one-sided tests between neighbours, Holm over the rows",
            shown_ordering(analysis.ordering),
        )
    for victim, comparison in analysis.comparisons.items():
        found[f"comparison_{victim}"] = (
            f"{victim}: every setting against {comparison.baseline}, Wilcoxon signed-rank over subjects, Holm over "
            f"{comparison.tests} tests",
            comparison,
        )
    if analysis.victims is not None:
        found["comparison_between_victims"] = "Victims against each other under each setting", analysis.victims
    found["sizes"] = "Size of the perturbations (mean over subjects)", size_table(records)
    return found


def write_frames(folder: Path, frames: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Write tables as CSV (all digits), Markdown and LaTeX (as read) into ``folder/tables``."""
    written = []
    for name, frame in frames.items():
        cells = frame_cells(frame)
        contents = {
            "csv": csv_bytes(frame),
            "md": tables.markdown(cells["headers"], cells["rows"]).encode(),
            "tex": tables.latex(cells["headers"], cells["rows"]).encode(),
        }
        for ending, content in contents.items():
            path = folder / "tables" / f"{safe_name(name)}.{ending}"
            write_atomic(path, content)
            written.append(path)
    return written
