"""Target rules in studies, exports, engines and transforms: read early, and in mm of the scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_cohort
from cli_caller import call
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer

from monai_adv import attacks
from monai_adv.attacks import run as attack_run
from monai_adv.data import scan
from monai_adv.engines import AttackIteration
from monai_adv.errors import ConfigError
from monai_adv.losses import edits, make_target
from monai_adv.studies import cases, read_records, run_study, study_from
from monai_adv.transforms import Attackd
from monai_adv.victims import Head, Victim

AFFINE = np.array([[-2.0, 0, 0, 20], [0, -1.5, 0, 30], [0, 0, 3.0, -5], [0, 0, 0, 1]])
SIZE = (2.0, 1.5, 3.0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every target that an attack makes, with what it was made from."""
    seen: list[dict[str, Any]] = []

    def spy(rule: Any, label: torch.Tensor, logits: torch.Tensor, head: Head, **options: Any) -> torch.Tensor:
        target = make_target(rule, label, logits, head, **options)
        seen.append({"rule": rule, "label": label, "target": target, **options})
        return target

    monkeypatch.setattr(attack_run, "make_target", spy)
    return seen


def test_a_study_grows_the_lesion_by_mm(content: dict[str, Any], tmp_path: Path, made: list[dict[str, Any]]) -> None:
    make_cohort(tmp_path / "coarse", 2, affine=AFFINE)
    content["data"]["root"] = str(tmp_path / "coarse")
    content["attacks"] = [
        {"name": "targeted_ifgsm", "steps": 2, "target": {"grow": 4}},
        {"name": "targeted_ifgsm", "steps": 2, "target": {"insert": {"radius": 2.5, "class": "ET"}}, "label": "insert"},
    ]
    content["budgets"] = {"eps": [0.5]}
    study = study_from(content)
    assert run_study(study).problems == []
    assert (read_records(tmp_path / "run")["status"] == "ok").all()
    grown = [m for m in made if m["rule"] == {"grow": 4}]
    assert len(grown) == 2
    items = {item["subject"]: item for item in scan(tmp_path / "coarse").items}
    for found, item in zip(grown, items.values()):
        case = cases.load(item, study.data)
        assert found["spacing"] == pytest.approx(SIZE)
        assert torch.equal(found["target"], edits.grow(case.classes, 4, SIZE))
        assert not torch.equal(found["target"], edits.grow(case.classes, 4, (1.0, 1.0, 1.0)))
    for found in made[1::2]:  # the inserted lesion lies in the brain, which is where the image may change
        new = found["target"] != found["label"]
        assert new.any()
        assert found["support"].any(1, keepdim=True)[new].all()


def test_the_command_line_reads_a_rule_and_uses_mm(
    tmp_path: Path, checkpoint: Path, made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "coarse", 1, affine=AFFINE)
    arguments = ["attack", str(tmp_path / "coarse"), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    arguments += ["--attack", "targeted_ifgsm", "--eps", "0.5", "--option", "steps=1"]
    assert call(monkeypatch, *arguments, "--option", "target={grow: 4}") == 0
    assert made[0]["rule"] == {"grow": 4}
    assert made[0]["spacing"] == pytest.approx(SIZE)
    assert torch.equal(made[0]["target"], edits.grow(made[0]["label"], 4, SIZE))
    assert call(monkeypatch, *arguments, "--option", "target={gorw: 4}") != 0
    assert len(made) == 1


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"gorw": 4}, r"attack targeted_ifgsm: target \{'gorw': 4\} is unknown"),
        ({"grow": "4 mm"}, "attack targeted_ifgsm: .* grow is written"),
        ({"subject": "BraTS2021_00001", "grow": 4}, "write {subject: name} or"),
        ({"file": "mask.nii.gz", "schema": "msd"}, "write {subject: name} or"),
    ],
)
def test_a_bad_rule_fails_when_the_study_is_read(content: dict[str, Any], target: Any, says: str) -> None:
    content["attacks"] = [{"name": "targeted_ifgsm", "target": target}]
    with pytest.raises(ConfigError, match=says):
        study_from(content)


def small_case(seed: int) -> dict[str, MetaTensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.zeros(1, 9, 9, 9, dtype=torch.long)
    label[:, 4, 4, 4], label[:, 4, 5, 4] = 2, 3
    return {
        "image": MetaTensor(torch.randn(4, 9, 9, 9, generator=generator), affine=torch.from_numpy(AFFINE)),
        "label": MetaTensor(label, affine=torch.from_numpy(AFFINE)),
    }


def test_meta_tensors_bring_their_spacing(made: list[dict[str, Any]]) -> None:
    network = torch.nn.Conv3d(4, 4, 1)
    attack = attacks.create("targeted_ifgsm", eps=0.5, steps=1, target={"grow": 4})
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"), val_data_loader=DataLoader(Dataset([small_case(0), small_case(1)]), batch_size=2),
        network=network, inferer=SimpleInferer(), decollate=False, iteration_update=AttackIteration(attack),
    )  # fmt: skip
    evaluator.run()
    Attackd(attack, Victim(network))(small_case(0))
    case = small_case(0)
    attack(Victim(network), case["image"][None], case["label"][None])
    assert [len(m["target"]) for m in made] == [2, 1, 1]
    for found in made:
        assert found["spacing"] == pytest.approx(SIZE)
        assert torch.equal(found["target"], edits.grow(found["label"], 4, SIZE))
