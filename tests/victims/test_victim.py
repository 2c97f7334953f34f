"""Victim: the deployed pipeline, differentiable from end to end, left as it was found."""

from __future__ import annotations

import functools

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer, sliding_window_inference
from oracles import SHAPES, make_image, make_victim, out_channels, seeded, smooth_network
from torch import nn

from monai_adv import attacks
from monai_adv.errors import ConfigError, MonaiAdvError, NonFiniteError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import Victim


def zscore(image: torch.Tensor) -> torch.Tensor:
    """NormalizeIntensity(nonzero=True, channel_wise=True), out of place and channel by channel."""
    samples = []
    for sample in image:
        channels = []
        for channel in sample:
            mask = (channel != 0).detach()
            values = channel[mask]
            normal = torch.zeros_like(channel)
            normal[mask] = (values - values.mean()) / values.std(correction=0)
            channels.append(normal)
        samples.append(torch.stack(channels))
    return torch.stack(samples)


def plain_gradient(network: nn.Module, image: torch.Tensor, upstream: torch.Tensor, normalize=zscore) -> torch.Tensor:
    """Automatic differentiation through MONAI's own tiler, keeping every window's graph."""
    image = image.clone().requires_grad_(True)
    network.eval()
    window = (4,) * (image.ndim - 2)
    logits = sliding_window_inference(
        normalize(image), window, 2, lambda x: network(x).clone(), overlap=0.5, mode="gaussian"
    )
    return torch.autograd.grad((logits * upstream).sum(), image)[0]


def victim_gradient(victim: Victim, image: torch.Tensor, upstream: torch.Tensor, support=None) -> torch.Tensor:
    with victim.attacked(support, image):
        image = image.clone().requires_grad_(True)
        return torch.autograd.grad((victim(image) * upstream).sum(), image)[0]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("support", ["none", "foreground", "lesion", "everything"])
def test_the_gradient_is_that_of_the_deployed_pipeline(dims, batch, support):
    """To 1e-12, also where the support is smaller than the voxels that the normalisation couples."""
    image = make_image(batch, dims) + 0.0
    image = torch.where(image != 0, image + 3, image)  # scanner units: a mean that matters
    victim = make_victim("windows", dims=dims)
    upstream = torch.randn(batch, 4, *SHAPES[dims], generator=torch.Generator().manual_seed(5), dtype=image.dtype)
    lesion = torch.zeros_like(image, dtype=torch.bool)
    lesion[..., :2, :1] = True  # the last windows hold no such voxel
    mask = {"none": None, "foreground": image != 0, "lesion": lesion & (image != 0), "everything": image == image}
    chosen = mask[support]
    expected = plain_gradient(victim.network, image, upstream)
    found = victim_gradient(victim, image, upstream, chosen)
    where = torch.ones_like(lesion) if chosen is None else chosen
    torch.testing.assert_close(found[where], expected[where], rtol=1e-12, atol=1e-12)
    assert expected[where].abs().max() > 1e-3


def test_with_an_unknown_preprocessing_no_window_is_left_out():
    """A mean over the volume couples all voxels; a preprocessing without gradient_support gets every window."""
    network = smooth_network()
    inferer = GradientSlidingWindowInferer((4, 4, 4), 2, overlap=0.5, mode="gaussian", keep_windows=0)

    def shift(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean((1, 2, 3, 4), keepdim=True)

    victim = Victim(network, inferer, preprocessing=shift)
    image = make_image(1)
    support = torch.zeros_like(image, dtype=torch.bool)
    support[..., :1, :1] = True
    upstream = torch.randn_like(image)
    found = victim_gradient(victim, image, upstream, support)
    expected = plain_gradient(network, image, upstream, shift)
    torch.testing.assert_close(found[support], expected[support], rtol=1e-12, atol=1e-12)


def test_windows_without_support_get_no_backward_pass():
    network = smooth_network()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    image = make_image(1)
    inferer = GradientSlidingWindowInferer((4, 4, 4), 1, overlap=0, keep_windows=0)
    upstream = torch.ones_like(image)
    corner = torch.zeros_like(image, dtype=torch.bool)
    corner[0, 0, 0, 0, 0] = True
    counts = []
    for support in (corner, torch.ones_like(corner)):
        calls.clear()
        victim_gradient(Victim(network, inferer), image, upstream, support)
        counts.append(len(calls))
    windows = 1 * 2 * 2
    assert counts == [windows + 1, 2 * windows]


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["linear", "smooth", "windows"])
@pytest.mark.parametrize("dims", [2, 3])
def test_shapes_predictions_and_that_the_network_is_left_alone(kind, head, dims):
    victim = make_victim(kind, head, dims)
    before = {name: value.clone() for name, value in victim.network.state_dict().items()}
    image = make_image(2, dims)
    logits = victim(image)
    assert logits.shape == (2, out_channels(head), *SHAPES[dims])
    assert torch.equal(victim.predict(image), victim.head.predict(logits))
    assert victim.network.training
    assert all(torch.equal(before[k], v) for k, v in victim.network.state_dict().items())
    assert all(parameter.requires_grad for parameter in victim.network.parameters())


def test_the_forward_pass_is_monais():
    image, victim = make_image(2), make_victim("windows")
    logits = victim(image)
    deployed = SlidingWindowInferer((4, 4, 4), 2, overlap=0.5, mode="gaussian")
    with torch.no_grad():
        expected = deployed(zscore(image), victim.network.eval())
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_mode_of_the_caller_counts():
    victim, image = make_victim("smooth"), make_image(1).requires_grad_(True)
    assert victim(image).requires_grad
    with torch.no_grad():
        assert not victim(image).requires_grad
    assert not victim.predict(image).requires_grad


def test_a_metatensor_gives_plain_logits_of_the_same_values():
    victim, image = make_victim("windows"), make_image(2)
    logits = victim(MetaTensor(image))
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, victim(image))


@pytest.mark.parametrize("kind", ["linear", "smooth", "windows"])
def test_a_wrong_channel_count_is_explained(kind):
    with pytest.raises(ConfigError, match="takes 4 channels but the data have 3"):
        make_victim(kind)(make_image(1, channels=3))


def test_a_network_whose_first_layer_is_not_its_entrance_is_not_refused():
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv3d(6, 4, 1)
            self.stem = nn.Conv3d(4, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x))

    victim = Victim(seeded(HeadFirst))
    assert victim(make_image(1)).shape == (1, 4, *SHAPES[3])
    with pytest.raises(RuntimeError, match="expected input"):
        victim(make_image(1, channels=6))


def test_other_errors_of_the_network_pass_through():
    def explode(*_: object) -> None:
        raise RuntimeError("out of memory")

    network = smooth_network()
    network.register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="out of memory"):
        Victim(network)(make_image(1))
    assert network.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_are_an_error(value):
    network = smooth_network()
    network[-1].bias.data[2] = value
    with pytest.raises(NonFiniteError, match="NaN or infinite logits"):
        Victim(network)(make_image(1))
    assert network.training


class Deep(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.network, self.kind = smooth_network(), kind

    def forward(self, x: torch.Tensor):
        z = self.network(x)
        return {"seg": z, "extra": z} if self.kind is dict else self.kind([z, z[:, :1]])


@pytest.mark.parametrize("kind", [tuple, list])
def test_of_several_outputs_the_first_is_the_logits(kind):
    image = make_image(1)
    assert torch.equal(Victim(Deep(kind).double())(image), Victim(smooth_network())(image))


def test_a_dictionary_is_refused():
    with pytest.raises(ConfigError, match="dictionary"):
        Victim(Deep(dict).double())(make_image(1))


def test_postprocessing_works_on_the_logits():
    image, network = make_image(1), smooth_network()
    assert torch.equal(Victim(network, postprocessing=lambda z: 2 * z)(image), 2 * Victim(network)(image))


def test_a_denoiser_before_the_network_is_protected_too():
    denoiser = seeded(functools.partial(nn.BatchNorm3d, 4))
    before = denoiser.running_mean.clone()
    victim = Victim(smooth_network(), preprocessing=denoiser)
    image = make_image(2).requires_grad_(True)
    victim(image).sum().backward()
    assert torch.equal(denoiser.running_mean, before)
    assert denoiser.training
    assert denoiser.weight.grad is None
    assert denoiser.weight.requires_grad


def test_attacked_protects_once_and_ends_also_after_an_error():
    victim = make_victim("smooth")

    def attack() -> None:
        with victim.attacked():
            assert not victim.network.training
            victim(make_image(1))
            assert not victim.network.training  # the inner call did not restore early
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        attack()
    assert victim.network.training
    victim(make_image(1))
    assert victim.network.training


def test_attacked_protects_once_for_all_its_passes():
    class Counts(nn.Sequential):
        changes = 0

        def train(self, mode: bool = True) -> Counts:
            self.changes += 1
            return super().train(mode)

    network = Counts(*smooth_network())
    victim = Victim(network)
    with victim.attacked():
        for _ in range(3):
            victim(make_image(1))
    assert network.changes == 1


def test_a_module_that_forces_training_is_reported():
    class Forces(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self[1].training = True
            return super().forward(x)

    network = Forces(*smooth_network())
    before = network[1].running_mean.clone()
    with pytest.raises(MonaiAdvError, match="running_mean"):
        Victim(network)(make_image(2))
    assert torch.equal(network[1].running_mean, before)


def test_the_support_of_normalisation_is_what_it_couples():
    image = torch.tensor([[[0.0, 0.0, 2.0, 5.0]]])
    support = torch.tensor([[[True, False, False, True]]])
    assert NormalizeNonzeroBatch.gradient_support(image, support).tolist() == [[[True, False, True, True]]]


class Cropped:
    """A preprocessing with a grid of its own: half of the volume, and a note of the affines it was given."""

    changes_grid = True

    def __init__(self) -> None:
        self.seen: list[object] = []

    def prepare(self, image: torch.Tensor, affine: torch.Tensor | None = None):
        self.seen.append(affine)
        return image[..., :3], lambda logits: nn.functional.pad(logits, (0, image.shape[-1] - 3))


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_logits_come_back_to_the_images_grid_and_what_was_not_seen_is_background(head):
    image, network = make_image(2).requires_grad_(True), smooth_network(classes=out_channels(head))
    logits = Victim(network, head=head, preprocessing=Cropped())(image)
    assert logits.shape == (2, out_channels(head), *SHAPES[3])
    assert torch.equal(logits[..., :3], Victim(network, head=head)(image[..., :3]))
    victim = Victim(network, head=head)
    probabilities = victim.head.probabilities(logits[..., 3:])
    if head == "softmax":
        assert probabilities[:, 0].min() > 1 - 1e-8
    else:
        assert probabilities.max() < 1e-8
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    assert gradient[..., :3].any()
    assert not gradient[..., 3:].any()


def test_the_affine_comes_from_the_call_the_image_or_the_attack():
    own, given, held = (torch.diag(torch.tensor([s, s, s, 1.0], dtype=torch.float64)) for s in (1.0, 2.0, 3.0))
    preprocessing, image = Cropped(), make_image(1)
    victim = Victim(smooth_network(), preprocessing=preprocessing)
    victim(MetaTensor(image, affine=own))
    victim(MetaTensor(image, affine=own), given)
    victim.predict(image, given)
    with victim.attacked(affine=held):
        victim(image)
        with victim.attacked():
            victim(image)
    victim(image)
    expected = [own, given, given, held, held, None]
    assert len(preprocessing.seen) == len(expected)
    for found, wanted in zip(preprocessing.seen, expected):
        assert (found is None and wanted is None) or torch.equal(torch.as_tensor(found), wanted)


def test_an_attack_hands_the_affine_on():
    preprocessing, affine = Cropped(), torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    victim = Victim(smooth_network(), preprocessing=preprocessing)
    attack = attacks.create("fgsm", eps=0.1, label_source="prediction")
    attack(victim, MetaTensor(make_image(1), affine=affine))
    attack(victim, make_image(1), affine=affine)
    assert len(preprocessing.seen) >= 4
    assert all(torch.equal(seen[0], affine) for seen in preprocessing.seen)


def test_a_victim_with_a_grid_of_its_own_is_not_resampled():
    with pytest.raises(ConfigError, match="already brings images to the network's grid"):
        Victim(smooth_network(), preprocessing=Cropped()).resampled((1.0, 1.0, 1.0), (2.0, 2.0, 2.0))
    assert Victim(smooth_network()).resampled((1.0, 1.0, 1.0), (2.0, 2.0, 2.0))(make_image(1)).shape[2:] == SHAPES[3]


def test_its_name_shows():
    text = repr(Victim(smooth_network(), name="distilled", head="sigmoid"))
    assert "distilled" in text
    assert "sigmoid" in text


def test_a_victim_is_deterministic_unless_its_preprocessing_says_otherwise():
    class Drawn:
        random = True

        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

        def reseed(self, seed: int) -> None:
            self.generator.manual_seed(seed)

    image = make_image(1)
    plain, drawn = make_victim("windows"), Victim(smooth_network(), preprocessing=Drawn())
    assert (plain.random, drawn.random) == (False, True)
    before = plain(image)
    plain.reseed(3)
    assert torch.equal(plain(image), before)
    drawn.reseed(3)
    first = drawn(image)
    assert not torch.equal(drawn(image), first)
    drawn.reseed(3)
    assert torch.equal(drawn(image), first)


def test_a_result_asks_only_a_random_victim_again():
    image, label = make_image(2), torch.zeros(2, 1, *SHAPES[3], dtype=torch.long)
    victim = make_victim("smooth")
    result = attacks.create("fgsm", eps=0.2)(victim, image, label)

    def never(image: torch.Tensor, affine: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("another pass")

    victim.predict = never
    assert result.predicted_by(victim) is result.prediction
