"""Any names and layouts of files: `scan` and `check_folder` say what is wrong, raise nothing else and write nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders import make_case
from cli_caller import call
from fuzzing import fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from monai_adv.data import check_folder, scan
from monai_adv.data.datalist import sanitise_subject
from monai_adv.errors import DataError, MonaiAdvError
from monai_adv.studies.units import safe_name

ENDS = ["_t1", "_t1ce", "_t2", "_flair", "_seg", "-t1n", "-t1c", "-t2w", "-t2f", "-seg", "", "_T1", ".."]
WHOLE = "*"  # a name that ends so stands for all files of a case
SUFFIXES = [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".txt", ".NII", ""]
FOLDERS = ["", "a", "A", "imagesTr", "imagesTs", "labelsTr", "x/imagesTr", "x/labelsTr", ".hidden", "b c", "é"]
CASES = ["BraTS2021_0", "brats2021_0", "BraTS-PED-1", "BRATS_001", "..", "=1+1", "-rf", "a b", "a_b", "\udcff",
         "\x1b[m", "a\nb", "€" * 30, "x" * 120, "NUL", "_", "%s{0}"]  # fmt: skip
CONTENTS = [
    b"",
    b"no image",
    b"NRRD0004\n\n",
    b"ObjectType = Image\nElementDataFile = LOCAL\n",
    b"\x5c\x01\x00\x00" * 100,
]


def names() -> st.SearchStrategy[str]:
    """Names of files, many of which are those of a case."""
    case = st.sampled_from(CASES) | st.text(
        st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=8
    )
    one = st.builds(lambda c, e, s: (c + e + s) or "_", case, st.sampled_from(ENDS), st.sampled_from(SUFFIXES))
    return one | case.map(lambda c: c + WHOLE)


def written(name: str) -> list[str]:
    """The files that a name stands for."""
    whole = name.endswith(WHOLE)
    return [name.removesuffix(WHOLE) + end + ".nii" for end in ENDS[:5]] if whole else [name]


def layouts() -> st.SearchStrategy[list[tuple[str, str, bytes]]]:
    """Some files: folder, name and content; a few names in every folder, so that cases come together."""
    return st.lists(
        st.tuples(st.sampled_from(FOLDERS), names(), st.sampled_from(CONTENTS)), max_size=12, unique_by=lambda f: f[:2]
    )


def descriptions() -> st.SearchStrategy[bytes]:
    """What may stand in a dataset.json."""
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    plain = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
    keys = st.sampled_from(["0", "1", "2", "3", "x", "Infinity"])
    words = st.sampled_from(["FLAIR", "T1w", "t1gd", "T2w", "edema", "enhancing", "../../x.nii", "\0", "\udcff"])
    part = plain | st.dictionaries(keys, words | plain, max_size=4) | st.lists(st.fixed_dictionaries({"image": words}))
    whole = st.dictionaries(st.sampled_from(["modality", "channel_names", "labels", "training"]), part)
    return st.one_of((whole | plain).map(lambda data: json.dumps(data).encode()), st.binary(max_size=20))


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("room")


def make(room: Path, files: list[tuple[str, str, bytes]], description: bytes | None) -> Path:
    root = room / "cohort"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for folder, name, content in files:
        parent = root / folder
        parent.mkdir(parents=True, exist_ok=True)
        for file in written(name):
            if file not in (".", "..") and len(os.fsencode(file)) < 256 and not (parent / file).exists():
                (parent / file).write_bytes(content)
    if description is not None:
        (root / "dataset.json").write_bytes(description)
    return root


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


@fuzz(60)
@given(files=layouts(), description=st.none() | descriptions(), label=st.booleans())
@example(files=[("imagesTr", "a.nii", b"")], description=b'{"modality": {"Infinity": "T1"}}', label=True)
@example(files=[("imagesTr", "a.nii", b"")], description=b'{"modality": [0, 7]}', label=True)
@example(files=[("imagesTr", "a.nii", b"")], description=b"[" * 100_000, label=True)
@example(files=[("imagesTr", "a.nii", b"")], description=b'{"training": 5}', label=True)
@example(
    files=[("imagesTr", "a.nii", b"")], description=b'{"training": [{"image": 5}, {"image": "\\ud800"}]}', label=True
)
@example(files=[("", "\udcff_t1.nii", b"")], description=None, label=True)
def test_any_layout(room: Path, files: list[tuple[str, str, bytes]], description: bytes | None, label: bool) -> None:
    root = make(room, files, description)
    before = tree(room)
    found, refused = None, None
    try:
        found = scan(root, require_label=label)
    except MonaiAdvError as error:
        refused = str(error)
    if found is None:
        assert refused is not None
        assert str(root) in refused
    else:
        subjects = [item["subject"] for item in found.items]
        assert len({subject.casefold() for subject in subjects}) == len(subjects)
        assert all(sanitise_subject(subject) == subject == safe_name(subject) for subject in subjects)
        report = check_folder(root, require_label=label)
        assert {item["subject"] for item in report.items} <= set(subjects)
        for text in (json.dumps(found.items), *map(str, report.findings)):
            text.encode()  # can be printed and written
    assert tree(room) == before


@fuzz(60)
@given(st.text(max_size=150))
@example("../../x")
@example("/etc/passwd")
@example("a\0b")
@example("x" * 10_000)
@example("CON")
def test_any_name_becomes_one_file_name(name: str) -> None:
    for made in (sanitise_subject(name), safe_name(name)):
        assert 0 < len(made) <= 100
        assert made not in (".", "..")
        assert os.path.basename(made) == made
        assert made.isascii()
        assert made.isprintable()
    assert sanitise_subject(name)[0] not in "=+-@."


def test_names_that_differ_in_case_only_are_not_two_subjects(tmp_path: Path) -> None:
    make_case(tmp_path / "1", "BraTS2021_a")
    make_case(tmp_path / "2", "BraTS2021_A")
    make_case(tmp_path / "3", "BraTS2021_b")
    items, problems = scan(tmp_path)
    assert [item["subject"] for item in items] == ["BraTS2021_b"]
    assert "as BraTS2021_A, BraTS2021_a" in str(problems[0])


def test_names_that_become_the_same_are_not_two_subjects(tmp_path: Path) -> None:
    for number, subject in enumerate(("BraTS2021_a b", "BraTS2021_a+b")):
        make_case(tmp_path / str(number), subject)
    items, problems = scan(tmp_path)
    assert items == []
    assert "there 2 times" in str(problems[0])


def test_long_names_are_told_apart(tmp_path: Path) -> None:
    for end in "ab":
        make_case(tmp_path, "BraTS2021_" + "x" * 150 + end)
    subjects = [item["subject"] for item in scan(tmp_path).items]
    assert len(set(subjects)) == 2
    assert all(len(subject) <= 100 for subject in subjects)


def test_control_sequences_in_a_name_do_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "\x1b[2J").mkdir()
    (tmp_path / "\x1b[2J" / "BraTS2021_0_t1.nii").touch()
    assert call(monkeypatch, "check", str(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert r"\x1b[2J" in said


@pytest.mark.parametrize("root", ["x" * 5000, "no/such", "a\0b"])
def test_a_folder_that_cannot_be(root: Any) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scan(root)


def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_case(tmp_path, "BraTS2021_a")
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def closed(path: Any) -> Any:  # root may read every folder
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", closed)
    items, problems = scan(tmp_path)
    assert len(items) == 1
    assert "closed" in str(problems[0])
    assert "cannot be read" in str(problems[0])
