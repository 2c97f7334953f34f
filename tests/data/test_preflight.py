from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from builders import CORRUPTIONS, LPS, MODALITIES, case_file, make_case, make_cohort, real_data, rewrite, write_nifti

from monai_adv.data import brats_datalist, check_folder, check_item
from monai_adv.errors import DataError

GEOMETRY = ("shape", "affine", "orientation", "spacing")
BAD_FILES = [
    *((how, "T1c") for how in CORRUPTIONS if how not in ("label_value", "label_fraction")),
    *((how, "label") for how in CORRUPTIONS if how not in ("zero", "constant")),
    *((how, "T1") for how in GEOMETRY),
]


def _only(findings, severity="error"):
    return [finding for finding in findings if finding.severity == severity]


@pytest.mark.parametrize("naming", ["2021", "2023", "msd"])
def test_a_sound_cohort_is_ok_and_its_facts_are_true(tmp_path, naming):
    root = tmp_path / "cohort"
    affine = LPS @ np.diag([1.5, 1.0, 2.0, 1.0])
    subjects = make_cohort(root, 2, naming=naming, affine=affine)
    written = make_case(tmp_path / "other", naming="2021", seed=0)
    report = check_folder(root)
    assert report.ok
    assert report.findings == []
    assert [item["subject"] for item in report.items] == subjects
    frame = report.to_frame().set_index("subject")
    assert frame.index.tolist() == subjects
    row = frame.loc[subjects[0]]
    assert (row.status, row.errors, row.warnings) == ("ok", 0, 0)
    assert row["shape"] == (14, 16, 12)
    assert row.spacing == (1.5, 1.0, 2.0)
    assert row.orientation == "LPS"
    assert (row["dtype"], row.label_dtype) == ("int16", "uint8")
    assert row.label_values == {"2021": (0, 1, 2, 4)}.get(naming, (0, 1, 2, 3))
    volumes = {"WT_ml": (1, 2, 3), "TC_ml": (1, 3), "ET_ml": (3,)}
    for name, classes in volumes.items():
        assert row[name] == pytest.approx(np.isin(written["label"], classes).sum() * 3.0 / 1000)
    assert row.foreground_voxels == (written["T1"] != 0).sum()
    for modality in MODALITIES:
        brain = written[modality][written[modality] != 0]
        assert row[f"{modality}_p0.5"] == pytest.approx(np.percentile(brain, 0.5), abs=1e-3)
        assert row[f"{modality}_p99.5"] == pytest.approx(np.percentile(brain, 99.5), abs=1e-3)


@pytest.mark.parametrize(("how", "role"), BAD_FILES)
def test_each_bad_file_is_an_error_of_its_own_subject(tmp_path, how, role):
    subjects = make_cohort(tmp_path, 3)
    file = case_file(tmp_path, subjects[1], role)
    CORRUPTIONS[how](file)
    report = check_folder(tmp_path)
    assert not report.ok
    errors = _only(report.findings)
    assert {error.subject for error in errors} == {subjects[1]}
    assert all(error.what and error.advice for error in errors)
    assert {error.file for error in errors} == {str(file)}  # the one that is off, not those that differ from it
    assert [item["subject"] for item in report.items] == [subjects[0], subjects[2]]
    frame = report.to_frame().set_index("subject")
    assert frame.status.tolist() == ["ok", "error", "ok"]
    assert frame.errors[subjects[1]] == len(errors)


def test_all_problems_are_found_not_the_first(tmp_path):
    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    for how, role in (
        ("truncated", "T1"),
        ("nan", "T1c"),
        ("zero", "T2"),
        ("affine", "FLAIR"),
        ("label_value", "label"),
    ):
        CORRUPTIONS[how](case_file(tmp_path, item["subject"], role))
    findings = _only(check_item(item))
    found = {(finding.file.rsplit("_", 1)[1], finding.what.split(" ")[0]) for finding in findings}
    assert {name for name, _ in found} == {"t1.nii.gz", "t1ce.nii.gz", "t2.nii.gz", "flair.nii.gz", "seg.nii.gz"}
    assert len(findings) == 5


def test_errors_stand_before_warnings_and_progress_is_told(tmp_path):
    subjects = make_cohort(tmp_path, 2)
    rewrite(lambda array, affine: (np.where(array == 4, 1, array), affine))(case_file(tmp_path, subjects[0], "label"))
    CORRUPTIONS["nan"](case_file(tmp_path, subjects[1], "T2"))
    seen = []
    frame = check_folder(tmp_path, progress=lambda *step: seen.append(step)).findings_frame()
    assert frame.severity.tolist() == ["error", "warning"]
    assert frame.subject.tolist() == subjects[::-1]
    assert seen == [(1, 2, subjects[0]), (2, 2, subjects[1])]


def _outlier(array, affine):
    array[array > 0][0] = 1
    array[7, 8, 6] = 32767
    return array, affine


@pytest.mark.parametrize(
    ("role", "change", "says"),
    [
        ("T1", _outlier, "T1 has outliers: maximum 32767"),
        ("T2", lambda array, affine: (array - 350, affine), "negative voxels (lowest -350)"),
        ("T2", lambda array, affine: (array + 5, affine), "100% of the voxels are non-zero"),
        ("label", lambda array, affine: (np.where(array == 4, 1, array), affine), "no voxel of ET in the label"),
        ("label", lambda array, affine: (array * 0, affine), "the label is empty"),
        (
            "label",
            lambda array, affine: (np.roll(array, 7, 0), affine),
            "tumour voxels lie where every modality is zero",
        ),
    ],
)
def test_what_is_odd_is_a_warning(tmp_path, role, change, says):
    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    assert check_item(item) == []
    rewrite(change)(case_file(tmp_path, item["subject"], role))
    findings = check_item(item)
    assert _only(findings) == []
    assert any(says in finding.what for finding in _only(findings, "warning"))
    assert check_folder(tmp_path).to_frame().status.tolist() == ["warning"]


def test_one_modality_copied_over_another(tmp_path):
    written = make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    write_nifti(case_file(tmp_path, item["subject"], "FLAIR"), written["T2"])
    assert [finding.what for finding in check_item(item)] == ["FLAIR and T2 are the same volume"]


@pytest.mark.parametrize(
    ("sform", "qform", "severity", "says"),
    [(0, 1, "note", "the qform (code 1) is used"), (0, 0, "warning", "left and right are a guess")],
)
def test_orientation_codes(tmp_path, sform, qform, severity, says):
    written = make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    base = np.diag([-1.0, 1, 1, 1])  # what nibabel assumes without any code: the affine must not differ as well
    base[:3, 3] = (np.array(written["T1"].shape) - 1) / 2 * (1, -1, -1)
    for role in (*MODALITIES, "label"):
        array = written[role] if role != "label" else np.asarray((0, 1, 2, 4), np.uint8)[written["label"]]
        codes = (sform, qform) if role == "T2" else (1, 1)
        write_nifti(case_file(tmp_path, item["subject"], role), array, base, *codes)
    (finding,) = check_item(item)
    assert finding.severity == severity
    assert says in finding.what
    assert finding.file.endswith("_t2.nii.gz")


def test_sform_and_qform_that_disagree(tmp_path):
    import nibabel as nib

    make_case(tmp_path)
    (item,) = brats_datalist(tmp_path)
    path = case_file(tmp_path, item["subject"], "T2")
    image = nib.load(path)
    image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
    image.header.set_qform(LPS @ np.diag([-1.0, 1, 1, 1]), code=1)
    path.unlink()
    nib.save(image, path)
    (finding,) = check_item(item)
    assert (finding.severity, finding.what) == ("warning", "sform and qform of T2 differ by up to 2; the sform is used")


def test_subjects_that_differ_from_one_another(tmp_path):
    make_case(tmp_path, "BraTS2021_00001")
    make_case(tmp_path, "BraTS2021_00002", affine=np.diag([2.0, 2, 2, 1]))
    findings = check_folder(tmp_path).findings
    assert {(finding.severity, finding.subject, finding.what.split(":")[0]) for finding in findings} == {
        ("warning", "", "subjects differ in spacing"),
        ("warning", "", "subjects differ in orientation"),
    }


def test_a_folder_without_a_usable_case_still_gives_tables(tmp_path):
    make_case(tmp_path, corrupt="missing")
    report = check_folder(tmp_path)
    assert not report.ok
    assert report.to_frame().status.tolist() == ["error"]
    with pytest.raises(DataError, match="no such folder"):
        check_folder(tmp_path / "nowhere")


@pytest.mark.real
def test_real_traps_are_seen_and_none_is_an_error():
    root = real_data("brats_1mm")
    reports = [check_folder(root / name) for name in ("BraTS-GLI-00000-000", "BraTS2021_01480", "BraTS2021_01659")]
    assert all(report.ok for report in reports)
    frame = pd.concat([report.to_frame() for report in reports]).set_index("subject")
    assert frame.loc["BraTS-GLI-00000-000", "label_values"] == (0, 1, 2, 3)
    assert frame.loc["BraTS-GLI-00000-000", "label_dtype"] == "float32"
    assert frame.loc["BraTS2021_01659", "label_dtype"] == "uint16"
    assert frame.loc["BraTS2021_01480", "ET_ml"] == 0
    assert frame.status["BraTS2021_01480"] == "warning"
    noted = {f.subject for report in reports for f in report.findings if "sform code 0" in f.what}
    assert noted == {"BraTS-GLI-00000-000", "BraTS2021_01659"}
