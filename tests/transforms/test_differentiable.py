"""A deployed Compose as the preprocessing of a victim: its values, its gradient, its way back."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import real_data
from monai import transforms as mt
from monai.data import MetaTensor
from oracles import seeded, smooth_network
from torch import nn

from monai_adv import attacks
from monai_adv.data import brats_datalist, load_case
from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.transforms import make_differentiable
from monai_adv.transforms.differentiable.equivalents import equivalent, normalized, percentile_of
from monai_adv.victims import Head, Victim, mean_dice

LPS = np.array([[-1.0, 0, 0, 5], [0, -1.2, 0, 3], [0, 0, 2.5, 1], [0, 0, 0, 1]])  # anisotropic, neither RAS nor cubic
SHAPE = (14, 12, 9)
KEYS = ["image", "label"]


def volume(seed: int = 0) -> np.ndarray:
    """Whole numbers of a scanner; background zero on three uneven sides."""
    voxels = np.random.default_rng(seed).integers(50, 1000, SHAPE).astype(np.int16)
    voxels[5:10, 3:7, 3:7] += 800  # the lesion
    voxels[:3] = 0
    voxels[:, -2:] = 0
    voxels[..., :1] = 0
    return voxels


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A case on disk: two modalities and a label with two classes."""
    found = {}
    for seed, name in enumerate(("t1", "flair")):
        nib.save(nib.Nifti1Image(volume(seed), LPS), tmp_path / f"{name}.nii.gz")
        found[name] = str(tmp_path / f"{name}.nii.gz")
    label = np.zeros(SHAPE, np.uint8)
    label[5:10, 3:7, 3:7] = 1
    nib.save(nib.Nifti1Image(label, LPS), tmp_path / "label.nii.gz")
    return {**found, "image": found["t1"], "label": str(tmp_path / "label.nii.gz")}


def loaded(path: str) -> MetaTensor:
    return mt.LoadImage(ensure_channel_first=True)(path)


def deployed(*last: object, keys: list[str] = KEYS) -> mt.Compose:
    """What a pipeline for T1 images deploys."""
    return mt.Compose(
        [
            mt.LoadImaged(keys),
            mt.EnsureChannelFirstd(keys),
            mt.Orientationd(keys, axcodes="RAS", labels=None),
            mt.Spacingd(keys, pixdim=(1.5, 1.5, 1.5), mode=("bilinear", "nearest")[: len(keys)]),
            mt.CropForegroundd(keys, source_key="image", allow_smaller=True),
            mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            *last,
        ]
    )


def network(channels: int = 1, classes: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv3d(channels, 6, 3, padding=1), nn.Softplus(), nn.Conv3d(6, classes, 1))

    return seeded(build, seed, dtype)


def bright() -> nn.Module:
    """Finds what is bright."""
    network = nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        network.weight[:] = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
        network.bias[:] = torch.tensor([0.0, -0.7])
    return network


def softmax() -> Head:
    return Head("softmax", {"lesion": (1,)})


# ------------------------------------------------------------------------------------------ as in the README
def test_the_files_of_a_deployed_pipeline_are_attacked(files):
    pipeline = deployed()
    preprocessing = make_differentiable(pipeline)
    victim = Victim(bright(), preprocessing=preprocessing, head=softmax())
    image = loaded(files["image"])[None]  # native grid, scanner units
    label = loaded(files["label"])[None]

    assert torch.equal(preprocessing(image)[0], pipeline(files)["image"].as_tensor())

    result = attacks.create("ifgsm", eps=40, units="absolute", steps=3)(victim, image, label)
    assert result.image.shape == image.shape
    assert torch.equal(result.image.affine, image.affine)
    assert (result.image[image == 0] == 0).all()
    assert 0 < result.perturbation.abs().max() <= 40
    assert float(result.clean_score) > 0.6
    assert float(result.score) < float(result.clean_score) - 0.05
    # the same voxels, as plain tensors with the affine beside them
    again = attacks.create("ifgsm", eps=40, units="absolute", steps=3)(
        victim, image.as_tensor(), label.as_tensor(), affine=image.affine
    )
    assert torch.equal(again.image, result.image.as_tensor())


def test_the_adversarial_file_fools_the_untouched_pipeline(files, tmp_path):
    """Written and loaded again by MONAI: the network sees what the attack saw."""
    victim = Victim(network(), preprocessing=make_differentiable(deployed()), head=softmax())
    image = loaded(files["image"])[None]
    result = attacks.create("ifgsm", eps=40, units="absolute", steps=2)(victim, image, loaded(files["label"])[None])
    nib.save(nib.Nifti1Image(result.image[0, 0].numpy(), LPS), tmp_path / "adversarial.nii.gz")
    data = deployed()({**files, "image": str(tmp_path / "adversarial.nii.gz")})["image"]
    assert torch.equal(victim.preprocessing(result.image)[0], data.as_tensor())


# --------------------------------------------------------------------------- values and gradients of members
SPATIAL = {
    "spacing": mt.Spacing((1.5, 1.5, 1.5)),
    "spacing aligned": mt.Spacing((1.5, 1.5, 1.5), align_corners=True),
    "spacing zeros": mt.Spacing((1.5, 1.5, 1.5), padding_mode="zeros"),
    "orientation": mt.Orientation("RAS", labels=None),
    "crop foreground": mt.CropForeground(allow_smaller=True),
    "crop foreground divisible": mt.CropForeground(allow_smaller=False, k_divisible=8, margin=1),
    "resize": mt.Resize((8, 8, 8), mode="trilinear"),
    "pad": mt.SpatialPad((16, 16, 16)),
    "divisible pad": mt.DivisiblePad(8),
    "center crop": mt.CenterSpatialCrop((8, 8, 8)),
    "crop or pad": mt.ResizeWithPadOrCrop((10, 16, 8)),
    "flip": mt.Flip(0),
    "rotate": mt.Rotate90(),
    "affine": mt.Affine(rotate_params=(0.1, 0.0, 0.0), image_only=True),
    "flip by hand": mt.Lambda(lambda x: x.flip(1), inv_func=lambda x: x.flip(1)),
    "nested": mt.Compose([mt.Spacing((1.5, 1.5, 1.5)), mt.Compose([mt.DivisiblePad(8)])]),
}
INTENSITY = {
    "scale": mt.ScaleIntensity(),
    "scale channels": mt.ScaleIntensity(channel_wise=True),
    "scale factor": mt.ScaleIntensity(None, None, factor=0.5),
    "range": mt.ScaleIntensityRange(0, 500, 0, 1, clip=True),
    "percentiles": mt.ScaleIntensityRangePercentiles(1, 99, 0, 1),
    "relative percentiles": mt.ScaleIntensityRangePercentiles(2, 97, 0, 1, clip=True, relative=True, channel_wise=True),
    "clip": mt.ClipIntensityPercentiles(5, 95),
    "clip above": mt.ClipIntensityPercentiles(None, 95, channel_wise=True),
    "soft clip": mt.ClipIntensityPercentiles(None, 95, sharpness_factor=0.01, return_clipping_values=True),
    "smooth": mt.GaussianSmooth(1.0),
    "median": mt.MedianSmooth(1),
    "contrast": mt.AdjustContrast(1.5),
    "contrast below one": mt.AdjustContrast(0.5),
    "contrast inverted": mt.AdjustContrast(1.5, invert_image=True, retain_stats=True),
    "gibbs": mt.GibbsNoise(0.4),
    "z-score": mt.NormalizeIntensity(nonzero=True, channel_wise=True),
    "z-score of all": mt.NormalizeIntensity(),
    "shift": mt.StdShiftIntensity(0.3, nonzero=True, channel_wise=True),
    "shift of all": mt.StdShiftIntensity(0.3),
    "in place at once": mt.Lambda(lambda x: x.mul_(3)),
    "in place": mt.Compose([mt.ScaleIntensity(), mt.Lambda(lambda x: x.mul_(3))]),
}


@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
@pytest.mark.parametrize("name", [*SPATIAL, *INTENSITY])
def test_members_keep_their_values_and_find_their_way_back(name, lazy, files):
    """Bit for bit the deployed pipeline, and MONAI's own inverse."""
    pipeline = mt.Compose([mt.LoadImage(ensure_channel_first=True), {**SPATIAL, **INTENSITY}[name]], lazy=lazy)
    expected = pipeline(files["image"])
    preprocessing = make_differentiable(pipeline)
    image = loaded(files["image"])[None]
    kept = image.as_tensor().clone()
    data, back = preprocessing.prepare(image)
    assert torch.equal(data[0], expected.as_tensor())
    assert torch.equal(preprocessing(image), data)  # also when it no longer looks for a gradient
    assert torch.equal(image.as_tensor(), kept)
    assert all(record.what in ("kept", "replaced", "outside") for record in preprocessing.report)

    logits = torch.randn(1, 3, *data.shape[2:], generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    restored = back(logits)
    trail = MetaTensor(logits[0].detach(), meta=expected.meta, applied_operations=expected.applied_operations)
    pipeline.lazy = False  # MONAI inverts no other way, and says so
    inverted = trail if name in INTENSITY and "in place" not in name else pipeline.inverse(trail)
    assert torch.equal(restored[0].detach(), inverted.as_tensor())
    assert restored.shape[2:] == image.shape[2:]
    (gradient,) = torch.autograd.grad(restored.sum(), logits)
    assert gradient.any()


@pytest.mark.parametrize("name", [*SPATIAL, *INTENSITY])
def test_gradients_of_members_are_those_of_finite_differences(name, files):
    preprocessing = make_differentiable(mt.Compose([{**SPATIAL, **INTENSITY}[name]]))
    generator = torch.Generator().manual_seed(0)
    image = loaded(files["image"])[None]
    affine, image = image.affine, image.as_tensor()
    inside = image != 0
    image = image + inside * torch.rand(image.shape, generator=generator)  # no ties: a median has a kink there
    direction = inside * torch.randn(image.shape, generator=generator)
    leaf = image.clone().requires_grad_(True)
    data = preprocessing(leaf, affine)
    weight = torch.randn(data.shape, generator=generator)
    (gradient,) = torch.autograd.grad((data * weight).sum(), leaf)
    step = 0.02
    ends = [(preprocessing(image + s * direction, affine).double() * weight).sum() for s in (step, -step)]
    difference = (ends[0] - ends[1]) / (2 * step)
    scale = (gradient * direction).double().norm()  # of the sum's parts: they cancel
    assert abs(difference - (gradient * direction).double().sum()) < 0.01 * scale
    assert scale > 0


@pytest.mark.parametrize("nonzero", [False, True])
@pytest.mark.parametrize("channel_wise", [False, True])
@pytest.mark.parametrize(("sub", "div"), [*itertools.product([None, 100.0], [None, 20.0, 0.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
def test_z_scores_are_monais_bit_for_bit(nonzero, channel_wise, sub, div, dtype):
    each = {k: None if v is None else [v, v + 1] if channel_wise else v for k, v in (("sub", sub), ("div", div))}
    image = torch.from_numpy(np.stack([volume(0), volume(1)])).to(dtype)
    image[1, :4] = 7
    for out in (np.float32, None):
        monai = mt.NormalizeIntensity(each["sub"], each["div"], nonzero, channel_wise, out)
        found, expected = equivalent(monai)[0](image.clone()), monai(image.clone())
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    for constant in (0, 5):  # nothing to count, no spread
        flat = torch.full((2, 3, 3, 3), constant, dtype=torch.float32)
        assert torch.equal(equivalent(monai)[0](flat.clone()), monai(flat.clone()))


@pytest.mark.parametrize("nonzero", [False, True])
@pytest.mark.parametrize("channel_wise", [False, True])
def test_shifts_are_monais_bit_for_bit(nonzero, channel_wise):
    monai = mt.StdShiftIntensity(0.7, nonzero, channel_wise)
    for image in (torch.from_numpy(np.stack([volume(0), volume(1)])).float(), torch.zeros(2, 3, 3, 3)):
        assert torch.equal(equivalent(monai)[0](image.clone()), monai(image.clone()))


@pytest.mark.real
def test_equivalents_are_monais_bit_for_bit_on_a_real_patient():
    item = brats_datalist(real_data("brats_2mm"))[0]
    image = load_case(item)["image"].as_tensor()
    assert image.numel() > 1_000_000  # where MONAI's percentiles go through NumPy
    for monai in (
        mt.NormalizeIntensity(nonzero=True, channel_wise=True),
        mt.NormalizeIntensity(),
        mt.StdShiftIntensity(0.1, nonzero=True, channel_wise=True),
        mt.ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1),
        mt.ClipIntensityPercentiles(0.5, 99.5, channel_wise=True),
        mt.AdjustContrast(0.7),
    ):
        assert torch.equal(torch.as_tensor(equivalent(monai)[0](image.clone())), torch.as_tensor(monai(image.clone())))


@pytest.mark.parametrize("nonzero", [False, True])
def test_the_statistics_of_a_z_score_are_in_its_gradient(nonzero):
    data = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data[0, :2] = 0
    inside = data != 0

    def score(values: torch.Tensor) -> torch.Tensor:
        return normalized(torch.where(inside, values, torch.zeros_like(values)), nonzero=nonzero)

    assert torch.autograd.gradcheck(score, data.requires_grad_(True))


@pytest.mark.parametrize("q", [0.0, 37.3, 100.0])
def test_percentiles_of_a_million_voxels_pass_a_gradient(q):
    data = torch.rand(1_000_003, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    value = percentile_of(data, q)
    assert float(value.detach()) == pytest.approx(np.percentile(data.detach().numpy(), q), abs=1e-7)
    (gradient,) = torch.autograd.grad(value, data)
    assert float(gradient.sum()) == pytest.approx(1)  # a shift of all shifts it as much
    assert float((gradient * data.detach()).sum()) == pytest.approx(float(value.detach()), abs=1e-5)


def test_the_gradient_goes_through_the_whole_pipeline(files):
    """Central differences of a smooth network behind everything a pipeline deploys, along the gradient."""
    head = Head("sigmoid", ("a", "b"))
    for restore in (True, False):
        preprocessing = make_differentiable(deployed(mt.DivisiblePadd(KEYS, 4)), restore=restore)
        victim = Victim(network(), preprocessing=preprocessing, head=head)
        image = loaded(files["image"])[None]
        affine, image = image.affine, image.as_tensor()
        leaf = image.clone().requires_grad_(True)
        logits = victim(leaf, affine)
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad((logits * weight).sum(), leaf)
        assert (gradient[image == 0] == 0).float().mean() < 1  # the resampling reads zeros too
        direction = (image != 0) * gradient / gradient.abs().max()
        ends = [(victim(image + s * direction, affine).double() * weight).sum() for s in (1.0, -1.0)]
        assert float(ends[0] - ends[1]) / 2 == pytest.approx(float((gradient * direction).double().sum()), rel=0.01)


# ------------------------------------------------------------------------------------------- what goes where
def test_the_report_says_what_became_of_each_member(files):
    pipeline = mt.Compose(
        [
            mt.LoadImaged(KEYS),
            mt.EnsureChannelFirstd(KEYS),
            mt.EnsureTyped(KEYS),
            mt.ConvertToMultiChannelBasedOnBratsClassesd("label"),
            mt.Compose([mt.Orientationd(KEYS, "RAS", labels=None), mt.RandFlipd(KEYS, prob=1.0)]),
            mt.NormalizeIntensityd("image"),
            mt.Lambdad("image", lambda x: (x * 8).round() / 8),
            mt.OneOf([mt.RandGaussianNoised("image", prob=1.0)]),
            mt.AsDiscreted("label", threshold=0.5),
            mt.ToTensord(KEYS, dtype=torch.float32),
        ]
    )
    preprocessing = make_differentiable(pipeline)
    with pytest.warns(UserWarning, match="Lambdad is passed straight through: its gradient is zero everywhere"):
        preprocessing(loaded(files["image"])[None])
    found = {r.name: (r.what, r.note) for r in preprocessing.report}
    assert {name: what for name, (what, _) in found.items()} == {
        "LoadImaged": "outside", "EnsureChannelFirstd": "outside", "EnsureTyped": "outside",
        "ConvertToMultiChannelBasedOnBratsClassesd": "outside", "Orientationd": "kept", "RandFlipd": "outside",
        "NormalizeIntensityd": "replaced", "Lambdad": "straight-through", "OneOf": "outside", "AsDiscreted": "outside",
        "ToTensord": "kept",
    }  # fmt: skip
    assert found["AsDiscreted"][1] == "acts on label only"
    assert "random" in found["RandFlipd"][1]
    lines = str(preprocessing).splitlines()
    assert len(lines) == 1 + len(preprocessing.report)
    assert any("Lambdad" in line and "zero everywhere" in line for line in lines)
    assert preprocessing.summary() == str(preprocessing)
    assert "Orientationd" in repr(preprocessing)


class Detaches:
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.detach() * 2


STRAIGHT = {
    "histogram": (mt.HistogramNormalize(), "not connected"),
    "numpy": (mt.Lambda(lambda x: x.numpy() * 2), "raises RuntimeError: Can't call numpy"),
    "rounding": (mt.Lambda(lambda x: x.round()), "zero everywhere"),
    "user": (Detaches(), "not connected"),
    "integers": (mt.CastToType(torch.int16), "not connected"),
    "root": (mt.Lambda(lambda x: x.sqrt()), "NaN or infinite"),
}


@pytest.mark.parametrize("name", STRAIGHT)
def test_what_passes_no_gradient_is_passed_straight_through(name, files):
    step, reason = STRAIGHT[name]
    pipeline = mt.Compose([mt.ScaleIntensityRange(0, 10, 0, 1), step])
    preprocessing = make_differentiable(pipeline)
    image = loaded(files["image"])
    leaf = image.as_tensor()[None].clone().requires_grad_(True)
    with pytest.warns(UserWarning, match="passed straight through"), torch.inference_mode():
        preprocessing(leaf)  # found out on the first image, in whatever mode
    data = preprocessing(leaf)  # once only: warnings are errors here
    expected = pipeline(image.clone())
    assert torch.equal(data[0].detach(), torch.as_tensor(expected).as_tensor().float())
    assert torch.autograd.grad(data.sum(), leaf)[0].allclose(torch.tensor(0.1))
    assert reason in preprocessing.report[1].note


def test_a_change_of_shape_without_a_gradient_is_refused(files):
    preprocessing = make_differentiable(mt.Compose([mt.Lambda(lambda x: x.numpy()[:, ::2])]))
    with pytest.raises(ConfigError, match=r"Lambda turns \(1, 14, 12, 9\) into \(1, 7, 12, 9\) and passes no gradient"):
        preprocessing(loaded(files["image"])[None])


def test_an_image_without_contrast_decides_nothing():
    preprocessing = make_differentiable(mt.Compose([mt.ScaleIntensity()]))
    preprocessing(torch.zeros(1, 1, 4, 4, 4))
    assert "is looked for" in preprocessing.report[0].note
    preprocessing(torch.rand(1, 1, 4, 4, 4))
    assert preprocessing.report[0].note == ""


def test_slices_work_as_volumes_do():
    image = torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    compose = mt.Compose([mt.Spacing((2.0, 1.0)), mt.NormalizeIntensity(channel_wise=True), mt.DivisiblePad(4)])
    data, back = make_differentiable(compose).prepare(image, torch.eye(3))
    for found, sample in zip(data, image):
        assert torch.equal(found, compose(MetaTensor(sample.clone())).as_tensor())
    assert back(data).shape == image.shape


def test_whole_numbers_may_come_as_such(files):
    image = loaded(files["image"])[None].as_tensor()
    preprocessing = make_differentiable(mt.Compose([mt.ScaleIntensity(channel_wise=True)]))
    assert torch.equal(preprocessing(image.to(torch.int16)), preprocessing(image))


# ------------------------------------------------------------------------------------------ several image keys
def several(order: list[str]) -> mt.Compose:
    return mt.Compose(
        [
            mt.LoadImaged([*order, "label"], ensure_channel_first=True),
            mt.Spacingd([*order, "label"], (2.0, 2.0, 2.0), mode=("bilinear", "bilinear", "nearest")),
            mt.ScaleIntensityRangePercentilesd("flair", 1, 99, 0, 1),
            mt.NormalizeIntensityd("t1", nonzero=True),
            mt.ConcatItemsd(order, name="image"),
            mt.DeleteItemsd(order),
            mt.SpatialPadd(["image", "label"], (20, 20, 20)),
        ]
    )


@pytest.mark.parametrize("order", [["t1", "flair"], ["flair", "t1"]])
def test_several_images_are_channels_in_the_order_of_the_network(order, files):
    pipeline = several(order)
    preprocessing = make_differentiable(pipeline)
    assert preprocessing.keys == tuple(order)
    image = torch.cat([loaded(files[key]) for key in order])[None]
    data, back = preprocessing.prepare(image)
    expected = pipeline(files)["image"]
    assert torch.equal(data[0], expected.as_tensor())
    assert back(data).shape == image.shape
    # along the first image, as MONAI records it
    inverse = mt.Compose([pipeline.transforms[1]])
    trail = MetaTensor(data[0], meta=expected.meta, applied_operations=expected.applied_operations)
    trail = pipeline.transforms[-1].inverse({"image": trail, "label": expected})["image"]
    with mt.utils.allow_missing_keys_mode(inverse):
        assert torch.equal(back(data)[0], inverse.inverse({order[0]: trail})[order[0]].as_tensor())


def test_the_channels_may_come_in_an_order_of_the_callers(files):
    image = torch.cat([loaded(files[key]) for key in ("flair", "t1")])[None]
    swapped = make_differentiable(several(["t1", "flair"]), keys=["flair", "t1"])
    assert torch.equal(swapped(image), make_differentiable(several(["t1", "flair"]))(image.flip(1)))


def test_a_wrong_number_of_channels_is_explained(files):
    with pytest.raises(ConfigError, match=r"loads 2 images \(t1, flair\) but the batch has 1 channels"):
        make_differentiable(several(["t1", "flair"]))(loaded(files["t1"])[None])


def test_a_copy_of_the_image_keeps_the_graph(files):
    pipeline = mt.Compose(
        [
            mt.LoadImaged("image", ensure_channel_first=True),
            mt.CopyItemsd("image", names="raw"),
            mt.NormalizeIntensityd("image", nonzero=True),
            mt.CropForegroundd(["image", "raw"], source_key="raw", allow_smaller=True),
            mt.ConcatItemsd(["raw", "image"], name="image"),
        ]
    )
    preprocessing = make_differentiable(pipeline)
    leaf = loaded(files["image"])[None].as_tensor().clone().requires_grad_(True)
    data, back = preprocessing.prepare(leaf)
    assert torch.equal(data[0].detach(), pipeline(files)["image"].as_tensor())
    assert torch.autograd.grad(data[:, 0].sum(), leaf)[0].sum() == data[0, 0].numel()
    assert back(data).shape[2:] == leaf.shape[2:]


def test_which_keys_are_the_image_must_be_clear():
    pipeline = mt.Compose([mt.LoadImaged(["ct", "seg"]), mt.ScaleIntensityd("ct")])
    with pytest.raises(ConfigError, match=r"which of the keys \['ct', 'seg'\] are the image"):
        make_differentiable(pipeline)
    assert make_differentiable(pipeline, keys="ct").report[1].what == "kept"
    with pytest.raises(ConfigError, match="are not joined"):
        make_differentiable(pipeline, keys=["ct", "seg"])
    assert make_differentiable(mt.Compose([mt.ScaleIntensityd("ct")])).keys == ("ct",)
    with pytest.raises(ConfigError, match="array transforms only"):
        make_differentiable(mt.Compose([mt.ScaleIntensity()]), keys="ct")
    with pytest.raises(ConfigError, match="needs a MONAI Compose"):
        make_differentiable(mt.ScaleIntensity())


def test_a_member_that_reads_the_label_is_named(files):
    pipeline = mt.Compose([mt.CropForegroundd(KEYS, source_key="label", allow_smaller=True)])
    with pytest.raises(ConfigError, match="CropForegroundd does not run on the image alone: KeyError: 'label'"):
        make_differentiable(pipeline)(loaded(files["image"])[None])


def test_an_affine_is_asked_for_where_it_counts(files):
    image = loaded(files["image"])[None].as_tensor()
    with pytest.raises(ConfigError, match="Orientationd depends on the affine"):
        make_differentiable(deployed())(image)
    with pytest.raises(ConfigError, match=r"affine \(3, 4, 4\) must be"):
        make_differentiable(deployed())(image, torch.eye(4).expand(3, 4, 4))
    assert make_differentiable(mt.Compose([mt.ScaleIntensity()]))(image).shape == image.shape


def test_each_image_of_a_batch_has_its_own_affine(files):
    image = loaded(files["image"])
    places = torch.stack([torch.from_numpy(LPS), torch.diag(torch.tensor([1.0, 1.2, 2.5, 1.0], dtype=torch.float64))])
    turn = make_differentiable(mt.Compose([mt.Orientation("RAS", labels=None)]))
    both, back = turn.prepare(image.as_tensor().expand(2, -1, -1, -1, -1), places)
    assert torch.equal(both[0], image.as_tensor().flip(1, 2))
    assert torch.equal(both[1], image.as_tensor())
    assert torch.equal(back(both), image.as_tensor().expand(2, -1, -1, -1, -1))
    preprocessing = make_differentiable(deployed())
    with pytest.raises(ConfigError, match="attack one at a time"):
        preprocessing(torch.stack([image.as_tensor(), image.as_tensor().roll(3, 1)]), places)


# -------------------------------------------------------------------------------------------- grids and heads
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_predictions_on_the_files_grid_are_those_of_invertd(kind, files):
    pipeline = deployed()
    head = softmax() if kind == "softmax" else Head("sigmoid", ("a", "b"))
    net = bright() if kind == "softmax" else network()
    victim = Victim(net, preprocessing=make_differentiable(pipeline), head=head)
    image = loaded(files["image"])[None]
    found = victim.predict(image)[0]

    item = pipeline(files)
    with torch.no_grad():
        item["pred"] = MetaTensor(net(item["image"][None])[0], meta=item["image"].meta)
    linear = mt.Invertd("pred", pipeline, orig_keys="image", nearest_interp=False)(dict(item))["pred"].as_tensor()
    expected = head.predict(linear[None])[0]
    seen = mt.Invertd("pred", pipeline, orig_keys="image", nearest_interp=False)(
        {**item, "pred": MetaTensor(torch.ones_like(item["pred"]), meta=item["image"].meta)}
    )["pred"].as_tensor()[:1]
    inside = (seen > 1 - 1e-5).expand_as(expected)
    assert torch.equal(found[inside], expected[inside])
    outside = (seen == 0).expand_as(expected)
    assert outside.any()
    assert not found[outside].any()  # cropped away: background
    # the usual way, a prediction brought back by nearest neighbours, differs at the borders of voxels only
    nearest = {**item, "pred": MetaTensor(head.predict(item["pred"][None])[0].float(), meta=item["image"].meta)}
    nearest = mt.Invertd("pred", pipeline, orig_keys="image", nearest_interp=True)(nearest)["pred"].as_tensor()
    label = loaded(files["label"]).as_tensor().expand_as(found)[None].long()
    scores = [float(mean_dice(x[None].long(), label, head)) for x in (found, nearest)]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)  # of 80 voxels, most at the border


def test_logits_may_stay_on_the_networks_grid(files):
    pipeline = deployed()
    victim = Victim(network(), preprocessing=make_differentiable(pipeline, restore=False), head=softmax())
    item = pipeline(files)
    image = loaded(files["image"])[None]
    assert victim(image).shape[2:] == item["image"].shape[1:]
    result = attacks.create("fgsm", eps=40, units="absolute")(victim, image, item["label"][None])
    assert result.image.shape == image.shape
    assert result.prediction.shape == item["label"][None].shape


def test_a_way_back_that_is_missing_is_named(files):
    preprocessing = make_differentiable(mt.Compose([mt.Lambda(lambda x: x[:, ::2])]))
    data, back = preprocessing.prepare(loaded(files["image"])[None])
    with pytest.raises(ConfigError, match=r"come back as \(7, 12, 9\), the image is \(14, 12, 9\)"):
        back(data)
    with pytest.raises(ConfigError, match="not on the grid of the network's input"):
        back(data[..., 1:])


def test_an_image_resampled_by_nearest_neighbours_still_gets_linear_logits(files):
    back = make_differentiable(mt.Compose([mt.Spacing((2.0, 2.0, 2.0), mode="nearest")])).prepare(
        loaded(files["image"])[None]
    )[1]
    linear = make_differentiable(mt.Compose([mt.Spacing((2.0, 2.0, 2.0))])).prepare(loaded(files["image"])[None])[1]
    logits = torch.rand(1, 2, 8, 8, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(logits), linear(logits))


# ----------------------------------------------------------------------------------------- where it is needed
@pytest.mark.parametrize("kind", ["pointwise", "z-score", "several"])
def test_the_gradient_on_a_support_stays_exact(kind):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 4, 8, 9, 10, generator=generator) * 100 + 50
    image[..., :3] = 0
    image[:, 1, :2] = 0
    if kind == "several":
        names = ["a", "b", "c", "d"]
        steps = [mt.NormalizeIntensityd(names, nonzero=True), mt.ConcatItemsd(names[::-1], name="image")]
        compose, keys = mt.Compose(steps), names
    else:
        zscore = mt.NormalizeIntensity(nonzero=True, channel_wise=True)
        compose, keys = mt.Compose([mt.ScaleIntensityRange(0, 100, 0, 1), zscore][: 1 + (kind == "z-score")]), None
    preprocessing = make_differentiable(compose, keys=keys)
    inferer = GradientSlidingWindowInferer((4, 4, 4), 2, overlap=0, mode="gaussian", keep_windows=0)
    victim = Victim(smooth_network(dtype=torch.float32), inferer, preprocessing=preprocessing)
    support = torch.zeros_like(image, dtype=torch.bool)
    support[..., :2, :2, 5:7] = True
    needed = preprocessing.gradient_support(image, support)
    # a z-score ties the voxels that are not zero to each other, and no others
    expected = {"pointwise": support, "z-score": (image != 0) | support}
    # channels that change places: what one of them needs
    expected["several"] = expected["z-score"].any(1, keepdim=True).expand_as(image)
    assert torch.equal(needed, expected[kind])
    found = []
    for mask in (None, support):
        with victim.attacked(mask, image):
            leaf = image.clone().requires_grad_(True)
            found.append(torch.autograd.grad(victim(leaf).square().sum(), leaf)[0])
    torch.testing.assert_close(found[0][support], found[1][support], rtol=1e-4, atol=1e-6)
    assert found[0][support].abs().max() > 1e-4


@pytest.mark.parametrize("step", [mt.Flip(0), mt.ScaleIntensity(), mt.Lambda(lambda x: x), mt.NormalizeIntensity()])
def test_what_may_couple_everything_is_needed_everywhere(step):
    support = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    assert make_differentiable(mt.Compose([step])).gradient_support(torch.rand(1, 1, 4, 4, 4), support).all()
