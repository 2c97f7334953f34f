"""VAFA: the transform against SciPy, the rounding against its golden value, the search against its parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ssim_and_cs
from oracles import make_image, make_label, make_victim
from scipy import fft
from torch import nn

from monai_adv import attacks
from monai_adv.attacks.frequency import VAFA, BlockDCT, Similarity, soft_round
from monai_adv.errors import ConfigError
from monai_adv.losses import Dice
from monai_adv.metrics import image_quality
from monai_adv.threats import LInf
from monai_adv.victims import Victim

headed = pytest.mark.parametrize("head", ["softmax", "sigmoid"])
dimensional = pytest.mark.parametrize("dims", [2, 3])


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------- the transform
@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (4, 4, 4, 8, 4), (1, 2, 7, 9), (2, 1, 5, 4, 11), (1, 1, 1, 6, 2)])
def test_every_block_is_the_orthonormal_dct_of_scipy(shape):
    image = uniform(*shape)
    transform = BlockDCT(shape, 4, image)
    found = transform.forward(image)
    sides = [min(4, n) for n in shape[2:]]
    padded = np.pad(image.numpy(), [(0, 0), (0, 0), *((0, -n % s) for n, s in zip(shape[2:], sides))], mode="edge")
    assert found.shape == (*shape[:2], *(n for size, s in zip(padded.shape[2:], sides) for n in (size // s, s)))
    for block in np.ndindex(*(n // s for n, s in zip(padded.shape[2:], sides))):
        part = padded[(..., *(slice(b * s, (b + 1) * s) for b, s in zip(block, sides)))]
        expected = fft.dctn(part, axes=range(2, part.ndim), norm="ortho")
        index = (slice(None), slice(None), *(i for b in block for i in (b, slice(None))))
        np.testing.assert_allclose(found[index].numpy(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(transform.inverse(found), image, rtol=0, atol=1e-12)


def test_a_table_is_one_for_all_or_one_for_each():
    transform, image = BlockDCT((2, 3, 8, 6), 4, uniform(2, 3, 8, 6)), uniform(2, 3, 8, 6)
    assert transform.forward(image).shape == (2, 3, 2, 4, 2, 4)
    for per_block, per_channel, shape in (
        (True, True, (2, 3, 2, 4, 2, 4)),
        (True, False, (2, 1, 2, 4, 2, 4)),
        (False, True, (2, 3, 1, 4, 1, 4)),
        (False, False, (2, 1, 1, 4, 1, 4)),
    ):
        table = transform.table(20.0, image, per_block, per_channel)
        assert table.shape == shape
        assert (table == 20).all()


# -------------------------------------------------------------------------------------------- the rounding
def test_the_soft_rounding_is_golden():
    assert float(soft_round(torch.tensor(0.25, dtype=torch.float64), 0.1)) == pytest.approx(0.1518, abs=5e-5)
    values = torch.tensor([-3.0, -1.25, -0.5, 0.0, 0.25, 0.5, 0.75, 7.0], dtype=torch.float64)
    for alpha in (0.5, 0.1, 0.01):
        rounded = soft_round(values, alpha)
        k = math.log(2 / alpha - 1)
        for u, found in zip(values.tolist(), rounded.tolist()):
            rest = u - math.floor(u)
            expected = math.floor(u) + (math.tanh(k * (rest - 0.5)) / (1 - alpha) + 1) / 2
            assert found == pytest.approx(expected, abs=1e-14)
        whole = values == values.round()
        torch.testing.assert_close(rounded[whole], values[whole], rtol=0, atol=1e-14)
    # the limit is a rounding
    ends = torch.tensor([-1.4, 0.3, 0.7, 2.3], dtype=torch.float64)
    torch.testing.assert_close(soft_round(ends, 1e-20), ends.round(), rtol=0, atol=1e-3)


def test_the_soft_rounding_has_the_gradient_of_its_formula():
    values = (uniform(5) * 6 - 3).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda u: soft_round(u, 0.1), values)


# ------------------------------------------------------------------------------------------- the similarity
@dimensional
def test_the_similarity_is_monais_inside_the_border(dims):
    shape = (2, 3, 14, 15, 13)[: 2 + dims]
    clean, image = uniform(*shape), uniform(*shape, seed=1)
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[(..., *[slice(5, -5)] * dims)] = True
    expected = compute_ssim_and_cs(image, clean, dims, (11,) * dims, (1.5,) * dims)[0].flatten(1).mean(1)
    torch.testing.assert_close(Similarity(clean, inside)(image), expected.double(), rtol=0, atol=1e-5)


def test_the_similarity_is_that_of_the_reports():
    clean, image = uniform(1, 1, 9, 8, 7), uniform(1, 1, 9, 8, 7, seed=1)
    mask = torch.ones_like(clean, dtype=torch.bool)
    low, high = np.percentile(clean.numpy(), [0.5, 99.5])
    found = Similarity((clean - low) / (high - low), mask)((image - low) / (high - low))
    assert float(found) == pytest.approx(image_quality(clean[0], image[0], mask[0])["ssim"], abs=1e-9)
    assert Similarity(clean, mask)(clean).tolist() == pytest.approx([1.0])


def test_the_similarity_counts_each_sample_over_its_own_support():
    clean = uniform(2, 2, 8, 8)
    mask = torch.zeros_like(clean, dtype=torch.bool)
    mask[0, 0, :4] = mask[1, :, 2:] = True
    image = torch.where(mask, uniform(2, 2, 8, 8, seed=1), clean)
    alone = [float(Similarity(clean[b : b + 1], mask[b : b + 1])(image[b : b + 1])) for b in range(2)]
    assert Similarity(clean, mask)(image).tolist() == pytest.approx(alone)
    gradient = torch.autograd.functional.jacobian(lambda x: Similarity(clean, mask)(x)[0], image)
    assert gradient[0].any()
    assert not gradient[1].any()


# ----------------------------------------------------------------------------------------------- the search
def reference(victim, image, label, steps, block, q_max=20.0, ssim=1.0, weight=None):
    """The images of the method, written down once more with SciPy, NumPy and one autograd graph; one sample."""
    low, high = (f(image, (*range(2, image.ndim),), keepdim=True) for f in (torch.amin, torch.amax))
    transform = BlockDCT(image.shape, block, image)
    mask = image != 0
    q = torch.full_like(transform.forward(image), q_max)
    images = []
    for step in range(steps + 1):
        q.requires_grad_(True)
        alpha = max(0.1 * (1 - step / steps), 1e-20)
        d = transform.forward(255 * (image - low) / (high - low))
        u = d / q
        s, k = 1 / (1 - alpha), math.log(2 / alpha - 1)
        values = transform.inverse(q * (u.floor() + (s * torch.tanh(k * (u - u.floor() - 0.5)) + 1) / 2))
        found = torch.where(mask, (low + values / 255 * (high - low)).clamp(low, high), image)
        images.append(found.detach())
        voxels = image[0, 0].numel() if weight is None else weight.sum()
        loss = Dice()(victim(found), label, victim.head, weight) / voxels
        unlike = 1 - Similarity((image - low) / (high - low), mask)((found - low) / (high - low))
        (gradient,) = torch.autograd.grad((loss - ssim * unlike).sum(), q)
        q = (q.detach() + gradient.sign()).clamp(5, q_max)
    return images


@pytest.mark.parametrize("ssim", [0.0, 1.0])
@dimensional
@headed
def test_the_search_is_the_published_one(head, dims, ssim):
    victim, image, label = make_victim("smooth", head, dims), make_image(1, dims), make_label(head, 1, dims)
    attack = attacks.create("vafa", steps=4, block=3, ssim_weight=ssim)
    assert attack.threat.eps == math.inf
    result = attack(victim, image, label)
    images = reference(victim, image, label, 4, 3, ssim=ssim)
    assert len(result.trace) == len(images) == 5
    assert (result.cost.forwards, result.cost.backwards) == (6, 4)
    torch.testing.assert_close(result.image, images[int(result.best_step)], rtol=1e-9, atol=1e-9)
    for entry, expected in zip(result.trace, images):
        torch.testing.assert_close(entry["loss"], Dice()(victim(expected), label, victim.head), rtol=1e-9, atol=1e-9)


def test_ignored_voxels_do_not_divide():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    weight = torch.zeros(2, 1, *image.shape[2:])
    weight[0, ..., 1:3] = weight[1, ..., 2:] = 1
    result = attacks.create("vafa", steps=6, block=3)(victim, image, label, weight=weight)
    for b in range(2):
        rows = slice(b, b + 1)
        images = reference(victim, image[rows], label[rows], 6, 3, weight=weight[rows].double())
        torch.testing.assert_close(result.image[rows], images[int(result.best_step[b])], rtol=1e-9, atol=1e-9)


@dimensional
@headed
def test_the_steps_raise_the_loss_over_plain_compression(head, dims):
    """Against the table that compresses most, which is where the search begins."""
    victim, image, label = make_victim("smooth", head, dims), make_image(4, dims), make_label(head, 4, dims)
    result = attacks.create("vafa", steps=10, block=4, ssim_weight=0)(victim, image, label)
    losses = torch.stack([entry["loss"] for entry in result.trace])
    assert (losses.amax(0) > losses[0]).all()
    assert (result.score <= result.trace[0]["score"]).all()


def test_the_similarity_holds_the_change_back():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    results = [
        attacks.create("vafa", steps=8, block=4, ssim_weight=w, loss="ce")(victim, image, label) for w in (0.0, 1e3)
    ]
    free, held = (torch.tensor(r.details["ssim"]) for r in results)
    assert (held > free).all()


def test_size_and_similarity_of_the_best_image_are_reported():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    result = attacks.create("vafa", steps=3, block=4)(victim, image, label)
    ball = LInf(1.0).bind(image)
    assert result.details["linf"] == ball.size(result.image).tolist()
    assert min(result.details["linf"]) > 0.1
    axes = (2, 3, 4)
    low, span = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True) - image.amin(axes, keepdim=True)
    found = Similarity((image - low) / span, image != 0)((result.image - low) / span)
    assert result.details["ssim"] == pytest.approx(found.tolist())
    assert all(value < 1 for value in result.details["ssim"])


def test_a_finite_budget_projects_and_zero_is_the_input():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    result = attacks.create("vafa", 0.05, steps=3, block=4)(victim, image, label)
    assert result.details["linf"] == pytest.approx([0.05, 0.05])
    assert torch.equal(attacks.create("vafa", 0.0, steps=3)(victim, image, label).image, image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@dimensional
def test_constant_blocks_channels_and_slices_make_no_nan(dims, dtype):
    image = make_image(2, dims, dtype=dtype)
    image[:, :, :, :3] = 1.0  # blocks without contrast
    image[:, 1] = 3.0  # a channel without contrast
    victim, label = make_victim("smooth", dims=dims, dtype=dtype), make_label("softmax", 2, dims)
    for units in ("std", "absolute"):
        threat = LInf(math.inf, units=units, bounds=None)
        result = VAFA(threat, steps=3, block=3)(victim, image, label)
        assert result.image.isfinite().all()
        assert np.isfinite(result.details["ssim"]).all()
        assert torch.equal(result.image[:, 1], image[:, 1])
        assert (result.perturbation != 0).flatten(1).any(1).all()


def test_the_units_of_the_scanner_do_not_matter():
    class Rescaled(nn.Module):
        def __init__(self, network, factor):
            super().__init__()
            self.network, self.factor = network, factor

        def forward(self, x):
            return self.network(x / self.factor)

    network, image, label = make_victim("smooth").network, make_image(2), make_label("softmax", 2)
    results = [
        attacks.create("vafa", steps=4, block=4)(Victim(Rescaled(network, f)), f * image, label) for f in (1.0, 256.0)
    ]
    torch.testing.assert_close(results[1].image / 256, results[0].image, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"block": 0}, "block must be"),
        ({"q_min": 0}, "0 < q_min <= q_max"),
        ({"q_min": 30}, "0 < q_min <= q_max"),
        ({"q_max": float("inf")}, "0 < q_min <= q_max"),
        ({"alpha": 1}, "alpha must be"),
        ({"ssim_weight": -1}, "ssim_weight must be"),
        ({"norm": "l2"}, "vafa searches linf threats"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        attacks.create("vafa", **options)
