"""Threats: units, projection, steps, random points, noise; per sample, per channel, bit for bit where promised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import make_image

from monai_adv.errors import ConfigError
from monai_adv.threats import L2, LInf, create_threat, foreground, unit_scale

NORMS = ["linf", "l2"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(image: torch.Tensor, size: float = 3.0, seed: int = 9) -> torch.Tensor:
    return image + size * torch.randn(image.shape, generator=generator(seed), dtype=image.dtype)


# ------------------------------------------------------------------------------------------------- units
@pytest.mark.parametrize("units", ["std", "range", "absolute"])
@pytest.mark.parametrize("dims", [2, 3])
def test_units_by_numpy(units, dims):
    image = make_image(4, dims)
    scale = unit_scale(image, foreground(image), units)
    assert scale.shape == (4, 4, *[1] * dims)
    for b in range(4):
        for c in range(4):
            values = image[b, c][image[b, c] != 0].numpy()
            low, high = np.percentile(values, [0.5, 99.5])
            expected = {"std": np.std(values), "range": high - low, "absolute": 1.0}[units]
            assert scale[b, c].item() == pytest.approx(expected, rel=1e-12)


def test_units_are_taken_over_the_support():
    image = make_image(2)
    mask = torch.zeros(2, 1, *image.shape[2:], dtype=torch.bool)
    mask[..., :2] = True
    scale = LInf(0.1).bind(image, mask).scale
    assert scale[1, 2].item() == pytest.approx(image[1, 2][..., :2].std(correction=0).item(), rel=1e-12)


def test_float32_statistics_of_a_scanner_image():
    image = 20000 + torch.randn(1, 1, 300_000, generator=generator())
    exact = image.double().std(correction=0).item()
    assert unit_scale(image, image != 0, "std").item() == pytest.approx(exact, rel=1e-6)


def test_a_constant_channel_cannot_change_in_relative_units():
    image = make_image(1)
    image[:, 2] = 7
    ball = LInf(0.5).bind(image)
    assert not ball.mask[:, 2].any()
    assert ball.mask[:, 1].any()
    noise = L2(0.5, bounds=None).bind(image)
    assert noise.size(noise.noise("sign", generator())).item() == pytest.approx(0.5, rel=1e-12)
    with pytest.raises(ConfigError, match="constant, so that one std of it is 0"):
        LInf(0.5, channels=(2,)).bind(image)
    assert LInf(0.5, units="absolute", channels=(2,)).bind(image).mask.any()


# ------------------------------------------------------------------------------------------- where and what
def test_support_rules():
    image = make_image(2)
    assert torch.equal(LInf(0.1).bind(image).mask, image != 0)
    assert LInf(0.1, support="all").bind(image).mask.all()
    one = torch.zeros(2, 1, *image.shape[2:])
    one[..., 0] = 1
    assert torch.equal(LInf(0.1).bind(image, one).mask, one.bool().expand_as(image))
    each = torch.rand(image.shape, generator=generator()) < 0.5
    assert torch.equal(LInf(0.1).bind(image, each).mask, each)


@pytest.mark.parametrize("channels", [(1,), (-1,), (0, 2)])
def test_only_the_chosen_modalities(channels):
    image = make_image(2)
    ball = LInf(0.1, channels=channels).bind(image)
    allowed = [c in [k % 4 for k in channels] for c in range(4)]
    assert ball.mask.amax((0, 2, 3, 4)).tolist() == allowed
    # the other modalities do not change what a unit is
    torch.testing.assert_close(ball.scale, LInf(0.1).bind(image).scale)


@pytest.mark.parametrize(
    ("arguments", "support", "message"),
    [
        ({"channels": (4,)}, None, r"channels \(4,\) do not exist in an image of 4"),
        ({"channels": (-5,)}, None, "do not exist"),
        ({}, (2, 1, 9, 9, 9), "does not fit the image"),
        ({}, (2, 3, 4, 5, 6), "does not fit the image"),
        ({}, (1, 1, 4, 5, 6), "does not fit the image"),
        ({"bounds": (0.0, 1.0)}, None, "the clean image leaves the bounds"),
        ({"bounds": (9.0, -9.0)}, None, "lower end above"),
        ({"bounds": ((-9.0, -9.0), 99.0)}, None, "one number or one per channel"),
    ],
)
def test_what_does_not_fit_the_image(arguments, support, message):
    with pytest.raises(ConfigError, match=message):
        LInf(0.1, **arguments).bind(make_image(2), None if support is None else torch.ones(support))


def test_an_empty_support_names_the_sample():
    mask = torch.ones(3, 1, 4, 5, 6)
    mask[1] = 0
    with pytest.raises(ConfigError, match=r"no voxel of sample \[1\] may change: its support is empty"):
        LInf(0.1).bind(make_image(3), mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -0.1}, "eps must be"),
        ({"eps": float("nan")}, "eps must be"),
        ({"eps": True}, "eps must be"),
        ({"eps": "0.1"}, "eps must be"),
        ({"eps": 0.1, "units": "255"}, "units '255' are unknown"),
        ({"eps": 0.1, "support": "brain"}, "support 'brain' is unknown"),
        ({"eps": 0.1, "bounds": "unit"}, "bounds 'unit' are unknown"),
        ({"eps": 0.1, "bounds": (1.0,)}, "two ends"),
        ({"eps": 0.1, "channels": ()}, "channels is empty"),
        ({"eps": 0.1, "color": 1}, "threat linf"),
    ],
)
def test_impossible_threats(arguments, message):
    with pytest.raises(ConfigError, match=message):
        create_threat("linf", **arguments)


def test_by_name():
    assert create_threat("l2", eps=1, units="range", channels=[0]) == L2(1, "range", (0,))
    with pytest.raises(ConfigError, match="norm 'l1' is unknown: use one of linf, l2"):
        create_threat("l1", eps=1)


def test_description_and_other_budget():
    threat = LInf(0.1, channels=(1, 3))
    assert threat.describe() == "L-inf <= 0.1 std, channels [1, 3]"
    assert threat.with_eps(0.2) == LInf(0.2, channels=(1, 3))
    assert L2(2.0, "absolute").describe() == "L2 <= 2 absolute"
    with pytest.raises(ConfigError, match="eps"):
        threat.with_eps(-1)


# ------------------------------------------------------------------------------------------------ bounds
@pytest.mark.parametrize("norm", NORMS)
def test_bounds_of_the_data_are_per_sample_and_channel(norm):
    image = make_image(4)
    far = create_threat(norm, eps=1e3, units="absolute").bind(image).project(moved(image, 50))
    dims = (2, 3, 4)
    assert torch.equal(far.amax(dims), image.amax(dims))
    assert torch.equal(far.amin(dims), image.amin(dims))


@pytest.mark.parametrize("norm", NORMS)
def test_bounds_given_per_channel(norm):
    image = make_image(2)
    high = [20.0, 30.0, 40.0, 50.0]
    far = create_threat(norm, eps=1e4, units="absolute", bounds=(-15.0, high)).bind(image).project(moved(image, 500))
    assert far.amin().item() == -15
    assert far.amax((0, 2, 3, 4)).tolist() == high


# -------------------------------------------------------------------------------------------- projection
@pytest.mark.parametrize("units", ["std", "range", "absolute"])
@pytest.mark.parametrize("dims", [2, 3])
def test_linf_projection_by_numpy(units, dims):
    image = make_image(4, dims)
    ball = LInf(0.3, units, bounds=None).bind(image)
    far = moved(image)
    radius = 0.3 * ball.scale.numpy()
    expected = np.where(image != 0, np.clip(far.numpy(), image.numpy() - radius, image.numpy() + radius), image)
    np.testing.assert_array_equal(ball.project(far).numpy(), expected)


@pytest.mark.parametrize("units", ["std", "range", "absolute"])
@pytest.mark.parametrize("dims", [2, 3])
def test_l2_projection_by_numpy(units, dims):
    image = make_image(4, dims)
    ball = L2(2.0, units, bounds=None).bind(image)
    far = moved(image)
    found = ball.project(far)
    for b in range(4):
        u = np.where(image[b] != 0, (far - image)[b] / ball.scale[b], 0)
        expected = image[b].numpy() + u * 2.0 / np.linalg.norm(u) * ball.scale[b].numpy()
        np.testing.assert_allclose(found[b].numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
def test_projection_keeps_what_is_inside_bit_for_bit(norm, dtype):
    image = make_image(4, dtype=dtype)
    ball = create_threat(norm, eps=500.0, units="absolute", bounds=None).bind(image)
    near = torch.where(image != 0, moved(torch.zeros_like(image)), image)
    assert not torch.equal(image + (near - image), near)  # what a needless shrinking by a factor of 1 would do
    assert torch.equal(ball.project(near), near)
    assert torch.equal(ball.project(image), image)
    once = ball.project(moved(image, 2000))
    torch.testing.assert_close(ball.project(once), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("units", ["std", "range", "absolute"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_operation_stays_inside_and_keeps_the_type(norm, units, dtype):
    image = make_image(4, dtype=dtype)
    ball = create_threat(norm, eps=0.7, units=units).bind(image)
    results = {
        "project": ball.project(moved(image)),
        "step": ball.step(image, moved(image), 5.0),
        "random": ball.random(generator()),
        "noise": ball.noise("sign", generator()),
    }
    for name, found in results.items():
        assert found.dtype == dtype, name
        assert torch.equal(found[image == 0], image[image == 0]), name
        assert ball.size(found).max() <= 0.7 * (1 + (1e-12 if dtype == torch.float64 else 1e-5)), name
        assert (found <= image.amax((2, 3, 4), keepdim=True)).all(), name
        assert (found >= image.amin((2, 3, 4), keepdim=True)).all(), name
        assert (ball.size(found) > 0.01).all(), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_batch_is_its_members(norm, dims):
    """With B = C = D = 4 a view of (B,) over the wrong axis broadcasts without an error."""
    image = make_image(4, dims) * torch.arange(1, 5).view(-1, *[1] * (dims + 1))
    threat = create_threat(norm, eps=0.4)
    far, gradient = moved(image), moved(image, seed=3)
    together = threat.bind(image)
    for b in range(4):
        alone = threat.bind(image[b : b + 1])
        one = slice(b, b + 1)
        torch.testing.assert_close(together.project(far)[one], alone.project(far[one]), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(
            together.step(image, gradient, 0.3)[one], alone.step(image[one], gradient[one], 0.3), rtol=1e-14, atol=1e-14
        )
        torch.testing.assert_close(together.size(far)[one], alone.size(far[one]), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_no_budget_no_change(norm):
    image = make_image(4, dtype=torch.float32)
    ball = create_threat(norm, eps=0).bind(image)
    for found in (
        ball.project(moved(image)),
        ball.step(image, moved(image), 0.0),
        ball.random(generator()),
        ball.noise("sign", generator()),
        ball.noise("gaussian", generator()),
    ):
        assert torch.equal(found, image)


# ------------------------------------------------------------------------------------------------- steps
def test_linf_step_is_the_sign_in_units():
    image = make_image(2)
    gradient = moved(torch.zeros_like(image))
    ball = LInf(1.0, bounds=None).bind(image)
    expected = torch.where(image != 0, image + 0.25 * ball.scale * gradient.sign(), image)
    torch.testing.assert_close(ball.step(image, gradient, 0.25), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(ball.step(image, 1e-30 * gradient, 0.25), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-20, 1.0, 1e20])
def test_l2_step_has_its_size_whatever_the_gradient_is(magnitude, dtype):
    image = make_image(3, dtype=dtype)
    ball = L2(1.0, bounds=None).bind(image)
    gradient = magnitude * torch.ones_like(image)
    found = ball.step(image, gradient, 0.25)
    torch.testing.assert_close(ball.size(found), torch.full((3,), 0.25, dtype=torch.float64), rtol=1e-4, atol=0)


def test_l2_step_is_the_steepest_in_units():
    """Among all steps of that size in units, none raises a linear function more."""
    image = make_image(1)
    ball = L2(1.0, bounds=None).bind(image)
    gradient = moved(torch.zeros_like(image))
    best = (gradient * (ball.step(image, gradient, 0.5) - image)).sum()
    bound = 0.5 * (torch.where(image != 0, gradient * ball.scale, 0.0)).norm()  # Cauchy and Schwarz
    torch.testing.assert_close(best, bound, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_moves_nothing(norm):
    image = make_image(2)
    ball = create_threat(norm, eps=1.0).bind(image)
    gradient = torch.zeros_like(image)
    assert torch.equal(ball.step(image, gradient, 0.5), image)
    gradient[1] = 1  # a dead sample does not stop the others
    found = ball.step(image, gradient, 0.5)
    assert torch.equal(found[0], image[0])
    assert not torch.equal(found[1], image[1])


def test_a_gradient_outside_the_support_does_not_shorten_the_step():
    image = make_image(1)
    gradient = torch.where(image != 0, 1.0, 1e6).double()
    ball = L2(1.0, bounds=None).bind(image)
    assert ball.size(ball.step(image, gradient, 0.5)).item() == pytest.approx(0.5, rel=1e-12)


# ------------------------------------------------------------------------------------- randomness and noise
@pytest.mark.parametrize("norm", NORMS)
def test_random_points_are_uniform_in_the_ball(norm):
    image = torch.ones(4000, 1, 3, dtype=torch.float64)
    ball = create_threat(norm, eps=2.0, units="absolute", bounds=None).bind(image)
    found = ball.random(generator())
    share = (ball.size(found) / 2.0) ** 3  # the volume inside the point's radius
    assert share.max() <= 1
    assert share.mean().item() == pytest.approx(0.5, abs=0.02)
    assert share.var().item() == pytest.approx(1 / 12, abs=0.01)
    assert (found - 1).mean().abs() < 0.05


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("draw", ["random", "sign", "gaussian"])
def test_numbers_come_from_the_generator_alone(norm, draw):
    image = make_image(2)
    ball = create_threat(norm, eps=0.5).bind(image)

    def sample(seed: int) -> torch.Tensor:
        return ball.random(generator(seed)) if draw == "random" else ball.noise(draw, generator(seed))

    before = torch.get_rng_state()
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("units", ["std", "range", "absolute"])
def test_linf_sign_noise_uses_the_whole_budget_everywhere(units):
    image = make_image(4)
    ball = LInf(0.3, units, bounds=None).bind(image)
    found = (ball.noise("sign", generator()) - image) / ball.scale
    torch.testing.assert_close(found.abs()[image != 0], torch.full_like(found[image != 0], 0.3))
    assert 0.4 < (found[image != 0] > 0).double().mean() < 0.6


def test_linf_gaussian_noise_has_the_rms_of_sign_noise():
    image = torch.ones(2, 2, 20_000, dtype=torch.float64)
    ball = LInf(0.3, "absolute", bounds=None).bind(image)
    rms = (ball.noise("gaussian", generator()) - image).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, 0.3), rtol=0.03, atol=0)
    assert ball.size(ball.noise("gaussian", generator())).max() > 0.9  # and is not clipped to the budget


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("units", ["std", "range", "absolute"])
def test_l2_noise_has_exactly_the_length(kind, units):
    image = make_image(4)
    ball = L2(1.5, units, bounds=None).bind(image)
    found = ball.noise(kind, generator())
    torch.testing.assert_close(ball.size(found), torch.full((4,), 1.5, dtype=torch.float64), rtol=1e-12, atol=0)
    parts = ((found - image) / ball.scale).abs()[0][image[0] != 0]
    assert (parts.std() < 1e-12) == (kind == "sign")


def test_an_unknown_noise():
    with pytest.raises(ValueError, match="'salt' is unknown"):
        LInf(0.1).bind(make_image(1)).noise("salt")


# ------------------------------------------------------------------------------------- without a norm's limit
@pytest.mark.parametrize("norm", NORMS)
def test_an_unbounded_threat_keeps_bounds_and_support(norm):
    image = torch.tensor([[[0.0, 1.0, 3.0, 2.0]], [[0.0, 5.0, 9.0, 7.0]]], dtype=torch.float64)
    ball = create_threat(norm, eps=float("inf")).bind(image)
    far = ball.project(image + torch.tensor([5.0, -50.0, 50.0, 0.0], dtype=torch.float64))
    assert far.tolist() == [[[0.0, 0.0, 3.0, 2.0]], [[0.0, 0.0, 9.0, 7.0]]]
    assert "unbounded" in create_threat(norm, eps=float("inf")).describe()
    free = create_threat(norm, eps=float("inf"), bounds=None).bind(image)
    assert torch.equal(free.project(image - 1e9)[image != 0], (image - 1e9)[image != 0])
    for draw in (free.random, lambda: free.noise("sign")):
        with pytest.raises(ConfigError, match="has no size: give eps"):
            draw()


def test_a_channel_that_cannot_change_stays_under_an_unbounded_threat():
    """A constant channel has no standard deviation, and infinity times nothing is no limit."""
    image = torch.tensor([[[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]]], dtype=torch.float64)
    ball = create_threat("linf", eps=float("inf"), bounds=None).bind(image)
    moved = ball.project(image + 7)
    assert torch.equal(moved[:, 0], image[:, 0] + 7)
    assert torch.equal(moved[:, 1], image[:, 1])


def test_a_parametric_threat_keeps_support_and_given_bounds_only():
    image = torch.tensor([[[0.0, 1.0, 3.0]]], dtype=torch.float64)
    threat = create_threat("parameter", eps=4.0, units="mm")
    assert threat.describe() == "parameters <= 4 mm"
    assert threat.bind(image).project(image * 9 + 1).tolist() == [[[0.0, 10.0, 28.0]]]
    bounded = create_threat("parameter", eps=4.0, units="mm", bounds=(0.0, 12.0)).bind(image)
    assert bounded.project(image * 9 + 1).tolist() == [[[0.0, 10.0, 12.0]]]
    with pytest.raises(NotImplementedError, match="in its parameters"):
        bounded.step(image, image, 1.0)
    with pytest.raises(ConfigError, match="must be finite"):
        create_threat("parameter", eps=float("inf"))
