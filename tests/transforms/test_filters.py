"""Filters: the library's values, the background, units, metadata."""

from __future__ import annotations

import ast
import inspect

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, GaussianSmooth

from monai_adv.errors import ConfigError
from monai_adv.transforms import BitDepth, BitDepthd, FilterImage, FilterImaged, filter_kinds
from monai_adv.transforms.filter_kinds import KINDS

SMALL = {"nlm": {"samples": 10, "iterations": 1}, "n4": {"iterations": [5, 5]}}
SPACINGS = ("curvature_diffusion", "gradient_diffusion", "bilateral")


def brain(dims: int = 3, channels: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Positive, noisy, brighter to one side; zero outside a ball."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 12)] * dims, indexing="ij")
    inside = sum(a**2 for a in axes) < 0.8
    image = 100 * (1 + 0.3 * axes[0]) + 10 * torch.randn((channels, *[12] * dims), generator=generator)
    return torch.where(inside, image, torch.zeros(())).to(dtype)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_filter_changes_the_foreground_and_nothing_else(kind: str, dims: int) -> None:
    image = brain(dims)
    before = image.clone()
    out = FilterImage(kind, **SMALL.get(kind, {}))(image)
    assert torch.equal(image, before)
    assert (out[image == 0] == 0).all()
    assert torch.isfinite(out).all()
    assert (out != image)[image != 0].float().mean() > 0.5
    assert (out - image)[image != 0].abs().max() < 100
    assert out.dtype == image.dtype
    assert type(out) is torch.Tensor
    assert torch.equal(out, FilterImage(kind, **SMALL.get(kind, {}))(image))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("n4", "bit_depth", "gaussian", "median")])
def test_denoisers_bring_a_noisy_ball_nearer_to_the_true_one(kind: str) -> None:
    truth = torch.where(brain()[:1] != 0, 100.0, 0.0)
    noise = 10 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    noisy = torch.where(truth != 0, truth + noise, 0)
    options = {"bilateral": {"range_sigma": 2.0}, "nlm": {"bandwidth": 3.0, "samples": 60, "iterations": 3}}
    out = FilterImage(kind, **options.get(kind, {}))(noisy)
    assert (out - truth).square().mean() < 0.85 * (noisy - truth).square().mean()


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("gaussian", "median")])
def test_empty_space_and_the_unit_of_the_intensities_change_nothing(kind: str) -> None:
    """Scanner units are arbitrary: what is in std or relative follows them."""
    image, run = brain(), FilterImage(kind, **SMALL.get(kind, {}))
    out = run(image)
    wide = torch.zeros(2, 20, 14, 15)
    wide[:, 5:17, 1:13, :12] = image
    torch.testing.assert_close(run(wide)[:, 5:17, 1:13, :12], out, rtol=1e-5, atol=1e-3)
    # a power of two is exact; N4's histogram is on a logarithm
    torch.testing.assert_close(run(4 * image) / 4, out, rtol=1e-4, atol=1e-2)


def test_the_voxel_size_is_that_of_the_metatensor_or_the_given_one() -> None:
    image = brain()
    meta = MetaTensor(image, affine=torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0])))
    for kind in SPACINGS:
        run = FilterImage(kind)
        one, thick = run(image), run(meta)
        assert isinstance(thick, MetaTensor)
        assert torch.equal(thick.affine, meta.affine)
        assert not torch.allclose(one, thick.as_tensor())
        assert torch.equal(run(image, (1.0, 1.0, 3.0)), thick.as_tensor())
        # the axes in their order: a bilateral filter along a thick axis sees less of its neighbours
        assert not torch.allclose(run(image, (3.0, 1.0, 1.0)), thick.as_tensor())


def test_bilateral_and_diffusion_are_those_of_simpleitk() -> None:
    image = torch.rand(1, 9, 10, 11, generator=torch.Generator().manual_seed(0)) + 1
    spacing = (2.0, 1.0, 1.5)
    padded = sitk.GetImageFromArray(np.pad(image[0].numpy(), 2))
    padded.SetSpacing(spacing[::-1])
    inner = (slice(2, -2),) * 3
    std = float(image.numpy().std())
    expected = {
        "bilateral": sitk.Bilateral(padded, 2.0, 0.5 * std, 100),
        "curvature_diffusion": sitk.CurvatureAnisotropicDiffusion(padded, 1 / 16, 1.0, 1, 5),
        "gradient_diffusion": sitk.GradientAnisotropicDiffusion(padded, 0.05, 1.0, 1, 4),
    }
    options = {
        "bilateral": {"domain_sigma": 2.0, "range_sigma": 0.5},
        "curvature_diffusion": {},
        "gradient_diffusion": {"iterations": 4, "time_step": 0.05},
    }
    for kind, truth in expected.items():
        out = FilterImage(kind, **options[kind])(image, spacing)
        np.testing.assert_allclose(out[0], sitk.GetArrayFromImage(truth)[inner], rtol=1e-6)


def test_gaussian_is_monai_and_n4_takes_the_field_away() -> None:
    image = brain()
    expected = torch.where(image != 0, torch.as_tensor(GaussianSmooth(sigma=1.5)(image)), torch.zeros(()))
    assert torch.equal(FilterImage("gaussian", sigma=1.5)(image), expected)
    out = FilterImage("n4", shrink=1)(image)
    inside = image[0] != 0
    slopes = [(x[0, 6:][inside[6:]].mean() / x[0, :6][inside[:6]].mean()).item() for x in (image, out)]
    assert slopes[0] > 1.2
    assert abs(slopes[1] - 1) < 0.4 * (slopes[0] - 1)
    # scanner units stay: the field's geometric mean is 1
    assert (out / image)[0][inside].log().mean().abs() < 1e-5


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_bit_depth_leaves_as_many_grey_values(bits: int) -> None:
    image = brain(channels=3)
    out = BitDepth(bits)(image)
    for channel, before in zip(out, image):
        inside = before[before != 0]
        values = channel[before != 0].unique()
        assert 2 <= len(values) <= 2**bits
        low, high = np.percentile(inside, (0.5, 99.5))
        assert values.min().item() == pytest.approx(low)
        assert values.max().item() == pytest.approx(high)
        middle = (inside > low) & (inside < high)
        half_step = (high - low) / (2**bits - 1) / 2
        assert (channel[before != 0] - inside)[middle].abs().max() <= half_step * (1 + 1e-4)
    assert repr(BitDepth(3)) == "BitDepth(bits=3)"


def test_random_patches_do_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which patches are drawn depends on how many parts ITK cuts the image into, one per core by default."""
    run, image = FilterImage("nlm", **SMALL["nlm"]), torch.rand(1, 9, 10, 11) + 1
    out = run(image)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(run(image), out)
    padded = np.pad(image[0].numpy(), 2)
    for parts, same in ((4, True), (1, False), (16, False)):
        denoise = sitk.PatchBasedDenoisingImageFilter()
        denoise.SetNumberOfWorkUnits(parts)
        denoise.SetKernelBandwidthSigma(0.3 * float(image.numpy().std()))
        denoise.SetPatchRadius(1)
        denoise.SetSampleVariance(9)
        denoise.SetNumberOfSamplePatches(10)
        found = sitk.GetArrayFromImage(denoise.Execute(sitk.GetImageFromArray(padded)))[2:-2, 2:-2, 2:-2]
        assert np.array_equal(found, out[0].numpy()) == same


@pytest.mark.parametrize("kind", ["curvature_diffusion", "gradient_diffusion"])
@pytest.mark.parametrize("size", [0.5, 1.0, 3.0])
def test_the_time_step_is_stable_at_any_voxel_size(kind: str, size: float, capfd: pytest.CaptureFixture[str]) -> None:
    FilterImage(kind)(brain(channels=1), (size, size, 2 * size))
    assert "instability" not in capfd.readouterr().err


def test_channels_without_foreground_and_flat_ones_stay() -> None:
    image = torch.zeros(2, 8, 8, 8)
    image[1, 2:6, 2:6, 2:6] = 5.0
    for kind in set(KINDS) - {"gaussian", "median"}:
        assert torch.equal(FilterImage(kind)(image), image), kind


def test_types_and_dictionaries() -> None:
    assert FilterImage("median")((brain() + 0.5).to(torch.int16)).dtype == torch.float32
    assert FilterImage("bilateral")(brain(dtype=torch.float64)).dtype == torch.float64
    assert isinstance(FilterImage("bilateral")(brain().numpy()), torch.Tensor)
    items = {"image": MetaTensor(brain()), "label": torch.ones(1)}
    run = Compose([FilterImaged("image", "bilateral"), BitDepthd("image", bits=3)])
    out = run(items)
    expected = BitDepth(3)(FilterImage("bilateral")(brain()))
    assert torch.equal(out["image"].as_tensor(), expected)
    assert out["label"] is items["label"]
    with pytest.raises(RuntimeError):
        Compose([FilterImaged("other", "median")])(items)
    assert FilterImaged("other", "median", allow_missing_keys=True)(items).keys() == items.keys()


def test_what_a_filter_cannot_do_is_said() -> None:
    for options, message in [
        (("magic", {}), "'magic' is unknown: use one of gaussian"),
        (("bilateral", {"sigma": 1}), "filter bilateral"),
        (("bilateral", {"domain_sigma": 0}), "domain_sigma must be a number > 0"),
        (("bit_depth", {"bits": 0}), r"bits must be a whole number in 1..16"),
        (("median", {"radius": 1.5}), "radius must be a whole number >= 0"),
        (("n4", {"iterations": [5, 0]}), "iterations must be a whole number >= 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            FilterImage(options[0], **options[1])
    with pytest.raises(ConfigError, match=r"time step of 0\.2 is unstable at a voxel size of 1 mm: use at most 0\.06"):
        FilterImage("curvature_diffusion", time_step=0.2)(brain())
    with pytest.raises(ConfigError, match="before the normalisation"):
        FilterImage("n4")(brain() - 100 * (brain() != 0))
    with pytest.raises(ConfigError, match="two or three axes"):
        FilterImage("median")(torch.zeros(4, 4))


def test_simpleitk_is_imported_when_a_filter_needs_it() -> None:
    top = ast.parse(inspect.getsource(filter_kinds)).body
    names = [a.name for node in top if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names]
    assert "annotations" in names
    assert not any("sitk" in name.lower() or "simpleitk" in name.lower() for name in names)
