"""The ensemble: the worst case per case, whose it was, and what it refuses."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from oracles import make_image, make_label, make_victim
from test_sign_attacks import EPS, create

from monai_adv import attacks
from monai_adv.attacks import ATTACKS, Attack, Ensemble
from monai_adv.errors import ConfigError
from monai_adv.losses import target_agreement
from monai_adv.threats import LInf
from monai_adv.victims import mean_dice

MEMBERS = [
    {"name": "fgsm", "loss": "ce"},
    {"name": "pgd", "steps": 2, "loss": "dice"},
    {"name": "pgd", "steps": 2, "loss": "margin"},
    {"name": "mifgsm", "steps": 2},
]
LABELS = ["fgsm", "pgd", "pgd 2", "mifgsm"]


class Roll(Attack):
    """Moves the image and its label by eps voxels: an attack with a budget of its own."""

    name: ClassVar[str] = "roll"
    reference: ClassVar[str] = "test"
    norms: ClassVar[tuple[str, ...]] = ("parameter",)
    units: ClassVar[str | None] = "voxels"
    default_eps: ClassVar[tuple[float, ...] | None] = (1.0,)
    moves_voxels: ClassVar[bool] = True

    def _search(self, run):
        step = int(run.ball.eps)
        moved = torch.full((len(run.clean), 1), float(step), dtype=torch.float64)
        run.details["moved"] = [step] * len(run.clean)
        run.consider(
            run.clean.roll(step, -1), warp=lambda x: x.roll(step, -1), parameters={"voxels": moved},
        )  # fmt: skip


@pytest.fixture
def roll(monkeypatch):
    monkeypatch.setitem(ATTACKS, "roll", Roll)


def case(head: str = "softmax", batch: int = 4):
    return make_victim("smooth", head), make_image(batch), make_label(head, batch)


# ------------------------------------------------------------------------------------------------ worst case
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_worst_member_of_every_case(head, norm):
    victim, image, label = case(head)
    eps = EPS[norm] / 4
    result = create("ensemble", norm, eps=eps, attacks=MEMBERS, seed=3)(victim, image, label)
    alone = [create(norm=norm, eps=eps, seed=3, **member)(victim, image, label) for member in MEMBERS]
    scores = torch.stack([member.score for member in alone])
    assert (result.score <= scores).all()
    assert torch.equal(result.score, scores.amin(0))
    winners = [LABELS.index(name) for name in result.details["winner"]]
    assert winners == scores.argmin(0).tolist()  # the first of equals
    for b, winner in enumerate(winners):
        for key in ("image", "perturbation", "prediction", "label", "success", "clean_score"):
            assert torch.equal(getattr(result, key)[b], getattr(alone[winner], key)[b]), key
        entry = result.trace[int(result.best_step[b])]
        assert entry["step"] == result.best_step[b]
        assert entry["score"][b] == result.score[b]
        assert entry["member"] == [LABELS[winner]] * 4
    assert len(set(winners)) > 1, winners
    assert [e["step"] for e in result.trace] == list(range(sum(len(member.trace) for member in alone)))
    assert result.cost.forwards == sum(member.cost.forwards for member in alone)
    assert result.cost.backwards == sum(member.cost.backwards for member in alone)
    assert result.cost.seconds > 0


def test_a_targeted_ensemble_goes_by_the_agreement():
    victim, image, label = case()
    target = make_label("softmax", 4, seed=6)
    members = [{"name": "targeted_ifgsm", "steps": 2}, {"name": "pgd", "steps": 3}, "fgsm"]
    attack = create("ensemble", "linf", attacks=members, target="background")
    for given in (None, target):
        result = attack(victim, image, label, target=given)
        scores = [
            create(norm="linf", target="background", **(m if isinstance(m, dict) else {"name": m}))(
                victim, image, label, target=given
            ).score
            for m in members
        ]
        assert torch.equal(result.score, torch.stack(scores).amax(0))
        aim = torch.zeros_like(label) if given is None else given
        assert torch.equal(result.score, target_agreement(result.prediction, aim, label))
    with pytest.raises(ConfigError, match="this ensemble is untargeted and takes no target"):
        create("ensemble", "linf")(victim, image, label, target=target)


def test_budgets():
    victim, image, label = case(batch=2)
    attack = create("ensemble", "linf", attacks=["fgsm", {"name": "pgd", "steps": 2}])
    for eps, result in zip([0.1, 0.0, 0.3], attack.curve(victim, image, label, [0.1, 0.0, 0.3])):
        single = create("ensemble", "linf", eps=eps, attacks=attack.attacks)(victim, image, label)
        assert torch.equal(result.image, single.image)
        assert result.details == single.details
    assert torch.equal(create("ensemble", "linf", eps=0.0)(victim, image, label).image, image)


def test_a_member_that_draws_nothing_does_not_rewind_the_generator():
    victim, image, label = case(batch=1)
    for members in (["pgd", "fgsm"], ["fgsm", "pgd"]):
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        create("ensemble", "linf", attacks=members)(victim, image, label, generator=generator)
        after = generator.get_state()
        assert not torch.equal(after, before)
        generator.set_state(before)
        create("pgd", "linf")(victim, image, label, generator=generator)
        assert torch.equal(generator.get_state(), after)


# ------------------------------------------------------------------------------------- budgets of their own
def test_a_member_with_a_moved_label_is_scored_against_it(roll):
    """Some rolls win, some lose: every case is its own, label and parameters too."""
    victim, image, label = case(batch=4)
    members = [{"name": "fgsm"}, {"name": "roll", "eps": 2}]
    rolled = Roll(attacks.create("roll", 2).threat)(victim, image, label)
    result = create("ensemble", "linf", eps=1e-9, attacks=members)(victim, image, label)
    for b, winner in enumerate(result.details["winner"]):
        moved = winner == "roll"
        assert torch.equal(result.label[b], label[b].roll(2, -1) if moved else label[b])
        assert moved == (rolled.score[b] < result.clean_score[b])
        assert result.parameters["roll.voxels"][b].isnan().all() != moved
    assert torch.equal(mean_dice(result.prediction, result.label, victim.head), result.score)
    assert result.details["roll.moved"] == [2] * 4
    assert set(result.details["winner"]) == {"fgsm", "roll"}


def test_a_budget_of_its_own_does_not_follow_the_ensembles(roll):
    victim, image, label = case(batch=2)
    attack = create("ensemble", "linf", attacks=["fgsm", {"name": "roll", "eps": 1}, {"name": "fgsm", "eps": 0.5}])
    results = attack.curve(victim, image, label, [0.0, 0.2])
    assert [r.cost.forwards for r in results] == [3 + 2 + 3, 1]  # those with a budget of their own run once
    last = create("fgsm", "linf", eps=0.5)(victim, image, label).score
    rolled = attacks.create("roll", 1)(victim, image, label).score
    for result in results:
        assert (result.score <= torch.minimum(last, rolled)).all()
        assert {e["member"][0] for e in result.trace} == {"fgsm", "roll", "fgsm 2"}


def test_a_budget_of_its_own_keeps_the_rest_of_the_threat(roll):
    attack = Ensemble(
        LInf(0.1, "range", channels=(1,), bounds=None, support="all"),
        [{"name": "fgsm", "eps": 0.5}, {"name": "roll", "eps": 1}, {"name": "fgsm", "eps": 2, "units": "absolute"}],
    )
    threats = [member.attack.threat for member in attack._members]
    assert threats[0] == LInf(0.5, "range", channels=(1,), bounds=None, support="all")
    assert (threats[1].norm, threats[1].units, threats[1].channels) == ("parameter", "voxels", (1,))
    assert threats[2] == LInf(2, "absolute", channels=(1,), bounds=None, support="all")


# -------------------------------------------------------------------------------------------- what it refuses
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": []}, "must be a list"),
        ({"attacks": "pgd"}, "must be a list"),
        ({"attacks": {"name": "pgd"}}, "must be a list"),
        ({"attacks": [{"steps": 3}]}, "needs a name"),
        ({"attacks": ["rumour"]}, "attack 'rumour' is unknown"),
        ({"attacks": [{"name": "pgd", "alpha": 3}]}, "pgd has no option alpha"),
        ({"attacks": [{"name": "pgd", "steps": 0}]}, "steps must be"),
        ({"attacks": [{"name": "pgd", "seed": 0}]}, "seed of .* belongs to the ensemble"),
        ({"attacks": [{"name": "pgd", "target": "background"}]}, "target of .* belongs to the ensemble"),
        ({"attacks": ["pgd", "targeted_ifgsm"]}, "targeted_ifgsm is targeted and the ensemble untargeted"),
        ({"attacks": ["pgd", "noise"], "target": "background"}, "noise is untargeted and the ensemble targeted"),
        ({"attacks": ["roll"]}, "roll does not search L-inf <= 0.1 std: give it a budget of its own"),
        ({"loss": "ce"}, "has no option loss"),
    ],
)
def test_impossible_ensembles(options, message, roll):
    with pytest.raises(ConfigError, match=message):
        attacks.create("ensemble", 0.1, **options)


def test_options_of_the_ensemble_are_those_of_all_members():
    options = {"label_source": "prediction", "goal": 0.25, "seed": 5, "draws": 2}
    attack = create("ensemble", "linf", attacks=MEMBERS, **options)
    for member in attack._members:
        for name, value in options.items():
            assert getattr(member.attack, name) == value
    victim, image, _ = case(batch=2)
    result = attack(victim, image)
    assert result.clean_score.tolist() == [1, 1]
    assert torch.equal(result.success, result.score <= 0.25)


def test_an_ensemble_is_plain_data():
    assert attacks.create("ensemble").attacks == ["fgsm", "pgd"]
    spec = [{"name": "pgd", "steps": 2}]
    attack = attacks.create("ensemble", attacks=spec)
    assert json.loads(json.dumps(attack.parameters()))["attacks"] == spec
    spec[0]["steps"] = 7
    assert attack.parameters()["attacks"] == [{"name": "pgd", "steps": 2}]
    nested = attacks.create("ensemble", attacks=["fgsm", {"name": "ensemble", "attacks": ["pgd"]}])
    victim, image, label = case(batch=1)
    assert nested(victim, image, label).details["winner"][0] in ("fgsm", "ensemble")
