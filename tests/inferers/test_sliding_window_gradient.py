"""The gradient through sliding-window inference: exact, in few network calls, and MONAI's own output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from monai.networks.nets import UNet
from torch import nn
from window_networks import TOLERANCE, Counted, both, compare, error, loss_of, tiny, volume

from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer


@pytest.mark.parametrize("keep", [0, 1, "auto"])
@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.6])
@pytest.mark.parametrize(
    ("size", "batch", "sw_batch_size"),
    [
        ((17, 23), 1, 1),
        ((16, 32), 4, 3),
        ((7, 21), 2, 2),  # smaller than the window along one axis, odd
        ((5, 6), 2, 4),  # along all axes
        ((9, 11, 13), 1, 2),
        ((8, 5, 16), 2, 1),
        ((5, 7, 3), 1, 1),
    ],
)
def test_exact(
    size: tuple[int, ...], batch: int, sw_batch_size: int, overlap: float, mode: str, keep: int | str
) -> None:
    network = tiny(len(size))
    ours, options = both(
        keep, roi_size=(8,) * len(size), sw_batch_size=sw_batch_size, overlap=overlap, mode=mode, sigma_scale=0.2
    )
    compare(ours, volume(size, batch), network, sources=list(network.parameters()), **options)


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"roi_size": (8, -1, 6), "overlap": (0.5, 0.1, 0.25)},
        {"roi_size": 8, "padding_mode": "reflect"},
        {"roi_size": 8, "padding_mode": "replicate", "mode": "gaussian"},
        {"roi_size": 8, "padding_mode": "circular"},
        {"roi_size": 8, "cval": 1.5},
        {"roi_size": (8, 8, 8), "cache_roi_weight_map": True, "mode": "gaussian"},
        {"roi_size": (4, 4, 4), "buffer_steps": 1, "sw_batch_size": 3, "overlap": 0.5, "mode": "gaussian"},
        {"roi_size": (4, 4, 4), "buffer_steps": 2, "buffer_dim": 0},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_options_of_monai(options: dict[str, Any], keep: int) -> None:
    network = tiny(3)
    compare(
        GradientSlidingWindowInferer(**options, keep_windows=keep),
        volume((9, 7, 5), batch=2),
        network,
        sources=list(network.parameters()),
        **options,
    )


def test_unet() -> None:
    torch.manual_seed(0)
    network = UNet(3, 2, 3, (2, 4, 4), (2, 2), num_res_units=1, norm="INSTANCE").double().eval()
    ours, options = both(0, roi_size=8, sw_batch_size=2, overlap=0.5, mode="gaussian")
    compare(ours, volume((10, 8, 13)), network, sources=list(network.parameters()), **options)


ENDS = [nn.Softmax(1), nn.Sigmoid(), nn.ReLU(), nn.ReLU(inplace=True)]


@pytest.mark.parametrize("end", ENDS, ids=str)
@pytest.mark.parametrize("keep", [0, 9])
def test_networks_whose_last_result_autograd_needs(end: nn.Module, keep: int) -> None:
    network = tiny(2, end=end)
    ours, options = both(keep, roi_size=8, overlap=0.5, sw_batch_size=2)
    compare(ours, volume((12, 19)), network, lambda x: network(x).clone(), **options)


@pytest.mark.parametrize("sw_batch_size", [1, 2])
@pytest.mark.parametrize("keep", [0, 9])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :1], lambda x: x.flip(1)[:, :1]])
def test_views_of_the_input_leave_the_image_alone(view: Callable[..., Any], keep: int, sw_batch_size: int) -> None:
    ours, options = both(keep, roi_size=8, overlap=0.5, mode="gaussian", sw_batch_size=sw_batch_size)
    image = volume((12, 8))
    before = image.detach().clone()
    compare(ours, image, view, lambda x: view(x).clone(), **options)
    with torch.no_grad():
        ours(image, view)
    assert torch.equal(image, before)


@pytest.mark.parametrize("sw_batch_size", [1, 2])
def test_networks_that_work_in_place_on_their_input(sw_batch_size: int) -> None:
    network = nn.Sequential(nn.ReLU(inplace=True), *tiny(2))
    ours, options = both(1, roi_size=8, overlap=0.5, sw_batch_size=sw_batch_size)
    image = volume((12, 19))
    before = image.detach().clone()
    compare(ours, image, network, lambda x: network(x.clone()), **options)
    with torch.no_grad():
        ours(image, network)
    with torch.inference_mode():
        ours(image, network)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: (z, z.mean()),
        lambda z: [z, None],
        lambda z: {"anything": z},
        lambda z: {"out": z, "aux": z * 2},
        lambda z: {"features": z * 2, "logits": z},
        lambda z: {"pred": z, "label": None},
    ],
)
def test_the_logits_among_several_results(wrap: Callable[..., Any]) -> None:
    network = tiny(2)
    ours, options = both(0, roi_size=8, overlap=0.5)
    image = volume((12, 19))
    compare(ours, image, lambda x: wrap(network(x)), network, **options)
    with torch.no_grad():
        assert torch.equal(ours(image, lambda x: wrap(network(x))), ours(image, network))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: {"seg": x, "aux": x}, r"keys \['seg', 'aux'\], in which the logits cannot be told"),
        (lambda x: {"out": x, "logits": x}, "cannot be told"),
        (lambda x: {}, "cannot be told"),
        (lambda x: (), "empty sequence"),
        (lambda x: ((x, x), x), "tuple with tuple where a tensor of logits"),
        (lambda x: None, "NoneType where a tensor of logits"),
        (lambda x: x.argmax(1, keepdim=True), r"torch.int64 of shape \(1, 1, 8, 8\), which are not logits"),
        (lambda x: x[:, None], "deep-supervision heads"),
        (lambda x: x.mean(), "not logits"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_where_no_logits_can_be_told(result: Callable[..., Any], message: str, grad: bool) -> None:
    ours = GradientSlidingWindowInferer(roi_size=8)
    with torch.set_grad_enabled(grad), pytest.raises(ConfigError, match=message):
        ours(volume((8, 8)), result)


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("size", [(16, 24), (6, 24)])
def test_logits_at_another_resolution(stride: int, size: tuple[int, int]) -> None:
    # instance norm: windows that overlap disagree, so that their weights matter
    network = nn.Sequential(*tiny(2), nn.AvgPool2d(stride))
    ours, options = both(0, roi_size=8, overlap=0.5, mode="gaussian", sw_batch_size=2)
    compare(ours, volume(size, batch=2), network, sources=list(network.parameters()), **options)


def test_without_a_gradient_it_is_monai() -> None:
    network = Counted(tiny(3))
    image = volume((9, 12, 8), batch=2)
    options: dict[str, Any] = {"roi_size": 8, "overlap": 0.5, "mode": "gaussian", "sw_batch_size": 2}
    with torch.no_grad():
        logits = GradientSlidingWindowInferer(**options)(image, network)
    assert not logits.requires_grad
    assert torch.equal(logits, sliding_window_inference(image.detach(), predictor=network, **options))
    frozen = network.requires_grad_(False)
    assert not GradientSlidingWindowInferer(**options)(image.detach(), frozen).requires_grad


class TestCalls:
    """What is run again in the backward pass, counted."""

    def run(
        self, keep: int | str, upstream: Callable[..., Any] | None = None, training: bool = False, **kwargs: Any
    ) -> list[int]:
        """Windows per network call of one forward and backward pass over six windows in three batches."""
        network = Counted(tiny(2)).requires_grad_(False).train(training)
        ours = GradientSlidingWindowInferer(roi_size=8, overlap=0, sw_batch_size=2, keep_windows=keep)
        image = volume((16, 24))
        logits = ours(image, network, **kwargs)
        assert network.calls == [2, 2, 2]
        torch.autograd.grad(logits.sum() if upstream is None else upstream(logits), image)
        return network.calls[3:]

    @pytest.mark.parametrize(("keep", "again"), [(0, 3), (1, 2), (2, 1), (3, 0), (99, 0), ("auto", 0)])
    def test_kept_graphs(self, keep: int | str, again: int) -> None:
        assert self.run(keep) == [2] * again

    @pytest.mark.parametrize("keep", [0, 1, "auto"])
    def test_one_batch_is_never_recomputed(self, keep: int | str) -> None:
        network = Counted(tiny(2)).eval()
        ours = GradientSlidingWindowInferer(roi_size=8, overlap=0, sw_batch_size=2, keep_windows=keep)
        ours(volume((8, 16)), network).sum().backward()
        assert network.calls == [2]

    def test_auto_recomputes_where_memory_is_short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("monai_adv.inferers.windows.available_memory", lambda device: 1000)
        assert self.run("auto") == [2, 2, 2]

    def test_auto_keeps_what_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        free = iter([2**30, 2**30, 2**20, 2**20, 2**20])  # at the start, for the first graph, for the second
        monkeypatch.setattr("monai_adv.inferers.windows.available_memory", lambda device: next(free))
        assert self.run("auto") == [2, 2]

    def test_windows_without_upstream_gradient(self) -> None:
        assert self.run(0, lambda z: z[..., :8, :8].sum()) == [1]
        assert self.run(0, lambda z: z[..., 8:, 8:].sum()) == [2]
        assert self.run(0, lambda z: z[..., 7:9].sum()) == [2, 2]  # windows 0, 1, 3, 4: in full batches
        assert self.run(0, lambda z: z.sum() * 0) == []
        assert self.run(0, lambda z: z[..., :8, :8].sum(), training=True) == [2]  # may couple a batch: left together
        assert self.run(3, lambda z: z[..., :8, :8].sum()) == []

    def test_no_window_at_all_gives_zeros(self) -> None:
        network, image = tiny(2), volume((8, 16))
        logits = GradientSlidingWindowInferer(roi_size=8, keep_windows=0)(image, network)
        for found in torch.autograd.grad(logits.sum() * 0, [image, *network.parameters()]):
            assert not found.any()

    def test_windows_without_support(self) -> None:
        support = torch.zeros(1, 1, 16, 24, dtype=torch.bool)
        assert self.run(0, support=support) == []
        support[..., 3, 20] = True
        assert self.run(0, support=support) == [1]
        assert self.run(0, lambda z: z[..., :8].sum(), support=support) == []

    def test_parameters_need_every_window(self) -> None:
        network = Counted(tiny(2)).eval()
        ours = GradientSlidingWindowInferer(roi_size=8, overlap=0, sw_batch_size=2, keep_windows=0)
        image, support = volume((16, 24)), torch.zeros(1, 1, 16, 24, dtype=torch.bool)
        parameters = list(network.parameters())
        truth = torch.autograd.grad(loss_of(SlidingWindowInferer(8, 2, 0)(image, network)), parameters)
        network.calls.clear()
        found = torch.autograd.grad(loss_of(ours(image, network, support=support)), [image, *parameters])
        assert network.calls == [2] * 6
        assert not found[0].any()
        assert all(error(one, other) <= TOLERANCE for one, other in zip(found[1:], truth))
        # only the image is asked for: the parameters' gradients are not computed, so no window counts
        network.calls.clear()
        torch.autograd.grad(loss_of(ours(image, network, support=support)), image)
        assert network.calls == [2] * 3

    def test_the_image_alone_costs_no_parameter_gradient(self) -> None:
        network, seen = tiny(2), []
        network[0].weight.register_hook(lambda grad: seen.append("outer"))
        network[3].register_full_backward_hook(lambda module, given, got: seen.append("module"))
        ours = GradientSlidingWindowInferer(roi_size=8, overlap=0, keep_windows=0)
        torch.autograd.grad(ours(volume((8, 16)), network).sum(), volume((8, 16)), allow_unused=True)
        image = volume((8, 16))
        torch.autograd.grad(ours(image, network).sum(), image)
        assert seen == ["module", "module"]
