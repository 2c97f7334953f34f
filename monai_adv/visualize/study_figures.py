"""Every figure of a run, with the numbers that it shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from monai_adv.data.files import write_atomic
from monai_adv.studies.analysis import Analysis
from monai_adv.studies.config import StudyConfig
from monai_adv.studies.records import csv_bytes
from monai_adv.studies.units import digest, safe_name
from monai_adv.studies.volumes import volumes_path
from monai_adv.threats import UNITS

from .curves import curve_table, dice_curves
from .heatmap import drop_heatmap, drop_table
from .montage import montage
from .paired import paired_plot, paired_table
from .slices import most_changed_slice
from .study_tables import scored
from .style import save_figure
from .viewer import Drawn


@dataclass(frozen=True)
class StudyFigure:
    """A figure as it is saved and shown.

    Attributes:
        name: of its files, without an ending.
        caption: what stands below it.
        figure: the drawing.
        data: the numbers in it.
        dpi: resolution of its PNG.
    """

    name: str
    caption: str
    figure: Figure
    data: pd.DataFrame
    dpi: int = 160

    def save(self, folder: Path) -> bytes:
        """Write ``<name>.png``, ``.svg`` and ``.csv``; returns the PNG."""
        png, _ = save_figure(self.figure, folder / self.name, dpi=self.dpi)
        write_atomic(folder / f"{self.name}.csv", csv_bytes(self.data))
        return png.read_bytes()


def study_figures(folder: Path, records: pd.DataFrame, analysis: Analysis, study: StudyConfig) -> Iterator[StudyFigure]:
    """Heat map, curves, a raincloud figure per victim, and the modalities where the run has them."""
    rows = scored(records)
    drops = drop_table(rows)
    yield StudyFigure(
        "dice_drop",
        "Mean Dice drop (clean minus attacked; dark is harm) of every setting in every region, over the subjects that "
        "have both values",
        drop_heatmap(drops),
        drops,
    )
    units = study.budgets.units
    own = [a.title for a in study.attacks if not a.follows]  # budgets of another kind have no place on the axis
    shared = rows[~rows["attack"].isin(own)]
    if shared.loc[shared["attack"] != "clean", "eps"].nunique() > 1:  # else there is no curve
        yield StudyFigure(
            "dice_curves",
            f"Mean Dice against eps (in {units} per channel), with 95 % bootstrap bands over subjects; the noise "
            "control is dashed",
            dice_curves(shared),
            curve_table(shared),
        )
    eps = study.figures.eps if study.figures.eps is not None else max(study.budgets.eps)
    for victim, comparison in analysis.comparisons.items():
        part = rows[rows["victim"] == victim]
        at = eps if np.isclose(part["eps"].astype(float), eps).any() else None
        which = f"at eps {eps:g} {units}" if at is not None else "at the largest budget of each attack"
        yield StudyFigure(
            safe_name(f"paired_{victim}"),
            f"{victim}: Dice of every subject {which}: points (lines join a subject), quartiles and "
            "density; brackets are Holm-adjusted",
            paired_plot(part, comparison, eps=at),
            paired_table(part, comparison, eps=at),
        )
    yield from _modalities(folder)


def _modalities(folder: Path) -> Iterator[StudyFigure]:
    """Universal perturbations of single modalities, where ``monai-adv universal`` left its table in the run folder."""
    for path in sorted([*folder.glob("modality_table.csv"), *folder.glob("*/modality_table.csv")]):
        table = pd.read_csv(path).rename(columns={"drop_mean": "drop"})
        noise = table.assign(modality=table["modality"] + ", noise", drop=table["noise_drop_mean"])
        both = pd.concat([table, noise]).assign(victim="").sort_values("modality", kind="stable")
        yield StudyFigure(
            "modality_vulnerability"
            if path.parent == folder
            else safe_name(f"modality_vulnerability_{path.parent.name}"),
            "Modality vulnerability: mean Dice drop of held-out subjects under one universal perturbation of a single "
            "modality (and of all), beside noise of the same size",
            drop_heatmap(both, rows="modality"),
            table,
        )


def drawn_units(folder: Path, records: pd.DataFrame, study: StudyConfig) -> list[Drawn]:
    """Attacked subjects whose volumes the run keeps, in the order of the records; those of the noise come last."""
    rows = scored(records)
    eps = {a.title: study.drawn_eps(a.title) for a in study.attacks}
    keys = ["subject", "victim", "attack", "method", "eps", "units", "norm", "setting"]
    units = [{str(k): v for k, v in row.items()} for row in rows[keys].drop_duplicates().to_dict("records")]
    clean = {(u["subject"], u["victim"]): u for u in units if u["attack"] == "clean"}
    found = []
    for unit in units:
        other = clean.get((unit["subject"], unit["victim"]))
        if unit["attack"] == "clean" or unit["eps"] != eps.get(unit["attack"]) or other is None:
            continue
        paths = volumes_path(folder, other), volumes_path(folder, unit)
        if all(path.is_file() for path in paths):
            found.append(Drawn(unit, *paths, dice=_dice_pairs(rows, unit)))
    subjects = list(dict.fromkeys(rows["subject"]))
    return sorted(found, key=lambda d: (subjects.index(d.identity["subject"]), d.identity["method"] == "noise"))


def montages(drawn: list[Drawn]) -> Iterator[StudyFigure]:
    """One picture per drawn subject, victim and attack; noise is left out."""
    names: set[str] = set()
    for one in drawn:
        volumes = None if one.identity["method"] == "noise" else one.load()
        if volumes is None:
            continue
        clean, attacked = volumes
        at = most_changed_slice(clean["prediction"], attacked["prediction"], clean["affine"])
        figure = montage(
            clean["image"],
            attacked["image"],
            clean["truth"],
            clean["prediction"],
            attacked["prediction"],
            spacing=[float(s) for s in clean["spacing"]],
            affine=clean["affine"],
            title=one.title,
            slice_index=at,
            units=one.identity["units"] if one.identity["units"] in UNITS else "std",
            moved_truth=None if np.array_equal(attacked["truth"], clean["truth"]) else attacked["truth"],
            dice=one.dice,
        )
        data = pd.DataFrame(
            [{"region": r, "dice_clean": a, "dice_attacked": b, "slice": at} for r, (a, b) in one.dice.items()]
        )
        caption = f"{one.title}: the axial slice whose prediction changed most"
        name = safe_name(f"montage_{one.title}")
        if name.casefold() in names:  # "a b" of c and "a" of "b c" are one title
            name = safe_name(f"montage_{digest(one.identity)[:10]}_{one.title}")
        names.add(name.casefold())
        yield StudyFigure(name, caption, figure, data, dpi=110)  # voxels are coarser anyway


def _dice_pairs(rows: pd.DataFrame, identity: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    own = rows[(rows["subject"] == identity["subject"]) & (rows["victim"] == identity["victim"])]
    clean = own[own["attack"] == "clean"].set_index("region")["dice"]
    attacked = own[own["setting"] == identity["setting"]].set_index("region")["dice"]
    return {str(region): (float(clean[region]), float(attacked[region])) for region in clean.index}
