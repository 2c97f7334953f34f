"""What a defense has to be judged by, the defense x attack table, and the published claims, on made-up records."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from monai_adv.studies.defended import TAG, AttackInfo, defense_table, not_adaptive, published_claims

ATTACKS = {
    "fgsm": AttackInfo("fgsm", {"loss": "ce"}),
    "ifgsm": AttackInfo("ifgsm", {"loss": "ce", "steps": 10}),
    "margin": AttackInfo("pgd", {"loss": "margin", "steps": 10}),
    "eot": AttackInfo("pgd", {"draws": 4}),
    "one step": AttackInfo("pgd", {"steps": 1}),
    "transfer": AttackInfo("transfer", {"surrogate": "a.pt"}),
    "noise": AttackInfo("noise", {}),
    "control": AttackInfo("bias_field", {"control": True}),
}


@pytest.mark.parametrize(
    ("kind", "adapted"),
    [
        ("none", set(ATTACKS)),
        ("noise", {"ifgsm", "margin", "eot"}),
        ("adversarial_training", {"ifgsm", "margin", "eot"}),
        ("purification", {"ifgsm", "margin", "eot"}),
        ("distillation", {"margin"}),
        ("smoothing", {"eot"}),
    ],
)
def test_which_attacks_take_a_defense_into_account(kind, adapted):
    assert {title for title, attack in ATTACKS.items() if attack.adapts_to(kind)} == adapted


def test_a_defense_nobody_adapted_to_is_named():
    kinds = {"plain": "none", "student": "distillation", "filter": "purification", "smooth": "smoothing"}
    found = not_adaptive(kinds, [ATTACKS["ifgsm"], ATTACKS["transfer"]])
    assert set(found) == {"student", "smooth"}
    assert "margin" in found["student"]
    assert "draws" in found["smooth"]
    assert not not_adaptive(kinds, [ATTACKS["margin"], ATTACKS["eot"]])


def records(dice, subjects: int = 8, regions: tuple[str, ...] = ("WT", "TC")) -> pd.DataFrame:
    """``dice``: (victim, attack) -> mean Dice; subjects differ by a little, the same for every setting."""
    rng = np.random.default_rng(0)
    rows = []
    for (victim, attack), value in dice.items():
        for s in range(subjects):
            rows += [
                {
                    "subject": f"s{s}", "victim": victim, "attack": attack, "region": region, "status": "ok",
                    "eps": 0.0 if attack == "clean" else 0.1,
                    "setting": attack if attack == "clean" else f"{attack} 0.1 std",
                    "dice": value + 0.01 * s + 0.001 * rng.random(),
                }
                for region in regions
            ]  # fmt: skip
    return pd.DataFrame(rows)


DICE = {
    ("plain", "clean"): 0.85, ("plain", "ifgsm"): 0.2, ("plain", "margin"): 0.15, ("plain", "transfer"): 0.3,
    ("student", "clean"): 0.8, ("student", "ifgsm"): 0.7, ("student", "margin"): 0.1, ("student", "transfer"): 0.4,
    ("AT", "clean"): 0.75, ("AT", "ifgsm"): 0.6, ("AT", "margin"): 0.55, ("AT", "transfer"): 0.7,
}  # fmt: skip
KINDS = {"plain": "none", "student": "distillation", "AT": "adversarial_training"}


def test_the_defense_by_attack_table():
    table = defense_table(records(DICE), KINDS, {"student": "x"})
    mean = table[table["region"] == "mean"].set_index("victim")
    assert list(mean.index) == ["plain", "student" + TAG, "AT"]
    assert mean.loc["AT", "margin 0.1 std"] == pytest.approx(0.55 + 0.035, abs=2e-3)
    assert mean.loc["plain", "clean"] == pytest.approx(0.85 + 0.035, abs=2e-3)
    assert (table["n"] == 8).all()
    assert set(table["region"]) == {"WT", "TC", "mean"}


def test_only_subjects_that_every_victim_has_are_averaged():
    found = records(DICE)
    found = found[~((found["victim"] == "AT") & (found["subject"] == "s7"))]
    assert (defense_table(found, KINDS, {})["n"] == 7).all()


def test_the_published_claims_and_what_adaptive_attacks_do_to_them():
    table = published_claims(records(DICE), KINDS, ATTACKS)
    by = table.set_index(["claim", "victim", "setting"])["verdict"]
    assert by["attacks lower Dice", "plain", "ifgsm 0.1 std"] == "holds"
    assert by["a defense stays below the clean Dice", "student", "ifgsm 0.1 std"] == "holds"
    keeps = "distillation keeps more Dice than adversarial training, "
    pair = "student against AT"
    assert by[keeps + "plain cross entropy", pair, "ifgsm 0.1 std"] == "holds"
    assert by[keeps + "logit margin", pair, "margin 0.1 std"] == "does not hold"
    assert by[keeps + "transferred", pair, "transfer 0.1 std"] == "does not hold"
    assert (table["p_holm"] >= table["p"]).all()


def test_every_claim_is_a_family_of_its_own():
    """Holm by hand within a claim: sorted p times (m, m - 1, ...), never falling, at most 1."""
    found = records(DICE)
    # one subject the other way round: a p-value that the size of the family decides about
    worst = (found["victim"] == "student") & (found["attack"] == "ifgsm") & (found["subject"] == "s0")
    found.loc[worst, "dice"] = 0.2
    table = published_claims(found, KINDS, ATTACKS)
    keeps = "distillation keeps more Dice than adversarial training, "
    sizes = table.groupby("claim").size().to_dict()
    assert sizes == {
        "attacks lower Dice": 3, "a defense stays below the clean Dice": 6,
        keeps + "plain cross entropy": 1, keeps + "logit margin": 1, keeps + "transferred": 1,
    }  # fmt: skip
    for claim, rows in table.groupby("claim"):
        assert (rows["tests"] == sizes[claim]).all()
        left, largest = len(rows), 0.0
        for row in rows.sort_values("p", kind="stable").to_dict("records"):
            largest = min(1.0, max(largest, left * row["p"]))
            assert row["p_holm"] == pytest.approx(largest, rel=1e-12)
            left -= 1
    alone = table.set_index("claim").loc[keeps + "plain cross entropy"]
    # eight pairs, one of them the other way round with the largest difference: ranks 1 to 7 of 36, and p is the share
    # of the 256 sign patterns whose negative ranks add up to 8 or less (subsets of {1..8}: 1, 1, 1, 2, 2, 3, 4, 5, 6)
    assert alone["p"] == pytest.approx(25 / 256, rel=1e-12)
    assert alone["p_holm"] == alone["p"]
    six = table[table["claim"] == "a defense stays below the clean Dice"]
    assert six["p"].min() == pytest.approx(1 / 256)
    assert six["p_holm"].min() == pytest.approx(6 / 256)


def test_few_subjects_claim_nothing():
    table = published_claims(records(DICE, subjects=5), KINDS, ATTACKS)
    assert table["p"].isna().all()
    assert set(table["verdict"]) == {"holds in the mean, n=5 < 6: no p-value", "does not hold"}


def test_a_family_too_large_for_so_few_subjects_says_so():
    """Six subjects give one-sided p = 1/64: enough for three tests (.047), not for six (.094)."""
    table = published_claims(records(DICE, subjects=6), KINDS, ATTACKS).set_index("claim")["verdict"]
    assert set(table["attacks lower Dice"]) == {"holds"}
    never = "holds in the mean, cannot reach significance with n=6"
    assert set(table["a defense stays below the clean Dice"]) == {never}
