"""Victims with defenses in a study: deployed as declared, attacked adaptively or said not to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from monai_adv.attacks import black_box
from monai_adv.defenses import DefendedVictim, SmoothedVictim
from monai_adv.errors import ConfigError
from monai_adv.studies import analyse_run, run_study
from monai_adv.studies.analysis import analyse
from monai_adv.studies.config import StudyConfig, VictimEntry
from monai_adv.studies.defended import TAG, Declared
from monai_adv.studies.records import read_records
from monai_adv.studies.units import read_json
from monai_adv.studies.victims import defense_kind, load_entry
from monai_adv.studies.volumes import load_volumes
from monai_adv.victims import load_victim, mean_dice
from monai_adv.visualize.study_report import write_study_report


@pytest.fixture
def defended(content: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    content["victims"] += [
        {"name": "median", "checkpoint": str(checkpoint), "purify": {"kind": "median", "radius": 1}},
        {"name": "smooth", "checkpoint": str(checkpoint), "smooth": {"sigma": 0.3, "samples": 3}},
    ]
    content["attacks"] = [
        {"name": "ifgsm", "steps": 2, "label": "I-FGSM"},
        {"name": "transfer", "surrogate": str(checkpoint), "attack": {"name": "ifgsm", "steps": 2}},
    ]
    content["budgets"]["eps"] = [0.5]
    return content


def study_from(content: dict[str, Any]) -> StudyConfig:
    return StudyConfig.model_validate(content)


def test_a_victim_is_deployed_with_its_defense(defended):
    plain, median, smooth = study_from(defended).victims
    assert [defense_kind(v) for v in (plain, median, smooth)] == ["none", "purification", "smoothing"]
    assert isinstance(load_entry(median, "cpu")[0], DefendedVictim)
    assert isinstance(load_entry(smooth, "cpu")[0], SmoothedVictim)
    hashes = {load_entry(v, "cpu")[1] for v in (plain, median, smooth)}
    assert len(hashes) == 3


def test_a_wrong_option_of_a_defense_is_named(defended, checkpoint):
    for wrong in ({"purify": {"kind": "median", "size": 1}}, {"smooth": {"sigmas": 0.3}}):
        with pytest.raises(ConfigError, match=r"size|sigmas"):
            load_entry(VictimEntry(name="x", checkpoint=checkpoint, **wrong), "cpu")


def test_a_study_of_defenses_says_which_were_not_attacked_adaptively(defended):
    result = run_study(study_from(defended))
    assert not result.problems
    stored = read_json(result.folder / "study.json")
    declared = Declared.of(stored)
    assert declared.kinds == {"tiny": "none", "median": "purification", "smooth": "smoothing"}
    analysis = analyse(read_records(result.folder), declared=declared)
    assert list(analysis.comparisons) == ["tiny", "median", "smooth" + TAG]
    assert analysis.victims.baseline == "tiny"
    assert any("smooth: NOT ADAPTIVE" in note and "draws" in note for note in analysis.notes)
    assert set(analysis.defenses["victim"]) == {"tiny", "median", "smooth" + TAG}
    assert set(analysis.claims["claim"]) == {"attacks lower Dice", "a defense stays below the clean Dice"}
    again = analyse_run(result.folder)  # the same from the folder alone
    assert list(again.comparisons) == list(analysis.comparisons)
    pd.testing.assert_frame_equal(again.claims, analysis.claims)
    pd.testing.assert_frame_equal(again.victims.table, analysis.victims.table)
    assert analyse_run(result.folder, alpha=0.5).victims.alpha == 0.5
    for wrong in ({"alhpa": 0.1}, {"alpha": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            analyse_run(result.folder, **wrong)
    _, report = write_study_report(result.folder)
    page = report.read_text()
    assert "smooth (NOT ADAPTIVE)" in page
    assert "behind a filter" in page
    assert "smoothed {" in page
    table = pd.read_csv(result.folder / "tables" / "defenses.csv")
    assert list(table.columns[:4]) == ["region", "victim", "defense", "n"]


def test_an_attack_on_one_defense_only(defended):
    eot = {"name": "ifgsm", "steps": 2, "draws": 2, "label": "over the noise", "only": ["smooth"]}
    defended["attacks"].append(eot)
    result = run_study(study_from(defended))
    assert result.computed == 3 * (3 * 3 + 1)
    declared = Declared.of(read_json(result.folder / "study.json"))
    assert not declared.lacking
    analysis = analyse(read_records(result.folder), declared=declared)
    assert analysis.victims is not None
    mean = analysis.defenses[analysis.defenses["region"] == "mean"].set_index("victim")["over the noise 0.5 std"]
    assert mean.notna().tolist() == [False, False, True]
    assert (analysis.defenses["n"] == 3).all()
    defended["attacks"][-1] = {**eot, "only": ["median"]}
    assert set(Declared.of({**read_json(result.folder / "study.json"), "study": defended}).lacking) == {"smooth"}
    with pytest.raises(ValueError, match="only names no victim of the study: nobody"):
        study_from({**defended, "attacks": [{**eot, "only": ["nobody"]}]})


def test_an_adaptive_attack_takes_the_tag_away(defended):
    defended["attacks"][0] |= {"draws": 2}
    assert not Declared.of({"study": defended, "defenses": {"smooth": "smoothing"}}).lacking


def test_a_smoothed_victim_is_scored_by_its_vote_and_repeatably(defended, tmp_path):
    defended["victims"] = defended["victims"][2:]
    defended["attacks"] = defended["attacks"][:1]
    first = read_records(run_study(study_from(defended)).folder)
    again = {**defended, "output": str(tmp_path / "again"), "attacks": [{"name": "fgsm"}, *defended["attacks"]]}
    second = read_records(run_study(study_from(again)).folder)
    second = second[second["attack"] != "fgsm"].reset_index(drop=True)
    columns = ["subject", "attack", "region", "dice"]
    pd.testing.assert_frame_equal(first[columns], second[columns])  # whatever was computed before
    victim = load_entry(study_from(defended).victims[0], "cpu")[0]
    image = torch.rand(1, 4, 8, 8, 8)
    assert torch.equal(victim.predict(image), victim.predict(image))


def test_what_is_scored_and_drawn_is_the_vote(defended):
    defended["victims"] = defended["victims"][2:]
    defended["attacks"] = defended["attacks"][:1]
    study = study_from(defended)
    result = run_study(study)
    victim = load_entry(study.victims[0], "cpu")[0]
    table = read_records(result.folder)
    (subject,) = (path.name for path in (result.folder / "volumes").iterdir())
    for path in sorted((result.folder / "volumes" / subject).glob("*.npz")):
        volumes = load_volumes(path)
        attack = "clean" if "clean" in path.name else "I-FGSM"
        image = torch.from_numpy(volumes["image"])[None]
        vote = victim.predict(image)
        assert np.array_equal(vote[0, 0].numpy(), volumes["prediction"])
        assert not torch.equal(vote, victim.denoised.predict(image))
        dice = mean_dice(vote, torch.from_numpy(volumes["truth"]).long()[None, None], victim.head)
        rows = table[(table["subject"] == subject) & (table["attack"] == attack)]
        assert rows["dice"].mean() == pytest.approx(float(dice), abs=1e-9)


def test_a_transferred_image_is_crafted_once_per_subject(defended, checkpoint, tmp_path, monkeypatch):
    """The same records, to the last bit, as of a study of each victim alone, where nothing can be shared."""
    defended["attacks"] = defended["attacks"][1:]
    defended["budgets"]["eps"] = [0.2, 0.5]
    defended["data"]["subjects"] = ["BraTS2021_00000", "BraTS2021_00001"]
    loaded = []

    def load(path, *arguments, **options):
        loaded.append(path)
        return load_victim(path, *arguments, **options)

    monkeypatch.setattr(black_box, "load_victim", load)
    together = read_records(run_study(study_from(defended)).folder)
    assert len(loaded) == 2  # once per subject, and not per victim
    alone = []
    for victim in defended["victims"]:
        only = {**defended, "victims": [victim], "output": str(tmp_path / victim["name"])}
        alone.append(read_records(run_study(study_from(only)).folder))
    keys = ["subject", "victim", "attack", "eps", "region"]
    columns = together.columns.drop("seconds")
    expected = pd.concat(alone).sort_values(keys, kind="stable")[columns].reset_index(drop=True)
    assert (together["method"] == "transfer").sum() == 2 * 3 * 2 * 3
    pd.testing.assert_frame_equal(together[columns], expected, check_exact=True)


def test_a_study_without_defenses_has_no_defense_table(content):
    content["attacks"] = [{"name": "fgsm"}]
    result = run_study(study_from(content))
    analysis = analyse(read_records(result.folder), declared=Declared.of(read_json(result.folder / "study.json")))
    assert analysis.defenses.empty
    assert analysis.claims.empty
