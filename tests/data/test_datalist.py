from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import CORRUPTIONS, MODALITIES, case_file, make_case, make_cohort

from monai_adv.data import brats_datalist, scan
from monai_adv.data.datalist import sanitise_subject
from monai_adv.errors import DataError


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize(
    ("subject", "naming", "scheme"),
    [
        ("Brats17_TCIA_001_1", "2021", "brats2017"),
        ("Brats18_CBICA_AQN_1", "2021", "brats2018"),
        ("BraTS19_2013_0_1", "2021", "brats2019"),
        ("BraTS20_Training_001", "2021", "brats2020"),
        ("BraTS2021_00000", "2021", "brats2021"),
        ("hospital_7", "2021", "brats2017"),
        ("BraTS-GLI-00000-000", "2021", "brats2023"),  # a new ID with the old endings, as published
        ("BraTS-GLI-00000-000", "2023", "brats2023"),
        ("BraTS-MET-00012-001", "2023", "brats2023"),
        ("hospital-7", "2023", "brats2023"),
    ],
)
def test_the_name_settles_files_order_and_scheme(tmp_path, subject, naming, scheme, suffix):
    make_case(tmp_path, subject, naming=naming, suffix=suffix)
    (item,) = brats_datalist(tmp_path)
    assert item == {
        "image": [str(case_file(tmp_path, subject, modality, naming, suffix)) for modality in MODALITIES],
        "label": str(case_file(tmp_path, subject, "label", naming, suffix)),
        "subject": subject,
        "scheme": scheme,
    }
    assert json.loads(json.dumps(item)) == item


def test_flat_nested_and_mixed_folders_sorted_by_subject(tmp_path):
    make_case(tmp_path / "HGG", "Brats18_B_1")
    make_case(tmp_path / "LGG", "Brats18_A_1")
    make_case(tmp_path / "new", "BraTS-GLI-00001-000", naming="2023")
    for subject in ("BraTS2021_00003", "BraTS2021_00002"):
        make_case(tmp_path, subject)
        for file in (tmp_path / subject).iterdir():
            file.rename(tmp_path / file.name)
    subjects = [item["subject"] for item in brats_datalist(tmp_path)]
    expected = ["BraTS-GLI-00001-000", "BraTS2021_00002", "BraTS2021_00003", "Brats18_A_1", "Brats18_B_1"]
    assert subjects == expected


def test_hidden_files_are_no_files(tmp_path):
    make_cohort(tmp_path, 1)
    for name in ("._BraTS2021_00000_t1.nii.gz", ".hidden/BraTS2021_00009_t1.nii.gz"):
        path = tmp_path / "BraTS2021_00000" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"resource fork")
    assert len(brats_datalist(tmp_path)) == 1


def test_the_decathlon_and_its_channel_order(tmp_path):
    above, tmp_path = tmp_path, tmp_path / "Task01_BrainTumour"
    make_cohort(tmp_path, 2, naming="msd")
    items = brats_datalist(tmp_path)
    assert [item["subject"] for item in items] == ["BRATS_000", "BRATS_001"]
    assert {(item["channels"], item["scheme"]) for item in items} == {((1, 2, 3, 0), "msd")}
    assert items[0]["image"] == str(tmp_path / "imagesTr" / "BRATS_000.nii.gz")
    assert brats_datalist(above) == items  # found below the folder that was given, too

    (tmp_path / "dataset.json").unlink()
    assert brats_datalist(tmp_path)[0]["channels"] == (1, 2, 3, 0)
    order = {"channel_names": {"0": "T2w", "1": "T1gd", "2": "T1w", "3": "FLAIR"}}
    (tmp_path / "dataset.json").write_text(json.dumps(order))
    assert brats_datalist(tmp_path)[0]["channels"] == (2, 1, 0, 3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"modality": {"0": "CT"}}', "are not the four of Task01"),
        ('{"labels": {"1": "necrosis", "2": "edema", "3": "enhancing tumour"}}', "Pass scheme="),
        ("{ not json", "not a Decathlon description"),
        ("[]", "not a Decathlon description"),
    ],
)
def test_a_decathlon_description_that_does_not_fit(tmp_path, content, says):
    make_cohort(tmp_path, 1, naming="msd")
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=says) as error:
        brats_datalist(tmp_path)
    assert "dataset.json" in str(error.value)


def test_decathlon_files_that_are_missing(tmp_path):
    make_cohort(tmp_path, 2, naming="msd")
    case_file(tmp_path, "BRATS_001", "label", "msd").unlink()
    description = {"training": [{"image": "./imagesTr/BRATS_009.nii.gz", "label": "./labelsTr/BRATS_009.nii.gz"}]}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    items, problems = scan(tmp_path)
    assert [item["subject"] for item in items] == ["BRATS_000"]
    assert [problem.subject for problem in problems] == ["BRATS_001", "BRATS_009"]
    assert "label is missing" in problems[0].what
    assert "dataset.json lists it" in problems[1].what


@pytest.mark.parametrize("naming", ["2021", "2023"])
@pytest.mark.parametrize("role", [*MODALITIES, "label"])
def test_a_missing_file_costs_its_own_subject(tmp_path, naming, role):
    subjects = make_cohort(tmp_path, 3, naming=naming)
    missing = case_file(tmp_path, subjects[1], role, naming)
    CORRUPTIONS["missing"](missing)
    items, (problem,) = scan(tmp_path)
    assert [item["subject"] for item in items] == [subjects[0], subjects[2]]
    assert (problem.severity, problem.subject, problem.file) == ("error", subjects[1], str(missing))
    assert role in problem.what
    assert missing.name in problem.advice  # what was looked for ...
    assert sum(file.name in problem.advice for file in missing.parent.iterdir()) == 4  # ... and what is there
    with pytest.raises(DataError) as error:
        brats_datalist(tmp_path)
    assert "1 of 3 subjects" in str(error.value)
    assert missing.name in str(error.value)


def test_a_label_under_another_name_is_pointed_at(tmp_path):
    make_case(tmp_path, "BraTS20_Training_355")
    label = case_file(tmp_path, "BraTS20_Training_355", "label")
    label.rename(label.with_name("W39_1998.09.19_Segm.nii.gz"))
    (problem,) = scan(tmp_path).problems
    assert "not recognised: W39_1998.09.19_Segm.nii.gz" in problem.advice


def test_labels_may_be_absent_when_nobody_needs_them(tmp_path):
    make_case(tmp_path / "brats", label=False)
    make_case(tmp_path / "msd", "BRATS_001", naming="msd", label=False)
    items = brats_datalist(tmp_path, require_label=False)
    assert [item["label"] for item in items] == [None, None]
    assert len(scan(tmp_path).problems) == 2


def test_a_subject_that_is_there_twice_is_not_used(tmp_path):
    make_cohort(tmp_path / "a", 2)
    make_case(tmp_path / "b", "BraTS2021_00001", corrupt="missing")
    make_cohort(tmp_path / "c", 1)
    items, problems = scan(tmp_path)
    assert items == []  # 00000 is there twice; of 00001 one copy is broken and nobody says which one is meant
    assert {problem.subject for problem in problems} == {"BraTS2021_00000", "BraTS2021_00001"}
    assert str(tmp_path / "a" / "BraTS2021_00000") in problems[0].what
    assert str(tmp_path / "c" / "BraTS2021_00000") in problems[0].what


def test_two_files_for_one_modality(tmp_path):
    make_cohort(tmp_path, 1)
    make_case(tmp_path, "BraTS2021_00000", suffix=".nii", label=False)
    problems = scan(tmp_path).problems
    assert [problem.what.split(":")[0] for problem in problems] == [f"more than one file for {m}" for m in MODALITIES]


def test_an_ambiguous_release_asks_for_the_scheme(tmp_path):
    make_case(tmp_path, "BraTS-PED-00001-000", naming="2023")
    with pytest.raises(DataError, match="Pass scheme="):
        brats_datalist(tmp_path)
    assert brats_datalist(tmp_path, scheme="brats2023")[0]["scheme"] == "brats2023"


def test_the_scheme_asked_for_outranks_the_name(tmp_path):
    make_cohort(tmp_path / "b", 1)
    make_cohort(tmp_path / "m", 1, naming="msd")
    assert [item["scheme"] for item in brats_datalist(tmp_path, scheme="brats2024")] == ["brats2024"] * 2
    with pytest.raises(DataError, match="unknown label scheme 'brats1999'"):
        brats_datalist(tmp_path, scheme="brats1999")


def test_no_cases_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        brats_datalist(tmp_path / "nowhere")
    (tmp_path / "scan.nii.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no cases found among 1 image files.*_t1ce.*-t1c.*imagesTr"):
        brats_datalist(tmp_path)


@pytest.mark.parametrize("name", ["=cmd()", "-rf", "../../etc", "a b\tc", "ü", "x" * 300, "..."])
def test_subject_ids_are_safe_names(tmp_path, name):
    safe = sanitise_subject(name)
    assert safe
    assert safe[0] not in "=+-@._"
    assert "/" not in safe
    assert (tmp_path / safe).resolve().parent == tmp_path.resolve()
    Path(tmp_path / safe).write_text("")


def test_unsafe_names_become_safe_subjects(tmp_path):
    make_case(tmp_path, "=case (1)")
    (item,) = brats_datalist(tmp_path)
    assert item["subject"] == "case_1_"
    assert Path(item["label"]).is_file()
