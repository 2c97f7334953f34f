"""The effect of the learned synthesis: its limits, its smoothness, and what never folds, turns negative or to brain."""

from __future__ import annotations

import math

import pytest
import torch
from warps import F64, brain, moved, places, random_image

from monai_adv.errors import ConfigError
from monai_adv.transforms.physics import Deformation, Synthesis, jacobian_determinant

GRIDS = [((60, 52), 1.0), ((40, 44), 2.0), ((36, 30), 2.5), ((26, 24, 22), 2.0), ((20, 22, 18), 2.5), ((36,) * 3, 1.0)]
NAMES = ("velocity", "log_bias", "residual")


def drawn(effect, image, spacing, magnitude=1.0, seed=0, kind="random"):
    return getattr(effect, kind)(image, spacing, magnitude, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_formula(dims):
    """B = C = 4: the moved image times the shading, plus the residual in standard deviations of the foreground."""
    shape, spacing = (8, 9, 7)[:dims], (3.0, 2.0, 4.0)[:dims]
    image = random_image(shape, batch=4, channels=4) * torch.arange(1, 5).view(-1, 1, *[1] * dims)
    image[:, :, 0] = 0
    effect = Synthesis(max_mm=4.0, knot_mm=10.0, bias_knot_mm=12.0, residual_knot_mm=9.0)
    parameters = drawn(effect, image, spacing)
    parameters["residual"] = parameters["residual"].abs()  # nothing is darkened, so nothing is kept from it
    found = moved(effect, image, parameters, spacing)
    warped = moved(Deformation(10.0), image, {"velocity": parameters["velocity"]}, spacing)
    splines = effect.splines(image, parameters, spacing)
    std = torch.stack([torch.stack([c[c != 0].std(correction=0) for c in x]) for x in image])
    expected = warped * splines["log_bias"].exp() + splines["residual"] * std.view(4, 4, *[1] * dims)
    torch.testing.assert_close(found, torch.where(warped != 0, expected, 0.0))
    fields = effect.fields(image, parameters, spacing, image != 0)
    torch.testing.assert_close(warped * fields["bias"] + fields["residual"], found)
    flow = Deformation(10.0).displacement(parameters, shape, spacing)
    assert torch.equal(fields["displacement"], flow)
    label = (image > image.mean()).long()
    assert torch.equal(
        effect.warp_label(label, parameters, spacing), Deformation(10.0).warp_label(label, parameters, spacing)
    )


@pytest.mark.parametrize(("shape", "mm"), GRIDS)
def test_nothing_folds_up_to_twice_the_limits(shape, mm):
    effect, spacing = Synthesis(), (mm,) * len(shape)
    image = torch.zeros(1, 1, *shape)
    control = effect.zeros(image, spacing)["velocity"]
    candidates = [drawn(effect, image, spacing, 2.0, seed, "control")["velocity"] for seed in range(2)]
    for period in (2, 4):  # neighbours that point at each other along every axis
        worst = control.clone()
        for axis in range(len(shape)):
            index = torch.arange(control.shape[2 + axis])
            view = [-1 if a == axis else 1 for a in range(len(shape))]
            worst[:, axis] = torch.where(index % period < period / 2, 100.0, -100.0).view(view)
        candidates += [effect.project({"velocity": sign * worst}, 2.0)["velocity"] for sign in (1, -1)]
    smallest = []
    for velocity in candidates:
        assert velocity.norm(dim=1).amax() > 15.9
        field = effect.displacement({"velocity": velocity}, shape, spacing)
        assert field.norm(dim=1).max() <= 16.0 * (1 + 1e-6)
        smallest.append(float(jacobian_determinant(field, spacing).min()))
    assert min(smallest) > 0
    assert min(smallest) < 0.5  # they are extreme


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("grid", "sign"), [(3, 1.0), (5, -1.0), (1, 1.0)])
def test_raw_fields_stay_inside_the_limits(dims, grid, sign):
    shape, spacing = (20, 24, 16)[:dims], (2.0, 2.5, 1.0)[:dims]
    image, effect = random_image(shape, batch=3, channels=2), Synthesis(knot_mm=20.0)
    generator = torch.Generator().manual_seed(0)
    raw = {n: sign * torch.rand(3, dims if n == "velocity" else 2, *[grid] * dims, generator=generator) for n in NAMES}
    raw["mu"] = torch.zeros(3, 8)  # what else a generator gives
    found = effect.from_unit(raw, image, spacing)
    assert {k: tuple(v.shape[1:]) for k, v in found.items()} == effect.shapes(image, spacing)
    assert all(v.dtype == F64 for v in found.values())
    assert (effect.size(found) <= 1).all()
    assert (effect.size(found) > 0.3).all()
    full = effect.from_unit({k: torch.full_like(v, sign) for k, v in raw.items()}, image, spacing)
    limits = effect.unit_limits()
    assert limits == {"velocity": 8.0, "log_bias": math.log(1.5), "residual": 0.5}
    assert torch.linalg.vector_norm(full["velocity"], dim=1).allclose(torch.tensor(8.0, dtype=F64))  # not sqrt(3) times
    for name in ("log_bias", "residual"):
        assert torch.equal(full[name], torch.full_like(full[name], sign * limits[name]))


@pytest.mark.parametrize("shape", [(16, 31), (8, 12, 61)])
def test_raw_fields_land_where_they_are(shape):
    image, effect = random_image(shape), Synthesis(max_mm=0, max_bias=0, residual_knot_mm=5.0)
    ramp = torch.linspace(-1, 1, 7, dtype=F64).expand(1, 2, *[4] * (len(shape) - 1), 7)  # from border to border
    parameters = effect.from_unit({"residual": ramp}, image, (1.0,) * len(shape))
    field = effect.splines(image, parameters, (1.0,) * len(shape))["residual"]
    expected = torch.linspace(-0.5, 0.5, shape[-1], dtype=F64).expand_as(field)
    inside = slice(5, -5)  # a spline keeps a straight line; beyond the border there is none
    torch.testing.assert_close(field[..., inside], expected[..., inside], rtol=0, atol=1e-9)


def test_the_slope_of_raw_fields():
    image, effect = random_image((5, 6)), Synthesis(knot_mm=4.0, residual_knot_mm=4.0)
    generator = torch.Generator().manual_seed(1)
    raw = [torch.rand(1, 2, 3, 2, generator=generator, dtype=F64) - 0.5 for _ in NAMES]
    bits = (image[:, :1] > 1.5).to(F64)

    def change(*values):
        parameters = effect.from_unit(dict(zip(NAMES, values)), image, (1.0, 2.0))
        return moved(effect, image, parameters, (1.0, 2.0)), effect.soft_warp(bits, parameters, (1.0, 2.0))

    leaves = [v.requires_grad_(True) for v in raw]
    assert torch.autograd.gradcheck(change, leaves, fast_mode=True)
    assert torch.autograd.grad(change(*leaves)[1].square().sum(), leaves, allow_unused=True)[0].any()
    nothing = [torch.zeros_like(v).requires_grad_(True) for v in raw]  # an untrained head may give exactly this
    slopes = torch.autograd.grad(change(*nothing)[0].sum(), nothing)
    assert all(slope.isfinite().all() for slope in slopes)


def test_a_slice_among_volumes_needs_no_depth_of_its_velocity():
    image, effect = random_image((1, 12, 14)), Synthesis()
    raw = {n: torch.rand(1, 3 if n == "velocity" else 2, 1, 2, 2) for n in NAMES}
    found = effect.from_unit(raw, image, (7.0, 2.0, 2.0))
    assert found["velocity"].shape[1] == 2
    flat = {n: (v[:, 1:] if n == "velocity" else v).squeeze(2) for n, v in raw.items()}
    expected = effect.from_unit(flat, image.squeeze(2), (2.0, 2.0))
    for name, values in expected.items():
        torch.testing.assert_close(found[name].squeeze(2), values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("missing", NAMES)
def test_a_limit_of_zero_takes_its_field_away(missing):
    option = {"velocity": "max_mm", "log_bias": "max_bias", "residual": "max_residual"}[missing]
    image, spacing = brain((20, 24), (2.0, 2.0), 15.0), (2.0, 2.0)
    effect = Synthesis(**{option: 0})
    parameters = drawn(effect, image, spacing)
    assert set(parameters) == set(NAMES) - {missing} == set(effect.unit_limits())
    fields = effect.fields(image, parameters, spacing, image != 0)
    nothing = {"velocity": ("displacement", 0.0), "log_bias": ("bias", 1.0), "residual": ("residual", 0.0)}
    for name, (field, value) in nothing.items():
        assert bool((fields[field] == value).all()) == (name == missing)
    found = moved(effect, image, parameters, spacing)
    assert not torch.equal(found, image)
    assert torch.equal(found != 0, image != 0) == (missing == "velocity")
    bits = (image != 0).double()
    assert torch.equal(effect.soft_warp(bits, parameters, spacing), bits) == (missing == "velocity")
    with pytest.raises(ConfigError, match="all limits are 0"):
        Synthesis(0, 0, 0)


def test_background_stays_zero_and_brain_stays_brain():
    """Strong residuals on a brain of scanner units: nothing negative, no hole, no shell."""
    shape, spacing = (40, 44), (2.0, 2.0)
    image = 100 * brain(shape, spacing, 30.0)
    image = torch.cat([image, torch.where(image != 0, image - 650, 0.0)], 1)  # the second one with both signs
    effect = Synthesis(max_residual=8.0)
    for seed in range(3):
        parameters = drawn(effect, image, spacing, 1.0, seed, "control")
        found = moved(effect, image, parameters, spacing)
        inside = effect.warp_label(image != 0, parameters, spacing)
        assert torch.equal(found != 0, inside)
        fields = effect.fields(image, parameters, spacing, image != 0)
        darkest = image[:, 0][image[:, 0] != 0].min()
        assert (found[:, 0] >= darkest * fields["bias"][:, 0] * (1 - 1e-9))[inside[:, 0]].all()
        assert (fields["residual"][:, 0] < 0).any()
        assert found[:, 1].min() < 2 * image[:, 1].min()  # z-scores have no darkest value to keep to
        assert not fields["residual"][~inside].any()
        assert (fields["bias"][~inside] == 1).all()


def test_a_given_support_moves_along():
    """Shading and residual where the support went, the warp everywhere."""
    image, spacing = random_image((24, 24)), (2.0, 2.0)
    support = torch.zeros_like(image, dtype=torch.bool)
    support[..., :12] = True
    effect = Synthesis()
    parameters = drawn(effect, image, spacing)
    found = effect.apply(image, parameters, spacing, support)
    warped = moved(Deformation(24.0), image, {"velocity": parameters["velocity"]}, spacing)
    inside = effect.warp_label(support, parameters, spacing)
    assert torch.equal(found[~inside], warped[~inside])
    assert (found != warped)[inside].double().mean() > 0.99
    assert not torch.equal(inside, support)


def test_fields_are_smooth():
    """Between neighbouring millimetres they change by a small share of their limits."""
    shape, spacing = (80, 80), (1.0, 1.0)
    image, effect = random_image(shape), Synthesis()
    parameters = drawn(effect, image, spacing, 1.0, 3, "control")
    fields = effect.splines(image, parameters, spacing)
    fields["velocity"] = effect.displacement(parameters, shape, spacing)
    for name, limit in effect.unit_limits().items():
        knot = 48.0 if name == "log_bias" else 24.0
        for axis in (2, 3):
            assert fields[name].diff(dim=axis).abs().max() < 2 * limit / knot  # the slope of a spline between +-limit
            assert fields[name].diff(n=2, dim=axis).abs().max() < 0.03 * limit


def test_scaled_fields():
    image, effect = random_image((8, 9), batch=3), Synthesis()
    parameters = drawn(effect, image, (1.0, 1.0))
    for scale in (0.5, torch.tensor([0.0, 0.5, 2.0])):
        found = effect.scaled(parameters, scale)
        sizes = effect.size(parameters) * scale
        torch.testing.assert_close(effect.size(found), sizes.to(F64))
        assert set(found) == set(parameters)


def test_masks_move_softly_with_the_image():
    """Linear interpolation: a mask that is linear in place moves exactly; half of it is the hard warp."""
    shape, spacing = (40, 44), (2.0, 1.5)
    effect = Synthesis(max_mm=6.0)
    image = brain(shape, spacing, 20.0)
    parameters = drawn(effect, image, spacing, 1.0, 2, "control")
    bits = (places(shape, spacing).norm(dim=0) < 15)[None, None]
    soft = effect.soft_warp(bits.double(), parameters, spacing)
    hard = effect.warp_label(bits, parameters, spacing)
    assert soft.min() >= 0
    assert soft.max() <= 1 + 1e-12
    assert ((soft > 0.5) == hard).double().mean() > 0.99
    assert ((soft > 0) & (soft < 1)).any()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, r"raw velocity must be \(1, 2, \*2 sizes\), got none"),
        ({"velocity": torch.zeros(1, 3, 2, 2)}, r"raw velocity .* got \(1, 3, 2, 2\)"),
        ({"velocity": torch.zeros(1, 2, 2, 2), "log_bias": torch.zeros(2, 2, 2, 2)}, r"raw log_bias .* got \(2, 2"),
        ({"velocity": torch.zeros(1, 2, 2)}, r"raw velocity .* got \(1, 2, 2\)"),
    ],
)
def test_raw_fields_that_do_not_fit(raw, message):
    with pytest.raises(ConfigError, match=message):
        Synthesis().from_unit(raw, random_image((8, 8)), (1.0, 1.0))
