"""Predictions on disk against truths on disk: Dice, HD95, and both lesion by lesion, per region and subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from monai_adv.data.files import write_atomic
from monai_adv.data.labels import REGIONS, region_masks
from monai_adv.data.segmentations import SegmentationPair, load_pair, pair_segmentations
from monai_adv.errors import ConfigError, DataError
from monai_adv.metrics import lesion_scores, region_scores
from monai_adv.stats.metrics_saver import setting_names
from monai_adv.studies.records import csv_bytes

RULES: Mapping[str, tuple[int, float]] = MappingProxyType(
    {"GLI": (3, 50.0), "SSA": (3, 50.0), "PED": (3, 50.0), "MEN": (1, 50.0), "MET": (1, 2.0)}
)
"""Dilation in voxels and largest volume in mm^3 that does not count, by challenge of BraTS 2023."""
SCORES = "scores.csv"
LESIONS = "lesions.csv"
METRICS = ("dice", "hd95", "iou", "lesion_dice", "lesion_hd95")


class Scored(NamedTuple):
    """What :func:`score_folders` found.

    Attributes:
        scores: one row per subject and region: Dice, HD95, IoU, voxel counts, lesion-wise Dice and HD95, and how many
            lesions were found, missed and invented.
        lesions: one row per lesion of the truth.
        problems: what could not be scored, and why.
    """

    scores: pd.DataFrame
    lesions: pd.DataFrame
    problems: list[str]


def score_folders(
    predictions: str | Path,
    truths: str | Path,
    *,
    scheme: str | None = None,
    prediction_scheme: str | None = None,
    files: str | None = None,
    rules: str = "GLI",
    ignore_affine: bool = False,
    output: str | Path | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Scored:
    """Score a folder of predictions against a folder of truths.

    Empty regions by the BraTS convention, see :func:`monai_adv.metrics.region_scores`; lesions by the rules of BraTS
    2023, see :func:`monai_adv.metrics.lesion_scores`. A pair that cannot be scored costs itself only.

    Args:
        predictions: see :func:`monai_adv.data.pair_segmentations`, which says what belongs together.
        truths: likewise.
        scheme: label scheme of the truths; None infers it from their names.
        prediction_scheme: of the predictions; that of the truth if None.
        files: name of a prediction with ``*`` for the subject, where a folder has several for one.
        rules: challenge of BraTS 2023 whose lesion rules hold: GLI, SSA, PED, MEN or MET.
        ignore_affine: take voxels to correspond where only the shapes agree.
        output: folder for ``scores.csv``, ``lesions.csv`` and ``summary.csv``, which hold what is scored so far should
            the run be stopped; nothing is written if None.
        on_progress: called with pairs done, pairs in all and the subject.

    Raises:
        DataError: if a folder cannot be read.
        ConfigError: for unknown rules.
        WriteError: if a table cannot be written.
    """
    if rules not in RULES:
        raise ConfigError(f"rules {rules!r} are unknown: one of {', '.join(RULES)}")
    pairs, found = pair_segmentations(predictions, truths, scheme, prediction_scheme=prediction_scheme, files=files)
    scored = Scored(pd.DataFrame(), pd.DataFrame(), [str(finding) for finding in found])
    scores: list[dict[str, Any]] = []
    lesions: list[dict[str, Any]] = []
    try:
        for done, pair in enumerate(pairs, start=1):
            try:
                own_scores, own_lesions = _score(pair, rules, ignore_affine)
            except (DataError, OSError, MemoryError) as error:
                text = str(error) or "out of memory"
                scored.problems.append(text if pair.subject in text else f"{pair.subject}: {text}")
            else:
                scores += own_scores
                lesions += own_lesions
            if on_progress is not None:
                on_progress(done, len(pairs), pair.subject)
    finally:
        scored = scored._replace(scores=pd.DataFrame(scores), lesions=pd.DataFrame(lesions))
        if output is not None and scores:
            write_scores(output, scored)
    return scored


def _score(pair: SegmentationPair, rules: str, ignore_affine: bool) -> tuple[list[Any], list[Any]]:
    prediction, truth, spacing = load_pair(pair, ignore_affine=ignore_affine)
    dilation, smallest = RULES[rules]
    predicted, true = region_masks(prediction), region_masks(truth)
    scores, lesions = [], []
    for region in REGIONS:
        found = lesion_scores(predicted[region], true[region], spacing, dilation=dilation, min_volume=smallest)
        scores.append(
            {
                "subject": pair.subject,
                "region": region,
                **region_scores(predicted[region], true[region], spacing),
                "lesion_dice": found.dice,
                "lesion_hd95": found.hd95,
                "lesions_found": found.found,
                "lesions_missed": found.missed,
                "lesions_invented": found.false_positives,
            }
        )
        for number, lesion in enumerate(found.lesions, start=1):
            row = {"volume_mm3": lesion.volume, "dice": lesion.dice, "hd95": lesion.hd95}
            known = {"subject": pair.subject, "region": region, "lesion": number}
            lesions.append({**known, **row, "found": lesion.found, "counted": lesion.counted})
    return scores, lesions


def write_scores(folder: str | Path, scored: Scored) -> list[Path]:
    """Write ``scores.csv``, ``lesions.csv`` and ``summary.csv``; the paths written.

    Raises:
        WriteError: if a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {SCORES: scored.scores, LESIONS: scored.lesions, "summary.csv": summarise_scores(scored.scores)}
    for name, table in tables.items():
        write_atomic(folder / name, csv_bytes(table))
    return [folder / name for name in tables]


def summarise_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per region over the subjects.

    Penalties are not averaged into distances: HD95 is given as a median, beside how many predictions and truths are
    empty; Dice with and without the subjects whose truth is empty.

    Args:
        scores: see :attr:`Scored.scores`.
    """
    rows = []
    for region, part in scores.groupby("region", sort=False) if len(scores) else ():
        full = part[~part["truth_empty"]]
        rows.append(
            {
                "region": region,
                "subjects": len(part),
                "empty_truth": int(part["truth_empty"].sum()),
                "empty_prediction": int(part["prediction_empty"].sum()),
                "dice_mean": part["dice"].mean(),
                "dice_sd": part["dice"].std(),
                "dice_median": part["dice"].median(),
                "dice_mean_where_present": full["dice"].mean() if len(full) else np.nan,
                "hd95_median": part["hd95"].median(),
                "lesion_dice_mean": part["lesion_dice"].mean(),
                "lesion_dice_median": part["lesion_dice"].median(),
                "lesion_hd95_median": part["lesion_hd95"].median(),
                "lesions_found": int(part["lesions_found"].sum()),
                "lesions_missed": int(part["lesions_missed"].sum()),
                "lesions_invented": int(part["lesions_invented"].sum()),
            }
        )
    return pd.DataFrame(rows)


def is_scores(path: Path) -> bool:
    """Whether a file is a ``scores.csv`` of :func:`write_scores`."""
    if not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as stream:
        return {"subject", "region", "lesion_dice"} <= set(stream.readline().strip().split(","))


def read_scores(paths: Sequence[Path], names: Sequence[str] | None = None) -> pd.DataFrame:
    """Tables of :func:`write_scores` as records, for :func:`monai_adv.stats.compare`.

    Args:
        paths: a ``scores.csv`` per folder of predictions, of the same subjects.
        names: what each is a result of, the ``attack`` of its rows; the folders that tell them apart if None.

    Raises:
        ConfigError: if one is no such table, or the subjects are not the same in all.
    """
    try:
        names = setting_names(paths) if names is None else list(names)
    except ValueError as error:
        raise ConfigError(f"{error} (--name)") from error
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise ConfigError(f"{len(paths)} tables need as many different names, got {', '.join(names)}")
    tables = {}
    for name, path in zip(names, paths):
        if not is_scores(path):
            raise ConfigError(f"{path} is no {SCORES} of `monai-adv score`; compare such tables with each other only")
        tables[name] = pd.read_csv(path, dtype={"subject": str, "region": str}).assign(attack=name)
    first = next(iter(tables.values()))
    for table, path in zip(tables.values(), paths):
        one, other = set(first["subject"]), set(table["subject"])
        if one != other:
            lacking = ", ".join(sorted(one ^ other)[:5])
            raise ConfigError(
                f"{path}: {len(one ^ other)} subjects are not in both it and {paths[0]}: {lacking}; score the same ones"
            )
    return pd.concat(tables.values(), ignore_index=True)
