from __future__ import annotations

import pytest
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from scipy import ndimage
from torch import nn

from monai_adv import attacks
from monai_adv.defenses import DefendedVictim, Purify, purified, unaware
from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.transforms import FilterImage, NormalizeNonzeroBatch, make_differentiable
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


@pytest.mark.parametrize("kind", ["bit_depth", "curvature_diffusion", "bilateral"])
def test_filters_without_a_gradient_pass_it_straight_through(kind: str, image: torch.Tensor) -> None:
    leaf = image.clone().requires_grad_(True)
    out = Purify(kind)(leaf)
    assert torch.equal(out, torch.stack([FilterImage(kind)(sample) for sample in image]))
    upstream = torch.rand(image.shape)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    assert torch.equal(gradient, torch.where(image != 0, upstream, 0))


def test_a_surrogate_gives_its_gradient_and_not_its_value(image: torch.Tensor) -> None:
    upstream = torch.rand(image.shape)

    def gradient(purify: Purify) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = image.clone().requires_grad_(True)
        out = purify(leaf)
        return out.detach(), torch.autograd.grad(out, leaf, upstream)[0]

    smooth = Purify("gaussian", sigma=0.7)
    _, expected = gradient(smooth)
    for surrogate in ({"kind": "gaussian", "sigma": 0.7}, smooth):
        value, found = gradient(Purify("bilateral", surrogate=surrogate))
        assert torch.equal(value, Purify("bilateral")(image))
        torch.testing.assert_close(found, expected)
    # of a filter with a gradient of its own too
    value, found = gradient(Purify("median", surrogate=smooth))
    assert torch.equal(value, Purify("median")(image))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ConfigError, match="bilateral passes no gradient"):
        Purify("bit_depth", surrogate="bilateral")
    with pytest.raises(ConfigError, match="needs a kind"):
        Purify("bit_depth", surrogate={"sigma": 1})


def test_the_voxel_size_reaches_the_filter(image: torch.Tensor) -> None:
    affine = torch.stack([torch.eye(4), torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0]))])
    out = Purify("bilateral")(image, affine)
    assert torch.equal(out[0], FilterImage("bilateral")(image[0]))
    assert torch.equal(out[1], FilterImage("bilateral")(image[1], (3.0, 1.0, 1.0)))
    assert torch.equal(Purify("bilateral")(image, affine[1])[0], FilterImage("bilateral")(image[0], (3.0, 1.0, 1.0)))
    # in a victim, during an attack on plain tensors
    victim = purified(Victim(nn.Identity()), Purify("bilateral"))
    meta = MetaTensor(image, affine=affine[1])
    expected = Purify("bilateral")(image, affine[1])
    assert torch.equal(victim(meta), expected)
    with victim.attacked(affine=affine[1]):
        assert torch.equal(victim(image), expected)


def test_a_preprocessing_with_a_grid_of_its_own_stays_one(image: torch.Tensor) -> None:
    torch.manual_seed(0)
    deployed = mt.Compose(
        [mt.Orientation("LPS", labels=None), mt.Spacing((2.0, 2.0, 2.0)), mt.NormalizeIntensity(nonzero=True)]
    )
    victim = Victim(nn.Conv3d(4, 4, 3, padding=1), preprocessing=make_differentiable(deployed))
    affine = torch.diag(torch.tensor([-1.0, 1.0, 1.5, 1.0]))
    filter_ = Purify("bilateral")
    defended = purified(victim, filter_)
    logits = defended(image, affine)
    assert logits.shape == (2, 4, 8, 9, 10)
    assert torch.equal(logits, victim(filter_(image, affine), affine))
    with pytest.raises(ConfigError, match="already brings images"):
        defended.resampled((1, 1, 1), (2, 2, 2))
    label = victim.predict(image, affine)
    result = attacks.create("ifgsm", eps=0.3, steps=2)(defended, MetaTensor(image, affine=affine), label)
    assert (result.perturbation.as_tensor() != 0).float().mean() > 0.1


def test_the_gradient_is_the_same_where_windows_without_support_are_skipped(image: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Conv3d(4, 4, 3, padding=1)
    inferer = GradientSlidingWindowInferer(roi_size=(4, 4, 4), overlap=0.5, keep_windows=0)
    support = torch.zeros_like(image, dtype=torch.bool)
    support[..., 4, 4, 5] = True
    for purify in (Purify("gaussian", sigma=0.4), Purify("bit_depth")):
        for preprocessing in (None, NormalizeNonzeroBatch(), lambda x: 2 * x):
            victim = purified(Victim(network, inferer=inferer, preprocessing=preprocessing), purify)
            leaf = image.clone().requires_grad_(True)
            (full,) = torch.autograd.grad(victim(leaf).square().sum(), leaf)
            with victim.attacked(support, image):
                (part,) = torch.autograd.grad(victim(leaf).square().sum(), leaf)
            torch.testing.assert_close(part[support], full[support])
            assert full[support].abs().min() > 0
    pointwise = Purify("bit_depth").gradient_support(image, support)
    assert torch.equal(pointwise, support)


def test_unaware_is_crafted_without_and_adaptive_with_the_defense(image: torch.Tensor) -> None:
    torch.manual_seed(0)
    victim = Victim(nn.Conv3d(4, 4, 3, padding=1), preprocessing=NormalizeNonzeroBatch(), name="net")
    defended = purified(purified(victim, Purify("bit_depth")), Purify("gaussian", sigma=1.5))
    assert defended.undefended is victim
    assert defended.name == "net purified purified"
    label = victim.predict(image)
    spec = {"name": "ifgsm", "steps": 4, "loss": "margin"}
    blind = unaware(spec, defended, eps=0.3)(defended, image, label)
    assert torch.equal(blind.image, attacks.create(eps=0.3, **spec)(victim, image, label).image)
    assert torch.equal(blind.prediction, defended.predict(blind.image))
    adaptive = attacks.create(eps=0.3, **spec)(defended, image, label)
    loss = attacks.create(eps=0.3, **spec).loss
    with torch.no_grad():
        weak, strong = (loss(defended(r.image), label, victim.head) for r in (blind, adaptive))
    assert (strong > weak).all()
    with pytest.raises(ConfigError, match="does not say what it is without its defense"):
        unaware("fgsm", victim)


def test_a_resampled_defense_resamples_what_it_defends(image: torch.Tensor) -> None:
    victim = Victim(nn.Conv3d(4, 4, 3, padding=1), preprocessing=NormalizeNonzeroBatch())
    defended = purified(victim, Purify("median"))
    other = defended.resampled((1, 1, 1), (2, 2, 2))
    assert isinstance(other, DefendedVictim)
    assert torch.equal(other(image), victim.resampled((1, 1, 1), (2, 2, 2))(Purify("median")(image)))
    assert torch.equal(other.undefended(image), victim.resampled((1, 1, 1), (2, 2, 2))(image))
    assert torch.equal(defended(image), victim(Purify("median")(image)))


def test_a_denoiser_with_buffers_is_left_as_it_was() -> None:
    denoiser = nn.BatchNorm3d(4)
    victim = purified(Victim(nn.Conv3d(4, 4, 1)), denoiser)
    before = denoiser.running_mean.clone()
    victim(torch.rand(2, 4, 5, 5, 5))
    assert torch.equal(denoiser.running_mean, before)
    assert denoiser.training
