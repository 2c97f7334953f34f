"""Sliding-window gradients: supports, what is replayed in the backward pass, errors that are noticed, memory."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn
from window_networks import TOLERANCE, both, compare, error, loss_of, tiny, volume

from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.inferers.memory import available_memory, graph_bytes, graph_leaves
from monai_adv.inferers.replay import modules_of


def test_support_masks_and_keeps_the_rest_exact() -> None:
    network, image = tiny(2), volume((16, 21), batch=2)
    options: dict[str, Any] = {"roi_size": 8, "overlap": 0.5, "mode": "gaussian"}
    ours = GradientSlidingWindowInferer(**options, keep_windows=0)
    (truth,) = torch.autograd.grad(loss_of(SlidingWindowInferer(**options)(image, network)), image)
    support = torch.rand(1, 2, 16, 21, generator=torch.Generator().manual_seed(0)) > 0.98
    with ours.restrict(support):
        inside = ours(image, network)
    (found,) = torch.autograd.grad(loss_of(inside), image)
    (given,) = torch.autograd.grad(loss_of(ours(image, network, support=support)), image)
    assert torch.equal(inside, ours(image, network))
    assert torch.equal(found, given)
    assert error(found, truth * support) <= TOLERANCE
    (after,) = torch.autograd.grad(loss_of(ours(image, network)), image)  # the context has ended
    assert error(after, truth) <= TOLERANCE


@pytest.mark.parametrize("padding_mode", ["constant", "reflect"])
def test_support_of_a_padded_volume(padding_mode: str) -> None:
    network, image = tiny(2), volume((5, 12))
    options: dict[str, Any] = {"roi_size": 8, "overlap": 0.5, "padding_mode": padding_mode}
    (truth,) = torch.autograd.grad(loss_of(SlidingWindowInferer(**options)(image, network)), image)
    support = torch.zeros(1, 1, 5, 12, dtype=torch.bool)
    support[..., 1, :5] = True
    ours = GradientSlidingWindowInferer(**options, keep_windows=0)
    (found,) = torch.autograd.grad(loss_of(ours(image, network, support=support)), image)
    assert error(found, truth * support) <= TOLERANCE


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 1, 16, 16), (1, 1, 16, 15), (16, 16)])
def test_support_that_does_not_fit(shape: tuple[int, ...]) -> None:
    ours = GradientSlidingWindowInferer(roi_size=8)
    with pytest.raises(ConfigError, match=r"support has the shape .* does not fit a volume of shape \(2, 2, 16, 16\)"):
        ours(volume((16, 16), batch=2), tiny(2), support=torch.ones(shape))


@pytest.mark.parametrize("keep", [-1, 1.5, "all", True, None])
def test_keep_windows_is_checked(keep: Any) -> None:
    with pytest.raises(ConfigError, match="keep_windows must be a whole number >= 0 or 'auto'"):
        GradientSlidingWindowInferer(roi_size=8, keep_windows=keep)


def test_monai_says_what_is_wrong_with_the_window() -> None:
    with pytest.raises(ValueError, match="Inputs must have 4 dimensions for 2D roi_size"):
        GradientSlidingWindowInferer(roi_size=(8, 8))(volume((8, 8, 8)), tiny(3))


def test_the_mode_of_the_graph_makes_no_difference() -> None:
    """Kept or recomputed, the gradients have the same bits."""
    network, image = tiny(3), volume((12, 8, 16))
    sources = [image, *network.parameters()]
    grads = []
    for keep in (0, 1, 99):
        ours = GradientSlidingWindowInferer(roi_size=8, overlap=0.5, sw_batch_size=2, keep_windows=keep)
        grads.append(torch.autograd.grad(loss_of(ours(image, network)), sources))
    for one, two, three in zip(*grads):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_backward_trains() -> None:
    """``backward`` accumulates into the parameters, and an image without gradient needs none."""
    network = tiny(2)
    twin = copy.deepcopy(network)
    image = volume((12, 12)).detach()
    loss_of(GradientSlidingWindowInferer(roi_size=8, overlap=0.5, keep_windows=0)(image, network)).backward()
    loss_of(SlidingWindowInferer(roi_size=8, overlap=0.5)(image, twin)).backward()
    for mine, theirs in zip(network.parameters(), twin.parameters()):
        assert mine.grad is not None
        assert error(mine.grad, theirs.grad) <= TOLERANCE


def test_a_leaf_that_is_part_of_the_graph_before() -> None:
    """The image may be the result of something, and an upstream part may be differentiated along."""
    network, source = tiny(2), volume((12, 19))
    options: dict[str, Any] = {"roi_size": 8, "overlap": 0.5}
    truth = torch.autograd.grad(loss_of(SlidingWindowInferer(**options)(source.tanh(), network)), source)
    ours = GradientSlidingWindowInferer(**options, keep_windows=1)
    found = torch.autograd.grad(loss_of(ours(source.tanh(), network)), source)
    assert error(found[0], truth[0]) <= TOLERANCE


@pytest.mark.parametrize("keep", [0, 1, 9])
def test_callables_that_hide_what_they_use(keep: int) -> None:
    """Modules in closures, partials and methods, and tensors that no module owns."""
    network, scale = tiny(2), torch.rand(3, 1, 1, dtype=torch.float64).requires_grad_()
    before = scale.exp()  # computed once, used in every window

    def scaled(factor: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        return network(window) * factor

    ours, options = both(keep, roi_size=8, overlap=0.5)
    sources = [scale, *network.parameters()]
    image = volume((12, 19))
    truth = torch.autograd.grad(
        loss_of(SlidingWindowInferer(**options)(image, functools.partial(scaled, scale.exp()))), [image, *sources]
    )
    logits = ours(image, functools.partial(scaled, before))
    found = torch.autograd.grad(loss_of(logits), [image, *sources])
    for one, other in zip(found, truth):
        assert error(one, other) <= TOLERANCE


def test_modules_are_found() -> None:
    network = tiny(2)

    class Holder:
        def __init__(self) -> None:
            self.network = network

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)

    for callable_ in (network, network.forward, lambda x: network(x), functools.partial(network), Holder()):
        assert modules_of(callable_) == [network]
    assert modules_of(torch.relu) == []


def test_a_tensor_that_only_later_windows_use_is_an_error() -> None:
    late = torch.ones((), dtype=torch.float64, requires_grad=True)
    calls = []

    def network(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * late if len(calls) > 1 else x * 2

    logits = GradientSlidingWindowInferer(roi_size=8, keep_windows=0)(volume((8, 16)), network)
    with pytest.raises(ConfigError, match=r"1 tensor\(s\) that need a gradient"):
        logits.sum().backward()


def test_a_network_without_gradient_is_an_error() -> None:
    image = volume((8, 16))
    logits = GradientSlidingWindowInferer(roi_size=8)(image, lambda x: x.detach() * 2)
    with pytest.raises(ConfigError, match="differentiable way"):
        logits.sum().backward()


def test_windows_that_a_network_answers_with_a_constant() -> None:
    """Skipping empty windows inside the network is legitimate: their gradient is zero."""
    network = tiny(2)

    def skipping(x: torch.Tensor) -> torch.Tensor:
        return network(x) if x.any() else x.new_zeros(x.shape[0], 3, *x.shape[2:])

    image = volume((8, 24)).detach()
    image[..., :8] = 0
    image[..., 16:] = 0
    ours, options = both(0, roi_size=8, overlap=0)
    compare(ours, image.requires_grad_(), skipping, sources=list(network.parameters()), **options)


def test_twice_differentiated_is_an_error_and_twice_backward_is_not() -> None:
    network, image = tiny(2), volume((8, 16))
    ours = GradientSlidingWindowInferer(roi_size=8, keep_windows=1)
    (first,) = torch.autograd.grad(loss_of(ours(image, network)), image, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
    loss = loss_of(ours(image, network))
    (one,) = torch.autograd.grad(loss, image, retain_graph=True)
    (two,) = torch.autograd.grad(loss, image)  # the graphs that were kept are recomputed
    assert torch.equal(one, two)


def test_a_changed_image_is_noticed() -> None:
    network, image = tiny(2), volume((8, 16))
    logits = GradientSlidingWindowInferer(roi_size=8, keep_windows=0)(image, network)
    with torch.no_grad():
        image += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_exchanged_parameters_are_noticed() -> None:
    network, image = tiny(2), volume((8, 16))
    ours = GradientSlidingWindowInferer(roi_size=8, keep_windows=0)
    logits = ours(image, network)
    network[0].weight = nn.Parameter(torch.zeros_like(network[0].weight))
    with pytest.raises(ConfigError, match="other parameters in the backward pass"):
        torch.autograd.grad(logits.sum(), image)


class TestReplay:
    """A recomputed window is the one that was run, and leaves no second trace."""

    OPTIONS: dict[str, Any] = {"roi_size": 8, "overlap": 0.5, "sw_batch_size": 2}

    def grads(self, inferer: SlidingWindowInferer, network: nn.Module) -> tuple[torch.Tensor, ...]:
        image = volume((12, 19))
        torch.manual_seed(5)
        found = torch.autograd.grad(loss_of(inferer(image, network)), [image, *network.parameters()])
        return *found, torch.rand(3)  # the random numbers afterwards are compared too

    @pytest.mark.parametrize("keep", [0, 2])
    @pytest.mark.parametrize(
        "layer",
        [
            nn.Dropout(0.5),
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3, momentum=None),
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1)),
        ],
        ids=["dropout", "batch norm", "batch norm, cumulative", "spectral norm"],
    )
    def test_training_mode(self, layer: nn.Module, keep: int) -> None:
        network = nn.Sequential(*tiny(2), copy.deepcopy(layer), nn.Conv2d(3, 3, 3, padding=1)).double().train()
        twin = copy.deepcopy(network)
        truth = self.grads(SlidingWindowInferer(**self.OPTIONS), twin)
        found = self.grads(GradientSlidingWindowInferer(**self.OPTIONS, keep_windows=keep), network)
        for one, other in zip(found, truth):
            assert error(one, other) <= 10 * TOLERANCE
        for mine, theirs in zip(network.buffers(), twin.buffers()):
            assert torch.equal(mine, theirs)

    def test_what_happened_in_the_meantime_stays(self) -> None:
        """Random numbers and running statistics go on from where they were when the backward pass began."""
        network = nn.Sequential(*tiny(2), nn.Dropout(0.5), nn.BatchNorm2d(3).double()).train()
        logits = GradientSlidingWindowInferer(**self.OPTIONS, keep_windows=0)(volume((12, 19)), network)
        network(volume((8, 8)))
        random, buffers = torch.get_rng_state(), [b.clone() for b in network.buffers()]
        logits.sum().backward()
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(now, before) for now, before in zip(network.buffers(), buffers))

    def test_random_numbers_in_eval_mode(self) -> None:
        """A randomised defense draws at inference: skipping windows must not change who draws what."""

        class Noisy(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * torch.rand_like(x)

        network = nn.Sequential(Noisy(), *tiny(2)).eval()
        image = volume((8, 32))
        grads = []
        for inferer in (
            SlidingWindowInferer(8, 2, 0),
            GradientSlidingWindowInferer(8, 2, 0, keep_windows=0),
        ):
            torch.manual_seed(5)
            logits = inferer(image, network)
            grads.append(torch.autograd.grad(loss_of(logits[..., 8:24]), image)[0])
        assert error(grads[1], grads[0]) <= TOLERANCE

    def test_modes_switched_back_in_the_meantime(self) -> None:
        """A guard puts train mode and requires_grad back before the gradient is taken."""
        network = nn.Sequential(*tiny(2), nn.Dropout(0.5), nn.BatchNorm2d(3).double()).train()
        twin = copy.deepcopy(network).eval()
        image = volume((12, 19))
        (truth,) = torch.autograd.grad(loss_of(SlidingWindowInferer(**self.OPTIONS)(image, twin)), image)
        network.eval().requires_grad_(False)
        logits = GradientSlidingWindowInferer(**self.OPTIONS, keep_windows=0)(image, network)
        network.train().requires_grad_(True)
        (found,) = torch.autograd.grad(loss_of(logits), image)
        assert error(found, truth) <= TOLERANCE
        assert all(module.training for module in network.modules())
        assert all(p.requires_grad for p in network.parameters())
        for mine, theirs in zip(network.buffers(), twin.buffers()):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("keep", [0, 1, 99])
    def test_autocast(self, keep: int) -> None:
        network = tiny(2).float()
        image = volume((12, 19)).detach().float().requires_grad_()
        sources, weight = [image, *network.parameters()], torch.randn(1, 3, 12, 19)
        seen = []
        network[3].register_forward_hook(lambda module, given, result: seen.append(result.dtype))

        def run(inferer: SlidingWindowInferer) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = inferer(image, network)
            return logits, torch.autograd.grad((logits * weight).sum(), sources)

        truth_logits, truth = run(SlidingWindowInferer(**self.OPTIONS))
        logits, found = run(GradientSlidingWindowInferer(**self.OPTIONS, keep_windows=keep))
        assert set(seen) == {torch.bfloat16}
        assert torch.equal(logits, truth_logits)
        for one, other in zip(found, truth):
            assert one.dtype == other.dtype
            assert error(one, other) < 0.02  # the order of roundings to bfloat16 differs


def test_float32_agrees_in_sign() -> None:
    network, image = tiny(3).float(), volume((12, 12, 9)).detach().float().requires_grad_()
    options: dict[str, Any] = {"roi_size": 8, "overlap": 0.5, "mode": "gaussian"}
    weight = torch.randn(1, 3, 12, 12, 9)
    grads = [
        torch.autograd.grad((inferer(image, network) * weight).sum(), image)[0]
        for inferer in (SlidingWindowInferer(**options), GradientSlidingWindowInferer(**options, keep_windows=0))
    ]
    assert error(grads[1], grads[0]) < 1e-5
    assert (grads[1].sign() == grads[0].sign()).float().mean() > 0.9999


@pytest.mark.parametrize("size", [(12, 19), (5, 19)])
def test_metatensor(size: tuple[int, int]) -> None:
    network, plain = tiny(2).float(), volume(size).detach().float()
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    image = MetaTensor(plain.clone(), affine=affine, meta={"subject": "one"}).requires_grad_()
    options: dict[str, Any] = {"roi_size": 8, "overlap": 0.5}
    ours = GradientSlidingWindowInferer(**options, keep_windows=0)
    logits = ours(image, network)
    expected = SlidingWindowInferer(**options)(image.detach(), network)
    assert isinstance(logits, MetaTensor)
    assert logits.meta["subject"] == "one"
    assert torch.equal(logits.affine, expected.affine)
    assert torch.equal(logits.as_tensor(), expected.as_tensor())
    weight = torch.randn(logits.shape)
    (found,) = torch.autograd.grad((logits * weight).sum(), image)
    bare = plain.clone().requires_grad_()
    (truth,) = torch.autograd.grad((ours(bare, network) * weight).sum(), bare)
    assert torch.equal(torch.as_tensor(found), truth)


@pytest.mark.parametrize("keep", [0, 1])
def test_coordinates_conditions_and_arguments(keep: int) -> None:
    network = tiny(2)
    condition = volume((6, 19), seed=9).detach()

    def conditioned(x: torch.Tensor, windows: Any, factor: float, condition: torch.Tensor) -> torch.Tensor:
        where = torch.tensor([float(w[-1].start) for w in windows], dtype=x.dtype)[:, None, None, None]
        return network(x + condition) * factor + network(x) * where

    options: dict[str, Any] = {"roi_size": 8, "overlap": 0.5, "sw_batch_size": 2, "with_coord": True}
    image, grads = volume((6, 19)), []
    for inferer in (SlidingWindowInferer(**options), GradientSlidingWindowInferer(**options, keep_windows=keep)):
        logits = inferer(image, conditioned, 3.0, condition=condition)
        grads.append(torch.autograd.grad(loss_of(logits), image)[0])
    assert error(grads[1], grads[0]) <= TOLERANCE
    ours = GradientSlidingWindowInferer(**options)
    with pytest.raises(ConfigError, match="gradient of `condition`"):
        ours(image, conditioned, 3.0, condition=condition.requires_grad_())


def test_memory_of_a_graph() -> None:
    x = torch.ones(1000, requires_grad=True)
    weight = torch.ones(1000, requires_grad=True)
    result = (x * weight).exp()  # the product saves x and weight, exp its result
    assert graph_bytes(result) == 3 * 4000
    assert graph_bytes(result, exclude=[weight]) == 2 * 4000
    assert {id(t) for t in graph_leaves(result)} == {id(x), id(weight)}
    assert graph_leaves(torch.ones(1)) == []
    kept = tiny(2)(volume((32, 32)))
    # input, first convolution (kept by the norm and, in place or not, by the activation), activation, logits
    assert graph_bytes(kept, exclude=[]) >= 8 * 32 * 32 * (2 + 4 + 4 + 3)


def test_available_memory(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory("cpu")
    assert 2**20 < free < 2**50
    assert available_memory(torch.device("meta")) == 0
    # a control group that allows less than the machine has
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    monkeypatch.setattr("monai_adv.inferers.memory._cgroup_folders", lambda: iter([tmp_path]))
    assert available_memory("cpu") == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert math.isclose(available_memory("cpu"), free, rel_tol=0.5)
