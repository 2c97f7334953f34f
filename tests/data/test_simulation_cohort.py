"""The files of the simulated cohort: form, headers, reuse, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_adv.data import brats_datalist, load_case
from monai_adv.data.simulation import RECIPE, Geometry, simulate_cohort, simulate_subject, template
from monai_adv.data.simulation.acquisition import CONTRASTS
from monai_adv.data.simulation.files import nifti_bytes
from monai_adv.data.simulation.template import template_folder
from monai_adv.errors import ConfigError, DataError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("nilearn") is None, reason="needs nilearn's template files")

COARSE = Geometry.from_spacing(4.0)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("simulated") / "cohort"
    return folder, simulate_cohort(folder, subjects=3, spacing=4.0, seed=5)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.nii.gz"))}


def test_cohort_is_a_brats_folder(cohort: tuple[Path, list[dict[str, object]]]) -> None:
    folder, items = cohort
    assert [item["subject"] for item in items] == ["Sim005_00000", "Sim005_00001", "Sim005_00002"]
    assert brats_datalist(folder) == items
    facts = json.loads((folder / "Sim005_00001" / "Sim005_00001.json").read_text())
    made = simulate_subject(facts["seed"], COARSE)
    case = load_case(items[1])
    written = np.rint(made.image)
    np.testing.assert_array_equal(case["image"].numpy(), written)
    classes = case["label"].numpy()[0]
    np.testing.assert_array_equal(classes, np.where(made.label == 4, 3, made.label))


def test_metadata_and_notice(cohort: tuple[Path, list[dict[str, object]]]) -> None:
    folder, _ = cohort
    facts = json.loads((folder / "Sim005_00000" / "Sim005_00000.json").read_text())
    assert (facts["cohort_seed"], facts["index"], facts["recipe"]) == (5, 0, RECIPE)
    assert facts["geometry"] == COARSE.as_dict()
    assert set(facts["sequences"]) == set(CONTRASTS)
    assert facts["sequences"]["t1"] == facts["sequences"]["t1ce"]
    assert set(facts["sha256"]) == {f"Sim005_00000_{n}.nii.gz" for n in (*CONTRASTS, "seg")}
    listed = json.loads((folder / "cohort.json").read_text())
    assert list(listed["subjects"]) == ["Sim005_00000", "Sim005_00001", "Sim005_00002"]
    assert listed["subjects"]["Sim005_00000"]["volumes_ml"] == facts["volumes_ml"]
    assert "McConnell Brain Imaging Centre" in (folder / "LICENSE-ICBM152.txt").read_text()
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")], "temporary files are gone"


def test_headers_agree_between_nibabel_and_simpleitk(cohort: tuple[Path, list[dict[str, object]]]) -> None:
    sitk = pytest.importorskip("SimpleITK")
    folder, _ = cohort
    for path in sorted((folder / "Sim005_00000").glob("*.nii.gz")):
        image = nib.load(path)
        assert image.get_data_dtype() == (np.uint8 if "seg" in path.name else np.int16)
        assert image.header.get_xyzt_units()[0] == "mm"
        for get in (image.header.get_sform, image.header.get_qform):
            affine, code = get(coded=True)
            assert code == 4
            np.testing.assert_allclose(affine, COARSE.affine, atol=1e-5)
        itk = sitk.ReadImage(str(path))
        assert itk.GetSize() == COARSE.shape
        np.testing.assert_allclose(itk.GetSpacing(), [4.0] * 3, atol=1e-6)
        np.testing.assert_allclose(itk.GetDirection(), np.eye(3).ravel(), atol=1e-6)  # ITK's world is LPS
        np.testing.assert_allclose(itk.GetOrigin(), COARSE.affine[:3, 3] * [-1, -1, 1], atol=1e-4)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).transpose(2, 1, 0), np.asarray(image.dataobj))


def test_smaller_and_later_cohorts_share_their_subjects(
    cohort: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    whole = digests(cohort[0])
    simulate_cohort(tmp_path / "one", subjects=1, spacing=4.0, seed=5)
    simulate_cohort(tmp_path / "later", subjects=1, spacing=4.0, seed=5, first=2)
    one, later = digests(tmp_path / "one"), digests(tmp_path / "later")
    assert one.items() <= whole.items()
    assert later.items() <= whole.items()
    assert "Sim005_00002_seg.nii.gz" in later
    other = simulate_cohort(tmp_path / "one", subjects=1, spacing=4.0, seed=6)
    assert other[0]["subject"] == "Sim006_00000"
    assert set(one.values()).isdisjoint(digests(tmp_path / "one" / "Sim006_00000").values())
    listed = json.loads((tmp_path / "one" / "cohort.json").read_text())
    assert list(listed["subjects"]) == ["Sim005_00000", "Sim006_00000"], "earlier calls stay listed"


@pytest.mark.parametrize("damage", ["image", "label gone", "recipe", "metadata", "swapped"])
def test_intact_subjects_are_reused_and_others_made_again(
    damage: str, cohort: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    shutil.copytree(cohort[0], tmp_path, dirs_exist_ok=True)
    before = digests(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.nii.gz")}
    simulate_cohort(tmp_path, subjects=3, spacing=4.0, seed=5)
    assert times == {p: p.stat().st_mtime_ns for p in times}, "nothing is written twice"

    case = tmp_path / "Sim005_00001"
    facts = case / "Sim005_00001.json"
    if damage == "image":
        (case / "Sim005_00001_t2.nii.gz").write_bytes(b"half a file")
    elif damage == "label gone":
        (case / "Sim005_00001_seg.nii.gz").unlink()
    elif damage == "recipe":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"recipe": RECIPE - 1}))
    elif damage == "metadata":
        facts.write_text("{")
    else:  # a valid file, but of another subject
        other = tmp_path / "Sim005_00000" / "Sim005_00000_t1.nii.gz"
        (case / "Sim005_00001_t1.nii.gz").write_bytes(other.read_bytes())
    simulate_cohort(tmp_path, subjects=3, spacing=4.0, seed=5)
    assert digests(tmp_path) == before
    redone = {p.parent.name for p, t in times.items() if p.stat().st_mtime_ns != t}
    assert redone == {"Sim005_00001"}
    assert json.loads(facts.read_text())["recipe"] == RECIPE


def test_two_geometries_do_not_mix(cohort: tuple[Path, list[dict[str, object]]]) -> None:
    with pytest.raises(DataError, match="another folder"):
        simulate_cohort(cohort[0], subjects=1, spacing=3.0, seed=5)
    with pytest.raises(DataError, match="is a file"):
        simulate_cohort(cohort[0] / "cohort.json", subjects=1, spacing=4.0)


def test_nifti_bytes_carry_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    first = nifti_bytes(data, np.eye(4))
    monkeypatch.setattr("time.time", lambda: 1.0e9)
    assert nifti_bytes(data, np.eye(4)) == first
    assert first[4:8] == b"\0\0\0\0"


@pytest.mark.slow
def test_worker_processes_make_the_same_bits(cohort: tuple[Path, list[dict[str, object]]], tmp_path: Path) -> None:
    simulate_cohort(tmp_path, subjects=2, spacing=4.0, seed=5, workers=2)
    made = digests(tmp_path)
    assert len(made) == 10
    assert made.items() <= digests(cohort[0]).items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"subjects": 0}, "subjects"), ({"seed": 1000}, "seed"), ({"first": -1}, "first"), ({"workers": 0}, "workers")],
)
def test_arguments_out_of_range(arguments: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate_cohort(tmp_path / "none", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()


def test_without_nilearn(
    cohort: tuple[Path, list[dict[str, object]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "monai_adv\[demo\]"'):
        simulate_cohort(tmp_path / "none", subjects=1, spacing=4.0)
    assert not (tmp_path / "none").exists()
    assert simulate_cohort(cohort[0], subjects=3, spacing=4.0, seed=5) == cohort[1], (
        "a finished cohort needs no nilearn"
    )


def test_nilearn_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("nilearn", tmp_path / "nilearn" / "__init__.py")
    monkeypatch.setattr(template.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match="lacks the template file"):
        template_folder()


def test_progress_is_silent_off_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate_cohort(tmp_path, subjects=1, spacing=4.0, progress=True)
    assert capsys.readouterr() == ("", "")
