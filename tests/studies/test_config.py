from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from monai_adv.errors import ConfigError
from monai_adv.studies import load_study, study_from


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"atacks": []}, r"atacks: unknown key; did you mean 'attacks'"),
        ({"budgets": {"epsilon": [1]}}, r"budgets.epsilon: unknown key"),
        ({"budgets": {"eps": [0.1, 0.1]}}, "different finite numbers"),
        ({"budgets": {"eps": [-1.0]}}, "different finite numbers"),
        ({"attacks": [{"name": "fgms"}]}, "attack 'fgms' is unknown"),
        ({"attacks": [{"name": "fgsm", "steps": 3}]}, "attack fgsm has no option steps"),
        ({"attacks": [{"name": "fgsm"}, {"name": "fgsm"}]}, "named twice: fgsm"),
        ({"attacks": [{"name": "fgsm", "label": "clean"}]}, "'clean' is scored always"),
        ({"figures": {"eps": 5.0}}, "is not one of the budgets"),
        ({"victims": []}, "victims"),
        ({"seed": "one"}, "seed"),
        ({"attacks": [{"name": "fgsm", "eps": 0.1}]}, "eps belong under budgets"),
        ({"attacks": [{"name": "fgsm", "norm": "l2", "support": "all"}]}, "norm, support belong under budgets"),
        ({"attacks": [{"name": "fgsm", "label": "=1+1"}]}, "does not begin with"),
    ],
)
def test_a_wrong_key_or_value_is_named(content: dict[str, Any], change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        study_from({**content, **change})


def test_paths_in_a_file_are_relative_to_it(content: dict[str, Any], tmp_path: Path) -> None:
    content["data"]["root"], content["output"] = "data", "elsewhere"
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    study = load_study(file)
    assert study.data.root == tmp_path / "data"
    assert study.output == tmp_path / "elsewhere"


def test_missing_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_study(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_study(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_study(broken)


def test_yaml_runs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("title: !!python/object/apply:os.system ['exit 1']")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_study(file)


def test_the_fingerprint_changes_with_what_decides_results_only(content: dict[str, Any]) -> None:
    before = study_from(content).fingerprint()
    assert study_from({**content, "title": "other", "output": "x"}).fingerprint() == before
    assert study_from({**content, "attacks": [{"name": "pgd"}]}).fingerprint() == before
    assert study_from({**content, "seed": 1}).fingerprint() != before
    assert study_from({**content, "victims": [{**content["victims"][0], "overlap": 0.25}]}).fingerprint() != before


def test_the_fingerprint_does_not_depend_on_how_a_path_is_written(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = study_from(content).fingerprint()
    monkeypatch.chdir(tmp_path)
    content["data"]["root"] = "data"
    assert study_from(content).fingerprint() == before


def test_window_and_orientation_are_checked(content: dict[str, Any]) -> None:
    victim = {**content["victims"][0], "roi_size": [64]}
    with pytest.raises(ConfigError, match=r"roi_size"):
        study_from({**content, "victims": [victim]})
    with pytest.raises(ConfigError, match=r"data\.orientation"):
        study_from({**content, "data": {**content["data"], "orientation": "XYZ"}})
