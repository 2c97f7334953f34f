"""Minimum-norm attacks against the closed-form minimum of voxelwise linear models, and bisection against the truth."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from oracles import SHAPES, linear_network, make_image, make_label, make_victim
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import Run
from monai_adv.attacks.lagrangian import penalty, penalty_slope, prox_l2, prox_linf
from monai_adv.attacks.minimum_norm import MinimumNorm
from monai_adv.errors import ConfigError
from monai_adv.threats import L2, LInf
from monai_adv.victims import Head, Victim, mean_dice

INF = math.inf
THREATS = {"linf": LInf, "l2": L2}
BINARY = Head("softmax", {"lesion": (1,)})
both = pytest.mark.parametrize("name", ["fmn", "alma_prox"])
normed = pytest.mark.parametrize("norm", ["linf", "l2"])


def linear(kind: str, dims: int = 3) -> Victim:
    """Two classes, four classes, one region."""
    classes, head = {"two": (2, BINARY), "four": (4, "softmax"), "bit": (1, Head("sigmoid", ["lesion"]))}[kind]
    return Victim(linear_network(dims, classes=classes), head=head)


def create(name: str, norm: str = "linf", eps: float = INF, **options):
    region = {"region": "all"} if name != "minimal" else {}
    return attacks.create(name, eps, norm=norm, **{"bounds": None, "support": "all", **region, **options})


def costs(victim: Victim, image, label, norm: str, scale=None) -> torch.Tensor:
    """Smallest perturbation (in units) that fools each voxel of a voxelwise linear model, (B, voxels).

    Class k overtakes the label y where (w_k - w_y) d >= z_y - z_k: at least (z_y - z_k) over the dual norm.
    """
    scale = LInf(1.0, support="all").bind(image).scale if scale is None else scale
    weight = victim.network.weight.detach().flatten(1)
    logits = victim(image).detach().flatten(2)
    if not victim.head.exclusive:  # a bit is a class against a logit of 0
        weight, logits = torch.cat([0 * weight, weight]), torch.cat([0 * logits, logits], 1)
    found = []
    for z, y, unit in zip(logits, label.long().flatten(1), scale.flatten(1)):
        difference = (weight[None] - weight[y][:, None]) * unit  # (voxels, K, C)
        dual = difference.abs().sum(2) if norm == "linf" else difference.norm(dim=2)
        margin = (z.gather(0, y[None]) - z).T
        every = torch.where(torch.arange(len(z)) == y[:, None], INF, (margin / dual).clamp_min(0))
        found.append(every.amin(1))
    return torch.stack(found)


def minimum(cost: torch.Tensor, nu: float, norm: str) -> torch.Tensor:
    """Closed form: the L-inf quantile, or the length of the cheapest voxels together."""
    cheapest = cost.sort(1).values[:, : math.ceil(nu * cost.shape[1] - 1e-9)]
    return cheapest[:, -1] if norm == "linf" else cheapest.norm(dim=1)


# ------------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize(
    ("name", "kind", "norm", "dims", "nu", "within"),
    [
        ("fmn", "two", "linf", 3, 0.9, 1.05),
        ("fmn", "bit", "linf", 2, 0.99, 1.05),
        ("fmn", "four", "linf", 3, 0.9, 1.1),
        ("fmn", "two", "l2", 3, 0.99, 1.15),
        ("fmn", "bit", "l2", 2, 0.9, 1.15),
        ("fmn", "four", "l2", 3, 0.9, 1.2),
        ("alma_prox", "two", "linf", 3, 0.9, 1.05),
        ("alma_prox", "bit", "linf", 2, 0.99, 1.05),
        ("alma_prox", "four", "linf", 3, 0.9, 1.15),
        ("alma_prox", "two", "l2", 3, 0.9, 1.1),
        ("alma_prox", "bit", "l2", 2, 0.99, 1.1),
        ("alma_prox", "four", "l2", 3, 0.9, 1.25),
    ],
)
def test_the_smallest_perturbation_of_a_linear_model(name, kind, norm, dims, nu, within):
    victim, image = linear(kind, dims), make_image(4, dims)
    label = victim.predict(image)
    expected = minimum(costs(victim, image, label, norm), nu, norm)
    result = create(name, norm, nu=nu, steps=200 if kind == "four" else 100)(victim, image, label)
    size = THREATS[norm](1.0, support="all", bounds=None).bind(image).size(result.image)
    assert (size >= expected * (1 - 1e-9)).all()
    assert (size <= within * expected).all(), size / expected
    assert result.details["size"] == size.tolist()
    wrong = (result.prediction != label).flatten(1).double().mean(1)
    assert result.details["fooled"] == wrong.tolist()
    assert (wrong >= nu).all()


@both
@normed
def test_targets_have_a_closed_form_too(name, norm):
    """Every voxel inverted; those that are inverted already cost nothing."""
    victim, image = linear("two"), make_image(4)
    label, target = victim.predict(image), make_label(BINARY, 4, classes=2, seed=9)
    expected = minimum(costs(victim, image, 1 - target, norm), 0.9, norm)
    result = create(name, norm, target=target, steps=100)(victim, image, label)
    for b in range(4):
        assert expected[b] * (1 - 1e-9) <= result.details["size"][b] <= 1.25 * expected[b]
        assert result.details["fooled"][b] == float((result.prediction[b] == target[b]).double().mean()) >= 0.9


@both
def test_a_budget_is_a_cap(name):
    victim, image = linear("two"), make_image(4)
    label = victim.predict(image)
    expected = minimum(costs(victim, image, label, "linf"), 0.9, "linf")
    low, high = float(expected.amin()), float(expected.amax())
    cap = low + 0.9 * (high - low)
    result = create(name, eps=cap, steps=100)(victim, image, label)
    assert (expected < 0.9 * cap).any()
    for size, least in zip(result.details["size"], expected.tolist()):
        if not 0.9 * cap < least <= cap:
            assert (size is not None) == (least <= cap)
    assert (LInf(1.0, support="all").bind(image).size(result.image) <= cap * (1 + 1e-12)).all()
    assert (result.perturbation != 0).flatten(1).any(1).all()


@both
@normed
def test_nothing_has_a_scale(name, norm):
    """An image in other units and a network that reads them: the same perturbation, in those units."""
    victim, image = linear("four"), make_image(2)
    label = victim.predict(image)
    small = create(name, norm, units="absolute", steps=20)(victim, image, label)
    other = linear("four")
    other.network.weight.data /= 1000
    large = create(name, norm, units="absolute", steps=20)(other, 1000 * image, label)
    torch.testing.assert_close(large.image, 1000 * small.image, rtol=1e-6, atol=1e-6)


def test_steps_of_alma_prox_grow_until_there_is_a_success():
    """25 steps of .02 would end at .5; the voxels that have to be fooled are more than twice as far."""
    victim, image = linear("two"), make_image(2)
    label = victim.predict(image)
    expected = minimum(costs(victim, image, label, "linf"), 0.9, "linf")
    assert (expected > 1).all()
    result = create("alma_prox", steps=50, step_size=0.02)(victim, image, label)
    assert None not in result.details["size"]
    assert create("alma_prox", steps=50, step_size=0.0002)(victim, image, label).details["size"] == [None, None]


@both
def test_samples_that_nothing_moves_end_without_a_size(name):
    class Constant(nn.Module):
        def forward(self, x):
            return x.sum(1, keepdim=True) * 0 + torch.tensor([0.0, 1, 0, 0], dtype=x.dtype).view(1, 4, 1, 1, 1)

    image, label = make_image(2), make_label("softmax", 2)
    for criterion in ("voxels", "dice"):
        result = create(name, steps=5, criterion=criterion)(Victim(Constant()), image, label)
        assert torch.equal(result.score, result.clean_score)
        assert not result.success.any()
        assert result.details["size"] == [None, None]
        assert torch.equal(result.image, image)


@both
def test_dice_as_criterion_stops_at_the_goal(name):
    victim, image = linear("four"), make_image(2)
    label = victim.predict(image)
    result = create(name, criterion="dice", steps=60)(victim, image, label)
    assert result.success.all()
    assert (result.score > 0.3).all()  # hardly more than asked for
    searched = create("minimal", attack={"name": "ifgsm", "steps": 10})(victim, image, label)
    for size, eps in zip(result.details["size"], searched.details["minimal_eps"]):
        assert size <= 1.1 * eps
    less = create(name, criterion="dice", steps=60, goal=0.8)(victim, image, label)
    assert all(a < b for a, b in zip(less.details["size"], result.details["size"]))


# ---------------------------------------------------------------------------------------------- the best iterate
class Says(nn.Module):
    """Two classes; the logit difference is the voxel itself."""

    def forward(self, x):
        return torch.cat([-x, x], 1)


class Scripted(MinimumNorm):
    """Offers given images."""

    name: ClassVar[str] = "scripted"
    reference: ClassVar[str] = "test"

    def __init__(self, images, criterion="voxels", nu=0.75, **options):
        threat = LInf(INF, "absolute", bounds=None, support="all")
        super().__init__(threat, 1, criterion, nu, "all", 0.0, **options)
        self.images = images

    def _search(self, run: Run) -> None:
        for values in self.images:
            run.consider(torch.tensor(values, dtype=torch.float64).view(1, 1, 4), loss=lambda z: z.flatten(1).sum(1))
        self._report(run)


@pytest.mark.parametrize(
    ("images", "best", "size"),
    [
        # all four wrong, of size 3; three wrong (enough), of size 2; two wrong, of size 1.5
        ([[-2, -2, 2, 2], [-0.9, -1, 1, -1], [-0.5, -0.5, -1, -1]], 1, 2.0),
        ([[-1.1, -1.1, 1.5, -1], [-1.0, -1, 1.5, -1]], 0, 2.5),
        # failures: the lower Dice (one of two found, no false alarm: 2/3; none found: 0)
        ([[-1.0, 1, -1, -1], [-0.2, -0.2, -1, -1], [1.0, 1, -1, -1]], 1, None),
    ],
)
def test_the_smallest_success_is_kept_and_of_failures_the_better_score(images, best, size):
    clean, label = torch.tensor([[[1.0, 1, -1, -1]]], dtype=torch.float64), torch.tensor([[[1, 1, 0, 0]]])
    result = Scripted(images)(Victim(Says(), head=BINARY), clean, label)
    assert result.best_step.tolist() == [best]
    assert result.details["size"] == [None if size is None else pytest.approx(size)]
    prediction = torch.tensor(images[best]) > 0
    assert result.details["fooled"] == [float((prediction != label[0, 0].bool()).double().mean())]


# ------------------------------------------------------------------------------------------------ counted voxels
def test_the_counted_voxels_are_the_lesion_grown_in_millimetres():
    seen = {}

    class Looks(MinimumNorm):
        name: ClassVar[str] = "looks"
        reference: ClassVar[str] = "test"

        def _search(self, run: Run) -> None:
            seen["counted"] = self._counted(run)
            run.consider(run.clean)

    image = -torch.ones(1, 1, 7, 9, dtype=torch.float64)
    image[..., 3, 4] = 1  # predicted
    label, target = torch.zeros(1, 1, 7, 9, dtype=torch.long), torch.zeros(1, 1, 7, 9, dtype=torch.long)
    label[..., 3, 5] = target[..., 0, 0] = 1
    victim = Victim(Says(), head=BINARY)

    def counted(dilation, region="lesion", **call):
        attack = Looks(LInf(INF), 1, "voxels", 0.9, region, dilation, target=call.pop("rule", None))
        attack(victim, image, call.pop("label", label), spacing=(1.0, 2.0), **call)
        return seen["counted"][0, 0]

    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[3, 4:6] = True
    assert torch.equal(counted(0), expected)
    expected[2:5, 4:6] = True
    assert torch.equal(counted(1), expected)
    expected[1:6, 4:6] = True
    expected[3, 3:7] = True
    assert torch.equal(counted(2), expected)
    assert counted(0, "all").all()
    assert counted(0, target=target, rule="background")[0, 0]
    weight = torch.ones(1, 1, 7, 9)
    weight[..., 5:] = 0
    inside = counted(2, weight=weight)
    assert not inside[:, 5:].any()
    assert inside[2:5, 4].all()
    # what is outside the weight does not grow into it
    elsewhere = torch.zeros_like(label)
    elsewhere[..., 3, 5] = 1
    assert torch.equal(counted(2, weight=weight, label=elsewhere), counted(2, weight=weight, label=0 * label))
    # no lesion at all: everything that counts
    weight[..., 4] = 0
    assert torch.equal(counted(2, weight=weight, label=0 * label), weight[0, 0].bool())


# -------------------------------------------------------------------------------------------- parts of ALMAProx
@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("rho", [0.01, 1.0, 20.0])
def test_the_derivative_of_the_penalty_at_zero_is_the_multiplier(mu, rho):
    mu, rho = torch.tensor(mu, dtype=torch.float64), torch.tensor(rho, dtype=torch.float64)
    for start in (0.0, 1e-9, -1e-9):
        y = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(penalty(y, mu, rho), y)
        torch.testing.assert_close(slope, mu, rtol=1e-6, atol=0)
    y = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    values = penalty(y, mu, rho)
    (slope,) = torch.autograd.grad(values.sum(), y)
    torch.testing.assert_close(slope, penalty_slope(y.detach(), mu, rho))
    assert (slope > 0).all()
    assert (slope.diff() >= 0).all()  # convex


def test_golden_penalties():
    one = torch.ones((), dtype=torch.float64)
    # 2 * .5 + 2 * 3 * .25 + 9 * .125 / 6, and 2 * -.5 / (1 + 3 * .5)
    assert penalty(0.5 * one, 2 * one, 3 * one).item() == pytest.approx(2.6875)
    assert penalty(-0.5 * one, 2 * one, 3 * one).item() == pytest.approx(-0.4)
    assert penalty(-0.5 * one, 2 * one, 0.1 * one).item() == pytest.approx(-2 / 3)  # max(1, rho)


@pytest.mark.parametrize(("prox", "norm"), [(prox_linf, INF), (prox_l2, 2)])
def test_proximal_steps_are_minima(prox, norm):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    metric = torch.rand(4, 3, 5, generator=generator, dtype=torch.float64) + 0.05
    amount = torch.tensor([0.1, 0.5, 1.5, 50.0], dtype=torch.float64)

    def value(p):
        return 0.5 * (metric * (p - u).square()).flatten(1).sum(1) + amount * p.flatten(1).norm(norm, dim=1)

    point = prox(u, amount, metric)
    assert point[3].abs().max() == 0
    assert (point[:3] != 0).flatten(1).any(1).all()
    best = value(point)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            other = point + size * torch.randn(u.shape, generator=generator, dtype=torch.float64)
            assert (value(other) >= best - 1e-12).all()
    for factor in (0.999, 1.001):
        assert (value(factor * point) >= best - 1e-12).all()
    torch.testing.assert_close(prox(u[1:2], amount[1:2], metric[1:2]), point[1:2])


# ----------------------------------------------------------------------------------------------------- bisection
@normed
@pytest.mark.parametrize("kind", ["two", "bit"])
def test_bisection_finds_the_smallest_budget_that_halves_dice(kind, norm):
    """FGSM with the plain margin fools, at eps, exactly the voxels of smaller cost (L-inf): Dice(eps) is known."""
    victim, image = linear(kind), make_image(4)
    label = victim.predict(image)
    attack = {"name": "ifgsm", "steps": 1, "step_size": 1e6, "loss": "ce"}
    result = create("minimal", norm, attack=attack, tolerance=0.02)(victim, image, label)
    assert result.success.all()
    for b in range(4):
        eps, tried = result.details["minimal_eps"][b], result.details["tried"][b]
        failed = [e for e, score in tried if score > 0.5]
        assert eps == min(e for e, score in tried if score <= 0.5)
        assert eps - max(failed) <= 0.02 * eps
        if norm == "linf":
            cost = costs(victim, image, label, norm)[b]
            for budget, score in tried:
                flipped = torch.where(cost.view(1, 1, *image.shape[2:]) < budget, 1 - label[b].long(), label[b].long())
                expected = mean_dice(flipped.to(label.dtype), label[b : b + 1], victim.head)
                assert score == pytest.approx(float(expected))
            truth = min(
                float(c) for c in cost
                if float(mean_dice(
                    torch.where(cost.view(1, 1, *image.shape[2:]) <= c, 1 - label[b].long(), label[b].long())
                    .to(label.dtype), label[b : b + 1], victim.head,
                )) <= 0.5
            )  # fmt: skip
            assert truth <= eps <= truth / (1 - 0.02) * (1 + 1e-9)
    size = THREATS[norm](1.0, support="all").bind(image).size(result.image)
    torch.testing.assert_close(size, torch.tensor(result.details["minimal_eps"], dtype=torch.float64))


def test_the_returned_image_is_the_attacks_own_at_that_budget():
    victim, image = linear("four"), make_image(3)
    label = victim.predict(image)
    for goal in (0.5, 0.01):  # reached, and out of reach
        result = create("minimal", attack={"name": "pgd", "steps": 3}, largest=0.4, goal=goal, seed=5)(
            victim, image, label
        )
        for b in range(3):
            eps, tried = result.details["minimal_eps"][b], result.details["tried"][b]
            assert (eps is None) == (not result.success[b])
            if eps is None:
                assert max(e for e, _ in tried) == 0.4
                eps = min(reversed(tried), key=lambda pair: pair[1])[0]
            alone = attacks.create("pgd", eps, steps=3, bounds=None, support="all", seed=5, goal=goal)(
                victim, image[b : b + 1], label[b : b + 1]
            )
            torch.testing.assert_close(result.image[b : b + 1], alone.image)
            assert float(result.score[b]) == dict(map(tuple, tried))[eps]
        assert bool(result.success.any()) == (goal == 0.5)


def test_budgets_double_and_end_at_the_cap():
    victim, image = linear("two"), make_image(1)
    label = victim.predict(image)
    far = create("minimal", start=0.01, goal=0.0, largest=0.1)(victim, image, label)
    assert [e for e, _ in far.details["tried"][0]] == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.1])
    assert far.details["minimal_eps"] == [None]
    capped = create("minimal", start=0.01, goal=0.0, eps=0.03)(victim, image, label)
    assert [e for e, _ in capped.details["tried"][0]] == pytest.approx([0.01, 0.02, 0.03])
    near = create("minimal", start=3.0, tolerance=0.5)(victim, image, label).details["tried"][0]
    assert near[0][0] == 3
    assert near[1][0] == 1.5
    length = create("minimal", "l2", start=0.01, goal=0.0, largest=0.1)(victim, image, label).details["tried"][0]
    assert length[-1][0] == pytest.approx(0.1 * math.sqrt(image.numel()))


def test_cost_is_the_sum_of_all_tries():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    calls = []
    victim.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    result = create("minimal", attack={"name": "ifgsm", "steps": 2})(victim, image, label)
    tries = sum(len(t) for t in result.details["tried"])
    assert (result.cost.forwards, result.cost.backwards) == (2 + 4 * tries, 2 * tries)
    assert len(calls) == result.cost.forwards


def test_targeted_attacks_and_details_of_the_attack_inside():
    victim, image = linear("two"), make_image(2)
    label = victim.predict(image)
    result = create("minimal", attack="targeted_ifgsm", goal=0.9)(victim, image, label)
    assert (result.clean_score == 0).all()
    assert (result.score >= 0.9).all()
    masked = create("minimal", attack="ifgsm", target="background", goal=0.9)(victim, image, label)
    assert masked.success.all()
    inverted = create("minimal", attack="ifgsm", target="background", goal=0.9)(victim, image, label, target=1 - label)
    assert torch.equal(inverted.score, (inverted.prediction != label).flatten(1).double().mean(1))
    assert inverted.success.all()
    inside = create("minimal", attack={"name": "dag", "steps": 5})(victim, image, label)
    assert len(inside.details["dag.fooled"]) == 2
    noise = create("minimal", attack={"name": "noise"}, largest=8.0)(victim, image, label)
    ours = create("minimal")(victim, image, label)
    for a, b in zip(noise.details["minimal_eps"], ours.details["minimal_eps"]):
        assert a is None or a > 1.5 * b


# ------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fmn", {"steps": 0}, "steps must be"),
        ("fmn", {"criterion": "pixels"}, "criterion 'pixels'"),
        ("fmn", {"nu": 0}, "nu must be in"),
        ("fmn", {"region": "brain"}, "region 'brain'"),
        ("fmn", {"dilation": -1}, "dilation must be"),
        ("fmn", {"step_size": 0}, "step_size must be > 0"),
        ("fmn", {"gamma": 1}, "gamma must be between 0 and 1"),
        ("fmn", {"kappa": -1}, "kappa must be >= 0"),
        ("alma_prox", {"step_size": -1}, "step_size must be > 0"),
        ("minimal", {"tolerance": 1}, "tolerance must be > 0 and < 1"),
        ("minimal", {"start": 0}, "start must be > 0"),
        ("minimal", {"largest": INF}, "largest must be > 0 and finite"),
        ("minimal", {"attack": "fmn"}, "fmn finds its own size"),
        ("minimal", {"attack": "minimal"}, "minimal finds its own size"),
        ("minimal", {"attack": "rumour"}, "attack 'rumour' is unknown"),
        ("minimal", {"attack": {"steps": 3}}, "an attack needs a name"),
        ("minimal", {"attack": {"name": "fgsm", "goal": 0.1}}, "goal of .* belongs to minimal"),
        ("minimal", {"attack": {"name": "fgsm", "step": 3}}, "fgsm has no option step"),
        ("minimal", {"attack": "noise", "target": "background"}, "noise is untargeted|has no option target"),
    ],
)  # fmt: skip
def test_impossible_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        attacks.create(name, **options)


def test_shapes_of_two_and_three_dimensions_and_bits_of_three_regions():
    for name in ("fmn", "alma_prox"):
        for dims in (2, 3):
            victim, image = make_victim("smooth", "sigmoid", dims), make_image(4, dims)
            label = victim.predict(image)
            result = attacks.create(name, steps=40, nu=0.5)(victim, image, label)
            assert result.image.shape == (4, 4, *SHAPES[dims])
            for fooled, size in zip(result.details["fooled"], result.details["size"]):
                assert (fooled > 0.5 - 1e-9) == (size is not None)
            assert max(result.details["fooled"]) > 0.5 - 1e-9
