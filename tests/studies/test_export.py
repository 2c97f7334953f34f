"""Adversarial files: stored as their sources are, the same Dice from disk as in memory, nothing lost or flipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from builders import LPS, case_file, make_case, make_cohort, rewrite
from readers import with_itk, with_nibabel, with_simpleitk
from scipy.spatial.transform import Rotation

from monai_adv.data import brats_datalist
from monai_adv.defenses import smoothed
from monai_adv.errors import ConfigError, WriteError
from monai_adv.studies import cases, export
from monai_adv.studies.export import SUFFIX, attack_files
from monai_adv.studies.records import read_records
from monai_adv.victims import load_victim, mean_dice

SUBJECT = "BraTS2021_00000"
SPEC = {"name": "ifgsm", "eps": 0.5, "steps": 3}
OBLIQUE = np.array([[-1.9, 0.2, 0.1, 20], [0.2, -0.95, 0.3, 30], [0.1, -0.28, 1.4, -5], [0, 0, 0, 1]])

RIGID = nib.affines.from_matvec(
    Rotation.from_euler("xyz", (10, -20, 5), degrees=True).as_matrix() * (-1, -1, 1.5), (9, 8, -7)
)


def scaled(path: Path, slope: float, inter: float) -> None:
    """Store the same numbers with another meaning."""
    image = nib.load(path)
    stored = np.asarray(image.dataobj).astype(np.int16)
    new = nib.Nifti1Image(stored, image.affine, image.header)
    new.header.set_slope_inter(slope, inter)
    nib.save(new, path)


def as_float(path: Path) -> None:
    rewrite(lambda array, affine: ((array * np.float32(0.731)).astype(np.float32), affine))(path)


SOURCES: dict[str, Any] = {
    "int16": lambda path: None,
    "int16 with a slope": lambda path: scaled(path, 0.5, 0.0),
    "uint16": rewrite(lambda array, affine: (array.astype(np.uint16), affine)),
    "float32": as_float,
}


def run(tmp_path: Path, checkpoint: Path, spec: dict[str, Any] = SPEC, **options: Any):
    return list(attack_files(tmp_path / "data", checkpoint, tmp_path / "out", spec, **options))


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj, dtype=np.float64)


@pytest.mark.parametrize("affine", [LPS, OBLIQUE, np.diag([-1.0, 1, 2.5, 1])], ids=["LPS", "oblique", "LAS 2.5 mm"])
@pytest.mark.parametrize("source", SOURCES)
def test_files_are_stored_as_their_sources_and_score_the_same(tmp_path, checkpoint, source, affine):
    make_case(tmp_path / "data", SUBJECT, affine=affine)
    for modality in SUFFIX:
        SOURCES[source](case_file(tmp_path / "data", SUBJECT, modality))
    (done,) = run(tmp_path, checkpoint)
    assert done.error is None
    for clean, memory, disk in done.dice.values():
        assert disk == pytest.approx(memory, abs=1e-12 if source != "float32" else 1e-3)
        assert memory < clean
    for modality, ending in SUFFIX.items():
        before = nib.load(case_file(tmp_path / "data", SUBJECT, modality))
        after = nib.load(tmp_path / "out" / SUBJECT / f"{SUBJECT}_{ending}.nii.gz")
        assert after.get_data_dtype() == before.get_data_dtype()
        assert np.array_equal(after.affine, before.affine)
        for code in ("sform_code", "qform_code", "xyzt_units"):
            assert after.header[code] == before.header[code]
        x, y = np.asarray(before.dataobj, np.float64), np.asarray(after.dataobj, np.float64)
        assert (y[x == 0] == 0).all()
        assert y.min() >= 0
        assert 0 < np.abs(y - x).max() <= 0.5 * x[x != 0].std() * (1 + 1e-6)
        change = voxels(tmp_path / "out" / SUBJECT / f"{SUBJECT}_{ending}_perturbation.nii.gz")
        assert np.allclose(change, y - x, atol=1e-3)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_other_readers_agree_on_every_file_that_is_written(tmp_path, checkpoint, suffix):
    """SimpleITK and itk, as ITK-SNAP and 3D Slicer read; sources in other formats too."""
    make_case(tmp_path / "data", SUBJECT, affine=RIGID, suffix=suffix)
    (done,) = run(tmp_path, checkpoint)
    assert done.error is None
    files = sorted(done.folder.glob("*.nii.gz"))
    assert len(files) == 4 + 4 + 2
    itk = with_itk(files, tmp_path)
    for path in files:
        first = with_nibabel(path)
        for other in (with_simpleitk(path), itk[path]):
            assert np.allclose(other.affine, first.affine, atol=1e-4)
            assert np.array_equal(other.array, first.array)
        assert np.allclose(first.affine, RIGID, atol=1e-4)


def test_the_document_says_what_was_done(tmp_path, checkpoint):
    make_case(tmp_path / "data", SUBJECT)
    (done,) = run(tmp_path, checkpoint)
    told = json.loads((done.folder / f"{SUBJECT}_attack.json").read_text())
    assert told["schema"] == "monai_adv.adversarial_case/1"
    assert told["threat"]["quantize"]["dtype"] == "int16"
    assert told["threat"]["eps"] == 0.5
    assert told["attack"]["name"] == "ifgsm"
    assert told["attack"]["steps"] == 3
    assert set(told["files"]) == {p.name for p in done.folder.glob("*.nii.gz")}
    assert all(len(value) == 64 for value in {**told["files"], **told["sources"]}.values())
    assert [row["dice"] for row in told["in_memory"]] == [row["dice"] for row in told["from_disk"]]
    assert "torch" in told["versions"]


def test_the_records_hold_every_road_and_grow(tmp_path, checkpoint):
    names = make_cohort(tmp_path / "data", 2)
    assert [d.subject for d in run(tmp_path, checkpoint)] == names
    run(tmp_path, checkpoint, {"name": "fgsm", "eps": 0.5})
    run(tmp_path, checkpoint, SPEC, subjects=names[:1])  # again: replaced, not doubled
    table = read_records(tmp_path / "out")
    settings = {"clean", "ifgsm 0.5 std", "ifgsm from disk 0.5 std", "fgsm 0.5 std", "fgsm from disk 0.5 std"}
    assert set(table["setting"]) == settings
    assert not table.duplicated(["subject", "setting", "region"]).any()
    assert len(table) == 2 * len(settings) * 3


def test_a_bad_subject_costs_itself_only(tmp_path, checkpoint):
    make_case(tmp_path / "data", SUBJECT)
    make_case(tmp_path / "data", "BraTS2021_00001", corrupt="truncated")
    make_case(tmp_path / "data", "BraTS2021_00002", seed=1)
    as_float(case_file(tmp_path / "data", "BraTS2021_00002", "T2"))
    found = {d.subject: d.error for d in run(tmp_path, checkpoint)}
    assert found[SUBJECT] is None
    assert "t1ce" in found["BraTS2021_00001"]
    assert "stored as float32, int16: write them with store=float32" in found["BraTS2021_00002"]


def test_other_types_than_the_source(tmp_path, checkpoint):
    make_case(tmp_path / "data", SUBJECT)
    (done,) = run(tmp_path, checkpoint, store="float32")
    stored = nib.load(done.folder / f"{SUBJECT}_t2.nii.gz")
    assert stored.get_data_dtype() == np.float32
    values = voxels(done.folder / f"{SUBJECT}_t2.nii.gz")
    assert (values != np.rint(values)).any()
    as_float(case_file(tmp_path / "data", SUBJECT, "T1"))
    (done,) = run(tmp_path, checkpoint, store="int16")
    assert "no int16 values" in done.error
    with pytest.raises(ConfigError, match="store 'int64' is unknown"):
        run(tmp_path, checkpoint, store="int64")


def test_a_moved_label_is_written_and_scored_against(tmp_path, checkpoint):
    make_case(tmp_path / "data", SUBJECT)
    (done,) = run(tmp_path, checkpoint, {"name": "affine", "steps": 2, "eps": 3.0})
    moved = voxels(done.folder / f"{SUBJECT}_seg.nii.gz")
    assert set(np.unique(moved)) <= {0, 1, 2, 4}
    assert (moved != voxels(case_file(tmp_path / "data", SUBJECT, "label"))).any()
    for _, memory, disk in done.dice.values():
        assert disk == pytest.approx(memory, abs=1e-12)


def test_budgets_of_the_modalities_reach_the_files(tmp_path, checkpoint):
    """In scanner units: T1c may change by 40, T2 by 10, T1 and FLAIR not at all."""
    make_case(tmp_path / "data", SUBJECT)
    run(tmp_path, checkpoint, {**SPEC, "eps": 1, "units": "absolute", "proportions": [0, 40, 10, 0]})
    largest = {
        m: np.abs(voxels(tmp_path / "out" / SUBJECT / f"{SUBJECT}_{e}_perturbation.nii.gz")).max()
        for m, e in SUFFIX.items()
    }
    assert largest == {"T1": 0, "T1c": 40, "T2": 10, "FLAIR": 0}


def test_a_random_victim_is_scored_by_what_it_deploys(tmp_path, checkpoint, monkeypatch):
    make_cohort(tmp_path / "data", 2)
    victim = smoothed(load_victim(checkpoint), 0.6, samples=7)
    monkeypatch.setattr(export, "load_victim", lambda *arguments: victim)
    alone, after_another = (
        {done.subject: done for done in run(folder, checkpoint, store="float32", subjects=subjects)}["BraTS2021_00001"]
        for folder, subjects in ((tmp_path, ["BraTS2021_00001"]), (tmp_path, None))
    )
    assert alone.dice == after_another.dice  # whatever was drawn before
    folder = tmp_path / "out" / "BraTS2021_00001"
    (item,) = (i for i in brats_datalist(tmp_path / "data") if i["subject"] == "BraTS2021_00001")
    names = [str(folder / f"BraTS2021_00001_{ending}.nii.gz") for ending in SUFFIX.values()]
    case = cases.load({**item, "image": names}, export.CONFIG)
    vote = victim.predict(case.image, case.affine)
    written = voxels(folder / "BraTS2021_00001_adversarial_prediction.nii.gz")
    assert np.array_equal(written, case.restore(vote[0])[0].numpy())
    table = read_records(tmp_path / "out")
    mine = table[(table["subject"] == "BraTS2021_00001") & (table["attack"] == "ifgsm")]
    expected = mean_dice(vote, victim.head.label_from_classes(case.classes), victim.head)
    assert mine["dice"].mean() == pytest.approx(float(expected), abs=1e-9)


def test_nowhere_to_write_ends_the_command_and_is_no_subjects_fault(tmp_path, checkpoint):
    make_cohort(tmp_path / "data", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        list(attack_files(tmp_path / "data", checkpoint, tmp_path / "file" / "out", SPEC))
