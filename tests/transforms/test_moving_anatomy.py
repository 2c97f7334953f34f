"""What moves with the anatomy: background, borders, labels of every type; slices and single voxels."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from warps import F64, brain, moved, places, random_image

from monai_adv.errors import ConfigError
from monai_adv.transforms import PhysicalAffine, PhysicalAffined, PhysicalDeformation
from monai_adv.transforms.physics import Affine, Deformation, jacobian_determinant

EFFECTS = [Deformation(knot_mm=15.0), Affine()]
each = pytest.mark.parametrize("effect", EFFECTS, ids=lambda e: e.name)


@each
@pytest.mark.parametrize(("shape", "spacing"), [((30, 40), (1.5, 1.0)), ((16, 20, 12), (2.0, 1.5, 3.0))])
def test_background_moves_as_a_label_and_keeps_the_brain_bright(effect, shape, spacing):
    """No shell of faint voxels: what is not background has a value of the brain's own range."""
    image = brain(shape, spacing, 12.0).float()
    for share in (1e-4, 1.0):
        parameters = effect.control(image, spacing, share * effect.default_magnitude, torch.Generator().manual_seed(0))
        found = moved(effect, image, parameters, spacing)
        assert torch.equal(found != 0, effect.warp_label(image != 0, parameters, spacing))
        values = image[image != 0]
        assert found[found != 0].min() >= values.min() - 1e-5
        assert found.max() <= values.max() + 1e-5
        if share < 1:  # a motion of nothing is nothing
            torch.testing.assert_close(found, image, rtol=0, atol=1e-3)
        else:
            assert not torch.equal(found != 0, image != 0)


@each
def test_labels_of_every_type_move_alike(effect):
    shape, spacing = (16, 18, 10), (2.0, 1.5, 3.0)
    generator = torch.Generator().manual_seed(0)
    image = random_image(shape, batch=2)
    parameters = effect.control(image, spacing, effect.default_magnitude, generator)
    classes = torch.randint(0, 2**40, (2, 1, *shape), generator=generator)  # beyond what float32 holds
    found = effect.warp_label(classes, parameters, spacing)
    assert found.dtype == torch.int64
    assert set(found.unique().tolist()) <= set(classes.unique().tolist())
    assert not torch.equal(found, classes)
    # the place a value comes from is the nearest voxel to where the image's own field points
    field = effect.displacement(parameters, shape, spacing)
    for b, place in ((0, (3, 4, 5)), (1, (8, 9, 2)), (1, (15, 17, 9))):
        source = [
            min(max(round(p + float(field[(b, d, *place)]) / spacing[d]), 0), shape[d] - 1) for d, p in enumerate(place)
        ]
        assert found[(b, 0, *place)] == classes[(b, 0, *source)]
    bits = classes % 3 == torch.arange(3).view(1, 3, 1, 1, 1)
    for dtype in (torch.bool, torch.uint8, torch.float32, F64):
        moved_bits = effect.warp_label(bits.to(dtype), parameters, spacing)
        assert moved_bits.dtype == dtype
        assert torch.equal(moved_bits, (found % 3 == torch.arange(3).view(1, 3, 1, 1, 1)).to(dtype))


@each
def test_outside_the_volume_the_border_goes_on(effect):
    """A volume without background stays without: no black rim comes in."""
    shape, spacing = (12, 14, 9), (2.0, 2.0, 2.0)
    image = random_image(shape)
    parameters = effect.control(image, spacing, effect.default_magnitude, torch.Generator().manual_seed(1))
    found = moved(effect, image, parameters, spacing)
    assert found.min() >= image.min() - 1e-12
    constant = torch.full_like(image, 3.0)
    torch.testing.assert_close(moved(effect, constant, parameters, spacing), constant)


@each
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_is_a_volume_of_depth_one(effect, axis):
    """Same random parameters, same image; along the axis of one voxel nothing moves, whatever its spacing."""
    shape, spacing = (14, 11), (1.5, 2.5)
    image = random_image(shape, batch=2)
    thick, spacings = image.unsqueeze(2 + axis), list(spacing)
    spacings.insert(axis, 7.0)
    flat = effect.control(image, spacing, effect.default_magnitude, torch.Generator().manual_seed(0))
    deep = effect.control(thick, spacings, effect.default_magnitude, torch.Generator().manual_seed(0))
    assert all(torch.equal(flat[k].flatten(), deep[k].flatten()) for k in flat)
    found = moved(effect, thick, deep, spacings).squeeze(2 + axis)
    torch.testing.assert_close(found, moved(effect, image, flat, spacing), rtol=1e-12, atol=1e-12)
    field = effect.displacement(deep, thick.shape[2:], spacings)
    assert not field[:, axis].any()
    torch.testing.assert_close(
        jacobian_determinant(field, spacings).squeeze(1 + axis),
        jacobian_determinant(effect.displacement(flat, shape, spacing), spacing),
    )
    leaves = {k: v.requires_grad_(True) for k, v in deep.items()}
    slopes = torch.autograd.grad(moved(effect, thick, leaves, spacings).square().sum(), list(leaves.values()))
    assert all(slope.isfinite().all() for slope in slopes)


@each
def test_a_single_voxel_has_nowhere_to_go(effect):
    image = torch.ones(1, 1, 1, 1, dtype=F64)
    parameters = effect.control(image, (1.0, 1.0), 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(moved(effect, image, parameters, (1.0, 1.0)), image)
    assert effect.size(parameters).tolist() == [0]


@each
def test_motion_starts_at_zero_with_a_gradient(effect):
    """Parameters of zero return the image bit for bit, and yet a search can start there."""
    image = brain((12, 14), (1.0, 1.0), 5.0)
    parameters = {k: v.requires_grad_(True) for k, v in effect.zeros(image, (1.0, 1.0)).items()}
    found = moved(effect, image, parameters, (1.0, 1.0))
    assert torch.equal(found, image)
    weight = places((12, 14), (1.0, 1.0))[0] * places((12, 14), (1.0, 1.0))[1]
    slopes = torch.autograd.grad((found * weight).sum(), list(parameters.values()))
    assert all(slope.isfinite().all() and slope.any() for slope in slopes)


def test_the_dictionary_moves_label_and_image_together():
    shape = (20, 24)
    image = brain(shape, (1.0, 2.0), 9.0)[0]
    affine = torch.diag(torch.tensor([1.0, 2, 1], dtype=F64))
    data = {"image": MetaTensor(image, affine=affine), "label": (image != 0).long()}
    values = {"rotation": [30.0], "translation": [3.0, -4.0], "log_scale": [0.1, 0.0]}
    found = PhysicalAffined("image", label_keys="label", **values)(data)
    assert torch.equal(found["label"].bool(), (found["image"] != 0).as_tensor())
    assert not torch.equal(found["label"], data["label"])
    explicit = PhysicalAffine(**values)
    assert torch.equal(found["label"], explicit.warp_label(data["label"], data["image"]))


def test_single_precision_is_as_good_as_double():
    shape, spacing = (48, 40, 20), (1.0, 1.0, 3.0)
    image = brain(shape, spacing, 16.0)
    for effect in EFFECTS:
        parameters = effect.control(image, spacing, effect.default_magnitude, torch.Generator().manual_seed(0))
        double = effect.displacement(parameters, shape, spacing)
        single = effect.displacement({k: v.float() for k, v in parameters.items()}, shape, spacing)
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


def test_a_label_of_another_shape_is_refused():
    image = random_image((8, 8))[0]
    warp = PhysicalDeformation(velocity=torch.zeros(2, 4, 4))
    assert warp.warp_label(torch.ones(1, 8, 8), image).shape == (1, 8, 8)
    with pytest.raises(ConfigError, match="velocity must have the shape"):
        PhysicalDeformation(velocity=torch.zeros(2, 4, 4), knot_mm=2.0)(image)
    with pytest.raises(ConfigError, match=r"label \(1, 8, 9\) .* image \(2, 8, 8\)"):
        warp.warp_label(torch.ones(1, 8, 9), image)
