"""The contract that every attack of the registry keeps, whatever the victim: what comes back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from attack_contract import (
    BUDGET,
    CASES,
    DRAWN,
    NAMES,
    TRAITS,
    assert_as_found,
    assert_same_result,
    budget,
    cased,
    headed,
    is_targeted,
    make_attack,
    named,
    norm_cased,
    prepared,
    snapshot,
)
from monai.inferers import SlidingWindowInferer
from oracles import SHAPES, make_image, make_label, make_victim, smooth_network

from monai_adv.attacks import ATTACKS
from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.losses import target_agreement
from monai_adv.threats import LInf
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import Victim, mean_dice


# ------------------------------------------------------------------------------------ what comes back
@pytest.mark.parametrize(
    ("kind", "dims", "batch"), [("linear", 2, 4), ("smooth", 3, 1), ("windows", 2, 1), ("windows", 3, 4)]
)
@headed
@cased
def test_the_result_is_allowed_evaluated_and_scored(name, norm, head, kind, dims, batch):
    victim, label = make_victim(kind, head, dims), make_label(head, batch, dims)
    image = prepared(name, make_image(batch, dims))
    attack = make_attack(name, norm)
    before = snapshot(victim.network)
    check(name, attack, victim, image, label, dims)
    assert_as_found(victim.network, before)


def check(name, attack, victim, image, label, dims):
    """One attack on one batch: allowed, evaluated, scored."""
    batch = len(image)
    result = attack(victim, image, label)
    ball = attack.threat.bind(image)
    axes = tuple(range(2, 2 + dims))
    assert result.image.shape == image.shape
    assert result.image.dtype == image.dtype
    if attack.threat.norm != "parameter":
        assert (ball.size(result.image) <= attack.threat.eps * (1 + 1e-12)).all()
        assert (result.image <= image.amax(axes, keepdim=True)).all()
        assert (result.image >= image.amin(axes, keepdim=True)).all()
    if TRAITS[name].local:
        assert torch.equal(result.image[image == 0], image[image == 0])
    assert torch.equal(result.perturbation, result.image - image)
    assert (result.perturbation != 0).flatten(1).any(1).all()
    assert not result.image.requires_grad

    # the image that is returned is the one that was evaluated
    assert torch.equal(victim.predict(result.image), result.prediction)
    if not attack.targeted:
        assert torch.equal(mean_dice(result.prediction, result.label, victim.head), result.score)
        assert torch.equal(mean_dice(victim.predict(image), label, victim.head), result.clean_score)
    for b in range(batch):
        entry = result.trace[int(result.best_step[b])]
        assert entry["step"] == result.best_step[b]
        assert entry["score"][b] == result.score[b]
    assert result.success.dtype == torch.bool
    assert result.success.shape == result.score.shape == (batch,)


@pytest.mark.parametrize(
    ("name", "norm"), [(n, k) for n in NAMES if ATTACKS[n].modes == "both" for k in ATTACKS[n].norms]
)
@headed
def test_a_targeted_result_is_allowed_evaluated_and_scored(name, norm, head):
    """Attacks with both modes, towards another mask: the score is the agreement with it."""
    victim, label = make_victim("smooth", head), make_label(head, 2)
    image = prepared(name, make_image(2))
    target = make_label(head, 2, seed=6)
    check(name, make_attack(name, norm, target=target), victim, image, label, 3)
    result = make_attack(name, norm, target="background")(victim, image, label, target=target)
    if ATTACKS[name].moves_voxels:
        return  # the target moves with the image
    assert torch.equal(result.score, target_agreement(result.prediction, target, label))


@pytest.mark.parametrize("units", ["std", "range", "absolute"])
@norm_cased
def test_the_budget_is_in_its_units(name, norm, units):
    victim, image, label = make_victim("smooth"), prepared(name, make_image(2)), make_label("softmax", 2)
    eps = BUDGET[norm] / {"std": 1, "range": 4, "absolute": 1}[units]
    attack = make_attack(name, norm, eps, units=units, bounds=None)
    result = attack(victim, image, label)
    delta = result.image - image
    for b in range(2):
        for c in range(4):
            values = image[b, c][image[b, c] != 0].numpy()
            low, high = np.percentile(values, [0.5, 99.5])
            delta[b, c] /= {"std": values.std(), "range": high - low, "absolute": 1.0}[units]
    size = delta.abs().flatten(1).amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert (size <= eps * (1 + 1e-12)).all()
    if TRAITS[name].uses_budget:
        assert (size >= 0.5 * eps).all()


@pytest.mark.parametrize(
    ("kind", "units", "dtype"), [("smooth", "std", torch.float32), ("windows", "absolute", torch.float64)]
)
@cased
def test_without_a_budget_the_image_comes_back_bit_for_bit(name, norm, dtype, units, kind):
    victim, image, label = (
        make_victim(kind, dtype=dtype),
        prepared(name, make_image(2, dtype=dtype)),
        make_label("softmax", 2),
    )
    result = make_attack(name, norm, 0.0, units=units)(victim, image, label)
    assert torch.equal(result.image, image)
    assert not result.perturbation.any()
    if not is_targeted(name):
        assert not result.success.any()


@cased
def test_single_precision_stays_single(name, norm):
    victim = make_victim("windows", dtype=torch.float32)
    image = prepared(name, make_image(2, dtype=torch.float32))
    result = make_attack(name, norm)(victim, image, make_label("softmax", 2))
    assert result.image.dtype == torch.float32
    if norm != "parameter":
        assert LInf(9).bind(image).size(result.image).max() < 9


# ----------------------------------------------------------------------------------- where it may change
@cased
def test_only_the_chosen_modality_changes(name, norm):
    if not TRAITS[name].modalities:
        with pytest.raises(ConfigError, match="leave channels out"):
            make_attack(name, norm, channels=(1, -1))
        return
    victim, image, label = make_victim("windows"), prepared(name, make_image(2)), make_label("softmax", 2)
    changed = make_attack(name, norm, channels=(1, -1))(victim, image, label).perturbation != 0
    assert changed.flatten(2).any(2).tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("name", "norm"), [c for c in CASES if TRAITS[c[0]].local])
def test_nothing_changes_outside_a_given_support(name, norm, channels):
    victim, image, label = make_victim("windows"), prepared(name, make_image(2)), make_label("softmax", 2)
    support = torch.rand(2, channels, *SHAPES[3], generator=torch.Generator().manual_seed(4)) < 0.3
    result = make_attack(name, norm, bounds=None)(victim, image, label, support=support)
    outside = ~support.expand_as(image)
    assert torch.equal(result.image[outside], image[outside])
    assert result.perturbation[~outside].any()


@cased
def test_given_bounds_are_kept(name, norm):
    victim, image, label = make_victim("smooth"), prepared(name, make_image(2)), make_label("softmax", 2)
    low, high = [[float(f(image[:, c])) for c in range(4)] for f in (torch.amin, torch.amax)]
    result = make_attack(name, norm, bounds=[low, high])(victim, image, label)
    for c in range(4):
        assert result.image[:, c].min() >= low[c]
        assert result.image[:, c].max() <= high[c]


# ------------------------------------------------------------------------------------------- per sample
@pytest.mark.parametrize(
    ("kind", "dims", "head"), [("linear", 3, "sigmoid"), ("smooth", 2, "softmax"), ("windows", 3, "softmax")]
)
@pytest.mark.parametrize(("name", "norm"), [c for c in CASES if TRAITS[c[0]].without_chance is not None])
def test_a_batch_is_the_stack_of_its_members(name, norm, head, kind, dims):
    """B = C = 4 = the first size of 3D; members of different brightness."""
    victim = make_victim(kind, head, dims)
    image = prepared(name, make_image(4, dims)) * torch.arange(1, 5).view(-1, *[1] * (dims + 1))
    label = make_label(head, 4, dims)
    attack = make_attack(name, norm, **TRAITS[name].without_chance)
    together = attack(victim, image, label)
    for b in range(4):
        alone = attack(victim, image[b : b + 1], label[b : b + 1])
        torch.testing.assert_close(together.image[b : b + 1], alone.image, rtol=1e-10, atol=1e-10)
        assert torch.equal(together.score[b : b + 1], alone.score)
        assert torch.equal(together.best_step[b : b + 1], alone.best_step)


@headed
@pytest.mark.parametrize(("name", "norm"), [c for c in CASES if TRAITS[c[0]].flat])
def test_two_dimensions_are_three_with_a_depth_of_one(name, norm, head):
    flat, deep = make_victim("smooth", head, 2), make_victim("smooth", head, 3)
    for two, three in zip(flat.network.state_dict().items(), deep.network.state_dict().items()):
        value = two[1]
        if value.ndim == 4 and value.shape[-1] == 3:  # only the middle of the depth sees the slice
            three[1].zero_()
            three[1][:, :, 1] = value
        else:
            three[1].copy_(value.unsqueeze(2) if value.ndim == 4 else value)
    image, label = prepared(name, make_image(2, 2)), make_label(head, 2, 2)
    attack = make_attack(name, norm)
    two = attack(flat, image, label)
    three = attack(deep, image.unsqueeze(2), label.unsqueeze(2))
    torch.testing.assert_close(three.image.squeeze(2), two.image, rtol=1e-10, atol=1e-10)
    assert torch.equal(two.score, three.score)


# ------------------------------------------------------------------------------------------ many budgets
@cased
def test_a_curve_is_its_single_calls_bit_for_bit(name, norm):
    victim, image, label = make_victim("smooth"), prepared(name, make_image(2)), make_label("softmax", 2)
    budgets = [budget(name, norm), 0.0, budget(name, norm) / 3]
    curve = make_attack(name, norm).curve(victim, image, label, budgets)
    assert len(curve) == 3
    for eps, result in zip(budgets, curve):
        assert_same_result(result, make_attack(name, norm, eps)(victim, image, label))
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    drawn = make_attack(name, norm).curve(victim, image, label, budgets, generator=generators[0])[2]
    assert_same_result(drawn, make_attack(name, norm, budgets[2])(victim, image, label, generator=generators[1]))


# ---------------------------------------------------------------------------------------------- chance
@pytest.mark.parametrize("kind", ["windows", "smooth"])
@cased
def test_a_seed_gives_the_same_bits_and_the_global_state_is_untouched(name, norm, kind):
    victim, image, label = make_victim(kind), prepared(name, make_image(2)), make_label("softmax", 2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = make_attack(name, norm, seed=3)(victim, image, label)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    torch.rand(5)
    assert_same_result(first, make_attack(name, norm, seed=3)(victim, image, label))
    given = make_attack(name, norm)(victim, image, label, generator=torch.Generator().manual_seed(3))
    assert_same_result(first, given)
    other = make_attack(name, norm, seed=4)(victim, image, label)
    assert torch.equal(first.image, other.image) == (name not in DRAWN)


@named
def test_a_generator_goes_on_from_call_to_call(name):
    victim, image, label = make_victim("smooth"), prepared(name, make_image(1)), make_label("softmax", 1)
    generator = torch.Generator().manual_seed(0)
    results = [make_attack(name)(victim, image, label, generator=generator).image for _ in range(2)]
    assert torch.equal(*results) == (name not in DRAWN)


@pytest.mark.parametrize("normalised", [False, True])
@named
def test_leaving_windows_out_changes_nothing(name, normalised):
    """A support in one corner of the volume: most windows get no backward pass, and the attack is the same."""
    image, label = prepared(name, make_image(2)), make_label("softmax", 2)
    support = torch.zeros_like(image, dtype=torch.bool)
    support[:, :, 1:3, :2, :2] = True
    preprocessing = NormalizeNonzeroBatch() if normalised else None
    windows = {"roi_size": (4, 3, 3), "sw_batch_size": 1, "overlap": 0.25}
    results, passes = [], []
    for inferer in (SlidingWindowInferer(**windows), GradientSlidingWindowInferer(**windows, keep_windows=0)):
        network, calls = smooth_network(), []
        network.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        attack = make_attack(name, bounds=None)
        results.append(attack(Victim(network, inferer, preprocessing=preprocessing), image, label, support=support))
        passes.append(sum(calls))
    torch.testing.assert_close(results[1].image, results[0].image, rtol=1e-10, atol=1e-10)
    assert (results[0].perturbation != 0).any()
    if results[0].cost.backwards and not normalised and TRAITS[name].local:  # what moves needs every window
        assert 0 < passes[1] < passes[0]


def test_normalisation_inside_the_victim_makes_the_scale_of_the_scanner_irrelevant():
    """Attacking z-scores and attacking scanner units through the pipeline's own z-score find the same change."""
    label, image = make_label("softmax", 2), make_image(2)
    raw = torch.where(image != 0, 500 + 80 * image, image)
    network = smooth_network()
    victim = Victim(network, preprocessing=NormalizeNonzeroBatch())
    attack = make_attack("ifgsm", eps=0.05, bounds=None)
    small = attack(victim, raw, label)
    large = attack(victim, 7 * raw, label)
    torch.testing.assert_close(large.image, 7 * small.image, rtol=1e-9, atol=1e-9)
