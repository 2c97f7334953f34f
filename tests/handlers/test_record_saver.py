"""The rows that AttackRecordSaver writes, against MONAI's metrics and the arithmetic of the norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ddp_worker import cases
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.metrics import DiceMetric, HausdorffDistanceMetric
from monai.utils import CommonKeys
from torch import nn

from monai_adv.engines import AttackEvaluator, AttackKeys
from monai_adv.errors import ConfigError
from monai_adv.handlers import AttackRecordSaver
from monai_adv.victims import Head


def run(saver: AttackRecordSaver, data: list[dict[str, Any]], head: str = "softmax", **options: Any) -> list[Any]:
    """The undecollated outputs of an evaluation that the saver records."""
    torch.manual_seed(0)
    network = nn.Conv3d(4, 4 if head == "softmax" else 3, 3, padding=1)
    attack = {"name": "fgsm", "eps": 0.3, **options}
    engine = AttackEvaluator(
        "cpu", DataLoader(Dataset(data), batch_size=2), network, attack=attack, head=head, val_handlers=[saver],
        decollate=False,
    )  # fmt: skip
    outputs: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(dict(e.state.output)))
    engine.run()
    return outputs


# MONAI 1.6.1 deprecates an argument that its own HausdorffDistanceMetric passes
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_scores_are_monais_and_norms_are_the_perturbations(head: str, tmp_path: Path) -> None:
    data = cases(3)
    kind = Head(head)
    for case in data:
        case["label"] = kind.label_from_classes(case["label"].as_tensor().long()[None])[0]
    outputs = run(AttackRecordSaver(tmp_path / "deep" / "r.csv", victim="v", head=head), data, head)
    table = pd.read_csv(tmp_path / "deep" / "r.csv").set_index(["subject", "attack", "region"])
    assert len(table) == 3 * 2 * 3
    assert set(table["victim"]) == {"v"}
    dice = DiceMetric(ignore_empty=False, reduction="none")
    hd95 = HausdorffDistanceMetric(include_background=True, percentile=95, reduction="none")
    subjects = iter(f"case{i}" for i in range(3))
    for output in outputs:
        for index in range(len(output[CommonKeys.LABEL])):
            subject = next(subjects)
            truth = kind.regions_of(output[CommonKeys.LABEL][index : index + 1])
            for attack, key in (("clean", AttackKeys.CLEAN_PRED), ("fgsm", CommonKeys.PRED)):
                found = kind.regions_of(kind.predict(output[key][index : index + 1].as_tensor()))
                for region in kind.region_names:
                    row = table.loc[(subject, attack, region)]
                    a, b = (x[region].float().reshape(1, 1, 8, 8, 8) for x in (found, truth))
                    assert row["dice"] == pytest.approx(float(dice(a, b)), abs=1e-6)
                    if a.any() and b.any():
                        assert row["hd95"] == pytest.approx(float(hd95(a, b, spacing=(2.0, 2.0, 3.0))), abs=1e-4)
            change = (output[CommonKeys.IMAGE] - output[AttackKeys.CLEAN_IMAGE])[index]
            assert table.loc[(subject, "fgsm")]["linf_absolute"].iloc[0] == pytest.approx(float(change.abs().max()))
            assert (table.loc[(subject, "clean")]["linf_absolute"] == 0).all()


def test_names_come_from_the_files_and_spacing_from_whoever_knows_it(tmp_path: Path) -> None:
    data = [{k: v for k, v in case.items() if k != "subject"} for case in cases(2)]
    run(AttackRecordSaver(tmp_path / "a.csv"), data)
    assert set(pd.read_csv(tmp_path / "a.csv")["subject"]) == {"case0", "case1"}
    plain = [{k: v.as_tensor() for k, v in case.items()} for case in data]
    with pytest.raises(ConfigError, match="'subject' key"):
        run(AttackRecordSaver(tmp_path / "b.csv"), plain)
    named = [{**case, "id": f"s{i}"} for i, case in enumerate(plain)]
    with pytest.raises(ConfigError, match="spacing in mm"):
        run(AttackRecordSaver(tmp_path / "c.csv", subject_key="id"), named)
    run(AttackRecordSaver(tmp_path / "d.csv", subject_key="id", spacing=(2.0, 2.0, 3.0)), named)
    given, own = pd.read_csv(tmp_path / "d.csv"), pd.read_csv(tmp_path / "a.csv")
    assert given["hd95"].equals(own["hd95"])


def test_a_file_is_continued_once_per_subject_and_setting(tmp_path: Path) -> None:
    path, data = tmp_path / "r.csv", cases(2)
    run(AttackRecordSaver(path), data)
    run(AttackRecordSaver(path), data, eps=0.1)
    table = pd.read_csv(path)
    assert len(table) == 2 * 3 * 3
    assert sorted(set(table["eps"])) == [0, 0.1, 0.3]
    with pytest.raises(ConfigError, match=r"case0, fgsm 0\.1 std was recorded already"):
        run(AttackRecordSaver(path), data, eps=0.1)
    with pytest.raises(ConfigError, match=r"case1, .* recorded already"):
        run(AttackRecordSaver(tmp_path / "new.csv"), [data[0], data[1], data[1]])


@pytest.mark.parametrize(
    ("content", "message"),
    [("subject,setting,dice\nx,clean,1\n", "has other columns"), ("a,b\n1,2\n", "no table of records")],
)
def test_a_file_of_something_else_is_not_continued(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(content)
    with pytest.raises(ConfigError, match=message):
        run(AttackRecordSaver(tmp_path / "r.csv"), cases(1))
    assert (tmp_path / "r.csv").read_text() == content


def test_what_it_needs_is_said(tmp_path: Path) -> None:
    unlabelled = [{k: v for k, v in case.items() if k != "label"} for case in cases(1)]
    with pytest.raises(ConfigError, match="the batch has none"):
        run(AttackRecordSaver(tmp_path / "r.csv"), unlabelled, label_source="prediction")
    engine = SupervisedEvaluator(
        "cpu", DataLoader(Dataset(cases(1))), nn.Conv3d(4, 4, 1), val_handlers=[AttackRecordSaver(tmp_path / "r.csv")]
    )
    with pytest.raises(ConfigError, match="attach it to one"):
        engine.run()
