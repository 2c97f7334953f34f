"""APGD against its pseudo-code and closed forms; SEA: radii, candidates, worst case."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from oracles import make_image, make_label, make_victim
from test_sign_attacks import EPS, LESION, UNCLIPPED, binary, binary_label, create, optimum, worst_direction
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import APGD, SEA
from monai_adv.attacks.auto import checkpoints
from monai_adv.errors import ConfigError
from monai_adv.losses import LOSSES as NAMED_LOSSES
from monai_adv.losses import CrossEntropy, as_loss
from monai_adv.threats import L2, LInf
from monai_adv.victims import Victim

LOSSES = ["masked_ce", "balanced_ce", "js", "spherical"]


# -------------------------------------------------------------------------------------------------- schedule
@pytest.mark.parametrize(
    ("steps", "marks"),
    [
        (100, [22, 41, 57, 70, 80, 87, 93, 99]),
        (50, [11, 21, 29, 35, 40, 44, 47, 50]),
        (10, [3, 5, 6, 7, 8, 9, 10]),
        (1, [1]),
    ],
)
def test_checkpoints(steps, marks):
    """.22 N, then intervals that shrink by .03 N from .19 N to .06 N, rounded up."""
    assert checkpoints(steps) == marks


def test_few_steps_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        APGD(LInf(0.1))
        assert not caplog.records
        APGD(LInf(0.1), steps=49)
    assert "apgd needs 50 steps or more" in caplog.text


@pytest.mark.parametrize("threat", [LInf(0.3), L2(2.0)], ids=["linf", "l2"])
def test_a_step_size_per_sample(threat):
    image, gradient = make_image(3), make_image(3, seed=5)
    ball = threat.bind(image)
    sizes = [0.0, 0.1, 5.0]
    together = ball.step(image, gradient, torch.tensor(sizes, dtype=torch.float64))
    for b, size in enumerate(sizes):
        alone = threat.bind(image[b : b + 1]).step(image[b : b + 1], gradient[b : b + 1], size)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_optimum_of_a_linear_margin_within_a_percent(head, norm, start):
    victim, image, label = binary(3, head), make_image(4), binary_label(4, 3, head)
    result = create("apgd", norm, loss=UNCLIPPED, random_start=start)(victim, image, label)
    direction = worst_direction(victim, label.long())
    best = (direction * (optimum(victim, image, label.long(), norm, "std", EPS[norm]) - image)).flatten(1).sum(1)
    clean = UNCLIPPED(victim(image).detach(), label, victim.head)
    reached = torch.stack([entry["loss"] for entry in result.trace]).amax(0) - clean
    assert (reached <= best * (1 + 1e-10)).all()
    assert (reached >= 0.99 * best).all(), reached / best


class Bowl(nn.Module):
    """Two classes; the voxel is most wrong at 0.31 in every channel, inside the ball."""

    def forward(self, x):
        away = (x - 0.31).square().sum(1, keepdim=True)
        return torch.cat([away, torch.zeros_like(away)], 1)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 1.0), ("l2", 30.0)])
def test_the_step_size_shrinks_to_an_optimum_inside_the_ball(norm, eps):
    """Fixed steps oscillate around it; APGD halves them."""
    victim, image = Victim(Bowl(), head=LESION), torch.zeros(2, 4, 4, 4, dtype=torch.float64)
    label = torch.zeros(2, 1, 4, 4, dtype=torch.long)
    common = {"norm": norm, "units": "absolute", "bounds": None, "support": "all", "loss": UNCLIPPED}
    missed = {}
    for name in ("pgd", "apgd"):
        attack = attacks.create(name, eps, steps=100, random_start=False, **common)
        missed[name] = -torch.stack([e["loss"] for e in attack(victim, image, label).trace]).amax(0)
    assert (missed["apgd"] < 1e-3).all(), missed
    assert (missed["pgd"] > 100 * missed["apgd"]).all(), missed


# ------------------------------------------------------------------------------- the pseudo-code of the paper
def by_the_paper(victim, image, label, ball, steps: int, rho: float = 0.75) -> list[float]:
    """Losses of the iterates of one sample, after algorithm 1 of Croce and Hein; a return forgets the last move."""

    def evaluate(x):
        leaf = x.detach().clone().requires_grad_(True)
        value = CrossEntropy()(victim.network(leaf), label, victim.head)
        return float(value.detach()), torch.autograd.grad(value.sum(), leaf)[0]

    marks = [math.ceil(round(p * steps, 9)) for p in (0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99)]
    eta, xs = 2 * ball.eps, [image]
    fs, g = [evaluate(image)[0]], evaluate(image)[1]
    best, f_best = image, fs[0]
    x, before, last = image, image, 0
    etas, bests, increases = [eta], [f_best], 0
    f = fs[0]
    for k in range(1, steps + 1):
        z = ball.step(x, g, eta)
        new = z if k == 1 else ball.project(x + 0.75 * (z - x) + 0.25 * (x - before))
        before, x = x, new
        f_old, (f, g) = f, evaluate(x)
        xs.append(x)
        fs.append(f)
        increases += f > f_old
        if f > f_best:
            best, f_best = x, f
        if k in marks and k < steps:
            first = increases < rho * (k - last)
            second = len(etas) > 1 and etas[-1] == etas[-2] and bests[-1] == f_best
            if first or second:
                eta /= 2
                x, before, f = best, best, f_best
                g = evaluate(best)[1]
            etas.append(eta)
            bests.append(f_best)
            increases, last = 0, k
    return fs


@pytest.mark.parametrize("rho", [0.75, 0.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["smooth", "linear", "bowl"])
def test_the_iterates_are_those_of_the_paper(kind, norm, rho):
    """For a batch whose members shrink their steps at different times; with rho 0 only where nothing improves."""
    image, label = make_image(3), make_label("softmax", 3)
    image = image * torch.tensor([1.0, 0.1, 10]).view(3, 1, 1, 1, 1)
    options, eps = {"loss": "ce", "rho": rho, "random_start": False}, 2 * EPS[norm]
    if kind == "bowl":  # the first steps are far too large: nothing improves until they were halved again and again
        victim, image, label, eps = (
            Victim(Bowl(), head=LESION),
            0.01 * image + 0.3,
            0 * label,
            1.0 if norm == "linf" else 60.0,
        )
        options |= {"units": "absolute", "support": "all"}
    else:
        victim = make_victim(kind)
    attack = create("apgd", norm, eps=eps, steps=40, **options)
    trace = attack(victim, image, label).trace
    assert len(trace) == 41
    victim.network.eval()
    expected = [
        by_the_paper(victim, image[b : b + 1], label[b : b + 1], attack.threat.bind(image[b : b + 1]), 40, rho)
        for b in range(3)
    ]
    found = torch.stack([entry["loss"] for entry in trace], dim=1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-7)


def test_rho_and_restarts_reach_the_search():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    losses = [
        torch.stack([e["loss"] for e in create("apgd", "l2", loss="ce", rho=rho)(victim, image, label).trace])
        for rho in (0.0, 0.75, 1.0)
    ]
    assert not torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[1], losses[2])
    result = create("apgd", "linf", steps=4, restarts=2)(victim, image, label)
    assert [e["restart"] for e in result.trace] == [0] * 5 + [1] * 5
    assert (result.trace[0]["loss"] != result.trace[5]["loss"]).all()
    assert (result.cost.forwards, result.cost.backwards) == (11, 8)


def test_the_result_is_the_best_by_the_metric():
    victim, image, label = make_victim("smooth"), make_image(4), make_label("softmax", 4)
    result = create("apgd", "linf", eps=0.1, loss="ce", random_start=False)(victim, image, label)
    scores = torch.stack([e["score"] for e in result.trace[1:]])
    losses = torch.stack([e["loss"] for e in result.trace[1:]])
    assert torch.equal(result.score, scores.amin(0))
    assert (losses.argmax(0) + 1 != result.best_step).any()  # not simply the highest loss
    assert (result.best_step > 0).all()  # the clean image is no candidate


class Helpful(CrossEntropy):
    """An attack that makes the segmentation better: the clean image would be its best iterate."""

    def __call__(self, logits, label, head, weight=None):
        return -super().__call__(logits, label, head, weight)


def test_the_clean_image_is_no_result():
    victim, image, label = binary(), make_image(2), binary_label(2)
    for start in (False, True):
        result = create("apgd", "linf", loss=Helpful(), random_start=start)(victim, image, label)
        assert (result.best_step >= 1).all()
        assert (result.score > result.clean_score).all()


def test_no_stage_of_sea_begins_at_the_clean_image_again(monkeypatch):
    monkeypatch.setitem(NAMED_LOSSES, "helpful", Helpful)
    victim, image, label = binary(), make_image(2), binary_label(2)
    seen = []
    victim.preprocessing = lambda x: seen.append(x.detach().clone()) or x
    result = create("sea", "linf", steps=8, losses=["helpful"], random_start=False)(victim, image, label)
    assert torch.equal(seen[1], image)
    assert all((x != image).flatten(1).any(1).all() for x in seen[2:])
    assert (result.score > result.clean_score).all()


def test_apgd_is_not_weaker_than_one_step_or_pgd():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)

    def strongest(name: str, **options) -> torch.Tensor:
        trace = create(name, "linf", loss="ce", **options)(victim, image, label).trace
        return torch.stack([e["loss"] for e in trace]).amax(0)

    assert (strongest("apgd") > strongest("fgsm")).all()
    assert (strongest("apgd") >= 0.999 * strongest("pgd", steps=50)).all()


def test_a_masked_loss_is_followed_by_its_progress():
    """Its own value would fall with every voxel that is fooled, and the steps be halved for that."""
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    result = create("apgd", "linf", loss="masked_ce", random_start=False)(victim, image, label)
    expected = CrossEntropy()(victim(image).detach(), label, victim.head)
    assert torch.equal(result.trace[0]["loss"], expected)
    assert (result.trace[-1]["loss"] > result.trace[0]["loss"]).all()
    masked = as_loss("masked_ce")(victim(result.image).detach(), label, victim.head)
    assert (masked < as_loss("masked_ce")(victim(image).detach(), label, victim.head)).all()


@pytest.mark.parametrize("loss", ["ce", *LOSSES])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_targeted_apgd_reaches_a_target_with_every_loss(head, loss):
    victim, image = make_victim("linear", head), make_image(2)
    label = victim.predict(image)
    attack = attacks.create("apgd", 30.0, loss=loss, support="all", target="background")
    result = attack(victim, image, label)
    assert (result.clean_score == 0).all()
    assert (result.score > 0.95).all(), result.score
    assert result.trace[-1]["loss"][0] > result.trace[0]["loss"][0]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (APGD, {"steps": 0}, "steps must be an integer"),
        (APGD, {"rho": 1.5}, "rho must be in"),
        (APGD, {"rho": float("nan")}, "rho must be in"),
        (APGD, {"restarts": 2, "random_start": False}, "restarts from the same point"),
        (SEA, {"steps": 3}, "steps of sea must be >= 4"),
        (SEA, {"losses": []}, "losses of sea"),
        (SEA, {"losses": "js"}, "losses of sea"),
        (SEA, {"losses": ["js", "js"]}, "losses of sea"),
        (SEA, {"losses": ["rumour"]}, "losses of sea must be different ones of ce, dice"),
        (SEA, {"rho": -1}, "rho must be in"),
        (SEA, {"target": "background"}, "sea is untargeted"),
    ],
)
def test_impossible_options(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(LInf(0.1), **options)


@pytest.mark.parametrize("name", ["apgd", "sea"])
def test_an_infinite_budget_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} starts with steps of 2 eps and needs a finite eps"):
        attacks.create(name, math.inf)
    with pytest.raises(ConfigError, match="needs a finite eps"):
        attacks.create(name, steps=4).curve(
            make_victim("linear"), make_image(1), make_label("softmax", 1), [0.1, math.inf]
        )


# -------------------------------------------------------------------------------------------------------- SEA
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_sea_is_the_worst_of_its_members(head, norm):
    """The same searches alone, at the same seed: their minimum, and the winner's image."""
    victim, image, label = make_victim("smooth", head), make_image(4), make_label(head, 4)
    eps = EPS[norm] / 3
    result = create("sea", norm, eps=eps, steps=10)(victim, image, label)
    alone = [create("sea", norm, eps=eps, steps=10, losses=[name])(victim, image, label) for name in LOSSES]
    scores = torch.stack([member.score for member in alone])
    assert (result.score <= scores).all()
    assert torch.equal(result.score, scores.amin(0))
    for b, winner in enumerate(result.details["winner"]):
        assert torch.equal(result.image[b], alone[LOSSES.index(winner)].image[b])
    assert [e["member"] for e in result.trace] == [[name] * 4 for name in LOSSES for _ in range(13)]
    assert (result.cost.forwards, result.cost.backwards) == (1 + 4 * 13, 4 * 10)
    assert alone[2].details["winner"] == ["js"] * 4


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_radii_of_sea(norm):
    """30 / 30 / 40 % of the steps in 2, 1.5 and 1 eps; each stage begins at the best of the one before, projected."""
    victim, image, label = make_victim("smooth"), make_image(1), make_label("softmax", 1)
    eps = EPS[norm] / 3
    seen = []
    victim.preprocessing = lambda x: seen.append(x.detach().clone()) or x
    attack = create("sea", norm, eps=eps, steps=20, losses=["js"])
    result = attack(victim, image, label)
    ball, seen = attack.threat.bind(image), seen[1:]  # the first is the clean image
    sizes = [float(ball.size(x)) for x in seen]
    bounds = [2.0] * 7 + [1.5] * 7 + [1.0] * 9
    assert len(sizes) == len(bounds)
    assert all(size <= bound * eps * (1 + 1e-12) for size, bound in zip(sizes, bounds))
    assert max(sizes[:7]) == pytest.approx(2 * eps)
    assert max(sizes[7:14]) == pytest.approx(1.5 * eps)
    scores, losses = ([float(e[key]) for e in result.trace] for key in ("score", "loss"))
    for first, stop, radius in ((1, 7, 1.5), (7, 14, 1.0)):  # the random start of the first stage does not count
        best = min(range(first, stop), key=lambda i: (scores[i], -losses[i]))
        expected = ball.with_eps(radius * eps).project(seen[best])
        assert torch.equal(seen[stop], expected)
    assert int(result.best_step) >= 14  # only images inside eps may be returned, although others are stronger
    assert min(scores[:14]) <= float(result.score)
    assert torch.equal(result.score, torch.tensor(scores[14:], dtype=torch.float64).amin()[None])


def test_the_members_of_sea_start_at_one_point():
    victim, image, label = make_victim("smooth"), make_image(1), make_label("softmax", 1)
    seen = []
    victim.preprocessing = lambda x: seen.append(x.detach().clone()) or x
    create("sea", "linf", steps=4)(victim, image, label)
    starts = seen[1::7]
    assert len(starts) == 4
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert not torch.equal(starts[0], image)
    seen.clear()
    create("sea", "linf", steps=4, random_start=False)(victim, image, label)
    assert torch.equal(seen[1], image)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_sea_finds_the_optimum_of_a_linear_model(head):
    """Voxels that no budget flips are at their worst too: Dice is that of the closed form."""
    victim, image, label = binary(3, head), make_image(4), binary_label(4, 3, head)
    result = create("sea", "linf", steps=50)(victim, image, label)
    worst = victim.predict(optimum(victim, image, label.long(), "linf", "std", EPS["linf"]))
    expected = create("fgsm", "linf", loss="ce")(victim, image, label)
    assert torch.equal(expected.prediction, worst)
    assert (result.score <= expected.score + 1e-12).all()
    assert (result.score.mean() < result.clean_score.mean()).all()


def test_sea_is_plain_data():
    attack = attacks.create("sea", losses=("js", "spherical"), steps=8)
    assert attack.parameters()["losses"] == ["js", "spherical"]
    assert "loss" not in attacks.option_names("sea")
    assert SEA(LInf(0.1)).losses == LOSSES
