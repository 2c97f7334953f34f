from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from builders import make_cohort

from monai_adv.errors import ConfigError
from monai_adv.studies import read_records, run_study, study_from
from monai_adv.studies.checks import Check, check_run, checks_table, exit_code, run_checks, write_checks
from monai_adv.studies.export import attack_files
from monai_adv.studies.units import read_json
from monai_adv.studies.volumes import load_volumes, save_volumes

LOSS = "iterative at least as strong as one step on the loss"
DICE = "iterative at least as strong as one step on Dice"
NOISE = "attack stronger than noise of its size"
BLACK = "transfer and black box not stronger than white box"
ADAPTIVE = "an adaptive attack beside the plain one"
BUDGET = "perturbation within the budget"
SUPPORT = "zero outside the support"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The run folder of a study with every kind of attack that the checks compare, and one exported case."""
    root = tmp_path_factory.mktemp("checks")
    make_cohort(root / "data", 2)
    study = {
        "data": {"root": str(root / "data"), "crop": 1},
        "victims": [{"name": "tiny", "checkpoint": str(checkpoint)}],
        "attacks": [
            {"name": "noise"}, {"name": "fgsm"}, {"name": "ifgsm", "steps": 3}, {"name": "square", "queries": 3},
        ],
        "budgets": {"eps": [0.2, 0.8], "units": "std"},
        "figures": {"montages": 1},
        "output": str(root / "run"),
    }  # fmt: skip
    assert run_study(study_from(study)).problems == []
    spec = {"name": "fgsm", "eps": 0.3}
    exported = list(attack_files(root / "data", checkpoint, root / "run" / "exported", spec, ["BraTS2021_00000"]))
    assert [e.error for e in exported] == [None]
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def table(finished: Path) -> pd.DataFrame:
    return read_records(finished)


def named(checks: list[Check]) -> dict[str, Check]:
    assert len({c.name for c in checks}) == len(checks)
    return {c.name: c for c in checks}


def statuses(table: pd.DataFrame, **changes: Any) -> dict[str, str]:
    """What is not PASS nor NOT RUN."""
    return {c.name: c.status for c in run_checks(table, **changes) if c.status not in ("PASS", "NOT RUN")}


def altered(table: pd.DataFrame, column: str, value: Any, **where: Any) -> pd.DataFrame:
    """The table with another value in the rows where the columns have these values."""
    rows = np.logical_and.reduce([table[name] == wanted for name, wanted in where.items()])
    assert rows.any()
    changed = table.copy()
    changed.loc[rows, column] = value(changed.loc[rows, column]) if callable(value) else value
    return changed


def test_a_sound_run_passes_every_check_that_it_allows(finished: Path) -> None:
    checks = check_run(finished)
    found = {name: check.status for name, check in named(checks).items()}
    assert found.pop(ADAPTIVE) == "NOT RUN"  # no defended victim
    assert set(found.values()) == {"PASS"}
    assert len(found) == 14
    # one budget of fgsm, ifgsm and square on one subject, and the exported case; noise has no budget to keep
    assert "n=4 images" in named(checks)[f"{BUDGET}, as saved"].detail
    assert "n=5 images" in named(checks)[f"{SUPPORT}, as saved"].detail
    assert "a single loss, dice_ce" in named(checks)[DICE].detail
    assert exit_code(checks) == 0


def test_only_what_a_table_tells_is_checked_without_unit_files(table: pd.DataFrame) -> None:
    found = {c.name: c.status for c in run_checks(table)}
    assert {name for name, status in found.items() if status == "NOT RUN"} == {LOSS, ADAPTIVE}
    assert set(found.values()) == {"PASS", "NOT RUN"}


@pytest.mark.parametrize(
    ("column", "value", "where", "expected"),
    [
        ("linf_std", 0.8 * 1.01, {"setting": "fgsm 0.8 std"}, {BUDGET: "FAIL"}),
        ("linf_std", float("nan"), {"setting": "fgsm 0.8 std"}, {BUDGET: "FAIL"}),
        ("outside_max", 1e-6, {"setting": "fgsm 0.8 std"}, {SUPPORT: "FAIL"}),
        ("voxel_accuracy", float("nan"), {"setting": "ifgsm 0.2 std"}, {"everything finite": "FAIL"}),
        ("linf_absolute", float("inf"), {"setting": "noise 0.2 std"}, {"everything finite": "FAIL"}),
        ("truth_voxels", 10_000, {"setting": "clean", "region": "TC"}, {"labels fit the head": "FAIL"}),
        ("truth_voxels", 10_000, {"region": "ET"}, {"labels fit the head": "FAIL"}),
        ("zero_gradient", 0.2, {"setting": "ifgsm 0.2 std"}, {"share of exactly zero gradients": "WARN"}),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_found(
    table: pd.DataFrame, column: str, value: float, where: Mapping[str, Any], expected: dict[str, str]
) -> None:
    changed = altered(table.assign(truth_voxels=table["truth_voxels"].astype(float)), column, value, **where)
    assert statuses(changed) == expected
    assert exit_code(run_checks(changed)) == (3 if "FAIL" in expected.values() else 0)


def test_a_unit_without_a_number_is_counted_and_is_no_failure_of_the_others(table: pd.DataFrame) -> None:
    changed = altered(table, "status", "invalid_nonfinite", setting="fgsm 0.2 std", subject="BraTS2021_00000")
    checks = named(run_checks(changed, ["BraTS2021_00000: NaN"]))
    assert checks["everything finite"].status == "WARN"
    assert "1 units excluded" in checks["everything finite"].detail
    assert checks["every unit has a result"].status == "FAIL"
    assert exit_code(list(checks.values()), ["BraTS2021_00000: NaN"]) == 1
    assert exit_code(run_checks(altered(table, "status", "failed", setting="fgsm 0.2 std"))) == 1
    nothing = run_checks(table[table["attack"] == "clean"])
    assert [c.status for c in nothing] == ["FAIL"]
    assert exit_code(nothing) == 1


def test_budgets_of_single_modalities_may_be_larger_than_eps(run: Path, tmp_path: Path, checkpoint: Path) -> None:
    """Proportions of a study move the allowed norm of the table; what is saved is measured in its own proportions."""
    stored = read_json(run / "study.json")["study"]
    budgets = {"eps": [0.2], "proportions": [0.5, 1, 2, 1]}
    output = str(tmp_path / "other")
    study = {**stored, "attacks": [{"name": "fgsm"}], "budgets": budgets, "output": output, "figures": {"montages": 1}}
    run_study(study_from(study))
    checks = named(check_run(output))
    assert checks[BUDGET].status == checks[f"{BUDGET}, as saved"].status == "PASS"
    assert "largest 2.0" in checks[BUDGET].detail
    assert "over eps 1 " in checks[f"{BUDGET}, as saved"].detail
    assert statuses(read_records(output)) == {BUDGET: "FAIL"}  # without the study the table alone cannot know


def test_an_iterative_attack_that_does_not_climb_is_a_failure(tmp_path: Path, finished: Path) -> None:
    """Steps of a thousandth reach less loss than one step of the whole budget."""
    stored = read_json(finished / "study.json")["study"]
    weak = {"name": "ifgsm", "steps": 2, "step_size": 0.001}
    study = {**stored, "attacks": [{"name": "fgsm"}, weak, {"name": "noise"}], "output": str(tmp_path / "weak")}
    run_study(study_from(study))
    checks = named(check_run(tmp_path / "weak"))
    assert (checks[LOSS].status, checks[DICE].status, checks[NOISE].status) == ("FAIL", "WARN", "WARN")
    assert "2 of 2 cells weaker" in checks[LOSS].detail
    assert "misaligned" in checks[DICE].detail
    assert exit_code(list(checks.values())) == 3

    stored = read_json(tmp_path / "weak" / "study.json")
    units = [read_json(p) for p in (tmp_path / "weak" / "units").rglob("*.json")]
    random = {**stored, "defenses": {"tiny": "smoothing"}}  # single passes of a random victim are no measure
    assert named(run_checks(read_records(tmp_path / "weak"), stored=random, units=units))[LOSS].status == "WARN"
    for unit in units:  # where a random start is high already, no step has led there
        if unit["identity"]["attack"] == "ifgsm":
            start = {**unit["trace"][0], "restart": 1, "loss": 1e9}
            unit["trace"] += [start, {**unit["trace"][-1], "restart": 1}]
    assert named(run_checks(read_records(tmp_path / "weak"), stored=stored, units=units))[LOSS].status == "FAIL"
    for unit in units:  # of two losses nothing can be said
        unit.get("attack", {})["loss"] = unit["identity"]["attack"]
    assert named(run_checks(read_records(tmp_path / "weak"), stored=stored, units=units))[LOSS].status == "NOT RUN"


def test_another_loss_or_target_is_not_compared(table: pd.DataFrame) -> None:
    weak = altered(table, "dice", 1.0, attack="ifgsm")
    assert named(run_checks(weak))[DICE].status == "WARN"
    for options in ({"loss": "ce"}, {"target": "background"}):
        attacks = [{"name": "fgsm"}, {"name": "ifgsm", **options}, {"name": "noise"}, {"name": "square"}]
        stored = {"study": {"victims": [{"name": "tiny"}], "attacks": attacks}}
        checks = named(run_checks(weak, stored=stored))
        assert checks[DICE].status == "NOT RUN"
        assert checks[NOISE].status == ("PASS" if "target" in options else "WARN")


def test_a_loss_that_is_not_finite_is_found_in_the_trace(finished: Path, table: pd.DataFrame) -> None:
    units = [read_json(p) for p in (finished / "units").rglob("*.json")]
    attacked = next(unit for unit in units if unit.get("trace"))
    attacked["trace"][-1]["loss"] = float("nan")
    assert named(run_checks(table, units=units))["everything finite"].status == "FAIL"


def test_black_box_attacks_that_win_point_to_masked_gradients(table: pd.DataFrame) -> None:
    lower = altered(table, "dice", lambda dice: dice * 0, setting="square 0.2 std")
    check = named(run_checks(lower))[BLACK]
    assert check.status == "WARN"
    assert "square" in check.detail
    assert "worst case over 2 white-box attacks" in check.detail
    one = lower[lower["attack"] != "ifgsm"]
    assert "a single white-box attack" in named(run_checks(one))[BLACK].detail
    # the worst case of the white box is taken per subject: each wins on one of them
    both = altered(lower, "dice", lambda dice: dice * 0, setting="fgsm 0.2 std", subject="BraTS2021_00000")
    both = altered(both, "dice", lambda dice: dice * 0, setting="ifgsm 0.2 std", subject="BraTS2021_00001")
    assert named(run_checks(both))[BLACK].status == "PASS"
    assert named(run_checks(table[table["attack"] != "square"]))[BLACK].status == "NOT RUN"


def test_dice_that_rises_with_eps_is_found_where_attacks_have_other_budgets_too(table: pd.DataFrame) -> None:
    """A budget of another attack between the two of one must not hide its rise."""
    rising = altered(table, "dice", 0.999, setting="fgsm 0.8 std")
    rising = altered(rising, "eps", 0.5, setting="ifgsm 0.8 std")
    assert named(run_checks(rising))["Dice falls with eps"].status == "WARN"
    assert named(run_checks(rising[rising["attack"] == "ifgsm"]))["Dice falls with eps"].status == "PASS"
    single = table[(table["eps"] == 0.2) | (table["attack"] == "clean")]
    assert named(run_checks(single))["Dice falls with eps"].status == "NOT RUN"


def test_an_empty_truth_whose_prediction_is_wiped_out_is_no_rise(table: pd.DataFrame) -> None:
    rising = altered(table, "dice", 1.0, setting="fgsm 0.8 std")
    assert named(run_checks(rising))["Dice falls with eps"].status == "WARN"
    empty = rising.assign(truth_empty=rising["truth_empty"].astype(object) | (rising["region"] == "ET"))
    whole = empty[(empty["region"] == "ET") | (empty["setting"] != "fgsm 0.8 std")]
    assert named(run_checks(whole))["Dice falls with eps"].status != "WARN"


def test_a_defense_without_an_adaptive_attack_is_named(table: pd.DataFrame) -> None:
    stored = {
        "study": {"victims": [{"name": "tiny"}], "attacks": [{"name": "fgsm"}, {"name": "ifgsm", "loss": "ce"}]},
        "defenses": {"tiny": "distillation"},
    }
    check = named(run_checks(table, stored=stored))[ADAPTIVE]
    assert (check.status, "NOT ADAPTIVE" in check.detail, "margin" in check.detail) == ("WARN", True, True)
    stored["study"]["attacks"][1]["loss"] = "margin"  # type: ignore[index]
    assert named(run_checks(table, stored=stored))[ADAPTIVE].status == "PASS"


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ("budget", {f"{BUDGET}, as saved"}),
        ("outside", {f"{SUPPORT}, as saved"}),
        ("bounds", {f"{BUDGET}, as saved", "bounds respected, as saved"}),
        ("nan", {f"{BUDGET}, as saved", f"{SUPPORT}, as saved", "bounds respected, as saved"}),
    ],
)
def test_saved_volumes_that_break_the_threat_are_found(run: Path, change: str, failed: set[str]) -> None:
    path = next(p for p in (run / "volumes").rglob("*.npz") if "fgsm_0.8" in p.name and "ifgsm" not in p.name)
    content = load_volumes(path)
    clean = load_volumes(next(p for p in path.parent.glob("*clean*")))
    assert content is not None
    assert clean is not None
    image = content["image"].copy()
    before = clean["image"][0]
    brain = before[before != 0]
    dark, background = (0, *np.argwhere(before == brain.min())[0]), (0, *np.argwhere(before == 0)[0])
    if change == "budget":
        image[dark] = before[dark[1:]] + 0.81 * brain.std()
    elif change == "outside":
        image[background] = 1e-3
    elif change == "bounds":
        image[dark] = before.max() + 1e4
    else:
        image[background] = np.nan
    save_volumes(path, {k: v for k, v in content.items() if k != "key"} | {"image": image}, str(content["key"]))
    assert {c.name for c in check_run(run) if c.status == "FAIL"} == failed


def test_exported_files_are_measured_against_their_sources(run: Path) -> None:
    shutil.rmtree(run / "volumes")
    checks = named(check_run(run))
    assert checks[f"{BUDGET}, as saved"].status == "PASS"
    assert "n=1 images" in checks[f"{BUDGET}, as saved"].detail
    path = next((run / "exported").rglob("*_t1ce.nii.gz"))
    image = nib.load(path)
    stored = np.asarray(image.dataobj).copy()
    stored[tuple(np.argwhere(stored == 0)[0])] += 50
    nib.save(nib.Nifti1Image(stored, image.affine, image.header), path)
    assert {c.name for c in check_run(run) if c.status == "FAIL"} >= {f"{SUPPORT}, as saved"}
    path.unlink()
    checks = named(check_run(run))
    assert checks[f"{BUDGET}, as saved"].status == "NOT RUN"
    assert path.name in checks[f"{BUDGET}, as saved"].detail


def test_a_table_of_checks_is_written_with_the_worst_first(tmp_path: Path) -> None:
    checks = [
        Check("a", "PASS", "1"),
        Check("b", "NOT RUN", "2"),
        Check("c", "FAIL", "=3", "tiny"),
        Check("d", "WARN", ""),
    ]
    assert checks_table(checks)["status"].tolist() == ["FAIL", "WARN", "NOT RUN", "PASS"]
    path = write_checks(tmp_path, checks)
    assert path == tmp_path / "tables" / "checks.csv"
    lines = path.read_text().splitlines()
    assert lines[0] == "status,check,victim,detail"
    assert lines[1].startswith("FAIL,c,tiny,")
    assert ",=3" not in lines[1]
    assert checks_table([]).empty


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study\.json"):
        check_run(tmp_path)
