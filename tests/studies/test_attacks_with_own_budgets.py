"""Attacks whose budget is no norm ball (mm, shares, unbounded) beside those that share the study's budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from monai.transforms import Compose

from monai_adv import attacks
from monai_adv.errors import ConfigError
from monai_adv.studies import load_study, read_records, run_study, study_from
from monai_adv.studies.attack_table import attack_table, catalogue, markdown, read_runs
from monai_adv.studies.checks import run_checks
from monai_adv.transforms import Attackd
from monai_adv.visualize.study_report import write_study_report

ROOT = Path(__file__).parents[2]
ENTRIES = [
    {"name": "ifgsm", "steps": 2},
    {"name": "bias_field", "steps": 2, "eps": [0.2, 0.4]},
    {"name": "deformation", "steps": 2, "knot_mm": 4.0, "eps": 3.0},
    {"name": "asma", "steps": 3},
]


@pytest.fixture
def study(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "attacks": ENTRIES}


def test_every_attack_is_run_at_its_own_budgets(study: dict[str, Any], tmp_path: Path) -> None:
    result = run_study(study_from(study))
    assert (result.problems, result.computed) == ([], 3 * (1 + 2 + 2 + 1 + 1))
    table = read_records(tmp_path / "run")
    assert (table["status"] == "ok").all()
    settings = list(table.drop_duplicates("setting")["setting"])
    assert sorted(settings) == sorted([
        "clean", "ifgsm 0.2 std", "ifgsm 0.8 std", "bias_field 0.2 share", "bias_field 0.4 share", "deformation 3 mm",
        "asma unbounded",
    ])  # fmt: skip
    first = table.drop_duplicates("attack").set_index("attack")
    assert first.loc["deformation", ["units", "norm"]].tolist() == ["mm", "parameter"]
    assert first.loc["ifgsm", ["units", "norm"]].tolist() == ["std", "linf"]
    assert np.isinf(first.loc["asma", "eps"])
    assert run_study(study_from(study)).computed == 0
    # a change of an attack's own budget is another unit
    checks = {c.name: c for c in run_checks(table)}
    assert checks["perturbation within the budget"].status == "PASS"
    assert checks["zero outside the support"].status == "PASS"
    page = write_study_report(tmp_path / "run")[1]
    assert "deformation 3 mm" in Path(page).read_text(encoding="utf-8")


def test_anatomy_that_moves_is_scored_against_the_label_that_moved_with_it(study: dict[str, Any]) -> None:
    """The unit of a deformation stores the warped truth; an intensity attack stores the truth itself."""
    study["attacks"] = [{"name": "deformation", "eps": 8.0, "knot_mm": 4.0, "steps": 1}, {"name": "ifgsm", "steps": 1}]
    config = study_from(study)
    run_study(config)
    volumes = sorted((config.output / "volumes").rglob("*.npz"))
    found = {kind: next(p for p in volumes if kind in p.name) for kind in ("clean", "deformation", "ifgsm")}
    truth = {kind: np.load(path)["truth"] for kind, path in found.items()}
    assert (truth["clean"] == truth["ifgsm"]).all()
    assert (truth["clean"] != truth["deformation"]).any()
    assert abs(int((truth["deformation"] > 0).sum()) - int((truth["clean"] > 0).sum())) < (truth["clean"] > 0).sum()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"name": "bias_field", "eps": [0.2, 0.2]}, "eps must be different numbers"),
        ({"name": "bias_field", "eps": "wide"}, "could not convert"),
        ({"name": "bias_field", "eps": 0.2, "units": "std"}, "units belong under budgets"),
        ({"name": "ifgsm", "eps": 0.2}, "eps belong under budgets"),
        ({"name": "bias_field", "control": True, "knots": 3}, "has no option knots"),
    ],
)
def test_what_does_not_fit_is_named(study: dict[str, Any], entry: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        study_from({**study, "attacks": [entry]})


def test_moving_anatomy_moves_all_modalities(study: dict[str, Any]) -> None:
    study["budgets"]["channels"] = [0]
    with pytest.raises(ConfigError, match="all modalities move"):
        study_from(study)


def test_files_of_an_attack_are_relative_to_the_study(study: dict[str, Any], tmp_path: Path) -> None:
    import yaml

    checkpoint = study["victims"][0]["checkpoint"]
    (tmp_path / "other.pt").write_bytes(Path(checkpoint).read_bytes())
    study["attacks"] = [
        {"name": "transfer", "surrogate": "other.pt", "attack": {"name": "ifgsm", "steps": 1}},
        {"name": "ensemble", "attacks": [{"name": "transfer", "surrogate": "other.pt"}, "fgsm"]},
    ]
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    config = load_study(file)
    assert config.attacks[0].options["surrogate"] == str(tmp_path / "other.pt")
    assert config.attacks[1].options["attacks"][0]["surrogate"] == str(tmp_path / "other.pt")


def test_the_label_moves_in_a_compose() -> None:
    from oracles import make_image, make_label, make_victim

    victim, image, label = make_victim("smooth"), make_image(1)[0], make_label("softmax", 1)[0]
    attack = attacks.create("deformation", 1.5, steps=2, knot_mm=2.0)
    moved = Compose([Attackd(attack, victim)])({"image": image, "label": label})
    expected = attack(victim, image[None], label[None])
    assert (moved["label"] == expected.label[0]).all()
    assert (moved["label"] != label).any()
    assert moved["label"].dtype == label.dtype


# ------------------------------------------------------------------------------------------------ tables
def records(dice: dict[str, list[float]], **extra: Any) -> pd.DataFrame:
    """Two subjects, two regions whose mean is the given Dice."""
    rows = [
        {"subject": f"S{i}", "victim": "net", "attack": a, "method": a, "eps": 0.0 if a == "clean" else 0.1,
         "units": "std", "norm": "linf", "setting": a, "region": region, "dice": d + shift, "status": "ok",
         "linf_std": 0.1, "l2_std": 5.0, "ssim": 0.9, "forwards": 3, "backwards": 2, "seconds": 1.5,
         "success": a != "clean", **extra}
        for a, values in dice.items() for i, d in enumerate(values) for region, shift in (("WT", 0.1), ("TC", -0.1))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_table_ranks_within_a_budget_and_counts_wins() -> None:
    table = attack_table(records({"clean": [0.9, 0.8], "a": [0.5, 0.5], "b": [0.4, 0.7], "c": [0.5, 0.9]}))
    attacked = table[table["eps"] > 0].set_index("attack")
    assert list(attacked.index) == ["a", "b", "c"]
    assert np.allclose(attacked["dice"], [0.5, 0.55, 0.7])
    assert attacked["rank"].tolist() == [1, 2, 3]
    assert attacked["wins"].tolist() == [1, 1, 0]
    assert np.allclose(attacked["dice_WT"], [0.6, 0.65, 0.8])
    assert (attacked["n"] == 2).all()
    assert (attacked["success"] == 1).all()
    text = markdown(table)
    assert "| a | 0.600 | 0.400 | 0.500 |" in text
    assert "linf, eps 0.1 std (n = 2)" in text


def test_the_spread_of_a_minimum_norm_is_shown() -> None:
    frame = records({"clean": [0.9, 0.8, 0.7], "fmn": [0.4, 0.4, 0.3]})
    frame.loc[frame["attack"] == "fmn", ["eps", "linf_std"]] = [[np.inf, v] for v in (0.1, 0.1, 0.2, 0.2, 0.6, 0.6)]
    table = attack_table(frame).set_index("attack")
    assert table.loc["fmn", ["linf_std_min", "linf_std_median", "linf_std_max"]].tolist() == [0.1, 0.2, 0.6]
    assert "0.2 (0.1 to 0.6)" in markdown(table.reset_index())


def test_runs_are_joined_and_must_agree(tmp_path: Path) -> None:
    records({"clean": [0.9, 0.8], "a": [0.5, 0.5]}).to_csv(tmp_path / "one.csv", index=False)
    records({"clean": [0.9, 0.8], "b": [0.4, 0.4]}).to_csv(tmp_path / "two.csv", index=False)
    records({"clean": [0.9, 0.7], "b": [0.4, 0.4]}).to_csv(tmp_path / "other.csv", index=False)
    table = attack_table(read_runs([tmp_path / "one.csv", tmp_path / "two.csv"]))
    assert table["attack"].tolist() == ["clean", "b", "a"]
    with pytest.raises(ConfigError, match="the runs differ in"):
        read_runs([tmp_path / "one.csv", tmp_path / "other.csv"])


def test_the_documentation_holds_the_table_of_attacks_as_it_is() -> None:
    """``monai-adv attacks --markdown`` between the markers of docs/attacks.md."""
    page = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    begin, end = "<!-- made by: monai-adv attacks --markdown -->\n", "<!-- end -->"
    assert page[page.index(begin) + len(begin) : page.index(end)] == catalogue()
    assert all(f"`{name}`" in page for name in attacks.ATTACKS)
