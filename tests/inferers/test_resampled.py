from __future__ import annotations

import pytest
import torch
from monai.inferers import SimpleInferer
from torch import nn

from monai_adv import attacks
from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer, ResampledInferer
from monai_adv.victims import Victim


def test_at_a_ratio_of_two_a_coarse_voxel_is_the_mean_of_its_eight() -> None:
    image = torch.rand(1, 2, 8, 6, 4, dtype=torch.float64)
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    out = ResampledInferer(SimpleInferer(), (1, 1, 1), (2, 2, 2))(image, network)
    assert torch.allclose(seen[0], nn.functional.avg_pool3d(image, 2), atol=1e-12)
    assert out.shape == image.shape


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 7, 8)])
def test_the_gradient_is_that_of_the_composition_and_respects_a_support(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv3d(3, 3, 1)).double()
    image = torch.rand(1, 2, *shape, dtype=torch.float64, requires_grad=True)
    windows = GradientSlidingWindowInferer((3, 3, 3), 2, overlap=0.25, mode="gaussian", keep_windows=0)
    inferer = ResampledInferer(windows, (1, 1, 1), (2, 2, 2))
    weight = torch.rand(1, 3, *shape, dtype=torch.float64)
    (exact,) = torch.autograd.grad((inferer(image, network) * weight).sum(), image)

    size = [max(1, round(n / 2)) for n in shape]
    small = nn.functional.interpolate(image, size=size, mode="trilinear")
    logits = super(GradientSlidingWindowInferer, windows).__call__(small, lambda x: network(x).clone())
    logits = nn.functional.interpolate(logits, size=shape, mode="trilinear")
    (plain,) = torch.autograd.grad((logits * weight).sum(), image)
    assert torch.allclose(exact, plain, atol=1e-12)

    support = torch.zeros(1, 1, *shape, dtype=torch.bool)
    support[..., :3, :3, :3] = True
    with inferer.restrict(support):
        (inside,) = torch.autograd.grad((inferer(image, network) * weight).sum(), image)
    assert torch.allclose(inside[..., :3, :3, :3], exact[..., :3, :3, :3], atol=1e-12)


def test_a_victim_at_another_voxel_size_is_attacked_on_the_scans_grid() -> None:
    torch.manual_seed(0)
    victim = Victim(nn.Conv3d(4, 4, 3, padding=1)).resampled((1, 1, 1), (2, 2, 2))
    image = torch.rand(1, 4, 9, 8, 7) + 1
    label = victim.predict(image)
    assert label.shape == (1, 1, 9, 8, 7)
    result = attacks.create("fgsm", eps=0.5, loss="margin")(victim, image, label)
    assert result.score < 1


def test_wrong_spacings_are_named() -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        ResampledInferer(SimpleInferer(), (1, 1), (2, 0))
    with pytest.raises(ConfigError, match="axes of the spacing"):
        ResampledInferer(SimpleInferer(), (1, 1), (2, 2))(torch.zeros(1, 1, 4, 4, 4), lambda x: x)
