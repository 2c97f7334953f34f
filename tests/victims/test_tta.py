"""Mirrored passes and clean-up when scoring."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import product

import pytest
import torch
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from oracles import linear_network, make_image, make_label, smooth_network
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from monai_adv import attacks
from monai_adv.defenses import purified
from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.victims import Head, KeepLargest, MirrorInferer, Victim

INFERERS: dict[str, Callable[[], Inferer]] = {
    "whole": SimpleInferer,
    "monai": lambda: SlidingWindowInferer(roi_size=(4, 4), overlap=0.5, mode="gaussian"),
    "windows": lambda: GradientSlidingWindowInferer((4, 4), 2, 0.5, mode="gaussian", keep_windows=0),
    "lone": lambda: GradientSlidingWindowInferer((8, 8), 8, 0.5),
}


def by_hand(image: Tensor, network: nn.Module, inferer: Inferer, axes: tuple[int, ...], convert) -> Tensor:
    total = 0
    for chosen in product((False, True), repeat=len(axes)):
        dims = [axis + 2 for axis, on in zip(axes, chosen) if on]
        total = total + convert(inferer(image.flip(dims), network).flip(dims))
    return total / 2 ** len(axes)


@pytest.mark.parametrize("inferer", INFERERS)
@pytest.mark.parametrize("axes", [(), (1,), (0, 1)])
def test_the_mean_of_logits_and_its_gradient(inferer: str, axes: tuple[int, ...]) -> None:
    image = make_image(batch=2, dims=2).requires_grad_(True)
    network = smooth_network(dims=2).eval()
    mirrored = MirrorInferer(INFERERS[inferer](), axes=axes)
    expected = by_hand(image, network, SlidingWindowInferer((4, 4), overlap=0.5, mode="gaussian")
                       if inferer in ("monai", "windows") else SimpleInferer(), axes, lambda z: z)  # fmt: skip
    found = mirrored(image, network)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=found.dtype)
    sought = [image, *network.parameters()]
    for a, b in zip(torch.autograd.grad(found, sought, upstream), torch.autograd.grad(expected, sought, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_mean_of_probabilities(head: str) -> None:
    image = make_image(batch=2, dims=2)
    network = smooth_network(dims=2).eval()
    probabilities = Head(head, None if head == "softmax" else "abcd").probabilities
    mirrored = MirrorInferer(SimpleInferer(), axes=(0, 1), average="probabilities", head=head)
    expected = by_hand(image, network, SimpleInferer(), (0, 1), probabilities)
    torch.testing.assert_close(probabilities(mirrored(image, network)), expected, rtol=0, atol=1e-14)
    extreme = mirrored(image, lambda x: 1e4 * network(x))  # neither 0 nor infinity on the way
    assert bool(torch.isfinite(extreme).all())
    assert not torch.allclose(mirrored(image, network).softmax(1),
                              MirrorInferer(SimpleInferer(), axes=(0, 1))(image, network).softmax(1))  # fmt: skip


@pytest.mark.parametrize(("average", "head"), [("logits", None), ("probabilities", "softmax"),
                                               ("probabilities", "sigmoid")])  # fmt: skip
def test_gradient_by_finite_differences(average: str, head: str | None) -> None:
    image = make_image(batch=1, dims=2)
    network = smooth_network(dims=2).eval()
    inferer = MirrorInferer(INFERERS["windows"](), axes=(0, 1), average=average, head=head)
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(5), dtype=image.dtype)
    weight = torch.randn((1, 4, 6, 5), generator=torch.Generator().manual_seed(6), dtype=image.dtype)

    def value(x: Tensor) -> Tensor:
        return (inferer(x, network) * weight).sum()

    leaf = image.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    with torch.no_grad():
        slope = (value(image + 1e-6 * direction) - value(image - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-7, atol=1e-7)


class Held:
    """A tensor that a graph keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(inferer: Inferer, image: Tensor, network: nn.Module) -> int:
    """Activations that are still kept for the backward pass when a forward pass is over."""
    held: list[weakref.ref[Held]] = []

    def pack(tensor: Tensor) -> Held:
        holder = Held(tensor)
        held.append(weakref.ref(holder))
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        logits = inferer(image, network)
    assert logits.requires_grad
    gc.collect()
    alive = [holder.tensor for ref in held if (holder := ref()) is not None]
    activations = [t for t in alive if t.dim() == 4 and t.shape[1] == 32 and t.shape[-1] > 1]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in activations}.values())


@pytest.mark.parametrize("inferer", ["whole", "lone", "windows"])
def test_passes_are_recomputed_not_kept(inferer: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.Softplus(), nn.Conv2d(32, 32, 1), nn.Softplus(),
                            nn.Conv2d(32, 2, 1))  # fmt: skip
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    image = torch.randn(1, 1, 8, 8).requires_grad_(True)
    alone = kept_bytes(SimpleInferer(), image, network)
    assert alone > 8 * 8 * 32 * 4
    made = {"whole": INFERERS["whole"], "lone": INFERERS["lone"], "windows": INFERERS["windows"]}[inferer]()
    assert kept_bytes(MirrorInferer(made, axes=(0, 1)), image, network) <= alone


def test_support_is_mirrored_along() -> None:
    image = make_image(batch=1, dims=2).requires_grad_(True)
    network = smooth_network(dims=2).eval()
    inferer = MirrorInferer(INFERERS["windows"](), axes=(0, 1))
    support = torch.zeros_like(image, dtype=torch.bool)
    support[:, :, 1:3, :2] = True
    (everywhere,) = torch.autograd.grad(inferer(image, network).square().sum(), image)
    with inferer.restrict(support):
        (inside,) = torch.autograd.grad(inferer(image, network).square().sum(), image)
    torch.testing.assert_close(inside, everywhere.where(support, 0))
    assert inferer._support is None


def test_attacked_in_a_victim() -> None:
    image, label = make_image(batch=1, dims=3), make_label("softmax", batch=1)
    mirrored = Victim(smooth_network(seed=4), MirrorInferer(GradientSlidingWindowInferer((4, 4, 4), 2, 0.5)))
    attack = attacks.create("pgd", eps=0.5, steps=3, label_source="prediction")
    result = attack(mirrored, image, label)
    assert float(result.score[0]) < float(result.clean_score[0])
    assert torch.equal(mirrored.predict(result.image), result.prediction)


@pytest.mark.parametrize("wrong", [{"axes": (0, 0)}, {"axes": (-1,)}, {"average": "votes"},
                                   {"average": "probabilities"}])  # fmt: skip
def test_what_cannot_be_mirrored_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        MirrorInferer(SimpleInferer(), **wrong)
    with pytest.raises(ConfigError, match="cannot mirror"):
        MirrorInferer(SimpleInferer(), axes=(2,))(torch.zeros(1, 1, 4, 4), nn.Identity())


def islands() -> Tensor:
    """Class indices (2, 1, 9): class 1 with a small island, class 2 twice; the second sample is empty."""
    labels = torch.zeros(2, 1, 9, 3, dtype=torch.long)
    labels[0, 0, [0, 2, 3, 4], :] = 1
    labels[0, 0, [5, 6, 8], :] = 2
    return labels


def test_largest_component_of_each_class() -> None:
    before = islands()
    given = before.clone()
    kept = KeepLargest()(given)
    assert torch.equal(given, before)
    assert kept.dtype == torch.long
    assert kept[0, 0, :, 0].tolist() == [0, 0, 1, 1, 1, 2, 2, 0, 0]
    assert not kept[1].any()
    assert KeepLargest(labels=2)(given)[0, 0, :, 0].tolist() == [1, 0, 1, 1, 1, 2, 2, 0, 0]


def test_largest_component_of_bits() -> None:
    bits = torch.cat([islands() == 1, islands() == 2, islands() > 0], dim=1)
    kept = KeepLargest()(bits)
    assert kept.dtype == torch.bool
    assert kept[0, 1, :, 0].int().tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0]
    assert kept[0, 2, :, 0].int().tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert not kept[1].any()


def test_largest_component_of_the_union() -> None:
    labels, bits = islands(), torch.cat([islands() == 1, islands() == 2], dim=1)
    expected = [0, 0, 1, 1, 1, 2, 2, 0, 0]
    assert KeepLargest(independent=False)(labels)[0, 0, :, 0].tolist() == expected
    kept = KeepLargest(independent=False)(bits)
    assert (kept[0, 0].int() + 2 * kept[0, 1].int())[:, 0].tolist() == expected
    corner = torch.eye(3).bool()[None, None]
    assert KeepLargest()(corner).sum() == 3
    assert KeepLargest(connectivity=1)(corner).sum() == 1


class Counting:
    """A clean-up that sees only what is scored, and empties it."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, prediction: Tensor) -> Tensor:
        assert not prediction.requires_grad
        self.seen.append(prediction)
        return torch.zeros_like(prediction)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("spec", [{"name": "pgd", "eps": 0.5, "steps": 2}, {"name": "fmn", "steps": 2},
                                  {"name": "alma_prox", "steps": 2}, {"name": "square", "eps": 0.5, "queries": 2}],
                         ids=lambda spec: spec["name"])  # fmt: skip
def test_refinement_counts_when_scoring_and_not_in_the_gradient(head: str, spec: dict) -> None:
    image, label = make_image(batch=2), make_label(head, batch=2)
    network = smooth_network(classes=4 if head == "softmax" else 3, seed=4)
    plain, refined = Victim(network, head=head), Victim(network, head=head, refine=Counting())
    assert not refined.predict(image).any()
    assert torch.equal(plain(image), refined(image))
    attack = attacks.create(**spec)
    result = attack(refined, image, label)
    assert not result.prediction.any()
    assert bool((result.score == 0).all())  # every region is there, none is predicted
    assert bool((result.clean_score == 0).all())
    clone = refined.resampled((1, 1, 1), (1, 1, 1))
    assert clone.refine is refined.refine
    assert purified(refined, lambda x: x).refine is refined.refine


def test_the_gradient_does_not_see_the_refinement() -> None:
    image, label = make_image(batch=1), make_label("softmax", batch=1)
    network, keep = linear_network(), KeepLargest(connectivity=1)
    attack = attacks.create("fgsm", eps=0.5)
    results = [attack(Victim(network, refine=refine), image, label) for refine in (None, keep)]
    assert torch.equal(results[0].image, results[1].image)
    assert not torch.equal(results[0].prediction, results[1].prediction)
    assert torch.equal(keep(results[0].prediction), results[1].prediction)


def test_a_refinement_that_changes_the_shape_is_an_error() -> None:
    with pytest.raises(ConfigError, match="must keep both"):
        Victim(smooth_network(), refine=lambda p: p[:, :, 1:]).predict(make_image(batch=1))
