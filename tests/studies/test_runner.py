from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import case_file, make_case, make_cohort, rewrite

from monai_adv.data import scan
from monai_adv.errors import CheckpointError, ConfigError, DataError, MonaiAdvError
from monai_adv.studies import cases, read_records, run_study, runner, study_from
from monai_adv.studies.analysis import analyse
from monai_adv.studies.checks import run_checks
from monai_adv.studies.config import DataConfig
from monai_adv.victims import Head, load_victim


def test_a_study_records_every_subject_setting_and_region(content: dict[str, Any], tmp_path: Path) -> None:
    result = run_study(study_from(content))
    assert (result.computed, result.reused, result.problems) == (3 * (1 + 3 * 2), 0, [])
    table = read_records(tmp_path / "run")
    assert len(table) == 3 * 7 * 3
    assert (table["status"] == "ok").all()
    assert not table.duplicated(["subject", "victim", "attack", "eps", "region"]).any()
    clean = table[table["attack"] == "clean"]
    assert (clean["linf_std"] == 0).all()
    attacked = table[table["attack"] != "clean"]
    assert np.allclose(attacked["linf_std"], attacked["eps"], rtol=1e-5)
    assert (attacked["outside_max"] == 0).all()
    means = table[table["eps"].isin([0, 0.8])].groupby("attack")["dice"].mean()
    assert means["clean"] > means["fgsm"] > means["ifgsm"]
    assert means["noise"] > means["fgsm"]
    assert {c.status for c in run_checks(table)} <= {"PASS", "NOT RUN"}


def test_a_second_run_computes_nothing_and_changes_nothing(content: dict[str, Any], tmp_path: Path) -> None:
    run_study(study_from(content))
    before = (tmp_path / "run" / "records.csv").read_bytes()
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "units").rglob("*.json")}
    result = run_study(study_from(content))
    assert (result.computed, result.reused) == (0, 21)
    assert (tmp_path / "run" / "records.csv").read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "units").rglob("*.json")} == files


def test_lost_and_damaged_units_are_computed_again_to_the_same_numbers(content: dict[str, Any], tmp_path: Path) -> None:
    run_study(study_from(content))
    before = (tmp_path / "run" / "records.csv").read_bytes()
    units = sorted((tmp_path / "run" / "units").rglob("*.json"))
    units[2].unlink()
    units[5].write_bytes(units[5].read_bytes()[:-40])
    volume = sorted((tmp_path / "run" / "volumes").rglob("*.npz"))[0]
    volume.unlink()
    result = run_study(study_from(content))
    assert result.computed == 3
    assert (tmp_path / "run" / "records.csv").read_bytes() == before


def test_a_study_grows_in_its_folder(content: dict[str, Any], tmp_path: Path) -> None:
    """Another attack or budget computes only what is new; one that left is not in the table any more."""
    content["attacks"] = [{"name": "noise"}]
    run_study(study_from(content))
    content["attacks"].append({"name": "fgsm"})
    result = run_study(study_from(content))
    assert (result.computed, result.reused) == (3 * 2, 3 * 3)
    content["budgets"]["eps"] = [0.2, 0.8, 1.6]
    assert run_study(study_from(content)).computed == 3 * 2
    content["attacks"] = [{"name": "fgsm", "loss": "ce"}]
    assert run_study(study_from(content)).computed == 3 * 3
    table = read_records(tmp_path / "run")
    assert set(table["attack"]) == {"clean", "fgsm"}


def test_a_changed_threat_is_not_mistaken_for_the_finished_one(content: dict[str, Any], tmp_path: Path) -> None:
    content["attacks"] = [{"name": "fgsm"}]
    units = 3 * len(content["budgets"]["eps"])
    assert run_study(study_from(content)).computed == units + 3
    for change in ({"bounds": None}, {"support": "all"}, {"proportions": [1, 1, 0.5, 2]}, {"quantize": "int16"}):
        changed = {**content, "budgets": {**content["budgets"], **change}}
        assert run_study(study_from(changed)).computed == units, change


def test_a_changed_case_or_victim_is_not_mistaken_for_a_finished_one(content: dict[str, Any], tmp_path: Path) -> None:
    run_study(study_from(content))
    make_case(tmp_path / "data", "BraTS2021_00001", seed=77)
    assert run_study(study_from(content)).computed == 7
    with pytest.raises(ConfigError, match=r"a different study \(seed differs\)"):
        run_study(study_from({**content, "seed": 5}))
    (tmp_path / "other").mkdir()
    make_cohort(tmp_path / "other", 2)
    other = {**content, "data": {"root": str(tmp_path / "other")}}
    with pytest.raises(ConfigError, match=r"a different study \(data differs\)"):
        run_study(study_from(other))
    twin = {**content["victims"][0], "overlap": 0.5}
    with pytest.raises(ConfigError, match=r"a different study \(victims, seed differ\)"):
        run_study(study_from({**content, "victims": [twin], "seed": 5}))


def test_a_bad_subject_costs_itself_only(content: dict[str, Any], tmp_path: Path) -> None:
    bad = next((tmp_path / "data" / "BraTS2021_00001").glob("*_t1ce*"))
    bad.write_bytes(bad.read_bytes()[:100])
    result = run_study(study_from(content))
    assert result.computed == 14
    assert len(result.problems) == 1
    assert bad.name in result.problems[0]
    table = read_records(tmp_path / "run")
    assert set(table.loc[table["status"] == "ok", "subject"]) == {"BraTS2021_00000", "BraTS2021_00002"}
    failed = table[table["subject"] == "BraTS2021_00001"]
    assert dict(zip(failed["attack"], failed["status"])) == {
        "clean": "failed", "noise": "skipped", "fgsm": "skipped", "ifgsm": "skipped"
    }  # fmt: skip
    assert failed["region"].isna().all()


def test_nan_logits_are_invalid_and_not_a_perfect_attack(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        victim = load_victim(*args, **kwargs)
        victim.postprocessing = lambda logits: logits * float("nan")
        return victim

    monkeypatch.setattr("monai_adv.studies.victims.load_victim", poisoned)
    result = run_study(study_from(content))
    assert result.computed == 0
    table = read_records(tmp_path / "run")
    assert set(table["status"]) == {"invalid_nonfinite"}
    assert table["dice"].isna().all()


def test_out_of_memory_is_a_status_of_its_own(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")
        yield

    monkeypatch.setattr(runner, "_compute", exhausted)
    run_study(study_from(content))
    assert set(read_records(tmp_path / "run")["status"]) == {"oom"}


def test_no_usable_subject_and_missing_checkpoints_are_errors(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no cases found"):
        run_study(study_from({**content, "data": {"root": str(tmp_path / "empty")}}))
    with pytest.raises(ConfigError, match="subjects nobody are not in"):
        run_study(study_from({**content, "data": {**content["data"], "subjects": ["nobody"]}}))
    with pytest.raises(CheckpointError, match="does not exist"):
        run_study(study_from({**content, "victims": [{"name": "v", "checkpoint": "none.pt"}]}))


def test_an_output_that_cannot_be_written_stops_with_advice(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MonaiAdvError, match=r"cannot write .*run\.lock"):
        run_study(study_from({**content, "output": str(tmp_path / "file" / "run")}))


def test_one_failed_unit_is_a_missing_pair_and_not_the_end_of_the_tables(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = runner._compute

    def stumble(study: Any, victim: Any, case: Any, units: Any, *others: Any) -> Any:
        for number, done in enumerate(compute(study, victim, case, units, *others)):
            if number == 1 and case.subject == "BraTS2021_00001" and units[0].identity["attack"] == "fgsm":
                raise ValueError("something unforeseen")
            yield done

    monkeypatch.setattr(runner, "_compute", stumble)
    result = run_study(study_from(content))
    assert len(result.problems) == 1
    assert "something unforeseen" in result.problems[0]
    table = read_records(tmp_path / "run")
    bad = table[table["status"] != "ok"]
    assert bad[["subject", "attack", "eps"]].to_numpy().tolist() == [["BraTS2021_00001", "fgsm", 0.8]]
    comparison = analyse(table).comparisons["tiny"].table
    row = comparison[(comparison["attack"] == "fgsm") & (comparison["eps"] == 0.8)]
    assert row["n"].tolist() == [2, 2, 2]
    assert row["missing"].tolist() == [1, 1, 1]
    assert run_checks(table)[0].status == "FAIL"


def test_an_interrupted_run_leaves_its_table(content: dict[str, Any], tmp_path: Path) -> None:
    def interrupt(progress: Any) -> None:
        if progress.done >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study_from(content), on_progress=interrupt)
    assert len(read_records(tmp_path / "run")) == 7 * 3
    assert run_study(study_from(content)).reused == 7


def test_subjects_that_left_the_data_leave_the_table(content: dict[str, Any], tmp_path: Path) -> None:
    run_study(study_from(content))
    shutil.rmtree(tmp_path / "data" / "BraTS2021_00002")
    run_study(study_from(content))
    assert set(read_records(tmp_path / "run")["subject"]) == {"BraTS2021_00000", "BraTS2021_00001"}


def test_a_changed_target_mask_is_attacked_again(content: dict[str, Any], tmp_path: Path) -> None:
    make_case(tmp_path / "masks", "BraTS2021_00009", seed=1)
    mask = case_file(tmp_path / "masks", "BraTS2021_00009", "label")
    content["attacks"] = [{"name": "targeted_ifgsm", "steps": 2, "target": {"file": str(mask)}}]
    content["budgets"] = {"eps": [0.5]}
    assert run_study(study_from(content)).computed == 6
    rewrite(lambda array, affine: (np.where(array == 2, 1, array).astype(array.dtype), affine))(mask)
    assert run_study(study_from(content)).computed == 3
    content["attacks"][0]["target"] = {"subject": "nobody"}
    with pytest.raises(ConfigError, match="target subject 'nobody'"):
        run_study(study_from({**content, "output": str(tmp_path / "other")}))


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR"])
def test_what_was_oriented_and_cropped_comes_back_to_the_files_grid(tmp_path: Path, codes: str) -> None:
    axes = nib.orientations.axcodes2ornt(tuple(codes))
    affine = nib.orientations.inv_ornt_aff(axes, (14, 16, 12)) @ np.diag([2.0, 2.0, 3.0, 1.0])
    make_case(tmp_path, "BraTS2021_00000", affine=affine)

    def empty_the_near_end(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        array = array.copy()
        array[:4], array[:, :3], array[:, :, :2] = 0, 0, 0
        return array, affine

    for role in ("T1", "T1c", "T2", "FLAIR", "label"):
        rewrite(empty_the_near_end)(case_file(tmp_path, "BraTS2021_00000", role))
    item = scan(tmp_path).items[0]
    case = cases.load(item, DataConfig(root=tmp_path, crop=1))
    assert any(side.start > 0 for side in case.box)
    assert case.image[0, 0].numel() < case.whole[0].numel()
    raw = np.stack([np.asarray(nib.load(path).dataobj) for path in item["image"]])
    assert np.array_equal(case.restore(case.image[0]).numpy(), raw)


def test_every_nth_subject_by_name(content: dict[str, Any], tmp_path: Path) -> None:
    content["data"]["every"] = 2
    content["attacks"] = [{"name": "noise"}]
    run_study(study_from(content))
    assert set(read_records(tmp_path / "run")["subject"]) == {"BraTS2021_00000", "BraTS2021_00002"}


def test_a_target_from_another_subject_is_on_this_subjects_grid(content: dict[str, Any], tmp_path: Path) -> None:
    content["attacks"] = [
        {"name": "targeted_ifgsm", "steps": 8, "target": {"subject": "BraTS2021_00002"}, "label": "to 2"}
    ]
    content["budgets"] = {"eps": [3.0]}
    result = run_study(study_from(content))
    assert result.problems == []
    found = {item["subject"]: item for item in scan(tmp_path / "data").items}
    study = study_from(content)
    head = Head("softmax")
    own = cases.load(found["BraTS2021_00002"], study.data)
    mask = cases.target_mask({"subject": "BraTS2021_00002"}, own, found, head)
    assert torch.equal(mask, own.classes)
    other = cases.target_mask({"file": found["BraTS2021_00001"]["label"]}, own, found, head)
    assert other.shape == own.classes.shape
    with pytest.raises(ConfigError, match="not in the cohort"):
        cases.target_mask({"subject": "x"}, own, found, head)


def test_label_voxels_outside_the_crop_count_as_missed(tmp_path: Path) -> None:
    make_case(tmp_path, "BraTS2021_00000")
    path = case_file(tmp_path, "BraTS2021_00000", "label")

    def stray(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        array = array.copy()
        array[0, 0, 0] = 2
        return array, affine

    rewrite(stray)(path)
    item = scan(tmp_path).items[0]
    case = cases.load(item, DataConfig(root=tmp_path, crop=0))
    assert case.outside.tolist() == [2]
    assert case.truth_outside(Head("softmax")) == {"WT": 1, "TC": 0, "ET": 0}
