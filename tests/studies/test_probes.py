from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from builders import case_file, make_case, make_cohort
from torch import Tensor, nn

from monai_adv.data import brats_datalist
from monai_adv.defenses import smoothed
from monai_adv.errors import ConfigError, MonaiAdvError
from monai_adv.studies import StudyConfig, cases, probes, read_records, run_study, study_from
from monai_adv.studies.check import Check
from monai_adv.studies.probes import load_checks, run_probes, smallest
from monai_adv.studies.probing import (
    BEFORE,
    BOUNDS,
    CLEAN,
    DOUBLE,
    FOUND,
    GRADIENT,
    LARGE,
    NAMES,
    PATH,
    SEED,
    TWICE,
    Stored,
    probe,
)
from monai_adv.studies.units import read_json
from monai_adv.threats.ball import Ball
from monai_adv.victims import Victim, load_victim, read_checkpoint, save_checkpoint

Step = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> StudyConfig:
    """A study of two subjects that was run, the second one smaller."""
    root = tmp_path_factory.mktemp("probes")
    make_cohort(root / "data", 1)
    make_case(root / "data", "BraTS2021_00001", shape=(12, 12, 12), seed=1)
    study = study_from(
        {
            "data": {"root": str(root / "data"), "crop": 1},
            "victims": [{"name": "tiny", "checkpoint": str(checkpoint)}],
            "attacks": [{"name": "fgsm"}, {"name": "ifgsm", "steps": 8}],
            "budgets": {"eps": [0.2, 0.8], "units": "std"},
            "figures": {"montages": 0},
            "output": str(root / "run"),
        }
    )
    assert run_study(study).problems == []
    return study


@pytest.fixture
def study(finished: StudyConfig, tmp_path: Path) -> StudyConfig:
    """The same study with a run folder of its own."""
    return finished.model_copy(update={"output": Path(shutil.copytree(finished.output, tmp_path / "run"))})


@pytest.fixture(scope="module")
def case(finished: StudyConfig) -> cases.Case:
    return cases.load(brats_datalist(finished.data.root)[1], finished.data)


@pytest.fixture
def victim(checkpoint: Path) -> Victim:
    return load_victim(checkpoint)


@pytest.fixture
def probed(finished: StudyConfig, case: cases.Case) -> Callable[..., dict[str, Check]]:
    def run(victim: Victim, stored: Stored | None = None) -> dict[str, Check]:
        checks = probe(finished, "tiny", victim, case, stored or Stored())
        assert tuple(c.name for c in checks) == NAMES
        assert {c.victim for c in checks} == {"tiny"}
        return {c.name: c for c in checks}

    return run


def bad(checks: dict[str, Check]) -> dict[str, str]:
    return {name: c.status for name, c in checks.items() if c.status in ("WARN", "FAIL")}


def wrong_slope(logits: Tensor) -> Tensor:
    """The logits with three tenths of their gradient too much where they are positive."""
    return logits + 0.3 * (logits.relu() - logits.relu().detach())


def half_masked(image: Tensor) -> Tensor:
    """The image without a gradient in half of the volume."""
    return torch.cat([image[:, :, :6].detach(), image[:, :, 6:]], dim=2)


class Counter(nn.Module):
    """Counts its passes in a buffer, also in evaluation mode."""

    passes: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        self.passes += 1
        return self.network(image)


class Drifting(nn.Module):
    """Learns while it is used."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        self.weight.data *= 1.001
        return self.network(image) * self.weight


def test_a_sound_victim_passes_and_nothing_is_computed_twice(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    checks = run_probes(study, lambda progress: said.append(f"{progress.done}/{progress.total} {progress.what}"))
    assert {c.name: c.status for c in checks} == dict.fromkeys(NAMES, "PASS")
    assert all("BraTS2021_00001" in c.detail for c in checks)  # the smaller one
    assert said == ["0/1 checks: tiny BraTS2021_00001", "1/1 checks done"]
    stored = read_json(study.output / "checks.json")
    assert [tuple(row[k] for k in ("name", "status", "detail", "victim")) for row in stored] == [
        (c.name, c.status, c.detail, c.victim) for c in checks
    ]
    assert load_checks(study.output) == checks

    def again(*args: Any) -> list[Check]:
        raise AssertionError("computed again")

    before = (study.output / "checks.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(probes, "probe", again)
        assert run_probes(study) == checks
        assert (study.output / "checks.json").read_bytes() == before
        (study.output / "checks.json").write_bytes(before[:-40])  # damaged
        assert {c.status for c in run_probes(study)} == {"NOT RUN"}
    assert run_probes(study) == checks


def test_another_configuration_is_computed_anew(study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(study: StudyConfig, name: str, *args: Any) -> list[Check]:
        calls.append(name)
        return [Check(n, "PASS", "", name) for n in NAMES]

    monkeypatch.setattr(probes, "probe", noted)
    run_probes(study)
    run_probes(study)
    assert calls == ["tiny"]
    assert {c.status for c in load_checks(study.output)} == {"PASS"}
    grown = study.model_copy(update={"budgets": study.budgets.model_copy(update={"bounds": None})})
    run_probes(grown)
    assert calls == ["tiny"] * 2
    # the folder holds the larger study: what was computed for the other one is no check of it
    assert {c.status for c in load_checks(study.output)} == {"NOT RUN"}
    run_probes(study, subjects=2)
    assert calls == ["tiny"] * 4
    assert len(load_checks(study.output)) == 2 * len(NAMES)
    case_file(study.data.root, "BraTS2021_00001", "T2", "2021").touch()  # content decides, not time
    run_probes(study, subjects=2)
    assert calls == ["tiny"] * 4


def test_an_option_turns_them_off_and_changes_no_unit(study: StudyConfig) -> None:
    content = study.model_dump(mode="json")
    off = study_from({**content, "checks": {"probes": False}})
    assert run_probes(off) == []
    assert not (study.output / "checks.json").exists()
    assert off.fingerprint() == study.fingerprint()
    assert run_study(off).computed == 0
    assert study_from({**content, "checks": {"subjects": 2}}).checks.subjects == 2
    for wrong in ({"probe": True}, {"subjects": 0}):
        with pytest.raises(ConfigError, match="did you mean 'probes'" if "probe" in wrong else "subjects"):
            study_from({**content, "checks": wrong})


def test_a_stored_result_that_the_victim_does_not_give_is_a_failure(study: StudyConfig) -> None:
    assert bad({c.name: c for c in run_probes(study)}) == {}
    table = read_records(study.output)
    rows = (table["attack"] == "clean") & (table["region"] == "TC")
    table.loc[rows, "dice"] -= 1e-4
    (study.output / "merged.json").unlink(missing_ok=True)  # checksums of the table
    table.drop(columns=["seconds", "forwards", "backwards"]).to_csv(study.output / "records.csv", index=False)
    assert bad({c.name: c for c in run_probes(study)}) == {CLEAN: "FAIL"}


def test_before_a_run_nothing_is_compared_with_its_results(study: StudyConfig) -> None:
    shutil.rmtree(study.output)
    checks = {c.name: c.status for c in run_probes(study)}
    assert {name for name, status in checks.items() if status != "PASS"} == {CLEAN, DOUBLE}
    assert checks[CLEAN] == checks[DOUBLE] == "NOT RUN"


def test_what_cannot_be_had_costs_only_itself(study: StudyConfig, tmp_path: Path) -> None:
    broken = study.victims[0].model_copy(update={"name": "gone", "checkpoint": tmp_path / "none.pt"})
    both = study.model_copy(update={"victims": [broken, *study.victims]})
    checks = run_probes(both)
    gone = [c for c in checks if c.victim == "gone"]
    assert {c.status for c in gone} == {"NOT RUN"}
    assert "none.pt" in gone[0].detail
    assert {c.status for c in checks if c.victim == "tiny"} == {"PASS"}
    empty = study.model_copy(update={"data": study.data.model_copy(update={"root": tmp_path / "nothing"})})
    assert {c.status for c in run_probes(empty)} == {"NOT RUN"}


def test_subjects_are_the_smallest_that_have_a_result(study: StudyConfig) -> None:
    table = read_records(study.output)
    names = [item["subject"] for item in smallest(study, table, 2)]
    assert names == ["BraTS2021_00001", "BraTS2021_00000"]
    assert len(smallest(study, table, 1)) == 1
    failed = table.assign(status=["failed" if s == "BraTS2021_00001" else "ok" for s in table["subject"]])
    assert [item["subject"] for item in smallest(study, failed, 2)] == ["BraTS2021_00000"]
    # of equal grids the smaller files: more of the scan is background
    make_case(study.data.root, "BraTS2021_00002", shape=(12, 12, 12), seed=2)
    t2 = case_file(study.data.root, "BraTS2021_00002", "T2", "2021")
    try:
        import nibabel as nib

        image = nib.load(t2)
        nib.save(nib.Nifti1Image(image.get_fdata().round(-2).astype("int16"), image.affine), t2)
        assert [i["subject"] for i in smallest(study, None, 3)][:2] == ["BraTS2021_00002", "BraTS2021_00001"]
    finally:
        shutil.rmtree(t2.parent)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (
            lambda logits: nn.functional.dropout(logits, 0.3),
            {**dict.fromkeys((FOUND, BEFORE, TWICE, SEED, PATH), "FAIL"), GRADIENT: "WARN"},
        ),
        (lambda logits: (logits * 2).round() / 2, {GRADIENT: "WARN", LARGE: "WARN"}),
        (wrong_slope, {GRADIENT: "WARN"}),
    ],
    ids=["dropout", "quantised", "wrong slope"],
)  # fmt: skip
def test_steps_after_the_network_that_break_a_promise_are_found(
    probed: Callable[..., dict[str, Check]], victim: Victim, step: Step, expected: dict[str, str]
) -> None:
    victim.postprocessing = step
    torch.manual_seed(0)
    assert bad(probed(victim)) == expected


def test_a_gradient_that_is_missing_in_parts_is_found(probed: Callable[..., dict[str, Check]], victim: Victim) -> None:
    """Along its own sign such a gradient is right; only a direction that it did not choose tells."""
    inner = victim.preprocessing
    assert inner is not None
    victim.preprocessing = lambda image: inner(half_masked(image))
    check = probed(victim)[GRADIENT]
    assert check.status == "WARN"
    along = float(check.detail.split("gradient ")[1].split(" along")[0])
    assert along < 0.05


def test_a_gradient_that_is_cut_off_leaves_black_box_attacks(
    probed: Callable[..., dict[str, Check]], victim: Victim
) -> None:
    victim.postprocessing = lambda logits: logits.detach()
    checks = probed(victim)
    assert (checks[GRADIENT].status, "not connected" in checks[GRADIENT].detail) == ("WARN", True)
    assert "not connected" in checks[SEED].detail  # the attack said so
    assert checks[SEED].status == checks[PATH].status == checks[LARGE].status == "NOT RUN"
    assert checks[FOUND].status == checks[TWICE].status == "PASS"


def test_a_network_that_counts_its_passes_is_found(probed: Callable[..., dict[str, Check]], victim: Victim) -> None:
    victim.network = Counter(victim.network)
    checks = probed(victim)
    assert checks[FOUND].status == "FAIL"
    assert "passes" in checks[FOUND].detail
    assert bad(checks) == {FOUND: "FAIL", TWICE: "FAIL"}


def test_a_network_that_learns_while_it_is_used_is_found(
    probed: Callable[..., dict[str, Check]], victim: Victim
) -> None:
    victim.network = Drifting(victim.network)
    checks = probed(victim)
    assert {name: checks[name].status for name in (FOUND, BEFORE, TWICE)} == dict.fromkeys(
        (FOUND, BEFORE, TWICE), "FAIL"
    )
    assert "weight" in checks[FOUND].detail


def test_a_gradient_left_on_a_parameter_is_found(probed: Callable[..., dict[str, Check]], victim: Victim) -> None:
    parameter = next(victim.network.parameters())

    def leave(logits: Tensor) -> Tensor:
        parameter.grad = torch.ones_like(parameter)
        return logits

    victim.postprocessing = leave
    assert bad(probed(victim)) == {FOUND: "FAIL"}


def test_a_victim_that_is_scored_on_another_path_is_found(
    probed: Callable[..., dict[str, Check]], victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack sees the logits, and what is scored is their mirror image."""
    predict = victim.predict
    monkeypatch.setattr(victim, "predict", lambda image, affine=None: predict(image, affine).flip(2))
    assert bad(probed(victim)) == {PATH: "FAIL"}


def test_attacks_that_leave_the_bounds_are_found(
    probed: Callable[..., dict[str, Check]], victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ball, "_bounded", lambda self, image: torch.where(self.mask, image, self.clean))
    assert bad(probed(victim)) == {BOUNDS: "FAIL"}


def test_without_bounds_there_is_nothing_to_keep(finished: StudyConfig, case: cases.Case, victim: Victim) -> None:
    free = finished.model_copy(update={"budgets": finished.budgets.model_copy(update={"bounds": None})})
    checks = {c.name: c for c in probe(free, "tiny", victim, case, Stored())}
    assert checks[BOUNDS].status == "NOT RUN"


def test_a_victim_that_no_attack_moves_is_doubted(
    probed: Callable[..., dict[str, Check]], victim: Victim, case: cases.Case
) -> None:
    """Constant logits: nothing is wrong with the numbers, but neither gradient nor a very large eps does anything."""
    truth = victim.head.encode(victim.head.label_from_classes(case.classes), torch.zeros(1, 4, *case.classes.shape[2:]))
    victim.postprocessing = lambda logits: 0 * logits + 5 * truth
    assert bad(probed(victim)) == {GRADIENT: "WARN", LARGE: "WARN"}


def test_a_random_victim_is_probed_with_the_same_numbers(
    probed: Callable[..., dict[str, Check]], victim: Victim, case: cases.Case
) -> None:
    """What is deployed is the vote over its own numbers; passes are the same only if they are drawn anew."""
    votes = smoothed(victim, sigma=0.25, samples=3)
    label = votes.head.label_from_classes(case.classes)
    prediction = votes.predict(case.image, case.affine)
    regions = ((n, a, votes.head.regions_of(label)[n]) for n, a in votes.head.regions_of(prediction).items())
    dice = {name: float(2 * (a & b).sum() / (a.sum() + b.sum())) for name, a, b in regions}
    checks = probed(votes, Stored(clean=dice))
    assert {checks[n].status for n in (FOUND, BEFORE, TWICE, SEED, CLEAN, GRADIENT)} == {"PASS"}
    assert checks[PATH].status == "NOT RUN"


def test_a_victim_at_its_own_voxel_size_is_probed_there(study: StudyConfig, tmp_path: Path) -> None:
    network, config = read_checkpoint(study.victims[0].source)
    path = save_checkpoint(tmp_path / "coarse.pt", network, dataclasses.replace(config, spacing=[1.5, 1.5, 1.5]))
    entry = study.victims[0].model_copy(update={"checkpoint": path, "resample": True})
    changed = {"victims": [entry], "output": tmp_path / "coarse", "attacks": study.attacks[:1]}
    coarse = study.model_copy(update=changed)
    assert run_study(coarse).problems == []
    assert {c.name: c.status for c in run_probes(coarse)}[CLEAN] == "PASS"


def test_an_attack_that_goes_on_to_win_is_not_settled(
    finished: StudyConfig, probed: Callable[..., dict[str, Check]], victim: Victim
) -> None:
    table = read_records(finished.output)
    own = table[(table["setting"] == "ifgsm 0.8 std") & (table["subject"] == "BraTS2021_00001")]
    found = probed(victim, Stored(title="ifgsm", eps=0.8, dice=own["dice"].mean()))[DOUBLE]
    assert found.status == "PASS"
    assert "after 8 steps" in found.detail
    assert "after 16 of ifgsm at 0.8" in found.detail
    found = probed(victim, Stored(title="ifgsm", eps=0.8, dice=own["dice"].mean() + 0.02))[DOUBLE]
    assert (found.status, "more steps" in found.detail) == ("WARN", True)
    assert probed(victim)[DOUBLE].status == "NOT RUN"


def test_the_strongest_iterative_attack_is_the_one_that_is_doubled(study: StudyConfig) -> None:
    table = read_records(study.output)
    extra = table[table["attack"] == "ifgsm"].assign(attack="other", dice=0.9)
    wide = study_from({**study.model_dump(mode="json"), "attacks": [
        {"name": "fgsm"}, {"name": "pgd", "label": "other"}, {"name": "ifgsm", "steps": 8},
        {"name": "targeted_ifgsm"}, {"name": "ifgsm", "label": "elsewhere", "only": ["tiny"]}]})  # fmt: skip
    stored = probes._stored(wide, pd.concat([table, extra]), "tiny", "BraTS2021_00001")
    assert (stored.title, stored.eps) == ("ifgsm", 0.8)
    unit = next(p for p in (study.output / "units" / "BraTS2021_00001").glob("*_ifgsm_0.8*"))
    assert stored.seed == read_json(unit)["seed"]


@pytest.mark.parametrize(
    ("error", "status"), [(MonaiAdvError("no"), "FAIL"), (torch.OutOfMemoryError("full"), "NOT RUN")]
)
def test_an_error_is_a_result_and_never_a_crash(
    probed: Callable[..., dict[str, Check]], victim: Victim, error: Exception, status: str
) -> None:
    passes = 0

    def stumble(logits: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes > 1:
            raise error
        return logits

    victim.postprocessing = stumble
    checks = probed(victim)
    assert checks[BEFORE].status == checks[TWICE].status == status
    assert checks[SEED].status == checks[GRADIENT].status == checks[LARGE].status == "NOT RUN"
    assert str(error) in checks[SEED].detail


def test_an_interruption_is_no_result(probed: Callable[..., dict[str, Check]], victim: Victim) -> None:
    def stop(logits: Tensor) -> Tensor:
        raise KeyboardInterrupt

    victim.postprocessing = stop
    with pytest.raises(KeyboardInterrupt):
        probed(victim)
