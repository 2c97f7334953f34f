"""A 2D network on volumes: MONAI's own logits, the exact gradient, and slices without a voxel."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer, SlidingWindowInferer
from torch import Tensor, nn

from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer, SlicewiseInferer

WINDOWS = {"roi_size": (8, 8), "sw_batch_size": 3, "overlap": 0.5, "mode": "gaussian"}


def network(seed: int = 0) -> nn.Module:
    """Smooth and of float64, so that gradients agree to rounding; instance normalisation as the baseline's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)
        ).double()


def volume(batch: int = 1, depth: int = 5) -> Tensor:
    return torch.randn(batch, 2, 11, 9, depth, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slicewise(keep: int | str = 0, background: list[float] | None = None) -> SlicewiseInferer:
    return SlicewiseInferer(GradientSlidingWindowInferer(**WINDOWS, keep_windows=keep), background)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_logits_are_those_of_monais_slice_inferer(batch: int) -> None:
    net, image = network().eval(), volume(batch)
    with torch.no_grad():
        expected = SliceInferer(spatial_dim=2, **WINDOWS)(image, net)
        assert torch.allclose(slicewise()(image, net), expected, atol=1e-12)


@pytest.mark.parametrize("keep", [0, 2, "auto"])
@pytest.mark.parametrize("empty", [False, True])
def test_the_gradient_is_that_of_a_loop_over_the_slices(keep: int | str, empty: bool) -> None:
    net, image = network().eval(), volume(2)
    background = [1.0, 2.0, 3.0] if empty else None
    if empty:
        image[0, ..., 1] = 0
        image[1, ..., 4] = 0
    wanted = torch.randn(2, 3, 11, 9, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    image.requires_grad_()
    logits = slicewise(keep, background)(image, net)
    (found,) = torch.autograd.grad((logits * wanted).sum(), image)

    plain, loop = SlidingWindowInferer(**WINDOWS), torch.zeros_like(wanted)
    total = torch.zeros((), dtype=torch.float64)
    for sample in range(2):
        for depth in range(5):
            one = image[sample : sample + 1, ..., depth]
            if empty and not bool(one.detach().any()):
                loop[sample, ..., depth] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(3, 1, 1)
                continue
            out = plain(one, net)
            loop[sample, ..., depth] = out[0].detach()
            total = total + (out[0] * wanted[sample, ..., depth]).sum()
    (expected,) = torch.autograd.grad(total, image)
    assert torch.allclose(logits, loop, atol=1e-12)
    assert torch.allclose(found, expected, atol=1e-10)
    assert float(expected.abs().max()) > 0.01


def test_slices_are_taken_as_they_are() -> None:
    net, image = network().eval(), volume()
    slices = image[0].movedim(-1, 0)
    with torch.no_grad():
        assert torch.equal(slicewise()(slices, net), slicewise()(image, net)[0].movedim(-1, 0))


def test_the_support_reaches_the_windows_of_its_slices() -> None:
    net, image = network().eval(), volume(2).requires_grad_()
    support = torch.zeros(2, 1, 11, 9, 5, dtype=torch.bool)
    support[1, :, 2:5, 2:5, 3] = True
    inferer = slicewise()
    (whole,) = torch.autograd.grad(inferer(image, net).square().sum(), image)
    calls: list[int] = []
    with inferer.restrict(support):
        logits = inferer(image, net)
        hook = net.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        (found,) = torch.autograd.grad(logits.square().sum(), image)
        hook.remove()
    assert torch.allclose(found, torch.where(support, whole, 0.0), atol=1e-12)
    # of the 60 windows only those of one slice that see the support are computed again, in batches of three
    assert 0 < sum(calls) <= 6


def test_a_volume_without_a_voxel_is_background_and_has_a_gradient_of_zero() -> None:
    net, image = network().eval(), torch.zeros(1, 2, 8, 8, 3, dtype=torch.float64, requires_grad=True)
    logits = slicewise(background=[0.0, -20.0, -20.0])(image, net)
    assert logits.detach()[0, :, 0, 0, 0].tolist() == [0, -20, -20]
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    assert not gradient.any()


def test_metadata_are_kept_and_errors_say_what_is_wrong() -> None:
    net = network().eval()
    image = MetaTensor(volume(), affine=torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0])))
    with torch.no_grad():
        assert slicewise()(image, net).affine[2, 2] == 3  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match="takes slices"):
            slicewise()(image[0, 0], net)
        with pytest.raises(ConfigError, match="2 background logits for a network of 3"):
            slicewise(background=[0.0, 0.0])(volume(), net)
