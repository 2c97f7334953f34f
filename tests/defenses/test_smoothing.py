"""Randomized smoothing: the certificate against the closed form of a linear model, and against attacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import linear_network, make_image, make_victim, smooth_network
from scipy.stats import binom, norm
from torch import nn
from varied_victim import varied

from monai_adv import attacks
from monai_adv.defenses import Purify, SmoothedVictim, certify, input_distance, purified, smoothed, unaware
from monai_adv.errors import ConfigError
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import KeepLargest, Victim, mean_dice


def chance(victim: Victim, image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Probability of a set bit of a voxelwise linear model under noise: Phi(logit / (sigma ||w||))."""
    weight = victim.network.weight.detach().flatten(1).norm(dim=1)
    logits = victim(image).detach()
    return torch.from_numpy(norm.cdf(logits / (sigma * weight.view(1, -1, *[1] * (logits.dim() - 2)))))


@pytest.mark.parametrize("dims", [2, 3])
def test_certified_are_the_voxels_whose_probability_exceeds_tau(dims: int) -> None:
    victim, image, sigma, tau = make_victim("linear", "sigmoid", dims), make_image(1, dims), 1.5, 0.75
    found = certify(victim, image, sigma=sigma, tau=tau, samples=400, draws0=20, batch=32)
    truth = chance(victim, image, sigma)
    majority = torch.maximum(truth, 1 - truth)
    # the counts are binomial with that probability of the bit that was chosen
    agree = torch.where(found.prediction, truth, 1 - truth)
    low, high = (torch.from_numpy(binom.ppf(q, 400, agree)) for q in (1e-6, 1 - 1e-6))
    hits = found.hits.to(torch.float64)
    assert ((hits >= low) & (hits <= high)).all()
    # sound: no voxel below tau is certified; not idle: those far above are
    assert not ((majority <= tau) & ~found.abstained).any()
    assert not (found.abstained & (majority > 0.9)).any()
    assert torch.equal(found.prediction[~found.abstained], (truth > 0.5)[~found.abstained])
    assert 0.05 < found.abstention < 0.95


def test_abstention_grows_with_tau() -> None:
    victim, image = make_victim("smooth"), make_image(1)
    shares, radii = [], []
    for tau in (0.5, 0.75, 0.9, 0.95):
        found = certify(victim, image, sigma=0.3, tau=tau, samples=260, draws0=10, batch=64)
        shares.append(found.abstention)
        radii.append(found.radius)
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert radii == sorted(radii)


def test_no_attack_inside_the_radius_changes_a_certified_voxel() -> None:
    """200 attacks on a linear model, where the smoothed segmentation of an attacked image has a closed form.

    Compared: the certificate's segmentation with the sign of the logit of the attacked image, which is the majority
    under noise since the noise of a linear logit is symmetric.
    """
    victim, image, sigma = make_victim("linear", "sigmoid"), make_image(1), 1.0
    found = certify(victim, image, sigma=sigma, tau=0.85, samples=300, draws0=20, batch=64)
    kept = ~found.abstained
    assert 0.2 < kept.float().mean() < 0.95
    weight = victim.network.weight.detach().flatten(1)
    generator = torch.Generator().manual_seed(3)
    changed = {1.0: 0, 4.0: 0}
    for trial in range(200):
        if trial % 4 == 0:  # everything against one voxel's bit, straight down its weights: the strongest there is
            place = [int(torch.randint(n, (1,), generator=generator)) for n in found.prediction.shape[1:]]
            if trial % 8 == 0:  # against the certified bit with the smallest margin of the drawn channel
                margin = victim(image).detach()[0, place[0]].abs().masked_fill(found.abstained[0, place[0]], torch.inf)
                place = [place[0], *(int(i) for i in np.unravel_index(int(margin.argmin()), margin.shape))]
            delta = torch.zeros_like(image)
            direction = weight[place[0]] / weight[place[0]].norm()
            sign = -1.0 if found.prediction[(0, *place)] else 1.0
            delta[(0, slice(None), *place[1:])] = sign * direction
        elif trial % 4 == 1:
            delta = torch.randn(image.shape, generator=generator, dtype=image.dtype)
        else:
            attack = attacks.create(
                "pgd", eps=found.radius, norm="l2", units="absolute", steps=3, loss=("ce", "margin")[trial % 4 - 2],
                support="all", bounds=None, seed=trial,
            )  # fmt: skip
            delta = attack(victim, image, found.prediction).perturbation
        for scale in changed:
            moved = image + delta / delta.norm() * found.radius * scale * (1 - 1e-9)
            prediction = victim(moved).detach() > 0
            changed[scale] += bool((prediction != found.prediction)[kept].any())
    assert changed[1.0] == 0
    assert changed[4.0] > 30  # the attacks are strong enough to be a test


def test_no_attack_inside_the_radius_changes_the_majority_of_a_network() -> None:
    """The same for a network with context: no certified voxel loses the majority of 400 votes significantly."""
    victim, image = make_victim("smooth"), make_image(1)
    found = certify(victim, image, sigma=0.5, tau=0.75, samples=300, draws0=30, batch=64)
    kept = ~found.abstained
    assert kept.float().mean() > 0.2
    for seed in range(5):
        attack = attacks.create(
            "pgd", eps=found.radius, norm="l2", units="absolute", steps=3, loss="ce", support="all", bounds=None,
            seed=seed, draws=4,
        )  # fmt: skip
        moved = attack(smoothed(victim, 0.5, seed=seed), image, found.prediction).image
        assert input_distance(victim, image, moved).item() <= found.radius * (1 + 1e-6)
        again = certify(victim, moved, sigma=0.5, tau=0.5, samples=400, draws0=1, batch=64,
                        generator=torch.Generator().manual_seed(seed + 1))  # fmt: skip
        # votes for the certified class on the attacked image
        same = again.prediction == found.prediction
        votes = torch.where(same, again.hits.to(torch.int64), 400 - again.hits.to(torch.int64))
        assert binom.cdf(votes[kept].min().item(), 400, 0.5) > 1e-6


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dims", [2, 3])
def test_seeds_reproduce_bits_and_batches_change_none(head: str, dims: int) -> None:
    victim, image = varied(head, dims), make_image(1, dims)
    options = {"sigma": 0.3, "samples": 60, "draws0": 7}
    first, again, batched, other = (
        certify(victim, image, batch=batch, generator=torch.Generator().manual_seed(seed), **options)
        for seed, batch in ((5, 1), (5, 1), (5, 9), (6, 1))
    )
    for found in (again, batched):
        assert torch.equal(found.hits, first.hits)
        assert torch.equal(found.prediction, first.prediction)
    assert not torch.equal(other.hits, first.hits)
    assert first.hits.dtype == torch.uint16
    assert first.prediction.shape == first.hits.shape == victim.predict(image).shape
    assert first.prediction.dtype == victim.predict(image).dtype


def test_counts_are_those_of_the_noise_after_the_preprocessing() -> None:
    """Also in the background, and drawn one after the other: a pass of my own gives the same counts."""
    network, image = smooth_network(), make_image(1)
    victim = Victim(network, preprocessing=NormalizeNonzeroBatch(), refine=KeepLargest())
    found = certify(victim, image, sigma=0.4, samples=50, draws0=5, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    data = NormalizeNonzeroBatch()(image)
    network.eval()
    seen = []
    with torch.no_grad():
        for _ in range(55):
            noise = torch.randn(data.shape[1:], generator=generator, dtype=data.dtype)
            seen.append(victim.discretise(network(data + 0.4 * noise)))
    network.train()
    votes = torch.stack([(torch.cat(seen[:5]) == k).sum(0) for k in range(4)])
    mode = votes.argmax(0)[None]
    assert torch.equal(found.prediction, mode)
    assert torch.equal(found.hits.to(torch.int64), (torch.cat(seen[5:]) == mode).sum(0)[None])
    assert torch.equal(found.foreground, (image != 0).any(1, keepdim=True))


def test_a_preprocessing_is_run_once_and_brings_every_pass_back() -> None:
    class Half(nn.Module):
        """Works on every second voxel."""

        calls = 0

        def prepare(self, image, affine=None):
            assert affine is not None
            Half.calls += 1
            shape = image.shape[2:]

            def back(logits):
                assert len(logits) == 1
                return nn.functional.interpolate(logits, size=shape, mode="nearest")

            return image[..., ::2, ::2, ::2], back

    victim = Victim(smooth_network(), preprocessing=Half())
    image = make_image(1)
    found = certify(victim, image, sigma=0.3, samples=50, draws0=5, batch=8, affine=torch.eye(4))
    assert Half.calls == 1
    assert found.prediction.shape == (1, 1, 4, 5, 6)
    assert torch.equal(found.hits[..., ::2], found.hits[..., 1::2])  # every vote came back to both


def test_progress_and_what_cannot_be_certified() -> None:
    victim, image = make_victim("linear"), make_image(1)
    seen: list[float] = []
    certify(victim, image, sigma=0.3, samples=45, draws0=5, batch=10, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    for options, message in (
        ({"sigma": 0}, "sigma must be a number > 0"),
        ({"tau": 0.4}, "tau must be in"),
        ({"tau": 1.0}, "tau must be in"),
        ({"alpha": 0}, "alpha must be in"),
        ({"samples": 70000}, r"samples must be a whole number in 1\.\.65535"),
        ({"draws0": 0}, "draws0 must be"),
        ({"batch": 1.5}, "batch must be"),
        ({"correction": "none"}, "holm, bonferroni"),
        ({"samples": 40}, "40 samples cannot certify a single one of 120 voxels at tau 0.75 and alpha 0.001: take 41"),
    ):
        with pytest.raises(ConfigError, match=message):
            certify(victim, image, **{"sigma": 0.3, "draws0": 1, **options})
    with pytest.raises(ConfigError, match="one image"):
        certify(victim, make_image(2), sigma=0.3)


def test_the_smoothed_victim_draws_anew_and_its_vote_is_the_certificates() -> None:
    victim, image = varied(), make_image(2)
    random = smoothed(victim, 0.4, samples=21, seed=3)
    assert not torch.equal(random(image), random(image))
    assert torch.equal(smoothed(victim, 0.4, seed=3)(image), smoothed(victim, 0.4, seed=3)(image))
    assert not torch.equal(smoothed(victim, 0.4, seed=4)(image), smoothed(victim, 0.4, seed=3)(image))
    vote = random.predict(image)
    assert torch.equal(vote, random.predict(image))
    assert vote.shape == victim.predict(image).shape
    # a vote leaves the noise of the passes alone
    one, two = smoothed(victim, 0.4, seed=3), smoothed(victim, 0.4, seed=3)
    one.predict(image)
    assert torch.equal(one(image), two(image))
    # the mode of as many first draws of the same noise
    alone = random.predict(image[:1])
    found = certify(victim, image[:1], sigma=0.4, samples=50, draws0=21, generator=torch.Generator().manual_seed(4))
    assert torch.equal(alone, found.prediction)
    assert len(alone.unique()) > 1
    assert not torch.equal(alone, victim.predict(image[:1]))
    bits = smoothed(make_victim("linear", "sigmoid"), 0.4, samples=4)
    assert bits.predict(image).dtype == torch.bool
    with pytest.raises(ConfigError, match="sigma"):
        smoothed(victim, -1)


def test_smoothing_goes_with_other_defenses_and_remembers_the_victim() -> None:
    victim, image = varied(), make_image(1)
    both = smoothed(purified(victim, Purify("median")), 0.4)
    assert both.undefended is victim
    assert both.name == "network purified smoothed"
    assert smoothed(both, 0.1).denoised is both.denoised
    options = {"sigma": 0.4, "samples": 50, "draws0": 5}
    found = certify(purified(victim, Purify("median")), image, **options)
    assert torch.equal(certify(both, image, **options).hits, found.hits)
    assert not torch.equal(certify(victim, image, **options).hits, found.hits)
    other = both.resampled((1, 1, 1), (2, 2, 2))
    assert isinstance(other, SmoothedVictim)
    assert other(image).shape == victim(image).shape
    there = purified(victim, Purify("median")).resampled((1, 1, 1), (2, 2, 2))
    assert torch.equal(certify(other, image, **options).hits, certify(there, image, **options).hits)
    label = victim.predict(image)
    blind = unaware("fgsm", both, eps=0.2)(both, image, label)
    assert torch.equal(blind.image, attacks.create("fgsm", eps=0.2)(victim, image, label).image)


@pytest.mark.parametrize("samples", [1, 4, 7])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_logits_of_the_vote_say_what_it_says_and_how_clearly(head: str, samples: int) -> None:
    victim, image = varied(head), make_image(2)
    random = smoothed(victim, 1.0, samples=samples, seed=3)
    logits, vote = random.predict_logits(image), random.predict(image)
    assert torch.equal(victim.head.predict(logits), vote)
    # the passes of the vote, counted by hand
    passes = smoothed(victim, 1.0, seed=4)
    seen = [victim.head.encode(victim.head.predict(z), z) for z in (passes(image) for _ in range(samples))]
    counts = torch.stack(seen).sum(0)
    both = counts.sum(1, keepdim=True) if head == "softmax" else torch.full_like(counts, samples)
    sides = logits.shape[1] if head == "softmax" else 2
    expected = (counts + 0.5) / (both + sides / 2)
    torch.testing.assert_close(victim.head.probabilities(logits).double(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_random_says_so_and_is_seeded() -> None:
    victim, image = varied(), make_image(1)
    label = victim.predict(image)
    filtered = purified(victim, Purify("median"))
    assert not any(v.random for v in (victim, filtered, filtered.resampled((1, 1, 1), (2, 2, 2))))
    for random in (smoothed(victim, 0.4), smoothed(filtered, 0.4), purified(smoothed(victim, 0.4), Purify("median"))):
        assert random.random
        assert random.resampled((1, 1, 1), (2, 2, 2)).random
        random.reseed(5)
        first = random(image)
        assert not torch.equal(random(image), first)
        random.reseed(5)
        assert torch.equal(random(image), first)
    random = smoothed(victim, 1.5, samples=15)
    result = attacks.create("ifgsm", eps=0.3, steps=2)(random, image, label)
    assert torch.equal(result.predicted_by(random), random.predict(result.image))
    assert not torch.equal(result.predicted_by(random), result.prediction)


def test_windows_without_support_are_skipped_under_noise_too() -> None:
    image, support = make_image(1), torch.zeros(1, 4, 4, 5, 6, dtype=torch.bool)
    support[:, :, 1, 1, 1] = True
    leaf = image.clone().requires_grad_(True)
    random = make_victim("windows")
    full, part = smoothed(random, 0.4), smoothed(random, 0.4)
    (whole,) = torch.autograd.grad(full(leaf).square().sum(), leaf)
    with part.attacked(support, image):
        (some,) = torch.autograd.grad(part(leaf).square().sum(), leaf)
    torch.testing.assert_close(some[support], whole[support])


def test_expectation_over_the_noise_is_the_stronger_attack() -> None:
    victim, image = Victim(smooth_network()), make_image(4)
    label = victim.predict(image)
    scores = {}
    for draws in (1, 16):
        attack = attacks.create("ifgsm", eps=0.5, steps=4, bounds=None, draws=draws, loss="ce")
        found = attack(smoothed(victim, 4.0), image, label).image
        scores[draws] = mean_dice(smoothed(victim, 4.0, samples=60, seed=9).predict(found), label, victim.head).mean()
    assert scores[16] < scores[1]


def test_distance_is_measured_where_the_noise_is() -> None:
    victim, image = Victim(linear_network(), preprocessing=lambda x: 3 * x), make_image(2)
    other = image.clone()
    other[1, 0, 1, 1, 1] += 2
    for v in (victim, smoothed(victim, 0.4)):
        torch.testing.assert_close(input_distance(v, image, other), torch.tensor([0.0, 6.0], dtype=torch.float64))
