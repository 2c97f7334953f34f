"""Detection by squeezing disagreement."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import brain_volumes
from oracles import make_image, make_victim
from scipy.stats import mannwhitneyu
from varied_victim import varied
from victims_on_disk import tiny_checkpoint

from monai_adv import attacks
from monai_adv.defenses import Purify, detection_roc, detector_aware, disagreement, purified
from monai_adv.errors import ConfigError
from monai_adv.victims import load_victim, mean_dice


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dims", [2, 3])
def test_disagreement_is_one_minus_dice(head: str, dims: int) -> None:
    victim, image = varied(head, dims), make_image(3, dims)
    squeeze = Purify("median")
    scores = disagreement(victim, image, squeeze)
    before, after = victim.predict(image), purified(victim, squeeze).predict(image)
    assert set(scores) == {*victim.head.region_names, "mean"}
    torch.testing.assert_close(scores["mean"], 1 - mean_dice(before, after, victim.head))
    a, b = victim.head.regions_of(before)["WT"], victim.head.regions_of(after)["WT"]
    for i in range(3):
        expected = 1 - 2 * int((a[i] & b[i]).sum()) / int(a[i].sum() + b[i].sum())
        assert float(scores["WT"][i]) == pytest.approx(expected, abs=1e-12)
    assert (scores["mean"] > 0).all()


def test_several_filters_count_by_their_largest() -> None:
    victim, image = varied(), make_image(4)
    filters = [Purify("median"), Purify("bit_depth", bits=1), lambda x: x]
    each = [disagreement(victim, image, f) for f in filters]
    joint = disagreement(victim, image, filters)
    for name, score in joint.items():
        assert torch.equal(score, torch.stack([one[name] for one in each]).max(0).values)
    assert (each[2]["mean"] == 0).all()
    with pytest.raises(ConfigError, match="at least one filter"):
        disagreement(victim, image, [])


def test_the_auc_is_mann_whitneys_and_the_table_its_curve() -> None:
    rng = np.random.default_rng(0)
    clean, attacked = rng.integers(0, 6, 15) / 10, rng.integers(2, 9, (15, 3)) / 10
    roc = detection_roc(clean, attacked, resamples=200)
    assert roc.auc == mannwhitneyu(attacked.ravel(), clean).statistic / (45 * 15)
    # the trapezoidal area under the table, which ends in (1, 1) and begins in (0, 0)
    t = roc.table
    assert t["threshold"].iloc[0] == math.inf
    assert t[["tpr", "fpr"]].iloc[0].tolist() == [0, 0]
    assert t[["tpr", "fpr"]].iloc[-1].tolist() == [1, 1]
    assert np.trapezoid(t["tpr"], t["fpr"]) == pytest.approx(roc.auc)
    assert (t["threshold"].diff().dropna() < 0).all()
    low, high = roc.confidence_interval
    assert low < roc.auc < high
    assert (roc.method, roc.subjects) == ("BCa", 15)
    assert detection_roc(clean, attacked, resamples=200).confidence_interval == (low, high)
    assert detection_roc(clean, attacked, resamples=200, seed=1).confidence_interval != (low, high)
    # the interval is over subjects: three equal attacks per subject tell no more than one
    one, three = (detection_roc(clean, np.tile(attacked[:, :1], k), resamples=200) for k in (1, 3))
    assert one.confidence_interval == pytest.approx(three.confidence_interval)


def test_thresholds_at_a_false_positive_rate() -> None:
    clean, attacked = [0.0, 0.1, 0.2, 0.3], [0.1, 0.25, 0.5, 0.6]
    roc = detection_roc(clean, attacked, resamples=100)
    assert roc.threshold_at(0.0) == (0.5, 0.5, 0.0)
    assert roc.threshold_at(0.25) == (0.25, 0.75, 0.25)
    assert roc.threshold_at(0.3) == (0.25, 0.75, 0.25)
    assert roc.threshold_at(1.0) == (0.0, 1.0, 1.0)
    assert detection_roc([0.9, 0.9], [0.1, 0.2], resamples=100).threshold_at(0.5)[0] == math.inf
    with pytest.raises(ConfigError, match=r"in \[0, 1\]"):
        roc.threshold_at(5)


def test_degenerate_scores_are_said() -> None:
    roc = detection_roc([0.0, 0.1, 0.2], [0.5, 0.6, 0.7], resamples=100)
    assert (roc.auc, roc.confidence_interval, roc.method) == (1.0, (1.0, 1.0), "percentile")
    assert "degenerate" in roc.note
    one = detection_roc([0.1], [0.1])
    assert (one.auc, one.method) == (0.5, "none")
    assert math.isnan(one.confidence_interval[0])
    for clean, attacked, message in (
        ([0.1, 0.2], [0.3], "2 subjects have clean scores and 1"),
        ([0.1, math.nan], [0.3, 0.4], "1 clean scores are NaN"),
        ([], [], "one per subject"),
    ):
        with pytest.raises(ConfigError, match=message):
            detection_roc(clean, attacked)


def test_who_knows_the_detector_attacks_the_mean_of_both_logits() -> None:
    victim, image = make_victim("windows"), make_image(2)
    squeeze = Purify("gaussian", sigma=0.8)
    both = detector_aware(victim, squeeze)
    expected = (victim(image) + purified(victim, squeeze)(image)) / 2
    torch.testing.assert_close(both(image), expected, rtol=1e-12, atol=1e-12)
    assert both.undefended is victim
    support = torch.zeros_like(image, dtype=torch.bool)
    support[:, :, 1, 2, 2] = True
    leaf = image.clone().requires_grad_(True)
    (full,) = torch.autograd.grad(both(leaf).square().sum(), leaf)
    with both.attacked(support, image):
        (part,) = torch.autograd.grad(both(leaf).square().sum(), leaf)
    torch.testing.assert_close(part[support], full[support])


def test_the_attack_that_knows_the_detector_is_seen_less(tmp_path: Path) -> None:
    volumes = brain_volumes()
    image = torch.from_numpy(np.stack([volumes[m] for m in ("T1", "T1c", "T2", "FLAIR")]).astype(np.float32))[None]
    label = torch.from_numpy(volumes["label"].astype(np.int64))[None, None]
    victim, squeeze = load_victim(tiny_checkpoint(tmp_path / "tiny.pt")), Purify("gaussian", sigma=0.5)
    attack = attacks.create("ifgsm", eps=2.0, steps=20, target="background", loss="ce")
    blind, aware = (attack(v, image, label) for v in (victim, detector_aware(victim, squeeze)))
    clean, seen, unseen = (disagreement(victim, x, squeeze)["mean"].item() for x in (image, blind.image, aware.image))
    assert clean < seen
    assert unseen < 0.6 * seen
    assert mean_dice(victim.predict(aware.image), label, victim.head) < 0.5 * blind.clean_score
