"""From a folder of image files to a MONAI datalist, by the naming conventions of the releases."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_adv.data.findings import Finding, raise_for_errors
from monai_adv.data.headers import ITK_ENDINGS, NIFTI_ENDINGS, stem
from monai_adv.data.labels import MODALITIES, LabelScheme
from monai_adv.errors import DataError

SUFFIXES: dict[str, dict[str, str]] = {
    "2017-2021": {"T1": "_t1", "T1c": "_t1ce", "T2": "_t2", "FLAIR": "_flair", "label": "_seg"},
    "2023+": {"T1": "-t1n", "T1c": "-t1c", "T2": "-t2w", "FLAIR": "-t2f", "label": "-seg"},
}
"""File name endings (before .nii.gz, .nii, .nrrd, .mha or .mhd) of the BraTS releases."""
MSD_CHANNELS = ("FLAIR", "T1", "T1c", "T2")
"""Channel order of Decathlon Task01 when its dataset.json does not say."""

_ROLES = {ending: (naming, role) for naming, roles in SUFFIXES.items() for role, ending in roles.items()}
_CASE_FILE = re.compile(rf"^(?P<case>.+?)(?P<ending>{'|'.join(map(re.escape, _ROLES))})$", re.IGNORECASE)
_RELEASE = re.compile(r"^brats(?:20)?(17|18|19|20|21)_", re.IGNORECASE)
_MODALITY_NAMES = {"flair": "FLAIR", "t2f": "FLAIR", "t1": "T1", "t1w": "T1", "t1n": "T1", "t1gd": "T1c", "t1ce": "T1c"}
_MODALITY_NAMES |= {"t1c": "T1c", "t2": "T2", "t2w": "T2"}


@dataclass
class Scan:
    """What :func:`scan` found.

    Attributes:
        items: usable items, sorted by subject.
        problems: what is wrong with the others.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.items, self.problems))


def brats_datalist(
    root: str | os.PathLike[str], scheme: str | LabelScheme | None = None, *, require_label: bool = True
) -> list[dict[str, Any]]:
    """List the cases of a BraTS or Decathlon folder as MONAI items.

    The layouts of BraTS 2017-2021 (``<case>_t1 _t1ce _t2 _flair _seg``), of BraTS 2023 and later
    (``<case>-t1n -t1c -t2w -t2f -seg``) and of Medical Segmentation Decathlon Task01 (``imagesTr``, ``labelsTr``) are
    recognised by their names, as NIfTI (.nii.gz, .nii), NRRD (.nrrd) or MetaImage (.mha, .mhd); cases may lie in
    folders of their own, in nested folders (HGG/LGG) or side by side.
    Only names are looked at here; the files are opened by :func:`monai_adv.data.load_case` or, for all at once, by
    :func:`monai_adv.data.check_folder`.

    Args:
        root: the folder; every folder below it is searched. Hidden files are ignored.
        scheme: the label scheme; None infers it from the names of each case.
        require_label: whether a case without a label file is an error.

    Returns:
        One item per subject, sorted by subject: ``{"image": [t1, t1c, t2, flair], "label": path or None,
        "subject": id, "scheme": name}``. For the Decathlon ``"image"`` is the path of the one 4D file and
        ``"channels"`` says which of its channels are T1, T1c, T2, FLAIR.

    Raises:
        DataError: if there is no case, or if one lacks a file, is there twice or has an ambiguous label scheme. Use
            :func:`scan` to go on with the other cases.

    Example:
        >>> items = brats_datalist("BraTS2021/")                      # doctest: +SKIP
        >>> items[0]["subject"], items[0]["scheme"]                   # doctest: +SKIP
        ('BraTS2021_00000', 'brats2021')
    """
    items, problems = scan(root, scheme, require_label=require_label)
    bad = len({problem.subject for problem in problems if problem.severity == "error"})
    raise_for_errors(problems, f"{root}: {bad} of {len(items) + bad} subjects cannot be used")
    return items


def scan(root: str | os.PathLike[str], scheme: str | LabelScheme | None = None, *, require_label: bool = True) -> Scan:
    """List the usable cases of a folder and what is wrong with the others; same arguments as :func:`brats_datalist`.

    Returns:
        A :class:`Scan`, which unpacks into ``items, problems``. A problem concerns its own subject only.

    Raises:
        DataError: if the folder does not exist, holds no case that can be recognised, or the scheme is unknown.
    """
    folder = Path(root)
    if not os.path.isdir(folder):  # Path.is_dir raises where a name is too long or a parent not allowed
        what = "a file, not a folder" if os.path.exists(folder) else "no such folder"
        raise DataError(f"{folder}: {what}. Pass the folder that holds the cases.")
    asked = None if scheme is None else LabelScheme.get(scheme).name
    found = Scan()
    files = []
    for file in sorted(image_files(folder, found)):
        if _printable(str(file.relative_to(folder))):
            files.append(file)
        else:
            what, advice = "the name holds bytes that are no text", "Rename it"
            found.problems.append(Finding("error", sanitise_subject(file_stem(file)), ascii(str(file)), what, advice))
    msd_roots = sorted({file.parent.parent for file in files if file.parent.name in ("imagesTr", "imagesTs")})
    for msd_root in msd_roots:
        _scan_msd(msd_root, files, asked, require_label, found)
    rest = [file for file in files if not any(file.is_relative_to(msd_root) for msd_root in msd_roots)]
    _scan_brats(rest, asked, require_label, found)
    _drop_duplicates(found)
    if not found.items and not found.problems:
        looked_for = "; ".join(f"{naming}: <case>{', '.join(s.values())}" for naming, s in SUFFIXES.items())
        raise DataError(
            f"{folder}: no cases found among {len(files)} image files. Looked for {looked_for} "
            f"({', '.join((*NIFTI_ENDINGS, *ITK_ENDINGS))}); Decathlon Task01: imagesTr/<case>.nii.gz with labelsTr. "
            f"{_linked(folder)}"
            "Rename the files, convert DICOM series (monai-adv convert), or pass another folder."
        )
    found.items.sort(key=lambda item: item["subject"])
    found.problems.sort(key=lambda problem: (problem.subject, problem.file))
    return found


def sanitise_subject(name: str) -> str:
    """A subject ID that is safe as a file name, a table cell and a command-line argument.

    Example:
        >>> sanitise_subject("=case 1/../x")
        'case_1_.._x'
    """
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-").rstrip(".")
    if len(cleaned) > 100:  # what is cut off may be all that tells two patients apart
        cleaned = f"{cleaned[:87]}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return cleaned or "unnamed"


def naming_role(name: str) -> tuple[str, str | None, str | None]:
    """Case, role (a modality or ``"label"``) and naming convention of a file's name without ending.

    Example:
        >>> naming_role("BraTS2021_00000_t1ce"), naming_role("BraTS-GLI-00000-000-seg"), naming_role("x")
        (('BraTS2021_00000', 'T1c', '2017-2021'), ('BraTS-GLI-00000-000', 'label', '2023+'), ('x', None, None))
    """
    match = _CASE_FILE.match(name)
    if match is None:
        return name, None, None
    naming, role = _ROLES[match["ending"].lower()]
    return match["case"], role, naming


def image_files(folder: Path, found: Scan) -> Iterator[Path]:
    """Image files below a folder, hidden ones left out; folders that cannot be read are added to the problems."""

    def unreadable(error: OSError) -> None:
        what = f"the folder cannot be read ({error.strerror})"
        found.problems.append(Finding("error", "", ascii(error.filename), what, "Are you allowed to?"))

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / name for name in names if not name.startswith(".") and stem(name) is not None)


def _linked(folder: Path) -> str:
    """What is said of links to folders, which are not searched."""
    links = [path.name for path in folder.iterdir() if path.is_symlink() and path.is_dir()]
    return f"Links to folders are not followed ({len(links)} here, {links[0]}): link the files. " if links else ""


def _printable(name: str) -> bool:
    """Whether a name can be written into a table or a page: those whose bytes are no UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def file_stem(file: Path) -> str:
    """The name of a file without the ending of an image, or its whole name."""
    return stem(file) or file.name


def infer_scheme(case: str, naming: str) -> str | None:
    """The scheme a BraTS name stands for; None where releases with the same name mean different things."""
    if case.lower().startswith("brats-ped"):
        return None  # 2023: 1 NCR, 2 ED, 3 ET; 2024: 1 ET, 2 NET, 3 cysts, 4 ED
    if naming == "2023+" or re.match(r"^brats-[a-z]+", case, re.IGNORECASE):  # a new ID outranks an old suffix
        return "brats2023"
    release = _RELEASE.match(case)
    return f"brats20{release.group(1)}" if release else "brats2017"


def _scan_brats(files: list[Path], asked: str | None, require_label: bool, found: Scan) -> None:
    cases: dict[tuple[Path, str], dict[str, dict[str, list[Path]]]] = defaultdict(lambda: defaultdict(dict))
    strangers: dict[Path, list[str]] = defaultdict(list)
    for file in files:
        case, role, naming = naming_role(file_stem(file))
        if role is None or naming is None:
            strangers[file.parent].append(file.name)
            continue
        cases[file.parent, case][naming].setdefault(role, []).append(file)
    for (parent, case), namings in sorted(cases.items()):
        # A folder that mixes both conventions is judged by the one that has more of the four modalities.
        naming = max(namings, key=lambda key: sum(role in namings[key] for role in MODALITIES))
        present, subject, problems = namings[naming], sanitise_subject(case), []
        for role in (*MODALITIES, "label"):
            candidates = present.get(role, [])
            if len(candidates) > 1:
                names = ", ".join(file.name for file in candidates)
                problems.append(
                    Finding("error", subject, str(parent), f"more than one file for {role}: {names}", "Keep one")
                )
            elif not candidates and (role != "label" or require_label):
                expected = f"{case}{SUFFIXES[naming][role]}.nii.gz"
                have = ", ".join(sorted(file.name for paths in present.values() for file in paths))
                other = f"; not recognised: {', '.join(sorted(strangers[parent])[:5])}" if strangers[parent] else ""
                what = f"{role} is missing" if role != "label" else "the label is missing"
                advice = f"Looked for {expected} (or .nii, .nrrd, .mha, .mhd); found {have}{other}"
                series = parent / f"{case}{SUFFIXES[naming][role]}"
                if series.is_dir():
                    advice += f". {series.name} is a folder; of DICOM? monai-adv convert {series} -o {expected}"
                problems.append(Finding("error", subject, str(parent / expected), what, advice))
        name = asked or infer_scheme(case, naming)
        if name is None and "label" in present:
            what = "the label scheme cannot be told from the name (BraTS-PED 2023 and 2024 differ)"
            advice = f"Pass scheme=, one of {', '.join(LabelScheme.names())}"
            problems.append(Finding("error", subject, str(parent), what, advice))
        if problems:
            found.problems.extend(problems)
            continue
        label = str(present["label"][0]) if "label" in present else None
        images = [str(present[role][0]) for role in MODALITIES]
        found.items.append({"image": images, "label": label, "subject": subject, "scheme": name or "brats2023"})


def _scan_msd(root: Path, files: list[Path], asked: str | None, require_label: bool, found: Scan) -> None:
    description, channels, problem = _read_msd_description(root, asked)
    if problem is not None:
        found.problems.append(problem)
        return
    folders = ("imagesTr",) if require_label else ("imagesTr", "imagesTs")
    images = [file for file in files if file.parent.parent == root and file.parent.name in folders]
    labels = {file_stem(file): file for file in files if file.parent == root / "labelsTr"}
    listed = description.get("training")
    for entry in listed if isinstance(listed, list) else []:
        named = entry.get("image") if isinstance(entry, dict) else None
        image = root / named if isinstance(named, str) and _printable(named) else None
        if image is not None and not os.path.isfile(image):
            subject = sanitise_subject(file_stem(image))
            what = "the image is missing although dataset.json lists it"
            found.problems.append(Finding("error", subject, str(image), what, "Unpack the archive again"))
    for image in images:
        subject, label = sanitise_subject(file_stem(image)), labels.get(file_stem(image))
        if label is None and require_label:
            expected = str(root / "labelsTr" / image.name)
            advice = f"Looked for {image.name} in labelsTr"
            found.problems.append(Finding("error", subject, expected, "the label is missing", advice))
            continue
        found.items.append(
            {
                "image": str(image),
                "channels": channels,
                "label": None if label is None else str(label),
                "subject": subject,
                "scheme": asked or "msd",
            }
        )


def _read_msd_description(root: Path, asked: str | None) -> tuple[dict[str, Any], tuple[int, ...], Finding | None]:
    """dataset.json, the channels that are T1, T1c, T2 and FLAIR, and what is wrong with it."""
    path, order = root / "dataset.json", list(MSD_CHANNELS)
    description: dict[str, Any] = {}
    if path.is_file():
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            names = description.get("modality") or description.get("channel_names") or {}
            labels = description.get("labels") or {}
            if names:
                listed = [str(names[key]) for key in sorted(names, key=int)]
                order = [_MODALITY_NAMES.get(name.lower(), name) for name in listed]
            enhancing = str(labels.get("3", "enhancing")).lower()
            oedema = str(labels.get("1", "edema")).lower()
        except (ValueError, AttributeError, TypeError, LookupError, OverflowError, RecursionError, OSError) as error:
            what, advice = f"not a Decathlon description ({error})", "Restore the file from the archive"
            return {}, (), Finding("error", "", str(path), what, advice)
        if asked is None and not ("dema" in oedema and "enhancing" in enhancing and "non" not in enhancing):
            what = f"labels {labels} are not those of Decathlon Task01 (1 edema, 2 non-enhancing, 3 enhancing tumour)"
            return {}, (), Finding("error", "", str(path), what, f"Pass scheme=, one of {LabelScheme.names()}")
    if sorted(order) != sorted(MODALITIES):
        what = f"modalities {order} are not the four of Task01 (FLAIR, T1w, T1gd, T2w)"
        return {}, (), Finding("error", "", str(path), what, "Pass the folder of Task01_BrainTumour")
    return description, tuple(order.index(name) for name in MODALITIES), None


def _drop_duplicates(found: Scan) -> None:
    """A subject that is there twice is used not once: a duplicated case is a wrong p-value."""
    by_subject: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in found.items:  # names that differ in case only are one file on macOS and Windows
        by_subject[item["subject"].casefold()].append(item)
    broken = {problem.subject for problem in found.problems if problem.subject}
    for items in by_subject.values():
        if len(items) > 1:
            subject = items[0]["subject"]
            folders = ", ".join(
                str(Path(item["image"] if isinstance(item["image"], str) else item["image"][0]).parent)
                for item in items
            )
            alike = ", as " + ", ".join(sorted({item["subject"] for item in items}))
            alike = alike if "," in alike[2:] else ""
            what, advice = f"the subject is there {len(items)} times{alike}: {folders}", "Keep one of them"
            found.problems.append(Finding("error", subject, "", what, advice))
    found.items = [
        item
        for item in found.items
        if len(by_subject[item["subject"].casefold()]) == 1 and item["subject"] not in broken
    ]
