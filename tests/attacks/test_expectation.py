"""Expectation over transformation: a victim that draws random numbers, attacked through their mean."""

from __future__ import annotations

import pytest
import torch
from attack_contract import assert_same_result
from oracles import make_image, make_label, make_victim, smooth_network

from monai_adv import attacks
from monai_adv.attacks import Attack, Run
from monai_adv.threats import LInf
from monai_adv.victims import Victim, mean_dice


class Noisy:
    """Preprocessing that adds noise from its own generator."""

    def __init__(self, sigma: float = 0.5, seed: int = 0) -> None:
        self.sigma, self.generator = sigma, torch.Generator().manual_seed(seed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.sigma * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


class Probe(Attack):
    """Takes the gradient of the clean image several times."""

    name, reference = "probe", "test"

    def __init__(self, repeats: int = 1, **options) -> None:
        super().__init__(LInf(1.0), "ce", **options)
        self.repeats = repeats

    def _search(self, run: Run) -> None:
        self.gradients = torch.stack([run.gradient(run.clean) for _ in range(self.repeats)])


def test_the_gradient_is_the_mean_of_the_draws_and_so_are_loss_and_score():
    image, label = make_image(2), make_label("softmax", 2)
    single, several = Probe(12), Probe(3, draws=3)
    one = single(Victim(smooth_network(), preprocessing=Noisy()), image, label)
    # the clean pass draws too: three numbers there, then three per gradient
    noisy = Noisy()
    three = several(Victim(smooth_network(), preprocessing=noisy), image, label)
    shift = 2  # of 12 single gradients the first two are three's clean passes
    assert one.trace[0]["loss"].shape == (2,)
    for k in range(3):
        rows = slice(shift + 3 * k, shift + 3 * k + 3)
        expected = single.gradients[rows].mean(0)
        torch.testing.assert_close(several.gradients[k], expected, rtol=1e-12, atol=1e-12)
        for key in ("loss", "score"):
            expected = torch.stack([entry[key] for entry in one.trace[rows]]).mean(0)
            torch.testing.assert_close(three.trace[k][key], expected, rtol=1e-12, atol=1e-12)
    assert (three.cost.forwards, three.cost.backwards) == (12, 9)


def test_the_clean_score_is_the_mean_of_the_draws():
    """The mean logits of a noisy victim score higher than its draws: a success is measured against the draws."""
    image, label = make_image(2), make_label("softmax", 2)
    victim = Victim(smooth_network(), preprocessing=Noisy(3.0))
    result = Probe(draws=5)(victim, image, label)
    again = Victim(smooth_network(), preprocessing=Noisy(3.0))
    scores = [mean_dice(again.predict(image), label, again.head) for _ in range(5)]
    torch.testing.assert_close(result.clean_score, torch.stack(scores).mean(0), rtol=1e-12, atol=1e-12)


def test_the_variance_of_the_gradient_falls_with_the_draws():
    image, label = make_image(1), make_label("softmax", 1)
    variance = {}
    for draws in (1, 4):
        probe = Probe(30, draws=draws)
        probe(Victim(smooth_network(), preprocessing=Noisy()), image, label)
        variance[draws] = float(probe.gradients.var(0).sum())
    assert variance[4] / variance[1] == pytest.approx(1 / 4, rel=0.25)


@pytest.mark.parametrize("name", ["fgsm", "ifgsm", "pgd"])
def test_a_victim_without_chance_is_attacked_as_before(name):
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    one, three = (attacks.create(name, 0.3, draws=n)(victim, image, label) for n in (1, 3))
    assert torch.equal(one.image, three.image)
    assert torch.equal(one.success, three.success)
    assert torch.equal(one.prediction, three.prediction)
    assert (three.cost.forwards, three.cost.backwards) == (3 * one.cost.forwards, 3 * one.cost.backwards)
    # a power of two loses no bit
    assert_same_result(one, attacks.create(name, 0.3, draws=2)(victim, image, label))


def test_averaging_makes_a_random_victim_weaker():
    """Scored on fresh noise: where the noise hides the gradient, more draws find more of it."""
    image, label = make_image(4), make_label("softmax", 4)
    scores = {}
    for draws in (1, 32):
        victim = Victim(smooth_network(), preprocessing=Noisy(6.0))
        attack = attacks.create("ifgsm", 1.0, steps=4, bounds=None, draws=draws, loss="ce")
        found = attack(victim, image, label, weight=None).image
        fresh = Victim(smooth_network(), preprocessing=Noisy(6.0, seed=9))
        scores[draws] = torch.stack([mean_dice(fresh.predict(found), label, fresh.head) for _ in range(50)]).mean()
    assert scores[32] < scores[1]


@pytest.mark.parametrize("name", ["noise", "square"])
def test_queries_of_attacks_without_a_gradient_are_means_too(name):
    image, label = make_image(2), make_label("softmax", 2)
    options = {"queries": 4} if name == "square" else {"repeats": 4}
    victim = Victim(smooth_network(), preprocessing=Noisy())
    result = attacks.create(name, 0.3, draws=3, **options)(victim, image, label)
    assert (result.cost.forwards, result.cost.backwards) == (3 * 5, 0)
    assert len(result.trace) == 4


def test_budget_zero_is_the_input():
    image, label = make_image(2), make_label("softmax", 2)
    victim = Victim(smooth_network(), preprocessing=Noisy())
    assert torch.equal(attacks.create("ifgsm", 0.0, draws=3)(victim, image, label).image, image)
