"""Segmentations on disk: which prediction belongs to which truth, both on one grid and in canonical classes."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from monai_adv.data.datalist import Scan, file_stem, image_files, infer_scheme, naming_role, sanitise_subject
from monai_adv.data.findings import Finding, raise_for_errors
from monai_adv.data.headers import geometry_findings, read_header
from monai_adv.data.labels import MODALITIES, LabelScheme
from monai_adv.data.masks import load_mask
from monai_adv.errors import DataError

BESIDE = ("_perturbation", "_displacement", "_bias", "_residual")
"""What `monai-adv attack` writes beside its predictions."""
PARTS = "_-."  # what may follow a subject in the name of its prediction


@dataclass(frozen=True)
class SegmentationPair:
    """A prediction and the truth of one subject.

    Attributes:
        subject: ID, from the truth's name.
        prediction: file of the prediction.
        truth: file of the truth.
        scheme: label scheme of the truth.
        prediction_scheme: label scheme of the prediction.
    """

    subject: str
    prediction: Path
    truth: Path
    scheme: str
    prediction_scheme: str


def pair_segmentations(
    predictions: str | os.PathLike[str],
    truths: str | os.PathLike[str],
    scheme: str | None = None,
    *,
    prediction_scheme: str | None = None,
    files: str | None = None,
) -> tuple[list[SegmentationPair], list[Finding]]:
    """Find the prediction of every truth.

    The truths are the files called ``<subject>_seg`` or ``<subject>-seg``, or those in ``labelsTr``, or where there is
    neither every image file of the folder. A prediction is called like its subject, alone or with something after
    ``_``, ``-`` or ``.`` that holds no number; the four modalities are passed over.

    Args:
        predictions: folder of predictions; every folder below it is searched.
        truths: folder of truths, likewise: a BraTS or Decathlon folder as it is, or label files alone.
        scheme: label scheme of the truths; None infers it from their names.
        prediction_scheme: of the predictions; that of the truth if None.
        files: name of a prediction with ``*`` for the subject, where a folder has several for one.

    Returns:
        The pairs sorted by subject, and what has no partner or more than one.

    Raises:
        DataError: if a folder does not exist or holds no image file, or a scheme is unknown.
    """
    for asked in (scheme, prediction_scheme):
        if asked is not None:
            LabelScheme.get(asked)
    found: list[SegmentationPair] = []
    problems: list[Finding] = []
    truth_files = _truths(Path(truths), problems)
    of_subject: dict[str, list[Path]] = defaultdict(list)
    pattern = None if files is None else _pattern(files)
    images, candidates = 0, 0
    for file in _files(Path(predictions), problems):
        if naming_role(file_stem(file))[1] in MODALITIES or file_stem(file).endswith(BESIDE):
            images += 1
            continue
        if pattern is None:
            subject = _owner(file_stem(file), truth_files)
        else:
            match = pattern.fullmatch(file.name)
            if match is None:
                continue
            subject = match[1] if match[1] in truth_files else None
        candidates += 1
        if subject is not None:
            of_subject[subject].append(file)
        else:
            what, advice = "no truth has this name", f"Its truth was looked for in {truths}; remove it or add the truth"
            problems.append(Finding("error", sanitise_subject(file_stem(file)), str(file), what, advice))
    if not candidates:
        called = f" called {files}" if files else ""
        kind = " (only images of cases)" if images else ""
        raise DataError(f"{predictions}: no predictions{called} found{kind}. Give the folder of segmentation files.")
    lacking = []
    for subject, truth in sorted(truth_files.items()):
        own = of_subject.get(subject, [])
        exact = [file for file in own if naming_role(file_stem(file))[0] == subject]
        own = exact if len(exact) == 1 else own
        name = sanitise_subject(subject)
        if not own:
            lacking.append(subject)
            continue
        if len(own) != 1:
            what = f"has {len(own)} predictions: {', '.join(file.name for file in own[:5])}"
            advice = f'Say which by files (--files): "{own[0].name.replace(subject, "*", 1)}", say'
            problems.insert(0, Finding("error", name, str(truth), what, advice))
            continue
        known = scheme or _scheme(truth, subject)
        if known is None:
            what = "the label scheme cannot be told from the name"
            advice = f"Pass scheme (--scheme), one of {', '.join(LabelScheme.names())}"
            problems.append(Finding("error", name, str(truth), what, advice))
            continue
        found.append(SegmentationPair(name, own[0], truth, known, prediction_scheme or known))
    if lacking:
        more = f", and {len(lacking) - 1} more have none ({', '.join(lacking[1:4])} ...)" if len(lacking) > 1 else ""
        what, advice = f"has no prediction{more}", f"Predict it, or name it {lacking[0]}.nii.gz"
        problems.append(Finding("error", sanitise_subject(lacking[0]), str(truth_files[lacking[0]]), what, advice))
    return found, problems


def load_pair(
    pair: SegmentationPair, *, ignore_affine: bool = False
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Both segmentations of a pair as canonical class indices, and the size of a voxel.

    Args:
        pair: the files.
        ignore_affine: take voxels to correspond where only the shapes agree; nothing is ever resampled.

    Returns:
        Prediction and truth, uint8 (X, Y, Z), and the truth's spacing in mm.

    Raises:
        DataError: if a file cannot be read, holds values outside its scheme, or the grids differ.
    """
    headers = {"the truth": read_header(pair.truth), "the prediction": read_header(pair.prediction)}
    shapes = [header.shape[:3] for header in headers.values()]
    if shapes[0] != shapes[1] or not ignore_affine:
        differing = geometry_findings(pair.subject, headers)
        if differing and shapes[0] == shapes[1]:
            raise DataError(
                f"{differing[0]}; or, if you know that the voxels correspond, ignore_affine (--ignore-affine)"
            )
        raise_for_errors(differing)
    try:
        prediction = load_mask(pair.prediction, pair.prediction_scheme)
    except DataError as error:
        if "do not fit scheme" not in str(error):
            raise
        raise DataError(f"{error} Of a prediction that is prediction_scheme (--prediction-scheme).") from error
    truth = load_mask(pair.truth, pair.scheme)
    x, y, z = (float(step) for step in headers["the truth"].spacing[:3])
    return np.asarray(prediction.numpy()[0]), np.asarray(truth.numpy()[0]), (x, y, z)


def _files(folder: Path, problems: list[Finding]) -> list[Path]:
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder. Pass the folder that holds the segmentations.")
    found = Scan()
    files = sorted(image_files(folder, found))
    problems += found.problems
    if not files:
        raise DataError(f"{folder}: no image files. Pass the folder that holds the segmentations.")
    return files


def _truths(folder: Path, problems: list[Finding]) -> dict[str, Path]:
    """Truth of each subject; one that is there twice is none."""
    files = _files(folder, problems)
    decathlon = [file for file in files if file.parent.name == "labelsTr"]
    labelled = [file for file in files if naming_role(file_stem(file))[1] == "label"]
    plain = [file for file in files if naming_role(file_stem(file))[1] is None]
    by_subject: dict[str, list[Path]] = defaultdict(list)
    for file in decathlon or labelled or plain:
        by_subject[naming_role(file_stem(file))[0]].append(file)
    if not by_subject:
        raise DataError(f"{folder}: no segmentations among {len(files)} image files. Looked for <case>_seg, <case>-seg")
    for subject, own in by_subject.items():
        if len(own) > 1:
            where = ", ".join(str(file) for file in own)
            what = f"the truth is there {len(own)} times: {where}"
            problems.append(Finding("error", sanitise_subject(subject), "", what, "Keep one of them"))
    return {subject: own[0] for subject, own in by_subject.items() if len(own) == 1}


def _owner(name: str, subjects: dict[str, Path]) -> str | None:
    """The subject a prediction's name begins with; what follows holds no number, which could be another subject's."""
    if name in subjects:
        return name
    ends = [i for i in range(len(name) - 1, 0, -1) if name[i] in PARTS and not re.search(r"\d", name[i:])]
    return next((name[:end] for end in ends if name[:end] in subjects), None)


def _pattern(files: str) -> re.Pattern[str]:
    before, star, after = files.partition("*")
    if not star or "*" in after:
        raise DataError(f"files {files!r} must hold one *, which stands for the subject: *_prediction.nii.gz, say")
    return re.compile(f"{re.escape(before)}(.+){re.escape(after)}")


def _scheme(truth: Path, subject: str) -> str | None:
    if truth.parent.name == "labelsTr":
        return "msd"
    naming = naming_role(file_stem(truth))[2]
    if naming is not None:
        return infer_scheme(subject, naming)
    return infer_scheme(subject, "") if subject.lower().startswith("brats") else None
