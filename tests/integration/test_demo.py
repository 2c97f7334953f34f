"""The demonstration as a user runs it, on one subject."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch

from monai_adv.errors import ConfigError
from monai_adv.studies import demo, read_records, run_study
from monai_adv.studies.demo import RECIPE, TRAINING, demo_study, packaged_victim
from monai_adv.victims import load_victim
from monai_adv.victims.checkpoint import file_hash
from monai_adv.visualize.study_report import write_study_report


def test_the_packaged_victim_is_the_one_its_page_describes() -> None:
    path = packaged_victim()
    assert path.stat().st_size <= 2_000_000
    page = (resources.files("monai_adv.networks") / "assets" / "README.md").read_text()
    assert file_hash(path) in page
    stored = torch.load(path, weights_only=True)["config"]["training"]
    assert stored["steps"] == RECIPE["steps"]
    assert stored["recipe"]["seed"] == RECIPE["seed"]
    assert len(stored["subjects"]) == TRAINING["subjects"]
    assert all(name.startswith(f"Sim{TRAINING['seed']:03d}_") for name in stored["subjects"])
    assert f"--subjects {TRAINING['subjects']} --spacing {TRAINING['spacing']} --seed {TRAINING['seed']}" in page
    assert load_victim(path).head.kind == "softmax"


@pytest.mark.slow
def test_demo_from_nothing_to_a_report(tmp_path: Path) -> None:
    study = demo_study(tmp_path, subjects=1)
    study = study.model_copy(update={"budgets": study.budgets.model_copy(update={"eps": [0.2]})})
    result = run_study(study)
    assert result.problems == []
    assert result.computed == 5
    table = read_records(result.folder)
    dice = table[table["region"] == "WT"].set_index("attack")["dice"]
    assert dice["clean"] > 0.5
    assert dice["clean"] > dice["fgsm"] > dice["ifgsm"]
    assert dice["noise"] > dice["fgsm"]
    _, report = write_study_report(result.folder)
    assert report.stat().st_size > 100_000
    assert run_study(study).computed == 0


def test_the_training_cohort_is_not_attacked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not held out"):
        demo_study(tmp_path, seed=TRAINING["seed"])


def test_retraining_follows_the_recipe_on_its_own_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAINING", {"subjects": 2, "spacing": 4.0, "seed": TRAINING["seed"]})
    path = demo.train_demo_victim(tmp_path / "training", tmp_path / "demo_unet.pt", steps=2)
    stored = torch.load(path, weights_only=True)["config"]
    packaged = torch.load(packaged_victim(), weights_only=True)["config"]
    assert stored["network"] == packaged["network"]
    apart = {"steps": None, "network": None}  # the network was compared whole
    recipes = ({**config["training"]["recipe"], **apart} for config in (stored, packaged))
    one, other = ({key: value for key, value in recipe.items() if value is not None} for recipe in recipes)
    assert one == other
    assert stored["training"]["subjects"] == packaged["training"]["subjects"][:2]
