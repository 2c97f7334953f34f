from __future__ import annotations

import pytest
import torch
from scipy import ndimage
from torch import nn

from monai_adv import attacks
from monai_adv.defenses import Purify, purified
from monai_adv.errors import ConfigError
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import Victim


@pytest.fixture
def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 4, 8, 9, 10, generator=generator) + 0.5
    image[..., :2, :, :] = 0
    return image


def test_the_background_stays_zero_and_the_filter_is_the_one_named(image: torch.Tensor) -> None:
    out = Purify("median", radius=1)(image)
    assert torch.equal(out == 0, image == 0)
    expected = ndimage.median_filter(image[1, 2].numpy(), size=3, mode="constant")
    inner = (slice(3, -1), slice(1, -1), slice(1, -1))
    assert torch.allclose(out[1, 2][inner], torch.from_numpy(expected)[inner])


def test_identity_filter_is_no_defense(image: torch.Tensor) -> None:
    torch.manual_seed(0)
    victim = Victim(nn.Conv3d(4, 4, 3, padding=1), preprocessing=NormalizeNonzeroBatch())
    same = purified(victim, lambda x: x)
    assert torch.equal(victim(image), same(image))
    assert same.name == "network purified"


def test_the_adaptive_attack_goes_through_the_filter(image: torch.Tensor) -> None:
    torch.manual_seed(0)
    victim = Victim(nn.Conv3d(4, 4, 3, padding=1), preprocessing=NormalizeNonzeroBatch())
    defended = purified(victim, Purify("gaussian", sigma=1.5))
    label = victim.predict(image)
    attack = attacks.create("ifgsm", eps=0.3, steps=10, loss="margin")
    plain, adaptive = attack(victim, image, label), attack(defended, image, label)

    def loss(result: object) -> torch.Tensor:
        with torch.no_grad():
            return attack.loss(defended(result.image), label, victim.head)  # type: ignore[attr-defined]

    assert (loss(adaptive) > loss(plain)).all()


def test_unknown_filters_and_options_are_named() -> None:
    with pytest.raises(ConfigError, match="filter 'magic' is unknown"):
        Purify("magic")
    with pytest.raises(ConfigError, match="filter median"):
        Purify("median", sigma=1)
