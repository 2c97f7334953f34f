"""Dense adversary generation where its steps are known: voxelwise linear models."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SHAPES, make_image, make_label, make_victim
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import DAG
from monai_adv.attacks.dense import _derangement
from monai_adv.errors import ConfigError
from monai_adv.threats import L2, LInf
from monai_adv.victims import Head, Victim

INF = math.inf
heads = pytest.mark.parametrize("head", ["softmax", "sigmoid"])


def dag(eps=INF, **options):
    return attacks.create("dag", eps, **{"bounds": None, "adversarial": "runner_up", "counts": "all", **options})


def first_direction(victim, image, label, wrong=None):
    """Gradient of the sum of z_adv - z_true over the voxels that are still right, by hand: (B, C, *spatial)."""
    weight = victim.network.weight.detach().flatten(1)  # (K, C)
    logits = victim(image).detach()
    total = torch.zeros_like(image)
    for index in torch.cartesian_prod(torch.arange(len(image)), *[torch.arange(n) for n in image.shape[2:]]).tolist():
        b, *v = index
        z = logits[(b, slice(None), *v)]
        if victim.head.exclusive:
            y = int(label[(b, 0, *v)])
            if int(z.argmax()) != y:
                continue
            order = [k for k in z.argsort(descending=True).tolist() if k != y]
            adv = order[0] if wrong is None else wrong[y]
            total[(b, slice(None), *v)] = weight[adv] - weight[y]
        else:
            for k, bit in enumerate(label[(b, slice(None), *v)].tolist()):
                if bool(z[k] > 0) == bool(bit):
                    total[(b, slice(None), *v)] += -weight[k] if bit else weight[k]
    return total


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@heads
def test_the_first_step_is_the_gradient_with_a_largest_entry_of_gamma(head, norm, dims):
    victim, image, label = make_victim("linear", head, dims), make_image(4, dims), make_label(head, 4, dims)
    attack = dag(norm=norm, steps=1, gamma=0.3)
    scale = attack.threat.bind(image).scale
    u = torch.where(image != 0, first_direction(victim, image, label) * scale, 0.0)
    step = 0.3 * u / u.abs().flatten(1).amax(1).view(-1, *[1] * (dims + 1))
    torch.testing.assert_close(attack(victim, image, label).image, image + step * scale, rtol=1e-10, atol=1e-10)


def test_only_voxels_that_are_not_fooled_yet_are_pushed():
    victim, image, label = make_victim("linear"), make_image(4), make_label("softmax", 4)
    wrong = (victim.predict(image) != label).expand_as(image)
    moved = dag(steps=1)(victim, image, label).perturbation != 0
    assert 0.2 < wrong.double().mean() < 0.9
    assert not moved[wrong].any()
    assert moved[~wrong & (image != 0)].all()


@pytest.mark.parametrize(("eps", "gamma"), [(2.0, 0.1), (INF, 0.1), (0.5, 0.025)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_default_step_is_a_twentieth_of_the_budget(norm, eps, gamma):
    victim, image, label = make_victim("linear"), make_image(2), make_label("softmax", 2)
    result = dag(eps, norm=norm, steps=1, support="all")(victim, image, label)
    if norm == "linf":
        expected = torch.full((2,), gamma, dtype=torch.float64)
        torch.testing.assert_close(LInf(1.0, support="all").bind(image).size(result.image), expected)
    else:
        assert (L2(1.0, support="all").bind(image).size(result.image) <= eps * (1 + 1e-12)).all()
        free = dag(INF, norm="l2", steps=1, gamma=gamma, support="all")(victim, image, label)
        ball = L2(eps, support="all", bounds=None).bind(image)
        torch.testing.assert_close(result.image, ball.project(free.image))


def test_steps_add_up_and_the_budget_stops_them():
    """While every voxel is active the gradient stays: n steps are n times the first."""
    network = nn.Conv3d(4, 2, 1).double()
    network.bias.data = torch.tensor([0.0, 50.0], dtype=torch.float64)
    victim, image = Victim(network, head=Head("softmax", {"lesion": (1,)})), make_image(2)
    label = torch.ones(2, 1, *SHAPES[3], dtype=torch.long)
    one, five = (dag(steps=n, gamma=0.02, support="all")(victim, image, label).trace for n in (1, 5))
    assert len(five) == 6
    gains = torch.stack([e["loss"] for e in five]).diff(dim=0)
    torch.testing.assert_close(gains, (one[1]["loss"] - one[0]["loss"]).expand(5, -1), rtol=1e-9, atol=1e-9)
    capped = dag(0.05, steps=5, gamma=0.02, support="all")(victim, image, label)
    size = LInf(1.0, support="all").bind(image).size(capped.image)
    torch.testing.assert_close(size, torch.full((2,), 0.05, dtype=torch.float64))


# ------------------------------------------------------------------------------------------- who has to be fooled
@pytest.mark.parametrize("counts", ["all", "lesion"])
@heads
def test_it_stops_per_sample_when_the_share_is_reached(head, counts):
    victim, image = make_victim("linear", head), make_image(4) * torch.arange(1, 5).view(-1, 1, 1, 1, 1)
    label = victim.predict(image)
    attack = dag(support="all", gamma=1.5, nu=0.8, units="absolute", counts=counts)
    result = attack(victim, image, label)
    stopped = result.details["stopped"]
    assert len(set(stopped)) > 1
    assert len(result.trace) == max(stopped) + 1  # the last step is evaluated, and no more follow
    counted = (label != 0).any(1, keepdim=True) if counts == "lesion" else torch.ones_like(label[:, :1]).bool()
    for b in range(4):
        wrong = (result.prediction[b] != label[b])[counted[b].expand_as(label[b])].double().mean()
        assert result.details["fooled"][b] == pytest.approx(float(wrong))
        alone = attack(victim, image[b : b + 1], label[b : b + 1])
        assert alone.details["stopped"] == [stopped[b]]
        torch.testing.assert_close(alone.image[0], result.image[b], rtol=1e-10, atol=1e-10)
        # a sample that is done stays where it is while others go on
        scores = [float(entry["score"][b]) for entry in result.trace]
        assert len(set(scores[stopped[b] :])) == 1
        assert result.best_step[b] <= stopped[b]
        assert len(alone.trace) == stopped[b] + 1
    assert result.success.all()


def test_the_lesion_is_what_is_pushed():
    victim, image, label = make_victim("linear"), make_image(2), torch.zeros(2, 1, *SHAPES[3], dtype=torch.long)
    lesion = (victim.predict(image) != 0).expand_as(image)
    assert lesion.any()
    assert (~lesion).any()
    label = torch.where(lesion[:, :1], victim.predict(image), label)
    moved = dag(steps=1, counts="lesion", support="all")(victim, image, label).perturbation != 0
    assert torch.equal(moved, lesion)
    moved = dag(steps=1, counts="all", support="all")(victim, image, label).perturbation != 0
    assert moved.all()


def test_a_failed_search_returns_its_best_iterate():
    victim, image = make_victim("linear"), make_image(2)
    label = victim.predict(image)
    result = dag(0.05, steps=8)(victim, image, label)
    assert not result.success.any()
    assert result.details["stopped"] == [None, None]
    assert len(result.trace) == 9
    assert torch.equal(result.score, torch.stack([e["score"] for e in result.trace[1:]]).amin(0))
    assert (result.score < result.clean_score).all()


def test_the_clean_image_is_no_result():
    """A step so large that it makes some predictions better than they were."""
    victim, image, label = make_victim("smooth"), make_image(4), make_label("softmax", 4)
    result = dag(steps=1, gamma=30.0)(victim, image, label)
    assert (result.score > result.clean_score).any()
    assert result.best_step.tolist() == [1] * 4


def test_a_constant_model_is_not_moved():
    class Constant(nn.Module):
        def forward(self, x):
            return x.sum(1, keepdim=True) * 0 + torch.tensor([0.0, 1, 0, 0], dtype=x.dtype).view(1, 4, 1, 1, 1)

    image, label = make_image(2), make_label("softmax", 2)
    result = dag(steps=3)(Victim(Constant()), image, label)
    assert torch.equal(result.image, image)
    assert not result.success.any()
    assert torch.equal(result.score, result.clean_score)


# --------------------------------------------------------------------------------------------- wrong classes, targets
def test_the_wrong_classes_are_a_permutation_without_fixed_points():
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 3, 4, 7):
        tables = {tuple(_derangement(classes, generator).tolist()) for _ in range(200)}
        for table in tables:
            assert sorted(table) == list(range(classes))
            assert all(k != v for k, v in enumerate(table))
        assert len(tables) >= {2: 1, 3: 2, 4: 9, 7: 100}[classes]
    with pytest.raises(ConfigError, match="one class has none"):
        _derangement(1, generator)


def test_every_sample_draws_its_own_permutation():
    """The first step of each sample is that of its table, and of no other."""
    victim, image, label = make_victim("linear"), make_image(4), make_label("softmax", 4)
    attack = dag(steps=1, adversarial="permutation", support="all", units="absolute", gamma=1.0)
    result = attack(victim, image, label, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    tables = [_derangement(4, generator).tolist() for _ in range(4)]
    assert len({tuple(t) for t in tables}) > 1
    for b, table in enumerate(tables):
        direction = first_direction(victim, image[b : b + 1], label[b : b + 1], table)[0]
        expected = direction / direction.abs().max()
        torch.testing.assert_close(result.perturbation[b], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adversarial", ["permutation", "runner_up"])
def test_without_a_budget_every_voxel_is_fooled(adversarial):
    victim, image = make_victim("linear"), make_image(4)
    label = victim.predict(image)
    result = dag(adversarial=adversarial, support="all", gamma=1.0)(victim, image, label)
    assert min(result.details["fooled"]) >= 0.99
    assert result.success.all()


@heads
def test_targets_are_reached(head):
    victim, image = make_victim("linear", head), make_image(4)
    label, target = victim.predict(image), make_label(head, 4, seed=8)
    result = dag(support="all", gamma=0.5, target="background", steps=150)(victim, image, label, target=target)
    # the bits of a voxel may be impossible together for a linear model of few modalities, classes are not
    assert (result.score > (0.95 if head == "softmax" else 0.8)).all(), result.score
    assert result.success.all()
    share = (result.prediction == target).flatten(1).double().mean(1)
    torch.testing.assert_close(torch.tensor(result.details["fooled"], dtype=torch.float64), share)


@heads
def test_a_voxel_that_is_at_its_target_is_left_alone_and_one_that_left_is_brought_back(head):
    victim, image = make_victim("linear", head), make_image(2)
    prediction = victim.predict(image)
    assert not dag(steps=2, target=prediction, nu=1.0)(victim, image, prediction).perturbation.any()
    other = make_label(head, 2, seed=8)
    # label and target agree, the prediction is elsewhere: towards the target all the same
    result = dag(steps=20, target=other, support="all", gamma=0.3)(victim, image, other)
    before = (prediction == other).double().mean()
    assert (result.prediction == other).double().mean() > before + 0.1


# ------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"gamma": 0}, "gamma must be > 0"),
        ({"gamma": INF}, "gamma must be > 0 and finite"),
        ({"nu": 0}, r"nu must be in \(0, 1\]"),
        ({"nu": 1.2}, "nu must be in"),
        ({"adversarial": "worst"}, "adversarial 'worst'"),
        ({"counts": "brain"}, "counts 'brain'"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message):
        DAG(LInf(0.1), **options)
