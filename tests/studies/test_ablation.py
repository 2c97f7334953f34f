"""The ablation table: every method towards the same target, measured on the image that comes back."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from builders import make_cohort
from cli_caller import call
from victims_on_disk import tiny_checkpoint

from monai_adv.data import scan
from monai_adv.errors import ConfigError
from monai_adv.studies import cases
from monai_adv.studies.ablation import ablate, summarise_ablation, write_ablation
from monai_adv.studies.export import CONFIG
from monai_adv.victims import Head

ORDER = ["ssm", "asm", "asma", "pgd 0.2 std"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cohort")
    make_cohort(root, 3, shape=(12, 12, 10))
    return root


def test_every_method_aims_at_the_next_subjects_mask(cohort: Path, checkpoint: Path) -> None:
    done = list(ablate(cohort, checkpoint, steps=4, eps=[0.2], figures=1, snapshots=2, options={"kappa": 0.0}))
    assert [d.subject for d in done] == [f"BraTS2021_0000{i}" for i in range(3)]
    assert all(d.error is None for d in done)
    assert [d.view is not None for d in done] == [True, False, False]
    assert [row["target"] for d in done for row in d.rows[:1]] == [f"subject BraTS2021_0000{i}" for i in (1, 2, 0)]
    for d in done:
        assert [row["method"] for row in d.rows] == ORDER
        assert [row["eps"] for row in d.rows] == [math.inf] * 3 + [0.2]
        assert {(row["steps"], row["backwards"], row["units"]) for row in d.rows} == {(4, 4, "std")}
        assert d.rows[3]["linf"] == pytest.approx(0.2, rel=1e-4)
        assert d.rows[0]["clean_iou"] == d.rows[3]["clean_iou"]
    view = done[0].view
    assert view is not None
    assert list(view.methods) == ORDER
    items = {item["subject"]: item for item in scan(cohort, None).items}
    case = cases.load(items["BraTS2021_00000"], CONFIG)
    head = Head("softmax")
    target = cases.target_mask({"subject": "BraTS2021_00001"}, case, items, head)
    for name, mask in head.regions_of(target).items():
        assert (view.target[name] == mask[0].numpy()).all()
    assert (view.image == case.image[0].numpy()).all()
    assert [len(shown.masks) for shown in view.methods.values()] == [0, 2, 2, 0]
    assert view.methods["asm"].steps == [0, 3]
    # the mask of the start: where the clean prediction is not the target, in any class
    differs = view.methods["asm"].masks[0]
    assert differs.any()
    for name in head.region_names:
        assert not ((view.prediction[name] != view.target[name]) & ~differs).any()


def test_a_rule_and_options(cohort: Path, checkpoint: Path) -> None:
    common = {"steps": 2, "subjects": ["BraTS2021_00001"], "figures": 0, "eps": []}
    (plain,) = ablate(cohort, checkpoint, target={"hide": "ET"}, **common)
    (other,) = ablate(cohort, checkpoint, target={"hide": "ET"}, options={"first_step": 0.3, "kappa": 1.0}, **common)
    assert plain.rows[0]["target"] == "hide ET"
    assert [row["method"] for row in plain.rows] == ["ssm", "asm", "asma"]
    assert other.rows[0]["scale"] == pytest.approx(3 * plain.rows[0]["scale"])
    (paper,) = ablate(cohort, checkpoint, target="background", mode="paper", **common)
    assert paper.rows[2]["scale"] == 1e-7
    assert paper.rows[2]["best_step"] == 2


def test_sigmoid_heads(cohort: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "sigmoid.pt", steps=10, head="sigmoid")
    (done,) = ablate(cohort, checkpoint, steps=2, subjects=["BraTS2021_00000"], snapshots=1)
    assert done.view is not None
    assert list(done.view.target) == ["TC", "WT", "ET"]
    assert done.view.methods["asma"].masks[0].shape == done.view.image.shape[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": ["x"]}, "subjects x are not in"),
        ({"options": {"alpha": 1}}, "no option alpha: asma takes"),
        ({"mode": "published"}, "mode 'published'"),
    ],
)
def test_what_cannot_be_run(cohort: Path, checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(ablate(cohort, checkpoint, **options))


def test_a_single_subject_has_no_next(tmp_path: Path, checkpoint: Path) -> None:
    make_cohort(tmp_path, 1)
    with pytest.raises(ConfigError, match="target 'next' needs two"):
        list(ablate(tmp_path, checkpoint))


def test_the_table(tmp_path: Path) -> None:
    rows = [
        {"subject": s, "method": m, "mode": "calibrated", "units": "std", "steps": 9, "l2": l2, "linf": 0.5, "iou": iou,
         "pixel_accuracy": 0.99, "seconds": 2.0}
        for s, m, l2, iou in (
            ("a", "ssm", 8.0, 0.4), ("a", "asm", 4.0, 0.9), ("a", "asma", 5.0, 0.95),
            ("b", "ssm", 6.0, 0.5), ("b", "asm", 7.0, 0.7), ("b", "asma", 3.0, 0.6),
        )
    ]  # fmt: skip
    summary = summarise_ablation(pd.DataFrame(rows)).set_index("method")
    assert list(summary.index) == ["ssm", "asm", "asma"]
    assert summary.loc["ssm", "l2_mean"] == 7
    assert summary.loc["ssm", "l2_sd"] == pytest.approx(math.sqrt(2))
    csv, document = write_ablation(tmp_path / "new", rows)
    assert pd.read_csv(csv)["iou"].tolist() == [row["iou"] for row in rows]
    text = document.read_text()
    assert "7.00 ± 1.41" in text
    assert "45.0 ± 7.1" in text
    assert "asm against ssm: smaller L2 on 1, higher IoU on 2, both on 1 of 2 subjects" in text
    assert "2.82" in text
    assert "11.76" in text
    assert "other data" in text
    (one,) = [line for line in (write_ablation(tmp_path, rows[:3])[1]).read_text().splitlines() if "| asm " in line][:1]
    assert "4.00" in one
    assert "±" not in one


def test_the_command_goes_on_after_a_bad_subject(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cohort(tmp_path / "data", 3, shape=(12, 12, 10))
    bad = next((tmp_path / "data" / "BraTS2021_00001").glob("*_flair*"))
    bad.write_bytes(b"")
    arguments = ["ablation", str(tmp_path / "data"), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    more = ["--steps", "2", "--eps", "0.1", "--eps", "0.2", "--option", "first_step=0.2", "--figures", "1"]
    assert call(monkeypatch, *arguments, *more) == 1
    captured = capsys.readouterr()
    assert bad.name in captured.err
    table = pd.read_csv(tmp_path / "out" / "ablation.csv")
    assert sorted(table["subject"].unique()) == ["BraTS2021_00000", "BraTS2021_00002"]
    assert set(table["method"]) == {"ssm", "asm", "asma", "pgd 0.1 std", "pgd 0.2 std"}
    assert "Published on other data" in (tmp_path / "out" / "ablation.md").read_text()
    assert [p.name for p in (tmp_path / "out" / "figures").glob("*.png")] == ["ablation_BraTS2021_00000.png"]
    assert call(monkeypatch, *arguments, "--option", "first_step") == 1
    assert "must be key=value" in capsys.readouterr().err


def test_a_rule_in_yaml_on_the_command_line(
    cohort: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["ablation", str(cohort), "--checkpoint", str(checkpoint), "-o", str(tmp_path), "--figures", "0"]
    more = ["--steps", "1", "--subject", "BraTS2021_00002", "--target", "{subject: BraTS2021_00000}"]
    assert call(monkeypatch, *arguments, *more) == 0
    assert set(pd.read_csv(tmp_path / "ablation.csv")["target"]) == {"subject BraTS2021_00000"}
    assert not (tmp_path / "figures").exists()
