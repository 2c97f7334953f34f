"""The differentiable z-score equals MONAI's and has the right gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, NormalizeIntensity
from oracles import make_image

from monai_adv.transforms import NormalizeNonzero, NormalizeNonzeroBatch, NormalizeNonzerod

MONAI = NormalizeIntensity(nonzero=True, channel_wise=True)


def scan(dims: int, dtype: torch.dtype) -> torch.Tensor:
    image = make_image(1, dims)[0]
    return (torch.where(image != 0, 400 + 50 * image, image)).to(dtype)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.float64])
def test_equals_monai(dims, dtype):
    image = scan(dims, dtype)
    expected = MONAI(image.clone().to(torch.float32 if dtype != torch.float64 else dtype))
    found = NormalizeNonzero()(image)
    assert found.dtype == (dtype if dtype.is_floating_point else torch.float32)
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-5, atol=1e-5)
    assert torch.equal(found == 0, image == 0)


def test_a_batch_is_its_members():
    image = make_image(4)
    expected = torch.stack([NormalizeNonzero()(member) for member in image])
    assert torch.equal(NormalizeNonzeroBatch()(image), expected)


def test_a_big_volume_far_from_zero_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    image = (30000 + torch.randn(1, 1, 700_000, generator=generator)).float()
    exact = image.double()
    exact = (exact - exact.mean()) / exact.std(correction=0)
    torch.testing.assert_close(NormalizeNonzeroBatch()(image).double(), exact, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0])
def test_a_constant_channel_is_only_shifted(value):
    image = torch.full((1, 2, 5, 5), value)
    image[:, :, 0] = 0
    image[:, 1, 1:] += torch.arange(5.0)
    found = NormalizeNonzeroBatch()(image)
    assert torch.equal(found[:, 0], torch.zeros(1, 5, 5))
    if value != 0.1:  # there MONAI's float32 mean misses the constant and its noise is scaled to 1
        torch.testing.assert_close(found, torch.as_tensor(MONAI(image[0].clone()))[None])


def test_gradient_against_finite_differences():
    """Background voxels are left out: moving one makes it foreground, which no derivative describes."""
    image = make_image(2, 2)
    mask = image != 0

    def of_foreground(values: torch.Tensor) -> torch.Tensor:
        return NormalizeNonzeroBatch()(torch.zeros_like(image).masked_scatter(mask, values))

    assert torch.autograd.gradcheck(of_foreground, image[mask].requires_grad_(True))


def test_background_gets_no_gradient_and_a_constant_channel_a_finite_one():
    image = make_image(2, 2)
    image[0, 0] = torch.where(image[0, 0] != 0, 2.5, 0.0)
    background = image == 0
    image.requires_grad_(True)
    upstream = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=image.dtype)
    (gradient,) = torch.autograd.grad((NormalizeNonzeroBatch()(image) * upstream).sum(), image)
    assert gradient.isfinite().all()
    assert not gradient[background].any()
    assert gradient[~background].any()


@pytest.mark.parametrize("kind", ["tensor", "metatensor", "numpy"])
def test_types_and_metadata(kind):
    image = scan(3, torch.float32)
    affine = torch.diag(torch.tensor([2.0, 1, 3, 1], dtype=torch.float64))
    given = {
        "tensor": image,
        "numpy": image.numpy(),
        "metatensor": MetaTensor(image, affine=affine, applied_operations=[{"id": 1}]),
    }[kind]
    kept = image.numpy().copy()
    found = NormalizeNonzero()(given)
    assert isinstance(found, MetaTensor) == (kind == "metatensor")
    torch.testing.assert_close(torch.as_tensor(np.asarray(found)), torch.as_tensor(MONAI(image.clone())))
    np.testing.assert_array_equal(np.asarray(given), kept)
    if kind == "metatensor":
        assert torch.equal(found.affine, affine)
        assert found.applied_operations == [{"id": 1}]


def test_dictionary_twin_in_a_compose():
    image = scan(3, torch.float32)
    data = Compose([NormalizeNonzerod(["image", "absent"], allow_missing_keys=True)])({"image": image, "label": 3})
    assert isinstance(data["image"], MetaTensor)
    torch.testing.assert_close(data["image"].as_tensor(), NormalizeNonzero()(image))
    assert data["label"] == 3
    with pytest.raises(KeyError):
        NormalizeNonzerod("absent")({"image": image})
