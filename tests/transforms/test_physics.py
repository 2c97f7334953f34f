"""What all physical effects share: one formula for the transform, its twins and the search."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, Transform
from oracles import make_image

from monai_adv import transforms
from monai_adv.errors import ConfigError
from monai_adv.transforms import physics
from monai_adv.transforms.physics import EFFECTS
from monai_adv.transforms.physics.effect import bspline_field, bspline_matrix

NAMES = list(EFFECTS)
OPTIONS = {
    "deformation": {"knot_mm": 4.0},
    "bias_field": {"knot_mm": 4.0},
    "motion": {"segments": 3},
    "gibbs": {"taper": 1.0},
}
# column lengths 2, 1, 3 mm of a patient lying askew: what counts is not the diagonal
AFFINE = torch.tensor([[0.0, 1, 0, 4], [2, 0, 0, 5], [0, 0, 3, 6], [0, 0, 0, 1]], dtype=torch.float64)
SPACING = (2.0, 1.0, 3.0)

named = pytest.mark.parametrize("name", NAMES)
dimensional = pytest.mark.parametrize("dims", [2, 3])


def make_effect(name: str):
    return EFFECTS[name](**OPTIONS.get(name, {}))


def images(name: str, dims: int = 3, batch: int = 2, dtype=torch.float64) -> torch.Tensor:
    image = make_image(batch, dims, dtype=dtype)
    return image.abs() if EFFECTS[name].positive else image


def drawn(name: str, image: torch.Tensor, spacing=None, magnitude=None, seed: int = 0, kind: str = "random"):
    magnitude = EFFECTS[name].default_magnitude if magnitude is None else magnitude
    spacing = (1.0,) * (image.dim() - 2) if spacing is None else spacing
    draw = getattr(make_effect(name), kind)
    return draw(image, spacing, magnitude, torch.Generator().manual_seed(seed))


def applied(name: str, image: torch.Tensor, parameters, spacing=None) -> torch.Tensor:
    spacing = (1.0,) * (image.dim() - 2) if spacing is None else spacing
    return make_effect(name).apply(image, parameters, spacing, image != 0)


def kind(name: str, before: str = "", after: str = "") -> type:
    """The transform of an effect by its public name: RandPhysicalBiasFieldd."""
    return getattr(transforms, f"{before}Physical{EFFECTS[name].__name__}{after}")


def bits(image: torch.Tensor) -> torch.Tensor:
    """Labels of three regions, another of each dtype is made of it."""
    return torch.rand(len(image), 3, *image.shape[2:], generator=torch.Generator().manual_seed(5)) < 0.5


# ------------------------------------------------------------------------------------------------ the formula
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@dimensional
@named
def test_parameters_of_zero_change_nothing(name, dims, dtype):
    image = images(name, dims, dtype=dtype)
    effect = make_effect(name)
    zeros = effect.zeros(image, (1.3,) * dims)
    assert torch.equal(applied(name, image, zeros, (1.3,) * dims), image)
    assert torch.equal(effect.warp_label(bits(image), zeros, (1.3,) * dims), bits(image))
    assert effect.size(zeros).tolist() == [0, 0]
    # beside a member that does change
    mixed = {k: torch.stack([v[0], zeros[k][1]]) for k, v in drawn(name, image, (1.3,) * dims).items()}
    found = applied(name, image, mixed, (1.3,) * dims)
    assert torch.equal(found[1], image[1])
    assert not torch.equal(found[0], image[0])


@dimensional
@named
def test_random_parameters_change_every_modality_and_keep_type_and_size(name, dims):
    image = images(name, dims, dtype=torch.float32)
    kept = image.clone()
    found = applied(name, image, drawn(name, image))
    assert torch.equal(image, kept)
    assert found.shape == image.shape
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert (found != image).flatten(2).any(2).all()
    if not EFFECTS[name].geometric:
        assert torch.equal(found[image == 0], image[image == 0])
    if EFFECTS[name].positive:
        assert (found >= 0).all()


@named
def test_a_given_support_is_kept(name):
    image = images(name)
    support = torch.zeros_like(image, dtype=torch.bool)
    support[..., :3] = True
    found = make_effect(name).apply(image, drawn(name, image), (1.0,) * 3, support & (image != 0))
    assert torch.equal(found[..., 3:], image[..., 3:]) == (not EFFECTS[name].geometric)


@named
def test_a_batch_is_its_members(name):
    image = images(name, batch=4)
    parameters = drawn(name, image)
    together = applied(name, image, parameters)
    for b in range(4):
        alone = applied(name, image[b : b + 1], {k: v[b : b + 1] for k, v in parameters.items()})
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-12)


@dimensional
@named
def test_the_gradient_in_the_parameters(name, dims):
    """Against finite differences in double precision; random parameters lie beside the kinks."""
    shape = (1, 1, 4, 3, 5)[: 2 + dims]
    image = 1 + torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameters = drawn(name, image, magnitude=0.4 * EFFECTS[name].default_magnitude, seed=2)

    def formula(*values):
        return applied(name, image, dict(zip(parameters, values)))

    leaves = [v.requires_grad_(True) for v in parameters.values()]
    assert torch.autograd.gradcheck(formula, leaves, fast_mode=True)
    slopes = torch.autograd.grad(formula(*leaves).square().sum(), leaves)
    assert all(slope.any() for slope in slopes)


# ------------------------------------------------------------------------------------------- the magnitude
@pytest.mark.parametrize("magnitude", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("draw", ["random", "control"])
@named
def test_drawn_parameters_are_inside_the_magnitude(name, draw, magnitude):
    image = images(name)
    magnitude *= EFFECTS[name].default_magnitude
    parameters = drawn(name, image, SPACING, magnitude, kind=draw)
    shapes = make_effect(name).shapes(image, SPACING)
    assert {k: tuple(v.shape[1:]) for k, v in parameters.items()} == shapes
    size = make_effect(name).size(parameters)
    assert size.shape == (2,)
    assert (size <= magnitude * (1 + 1e-12)).all()
    if draw == "control":  # uses all of it
        assert (size >= magnitude * (1 - 1e-6)).all()
    again = drawn(name, image, SPACING, magnitude, kind=draw)
    assert all(torch.equal(again[k], v) for k, v in parameters.items())
    if magnitude:
        assert any(not torch.equal(drawn(name, image, SPACING, magnitude, 9, draw)[k], v) for k, v in again.items())
        assert any(not torch.equal(v[0], v[1]) for v in again.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@named
def test_projection(name, dtype):
    image, effect = images(name, dtype=dtype), make_effect(name)
    magnitude = EFFECTS[name].default_magnitude
    far = {k: 5 * v for k, v in drawn(name, image, kind="control").items()}
    once = effect.project(far, magnitude)
    assert (effect.size(far) > magnitude).all()
    assert (effect.size(once) <= magnitude * (1 + 4 * torch.finfo(dtype).eps)).all()
    twice = effect.project(once, magnitude)
    assert all(torch.equal(twice[k], v) for k, v in once.items())
    inside = drawn(name, image, magnitude=0.99 * magnitude)
    assert all(torch.equal(effect.project(inside, magnitude)[k], v) for k, v in inside.items())
    assert not any(v.any() for v in effect.project(far, 0.0).values())


@named
def test_a_step_goes_uphill_by_its_share_and_stays_inside(name):
    image, effect = images(name), make_effect(name)
    magnitude = EFFECTS[name].default_magnitude
    generator = torch.Generator().manual_seed(1)
    start = effect.zeros(image, (1.0,) * 3)
    gradient = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in start.items()}
    for share in (0.25, 1.0):
        moved = effect.step(start, gradient, share, magnitude)
        size = effect.size(moved)
        assert (size <= share * magnitude * (1 + 1e-12)).all()
        assert (size >= (0.8 * share if share < 1 else 1 - 1e-9) * magnitude).all()  # shares of a logarithm are less
        for k, v in moved.items():
            assert ((v - start[k]) * gradient[k]).flatten(1).sum(1).gt(0).all()
    inside = drawn(name, image)
    assert (effect.size(effect.step(inside, gradient, 1.0, magnitude)) <= magnitude * (1 + 1e-12)).all()
    # a gradient of zero, and one whose square vanishes
    nothing = effect.step(inside, {k: torch.zeros_like(v) for k, v in inside.items()}, 0.5, magnitude)
    assert all(torch.equal(nothing[k], v) for k, v in inside.items())
    tiny = effect.step(start, {k: 1e-200 * v for k, v in gradient.items()}, 0.5, magnitude)
    normal = effect.step(start, gradient, 0.5, magnitude)
    assert all(torch.allclose(tiny[k], v, rtol=1e-9) for k, v in normal.items())


# ------------------------------------------------------------------------------------- the transforms by name
@named
def test_every_effect_has_its_four_transforms(name):
    for before, after in (("", ""), ("", "d"), ("Rand", ""), ("Rand", "d")):
        cls = kind(name, before, after)
        assert issubclass(cls, MapTransform if after else Transform)
        assert cls.__name__ in transforms.__all__
        assert getattr(physics, cls.__name__) is cls
        assert len((inspect.getdoc(cls) or "").splitlines()[0]) > 20


@pytest.mark.parametrize("type_", ["tensor", "metatensor"])
@dimensional
@named
def test_array_dictionary_and_random_twin_are_one_formula(name, dims, type_):
    """What the random twin drew makes the same image in the deterministic one, array or dictionary."""
    image = images(name, dims)[0]
    label = bits(image[None])[0]
    if type_ == "metatensor":
        affine = torch.diag(torch.tensor([2.0, 1, 3, 1], dtype=torch.float64))
        image = MetaTensor(image, affine=affine, applied_operations=[{"id": 7}])
    options = OPTIONS.get(name, {})
    random = kind(name, "Rand")(prob=1.0, **options).set_random_state(3)
    expected = random(image)
    expected_label = random.warp_label(label, image)
    assert not torch.equal(plain(expected), plain(image))

    explicit = kind(name)(**random.parameters, **options)
    assert torch.equal(plain(explicit(image)), plain(expected))
    data = {"image": image, "second": image, "label": label, "subject": "S1"}
    keys = {"keys": ["image", "second"], "label_keys": "label"}
    for twin in (
        kind(name, "", "d")(**keys, **random.parameters, **options),
        kind(name, "Rand", "d")(**keys, prob=1.0, **options).set_random_state(3),
    ):
        found = twin(data)
        assert data["image"] is image
        assert found["subject"] == "S1"
        assert torch.equal(found["label"], expected_label)
        for key in ("image", "second"):
            if isinstance(twin, transforms.physics.PhysicalTransformd) or key == "image":
                assert torch.equal(plain(found[key]), plain(expected))
        assert torch.equal(plain(found["second"]), plain(found["image"]))
    assert torch.equal(expected_label, label) == (not EFFECTS[name].geometric)


def plain(data):
    return data.as_tensor() if isinstance(data, MetaTensor) else data


@named
def test_metatensors_keep_affine_and_trail_and_give_the_voxel_size(name):
    image = images(name, batch=1)
    parameters = drawn(name, image, SPACING)
    given = MetaTensor(image[0], affine=AFFINE, meta={"id": 3}, applied_operations=[{"id": 7}])
    found = kind(name)(**{k: v[0] for k, v in parameters.items()}, **OPTIONS.get(name, {}))(given)
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, AFFINE)
    assert found.meta["id"] == 3
    assert found.applied_operations == [{"id": 7}]
    assert torch.equal(found.as_tensor(), applied(name, image, parameters, SPACING)[0])
    found.applied_operations.pop()
    assert given.applied_operations == [{"id": 7}]


@pytest.mark.parametrize("twin", ["", "d"])
@named
def test_a_random_state_is_replayed(name, twin):
    image = images(name)[0]
    keys = {"keys": "image"} if twin else {}
    transform = kind(name, "Rand", twin)(**keys, prob=0.5, **OPTIONS.get(name, {}))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    def series(seed):
        transform.set_random_state(seed)
        return [transform({"image": image})["image"] if twin else transform(image) for _ in range(12)]

    first, again, other = series(1), series(1), series(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    unchanged = [torch.equal(a, image) for a in first]
    assert 0 < sum(unchanged) < 12
    changed = [a for a, same in zip(first, unchanged) if not same]
    assert not torch.equal(changed[0], changed[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@named
def test_magnitudes_and_probabilities_of_the_random_twin(name):
    image = images(name)[0]
    effect, high = make_effect(name), EFFECTS[name].default_magnitude
    never = kind(name, "Rand")(prob=0.0)
    assert never(image) is image
    assert never.parameters is None
    assert torch.equal(never.warp_label(bits(image[None])[0], image), bits(image[None])[0])
    random = kind(name, "Rand")(prob=1.0, magnitude=(0.1 * high, 0.2 * high), **OPTIONS.get(name, {}))
    random.set_random_state(0)
    for _ in range(3):
        random(image)
        size = effect.size({k: v[None] for k, v in random.parameters.items()})
        assert 0 < size <= 0.2 * high * (1 + 1e-12)
    for magnitude in (-1.0, (0.3, 0.2)):
        with pytest.raises(ConfigError, match="magnitude must be"):
            kind(name, "Rand")(magnitude=magnitude)


@named
def test_in_a_monai_compose_from_whole_numbers(name):
    """Images as scanners store them: int16, arrays or MetaTensors."""
    whole = (images(name)[0] * 100).abs().to(torch.int16)
    keys = {"keys": ["image", "absent"], "label_keys": ["label"], "allow_missing_keys": True}
    pipeline = Compose([kind(name, "Rand", "d")(**keys, prob=1.0, **OPTIONS.get(name, {}))]).set_random_state(1)
    label = bits(whole[None])[0].long()
    found = pipeline({"image": MetaTensor(whole, affine=AFFINE), "label": MetaTensor(label, affine=AFFINE)})
    assert found["image"].dtype == torch.float32
    assert not torch.equal(found["image"].as_tensor(), whole.float())
    assert found["label"].dtype == torch.int64
    assert torch.equal(found["label"].affine, AFFINE)
    assert torch.equal(found["label"].as_tensor(), label) == (not EFFECTS[name].geometric)
    pipeline.set_random_state(1)
    from_array = kind(name, "Rand")(prob=1.0, **OPTIONS.get(name, {})).set_random_state(2)
    expected = kind(name, "Rand")(prob=1.0, **OPTIONS.get(name, {})).set_random_state(2)
    assert torch.equal(from_array(whole.numpy()), expected(whole.float()))


@named
def test_what_does_not_fit_is_explained(name):
    image = images(name)
    parameters = {k: v[0] for k, v in drawn(name, image).items()}
    first, options = next(iter(parameters)), OPTIONS.get(name, {})
    with pytest.raises(ConfigError, match=f"{kind(name).__name__} takes the parameters .*{first}.* got none"):
        kind(name)(**options)(image[0])
    with pytest.raises(ConfigError, match=f"takes the parameters .*{first}.* got .*typo"):
        kind(name)(**parameters, **options, typo=1.0)(image[0])
    wrong = {**parameters, first: torch.zeros(*parameters[first].shape, 2)}
    with pytest.raises(ConfigError, match=f"{first} must have the shape"):
        kind(name)(**wrong, **options)(image[0])
    with pytest.raises(ConfigError, match="has no option typo: it takes prob, magnitude"):
        kind(name, "Rand")(typo=1.0)
    for option, default in inspect.signature(EFFECTS[name]).parameters.items():
        if isinstance(default.default, float):
            with pytest.raises(ConfigError, match=option):
                kind(name, "Rand")(**{option: -1.0})
            with pytest.raises(ConfigError, match=option):
                kind(name, "Rand")(**{option: "x"})


# ----------------------------------------------------------------------------------------------- the splines
@pytest.mark.parametrize(("size", "spacing", "knot"), [(1, 1.0, 5.0), (2, 1.0, 50.0), (17, 1.5, 6.0), (30, 0.5, 4.0)])
def test_splines_are_convex_and_reproduce_straight_lines(size, spacing, knot):
    matrix = bspline_matrix(size, spacing, knot, torch.zeros((), dtype=torch.float64))
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64))
    if size == 1:
        assert matrix.shape == (1, 1)
        return
    length = (size - 1) * spacing
    controls = matrix.shape[1]
    step = length / (controls - 3)
    assert step <= knot
    places = step * (torch.arange(controls, dtype=torch.float64) - 1)  # where the control points stand, in mm
    torch.testing.assert_close(matrix @ places, torch.arange(size, dtype=torch.float64) * spacing)


def test_rounded_voxel_sizes_need_the_same_controls():
    like = torch.zeros(())
    exact = bspline_matrix(81, 0.5, 4.0, like)
    for spacing in (0.5 - 1e-8, 0.5 + 1e-8):
        assert bspline_matrix(81, spacing, 4.0, like).shape == exact.shape


def test_a_spline_field_is_the_product_of_its_axes():
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 7, 4)
    matrices = [bspline_matrix(n, 1.0, 3.0, torch.zeros((), dtype=torch.float64)) for n in sizes]
    control = torch.randn(2, 3, *(m.shape[1] for m in matrices), generator=generator, dtype=torch.float64)
    expected = torch.einsum("bcijk,xi,yj,zk->bcxyz", control, *matrices)
    torch.testing.assert_close(bspline_field(control, matrices), expected)
