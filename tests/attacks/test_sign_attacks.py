"""What each sign attack must find where the answer is known: voxelwise linear models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from oracles import linear_network, make_image, make_label, make_victim
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import FGSM, IFGSM, PGD, Noise, TargetedIFGSM
from monai_adv.errors import ConfigError
from monai_adv.losses import CrossEntropy, DiceCrossEntropy, Margin
from monai_adv.threats import L2, LInf
from monai_adv.victims import Head, Victim

LESION = Head("softmax", {"lesion": (1,)})
UNITS = ["std", "range", "absolute"]
EPS = {"linf": 0.3, "l2": 2.0}
UNCLIPPED = Margin(kappa=float("inf"))


def binary(dims: int = 3, head: str = "softmax") -> Victim:
    """Two classes, or one region: the direction of every voxel's worst change is one vector."""
    if head == "softmax":
        return Victim(linear_network(dims, classes=2), head=LESION)
    return Victim(linear_network(dims, classes=1), head=Head("sigmoid", ["lesion"]))


def binary_label(batch: int = 4, dims: int = 3, head: str = "softmax") -> torch.Tensor:
    label = make_label(LESION, batch, dims, classes=2)
    return label if head == "softmax" else label.bool()


def worst_direction(victim: Victim, label: torch.Tensor) -> torch.Tensor:
    """d margin / d x at every voxel, (B, C, *spatial), without automatic differentiation."""
    weight = victim.network.weight.detach().flatten(1)  # (K, C)
    towards_lesion = weight[1] - weight[0] if len(weight) == 2 else weight[0]
    sign = 1 - 2 * label.double()  # healthy voxels are pushed to lesion, lesion voxels away from it
    return sign * towards_lesion.view(1, -1, *[1] * (label.ndim - 2))


def units_of(image: torch.Tensor, units: str) -> torch.Tensor:
    """By NumPy, (B, C, 1, ...)."""
    scale = np.ones(image.shape[:2])
    for b, c in np.ndindex(*scale.shape):
        values = image[b, c][image[b, c] != 0].numpy()
        low, high = np.percentile(values, [0.5, 99.5])
        scale[b, c] = {"std": values.std(), "range": high - low, "absolute": 1.0}[units]
    return torch.from_numpy(scale).view(*image.shape[:2], *[1] * (image.ndim - 2))


def optimum(victim, image, label, norm: str, units: str, eps: float) -> torch.Tensor:
    """The image of the largest summed margin in the ball, in closed form."""
    direction = torch.where(image != 0, worst_direction(victim, label), 0.0)
    scale = units_of(image, units)
    if norm == "linf":
        return image + eps * scale * direction.sign()
    u = direction * scale
    return image + scale * eps * u / u.flatten(1).norm(dim=1).view(-1, *[1] * (image.ndim - 1))


def create(name: str, norm: str, **options):
    return attacks.create(name, options.pop("eps", EPS[norm]), norm=norm, bounds=None, **options)


# ------------------------------------------------------------------------------------------ closed forms
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["fgsm", "ifgsm", "pgd"])
def test_the_optimum_of_a_linear_margin_is_found(name, head, norm, units, dims):
    victim, image, label = binary(dims, head), make_image(4, dims), binary_label(4, dims, head)
    options = {"random_start": False} if name == "pgd" else {}
    result = create(name, norm, units=units, loss=UNCLIPPED, **options)(victim, image, label)
    expected = optimum(victim, image, label.long(), norm, units, EPS[norm])
    torch.testing.assert_close(result.image, expected, rtol=1e-10, atol=1e-10)
    assert (result.score <= result.clean_score).all()
    assert result.score.mean() < result.clean_score.mean()


@pytest.mark.parametrize("loss", ["ce", "dice_ce"])
@pytest.mark.parametrize("name", ["fgsm", "ifgsm", "pgd"])
def test_linf_needs_only_the_sign_so_every_loss_finds_it(name, loss):
    victim, image, label = binary(), make_image(4), binary_label()
    result = create(name, "linf", loss=loss)(victim, image, label)
    expected = optimum(victim, image, label, "linf", "std", 0.3)
    torch.testing.assert_close(result.image, expected, rtol=1e-10, atol=1e-10)


def test_pgd_finds_it_from_a_random_start_too():
    victim, image, label = binary(), make_image(4), binary_label()
    expected = optimum(victim, image, label, "linf", "std", 0.3)
    found = create("pgd", "linf", loss=UNCLIPPED)(victim, image, label).image
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    best = (
        (worst_direction(victim, label) * (optimum(victim, image, label, "l2", "std", 2.0) - image)).flatten(1).sum(1)
    )
    for steps, share in ((10, 0.9), (40, 0.98)):
        found = create("pgd", "l2", loss=UNCLIPPED, steps=steps)(victim, image, label).image
        reached = (worst_direction(victim, label) * (found - image)).flatten(1).sum(1)
        assert (reached <= best * (1 + 1e-12)).all()
        assert (reached >= share * best).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_cross_entropy_of_four_classes_against_its_exact_maximum(norm):
    """Cross entropy is convex in a voxel: its maximum in an L-inf ball is at one of the 16 corners."""
    victim, image, label = make_victim("linear"), make_image(2), make_label("softmax", 2)
    scale = units_of(image, "std")
    weight, bias = (p.detach() for p in victim.network.parameters())
    worst = torch.full(label.shape, -torch.inf, dtype=torch.float64)
    for corner in itertools.product((-1.0, 1.0), repeat=4):
        moved = image + (image != 0) * 0.3 * scale * torch.tensor(corner).view(1, 4, 1, 1, 1)
        logits = nn.functional.conv3d(moved, weight, bias)
        worst = torch.maximum(worst, nn.functional.cross_entropy(logits, label[:, 0], reduction="none")[:, None])
    worst = worst.flatten(1).sum(1)
    values = {}
    for name, options in (("fgsm", {}), ("ifgsm", {}), ("pgd", {"restarts": 3})):
        result = create(name, norm, loss="ce", **options)(victim, image, label)
        values[name] = torch.stack([entry["loss"] for entry in result.trace]).amax(0)
    if norm == "linf":
        for name, share in (("fgsm", 0.9), ("ifgsm", 0.97), ("pgd", 0.97)):
            assert (values[name] <= worst * (1 + 1e-12)).all(), name
            assert (values[name] >= share * worst).all(), (name, values[name] / worst)
    assert (values["ifgsm"] >= values["fgsm"]).all()


def test_bounds_cut_the_optimum():
    victim, image, label = binary(), make_image(4), binary_label()
    free = optimum(victim, image, label, "linf", "std", 2.0)
    low, high = image.amin((2, 3, 4), keepdim=True), image.amax((2, 3, 4), keepdim=True)
    found = attacks.create("ifgsm", 2.0, loss="ce")(victim, image, label).image
    torch.testing.assert_close(found, free.clamp(low, high), rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------- step sizes
@pytest.mark.parametrize(("steps", "expected"), [(1, 0.04), (3, 0.12), (20, 0.3)])
@pytest.mark.parametrize("name", ["ifgsm", "pgd"])
def test_the_step_size_is_in_units_and_stops_at_the_budget(name, steps, expected):
    victim, image, label = binary(), make_image(2), binary_label(2)
    options = {"random_start": False} if name == "pgd" else {}
    found = create(name, "linf", units="range", steps=steps, step_size=0.04, loss=UNCLIPPED, **options)(
        victim, image, label
    )
    torch.testing.assert_close(found.image, optimum(victim, image, label, "linf", "range", expected))


def test_the_default_step_reaches_the_budget_and_beyond():
    """2.5 eps / K: after 4 of 10 steps the L-inf ball's corner is reached, after 3 not yet."""
    victim, image, label = binary(), make_image(2), binary_label(2)
    values = [e["loss"] for e in create("ifgsm", "linf", loss=UNCLIPPED)(victim, image, label).trace]
    best = Margin(float("inf"))(victim(optimum(victim, image, label, "linf", "std", 0.3)).detach(), label, victim.head)
    assert len(values) == 11
    torch.testing.assert_close(values[4], best, rtol=1e-10, atol=0)
    assert (values[3] < best).all()
    gains = torch.stack(values).diff(dim=0)[:3]
    torch.testing.assert_close(gains, gains[:1].expand(3, -1), rtol=1e-8, atol=0)


def test_the_loss_grows_step_by_step():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    for norm in ("linf", "l2"):
        result = create("ifgsm", norm, loss="ce", eps=EPS[norm] / 10)(victim, image, label)
        assert (torch.stack([e["loss"] for e in result.trace]).diff(dim=0)[:4] > 0).all()


def test_more_steps_and_restarts_are_not_weaker():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)

    def strongest(name: str, **options) -> torch.Tensor:
        result = create(name, "linf", loss="ce", **options)(victim, image, label)
        return torch.stack([e["loss"] for e in result.trace]).amax(0)

    assert (strongest("ifgsm", steps=10) >= strongest("fgsm")).all()
    assert (strongest("pgd", steps=5, restarts=4) >= strongest("pgd", steps=5)).all()
    one, four = (create("pgd", "linf", steps=5, restarts=n)(victim, image, label).score for n in (1, 4))
    assert (four <= one).all()


# ------------------------------------------------------------------------------------- starts and restarts
def test_restarts_are_whole_searches_from_different_points():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    result = create("pgd", "linf", steps=3, restarts=2)(victim, image, label)
    assert [e["restart"] for e in result.trace] == [0] * 4 + [1] * 4
    assert [e["step"] for e in result.trace] == list(range(8))
    assert (result.trace[0]["loss"] != result.trace[4]["loss"]).all()
    single = create("pgd", "linf", steps=3)(victim, image, label)
    for entry, alone in zip(result.trace[:4], single.trace):
        assert torch.equal(entry["loss"], alone["loss"])


def test_without_a_random_start_pgd_is_ifgsm():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    for norm in ("linf", "l2"):
        a = create("pgd", norm, random_start=False, steps=4)(victim, image, label)
        b = create("ifgsm", norm, steps=4)(victim, image, label)
        assert torch.equal(a.image, b.image)
        expected = DiceCrossEntropy()(victim(image).detach(), label, victim.head)
        assert torch.equal(b.trace[0]["loss"], expected)  # the default loss, of the clean image


def test_the_clean_image_is_never_a_result_of_an_iterative_attack():
    """Every step hurts the attack, so the clean image would be the best iterate were it allowed."""

    class Wrong(CrossEntropy):
        def __call__(self, logits, label, head, weight=None):
            return -super().__call__(logits, label, head, weight)

    victim, image, label = binary(), make_image(2), binary_label(2)
    for name in ("ifgsm", "fgsm"):
        result = create(name, "linf", loss=Wrong())(victim, image, label)
        assert (result.best_step >= 1).all()
        assert (result.image != image).flatten(1).any(1).all()


# ----------------------------------------------------------------------------------------------- targeted
@pytest.mark.parametrize("loss", ["ce", "dice_ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_a_large_budget_reaches_the_target(head, norm, loss):
    victim, image = make_victim("linear", head), make_image(2)
    label = victim.predict(image)
    attack = create("targeted_ifgsm", norm, eps=30.0 if norm == "linf" else 600.0, loss=loss, steps=40, support="all")
    result = attack(victim, image, label)
    assert (result.clean_score == 0).all()
    assert (result.score > 0.95).all(), result.score
    assert result.success.all()
    assert (result.prediction != 0).double().mean() < 0.05


def test_a_target_far_away_is_approached_with_the_margin_too():
    """More than kappa away: the untargeted margin would have no gradient left there."""
    network = linear_network(classes=2)
    network.bias.data.copy_(torch.tensor([-30.0, 30.0]))
    victim, image = Victim(network, head=LESION), make_image(2)
    label = torch.ones(2, 1, *image.shape[2:], dtype=torch.long)
    result = create("targeted_ifgsm", "linf", loss="margin")(victim, image, label)
    assert result.trace[0]["zero_gradient"].tolist() == [0, 0]
    assert (result.trace[-1]["loss"] > result.trace[0]["loss"]).all()


def test_targeted_is_the_opposite_of_untargeted_on_two_classes():
    """Towards the inverted label is away from the label."""
    victim, image, label = binary(), make_image(2), binary_label(2)
    away = create("ifgsm", "linf", loss="ce")(victim, image, label)
    towards = create("targeted_ifgsm", "linf", loss="ce")(victim, image, label, target=1 - label)
    torch.testing.assert_close(towards.image, away.image, rtol=1e-10, atol=1e-10)
    mask = TargetedIFGSM(LInf(0.3, bounds=None), target=1 - label)
    assert torch.equal(mask(victim, image, label).image, towards.image)


def test_towards_the_label_itself_the_segmentation_gets_better():
    victim, image, label = make_victim("linear"), make_image(2), make_label("softmax", 2)
    result = create("targeted_ifgsm", "linf", eps=1.0)(victim, image, label, target=label)
    before = (victim.predict(image) == label).double().mean()
    assert (result.prediction == label).double().mean() > before + 0.1


# -------------------------------------------------------------------------------------------------- noise
@pytest.mark.parametrize("units", UNITS)
def test_noise_has_the_size_of_the_attack(units):
    victim, image, label = make_victim("linear"), make_image(4), make_label("softmax", 4)
    scale = units_of(image, units)
    moves = image != 0
    for norm in ("linf", "l2"):
        delta = create("noise", norm, units=units)(victim, image, label).perturbation / scale
        attacked = create("fgsm", norm, units=units)(victim, image, label).perturbation / scale
        torch.testing.assert_close(delta.flatten(1).norm(dim=1), attacked.flatten(1).norm(dim=1), rtol=1e-9, atol=0)
        if norm == "linf":
            torch.testing.assert_close(delta.abs()[moves], torch.full_like(delta[moves], 0.3))


def test_gaussian_noise():
    victim, image, label = make_victim("linear"), make_image(4), make_label("softmax", 4)
    linf = create("noise", "linf", kind="gaussian")(victim, image, label).perturbation / units_of(image, "std")
    assert 0.25 < linf[image != 0].square().mean().sqrt() < 0.35
    l2 = create("noise", "l2", kind="gaussian")(victim, image, label).perturbation / units_of(image, "std")
    torch.testing.assert_close(l2.flatten(1).norm(dim=1), torch.full((4,), 2.0, dtype=torch.float64))
    assert not torch.equal(linf, l2)


def test_repeated_noise_is_not_weaker_and_the_worst_is_kept():
    victim, image, label = make_victim("linear"), make_image(4), make_label("softmax", 4)
    one, five = (create("noise", "linf", repeats=n)(victim, image, label) for n in (1, 5))
    assert (five.score <= one.score).all()
    assert torch.equal(five.score, torch.stack([e["score"] for e in five.trace]).amin(0))
    assert [e["restart"] for e in five.trace] == list(range(5))
    assert all(e["zero_gradient"].isnan().all() for e in five.trace)


def test_noise_is_weaker_than_the_attack():
    victim, image, label = binary(), make_image(4), binary_label()
    noise, attack = (create(n, "linf", loss="ce")(victim, image, label) for n in ("noise", "fgsm"))
    assert (noise.trace[-1]["loss"] < attack.trace[-1]["loss"]).all()


# --------------------------------------------------------------------------------------------------- cost
@pytest.mark.parametrize(
    ("name", "options", "forwards", "backwards"),
    [
        ("noise", {}, 2, 0),
        ("noise", {"repeats": 3}, 4, 0),
        ("fgsm", {}, 3, 1),
        ("ifgsm", {"steps": 3}, 5, 3),
        ("targeted_ifgsm", {"steps": 3}, 5, 3),
        ("pgd", {"steps": 3, "restarts": 2}, 9, 6),
    ],
)
def test_cost(name, options, forwards, backwards):
    """One clean pass, one pass per gradient, one for the last iterate of each restart; counted by the network too."""
    victim = make_victim("smooth")
    calls = []
    victim.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    result = create(name, "linf", **options)(victim, make_image(2), make_label("softmax", 2))
    assert (result.cost.forwards, result.cost.backwards) == (forwards, backwards)
    assert len(calls) == forwards
    assert sum(calls) == backwards
    assert result.cost.seconds > 0


def test_fgsm_takes_one_gradient_for_many_budgets():
    victim = make_victim("smooth")
    results = create("fgsm", "linf").curve(victim, make_image(2), make_label("softmax", 2), [0.1, 0.2, 0.3])
    assert [(r.cost.forwards, r.cost.backwards) for r in results] == [(3, 1), (1, 0), (1, 0)]


# ------------------------------------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PGD, {"steps": 0}, "steps must be an integer >= 1"),
        (PGD, {"steps": 2.5}, "steps must be an integer >= 1"),
        (PGD, {"steps": "many"}, "steps must be an integer >= 1"),
        (PGD, {"steps": True}, "steps must be an integer >= 1"),
        (PGD, {"steps": float("nan")}, "steps must be an integer >= 1"),
        (PGD, {"step_size": 0.0}, "step_size must be > 0"),
        (PGD, {"step_size": float("nan")}, "step_size must be > 0"),
        (PGD, {"step_size": "small"}, "step_size must be > 0"),
        (PGD, {"restarts": 0}, "restarts must be an integer"),
        (PGD, {"restarts": 2, "random_start": False}, "restarts from the same point"),
        (Noise, {"kind": "salt"}, "noise kind 'salt'"),
        (Noise, {"repeats": -1}, "repeats must be"),
    ],
)
def test_impossible_options(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(LInf(0.1), **options)


@pytest.mark.parametrize("kind", [FGSM, IFGSM, PGD, TargetedIFGSM, Noise])
def test_a_repr_and_parameters_name_everything(kind):
    attack = kind(L2(0.5, "range"), seed=7)
    assert repr(attack).startswith(f"{kind.__name__}(L2(eps=0.5, units='range'")
    parameters = attack.parameters()
    assert parameters["threat"] == "L2 <= 0.5 range"
    assert parameters["seed"] == 7
    assert {"loss", "goal", "label_source"} <= set(parameters)
