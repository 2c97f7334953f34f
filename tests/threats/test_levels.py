"""Stored values: rounding keeps budget, bounds, support and type limits; modalities with budgets of their own."""

from __future__ import annotations

import pytest
import torch
from oracles import make_image

from monai_adv.errors import ConfigError
from monai_adv.threats import L2, LInf, Parametric, create_threat


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scanner_image(batch: int = 4, dims: int = 3, slope: float = 1.0, inter: float = 0.0, dtype=torch.float64):
    """Values of an int16 file: a background of stored 0, other voxels anywhere."""
    return ((make_image(batch, dims) * 40).round() * slope + inter).to(dtype)


RULES = ["int16", {"dtype": "int16", "slope": 0.5, "inter": 7.0}, {"dtype": "int32", "slope": [0.25, 1, 2, 3]}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES, ids=["whole", "slope", "slope per channel"])
@pytest.mark.parametrize(("kind", "eps"), [(LInf, 9.7), (L2, 60.0)])
def test_a_stored_image_is_allowed_and_holds_levels(kind, eps, rule, dtype):
    slope = rule.get("slope", 1.0) if isinstance(rule, dict) else 1.0
    inter = rule.get("inter", 0.0) if isinstance(rule, dict) else 0.0
    slope = torch.as_tensor(slope, dtype=torch.float64).view(1, -1, 1, 1, 1)
    image = ((make_image(4, 3) * 40).round() * slope + inter).to(dtype)
    ball = kind(eps, units="absolute", quantize=rule).bind(image, image != 0)
    for seed in range(5):
        wanted = ball.random(generator(seed)) if seed else ball.project(image + 1000)
        stored = ball.store(wanted)
        number = (stored.double() - inter) / slope
        assert stored.dtype == dtype
        assert (number - number.round()).abs().max() < 1e-4
        assert (ball.size(stored) <= eps * (1 + 1e-6)).all()
        assert torch.equal(stored[image == 0], image[image == 0])
        assert (stored.amax((2, 3, 4)) <= image.amax((2, 3, 4))).all()
        assert (stored != image).any()
        assert torch.equal(ball.store(stored), stored)


def test_rounding_is_to_the_nearest_level_inside_the_budget():
    image = torch.tensor([[[100.0, 200.0, 300.0, 1.0, 1000.0]]])
    ball = LInf(2.5, units="absolute", quantize="int16").bind(image)
    wanted = torch.tensor([[[100.4, 202.5, 297.5, 1.0, 1000.0]]])
    assert ball.store(wanted).tolist() == [[[100.0, 202.0, 298.0, 1.0, 1000.0]]]


def test_an_l2_perturbation_that_rounding_would_lengthen_is_cut_towards_the_clean_image():
    image = torch.tensor([[[10.0, 20.0, 30.0, 0.0]], [[10.0, 20.0, 30.0, 0.0]]])
    ball = L2(3.0, units="absolute", bounds=None, quantize="int16").bind(image)
    wanted = image + torch.tensor([[[1.6, 1.6, 1.7, 0.0]], [[1.6, 1.6, 0.2, 0.0]]])
    assert (ball.store(wanted) - image).tolist() == [[[1.0, 1.0, 1.0, 0.0]], [[2.0, 2.0, 0.0, 0.0]]]


def test_the_type_has_limits():
    image = torch.tensor([[[0.0, 250.0, 3.0]]])
    ball = LInf(20.0, units="absolute", bounds=None, support="all", quantize="uint8").bind(image)
    assert ball.store(ball.project(image + 20)).tolist() == [[[20.0, 255.0, 23.0]]]
    assert ball.store(ball.project(image - 20)).tolist() == [[[0.0, 230.0, 0.0]]]


@pytest.mark.parametrize("slope", [2.956862688064575, 0.1, 1 / 3])
def test_the_types_largest_number_may_be_stored_whatever_the_slope(slope):
    clean = torch.tensor([0.0, 12.0, 254.0, 255.0]).mul(slope).view(1, 1, 4)  # as a reader gives it: float32
    threat = create_threat("linf", eps=3 * slope, units="absolute", quantize={"dtype": "uint8", "slope": slope})
    stored = threat.bind(clean).project(clean + 2 * slope) / slope
    torch.testing.assert_close(stored, torch.tensor([0.0, 14.0, 255.0, 255.0]).view(1, 1, 4))


def test_without_levels_nothing_is_rounded():
    image = scanner_image()
    ball = LInf(0.3, units="absolute").bind(image)
    wanted = ball.random(generator())
    assert ball.store(wanted) is wanted


@pytest.mark.parametrize("kind", [LInf, L2])
def test_no_budget_no_change(kind):
    image = scanner_image(slope=0.5, inter=7.0, dtype=torch.float32)
    ball = kind(0.0, units="absolute", quantize=RULES[1]).bind(image)
    assert torch.equal(ball.store(ball.project(image + 5)), image)


def test_a_physical_change_is_stored_too():
    image = scanner_image(1)
    ball = Parametric(0.3, quantize="int16").bind(image)
    stored = ball.store(image * 1.037)
    assert torch.equal(stored, torch.where(image != 0, (image * 1.037).round(), image))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("float16", "is not understood"),
        ({"slope": 1.0}, "is not understood"),
        ({"dtype": "int16", "scale": 1.0}, "is not understood"),
        ({"dtype": "int16", "slope": 0.0}, "slope must be > 0"),
    ],
)
def test_impossible_quantisations(rule, message):
    with pytest.raises(ConfigError, match=message):
        LInf(0.1, quantize=rule)


def test_an_image_that_is_not_stored_in_that_type():
    with pytest.raises(ConfigError, match="voxels of the clean image are no int16 values"):
        LInf(0.1, quantize="int16").bind(make_image())
    with pytest.raises(ConfigError, match="no uint8 values"):
        LInf(0.1, quantize="uint8").bind(scanner_image())
    with pytest.raises(ConfigError, match="one number or one per channel"):
        LInf(0.1, quantize={"dtype": "int16", "slope": [1, 1]}).bind(scanner_image())


# ---------------------------------------------------------------------------- budgets of the modalities
def test_each_modality_has_its_own_budget_in_scanner_units():
    image = scanner_image()
    ball = LInf(1.0, units="absolute", proportions=(3, 0, 5.5, 1), bounds=None).bind(image)
    delta = (ball.project(image + 100) - image).abs().amax((0, 2, 3, 4))
    assert delta.tolist() == [3, 0, 5.5, 1]
    assert not ball.mask[:, 1].any()
    assert ball.size(ball.project(image + 100)).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("units", ["std", "range"])
def test_proportions_multiply_the_relative_unit(units):
    image = scanner_image()
    plain = LInf(0.1, units=units).bind(image).scale
    assert torch.allclose(
        LInf(0.1, units=units, proportions=(1, 2, 3, 4)).bind(image).scale.flatten(1),
        plain.flatten(1) * torch.tensor([1, 2, 3, 4]),
    )


@pytest.mark.parametrize("proportions", [(1, 1), (1, -1, 1, 1), (1, float("inf"), 1, 1), ("a", 1, 1, 1), 3])
def test_impossible_proportions(proportions):
    with pytest.raises(ConfigError, match="proportions"):
        LInf(0.1, proportions=proportions).bind(scanner_image())


def test_a_physical_change_has_one_budget():
    with pytest.raises(ConfigError, match="a physical change has one"):
        create_threat("parameter", eps=0.1, proportions=(1, 1, 1, 1))


def test_the_description_says_both():
    threat = LInf(1, units="absolute", proportions=(10, 20, 30, 40), quantize="int16")
    assert threat.describe() == "L-inf <= 1 absolute, times [10.0, 20.0, 30.0, 40.0], stored as int16"
    assert threat.with_eps(2).describe().startswith("L-inf <= 2 absolute, times")
