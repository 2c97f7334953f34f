"""nnU-Net's plans around a network; its architecture is rebuilt here with nnU-Net's names, from its description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import brain_volumes
from scipy import ndimage
from torch import Tensor, nn

from monai_adv import attacks
from monai_adv.errors import CheckpointError, ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.victims import Head, MirrorInferer, NnUNetPreprocessing, RegionConversion, nnunet_victim

KERNELS = [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
FEATURES = [4, 6, 8]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: list[int], stride: Any) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding=[(k - 1) // 2 for k in kernel])
        self.norm = nn.InstanceNorm3d(outputs, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, nn.LeakyReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.all_modules(x)


class Stack(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: list[int], stride: Any) -> None:
        super().__init__()
        self.convs = nn.Sequential(Block(inputs, outputs, kernel, stride), Block(outputs, outputs, kernel, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class Plain(nn.Module):
    """Encoder and decoder as nnU-Net's PlainConvUNet names them."""

    def __init__(self, outputs: int, kernels: list[list[int]] = KERNELS) -> None:
        super().__init__()
        widths = [4, *FEATURES]
        self.encoder = nn.Module()
        self.encoder.stages = nn.Sequential(
            *(nn.Sequential(Stack(widths[i], widths[i + 1], kernels[i], STRIDES[i])) for i in range(3))
        )
        self.decoder = nn.Module()
        self.decoder.encoder = self.encoder
        levels = (1, 0)  # from the bottleneck upwards
        self.decoder.transpconvs = nn.ModuleList(
            nn.ConvTranspose3d(FEATURES[i + 1], FEATURES[i], STRIDES[i + 1], STRIDES[i + 1]) for i in levels
        )
        self.decoder.stages = nn.ModuleList(Stack(2 * FEATURES[i], FEATURES[i], kernels[i], 1) for i in levels)
        self.decoder.seg_layers = nn.ModuleList(nn.Conv3d(FEATURES[i], outputs, 1) for i in levels)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.encoder.stages:
            x = stage(x)
            skips.append(x)
        for number, skip in enumerate(skips[-2::-1]):
            x = self.decoder.transpconvs[number](x)
            x = self.decoder.stages[number](torch.cat((x, skip), 1))
        return self.decoder.seg_layers[-1](x)


def plans(**changes: Any) -> dict[str, Any]:
    configuration = {
        "patch_size": [8, 8, 8],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * 4,
        "use_mask_for_norm": [True] * 4,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 3, "features_per_stage": FEATURES, "kernel_sizes": [[3, 3, 3]] * 3, "strides": STRIDES,
                "n_conv_per_stage": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2], "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin_kwargs": {"inplace": True},
            },
        },
        **changes,
    }  # fmt: skip
    return {"transpose_forward": [0, 1, 2], "configurations": {"3d_fullres": configuration}}


CHANNELS = {"0": "T1", "1": "T1Gd", "2": "T2", "3": "FLAIR"}
CLASSES = {"channel_names": CHANNELS, "labels": {"background": 0, "edema": 1, "NCR": 2, "enhancing tumor": 3}}
REGIONS = {
    "channel_names": CHANNELS,
    "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
    "regions_class_order": [1, 2, 3],
}


def seeded(outputs: int, kernels: list[list[int]] = KERNELS) -> Plain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Plain(outputs, kernels).eval()


def scan() -> Tensor:
    volumes = brain_volumes()
    return torch.from_numpy(np.stack([volumes[m] for m in ("T1", "T1c", "T2", "FLAIR")]).astype(np.float32))[None]


@pytest.mark.parametrize("old", [False, True])
def test_nnunet_weights_in_dynunet_are_the_same_function(old: bool) -> None:
    trained, content = seeded(4, [[3, 3, 3]] * 3), plans()
    if old:  # the plans of version 2.0 to 2.3
        configuration = content["configurations"]["3d_fullres"]
        del configuration["architecture"]
        configuration |= {
            "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 8,
            "n_conv_per_stage_encoder": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2],
            "conv_kernel_sizes": [[3, 3, 3]] * 3, "pool_op_kernel_sizes": STRIDES,
        }  # fmt: skip
        trained.encoder.stages[1] = nn.Sequential(Stack(4, 8, [3, 3, 3], STRIDES[1]))  # 4, 8, 8 features
        trained.encoder.stages[2] = nn.Sequential(Stack(8, 8, [3, 3, 3], STRIDES[2]))
        trained.decoder.transpconvs[0] = nn.ConvTranspose3d(8, 8, STRIDES[2], STRIDES[2])
        trained.decoder.transpconvs[1] = nn.ConvTranspose3d(8, 4, STRIDES[1], STRIDES[1])
        trained.decoder.stages[0] = Stack(16, 8, [3, 3, 3], 1)
        trained.decoder.seg_layers[0] = nn.Conv3d(8, 4, 1)
    checkpoint = {"network_weights": trained.state_dict(), "trainer_name": "nnUNetTrainer"}
    victim = nnunet_victim(content, checkpoint, dataset=CLASSES)
    assert type(victim.network).__name__ == "DynUNet"
    image = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(victim.network(image), trained.eval()(image), rtol=1e-4, atol=1e-4)


def test_weights_of_another_architecture_are_refused() -> None:
    trained = seeded(4)  # a stage of flat kernels, which DynUNet's decoder has one level lower
    content = plans()
    content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["kernel_sizes"] = KERNELS
    with pytest.raises(CheckpointError, match="network="):
        nnunet_victim(content, trained.state_dict(), dataset=CLASSES)
    assert nnunet_victim(content, trained, dataset=CLASSES).network is trained
    residual = plans()
    residual["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "x.ResidualEncoderUNet"
    with pytest.raises(ConfigError, match="ResidualEncoderUNet"):
        nnunet_victim(residual, trained.state_dict(), dataset=CLASSES)


def test_inference_is_nnunets() -> None:
    victim = nnunet_victim(plans(), seeded(4), dataset=CLASSES)
    assert isinstance(victim.inferer, MirrorInferer)
    assert victim.inferer.axes == (0, 1, 2)
    windows = victim.inferer.inferer
    assert isinstance(windows, GradientSlidingWindowInferer)
    assert (tuple(windows.roi_size), windows.overlap, str(windows.mode)) == ((8, 8, 8), 0.5, "gaussian")
    assert isinstance(nnunet_victim(plans(), seeded(4), dataset=CLASSES, mirror=False).inferer,
                      GradientSlidingWindowInferer)  # fmt: skip
    checkpoint = {
        "network_weights": seeded(4, [[3, 3, 3]] * 3).state_dict(),
        "inference_allowed_mirroring_axes": (0, 1),
    }
    assert nnunet_victim(plans(), checkpoint, dataset=CLASSES).inferer.axes == (0, 1)  # type: ignore[attr-defined]


def normalised_by_numpy(image: np.ndarray, use_mask: bool) -> tuple[np.ndarray, tuple[slice, ...]]:
    """nnU-Net's crop and z-score, from its description, in NumPy."""
    mask = ndimage.binary_fill_holes((image != 0).any(0))
    box = ndimage.find_objects(mask.astype(int))[0]
    image, mask = image[(slice(None), *box)].astype(np.float64), mask[box]
    out = image.copy()
    for channel in range(len(image)):
        where = mask if use_mask else np.ones_like(mask)
        values = image[channel][where]
        out[channel][where] = (values - values.mean()) / max(values.std(), 1e-8)
    return out, box


@pytest.mark.parametrize("use_mask", [True, False])
def test_normalisation_and_crop_are_nnunets(use_mask: bool) -> None:
    image = scan()
    image[..., 7, 8, 6] = 0  # a hole in the brain belongs to the mask
    expected, box = normalised_by_numpy(image[0].numpy(), use_mask)
    assert expected.shape[1:] != tuple(image.shape[2:])
    preprocessing = NnUNetPreprocessing(plans(use_mask_for_norm=[use_mask] * 4))
    preprocessing.axes = (0, 1, 2)
    data, back = preprocessing.prepare(image)
    np.testing.assert_allclose(data[0].numpy(), expected, atol=2e-5)
    restored = back(data)
    assert restored.shape == image.shape
    np.testing.assert_array_equal(restored[(0, slice(None), *box)].numpy(), data[0].numpy())


def test_logits_come_back_to_where_the_crop_was() -> None:
    image = torch.zeros(1, 4, 9, 8, 7)
    image[..., 1:6, 0:5, 4:6] = 1 + torch.rand(5, 5, 2)
    data, back = NnUNetPreprocessing(plans(normalization_schemes=["NoNormalization"] * 4)).prepare(image)
    assert data.shape[2:] == (2, 5, 5)
    assert torch.equal(back(data), image)


def test_axes_are_nnunets_and_come_back() -> None:
    image = torch.rand(1, 4, 5, 6, 7) + 1
    content = plans(normalization_schemes=["NoNormalization"] * 4, spacing=[3.0, 2.0, 1.0])
    data, back = NnUNetPreprocessing(content).prepare(image)
    torch.testing.assert_close(data, image.permute(0, 1, 4, 3, 2))  # (z, y, x), as nnU-Net reads a file
    torch.testing.assert_close(back(data), image)
    content["transpose_forward"] = [1, 0, 2]
    data, back = NnUNetPreprocessing(content).prepare(image)
    torch.testing.assert_close(data, image.permute(0, 1, 3, 4, 2))
    torch.testing.assert_close(back(data), image)
    affine = torch.diag(torch.tensor([1.0, 3.0, 1.0, 1.0]))  # x 1, y 3, z 1 mm; the plans want y 3, z 2, x 1
    data, back = NnUNetPreprocessing(content).prepare(image, affine)
    assert data.shape[2:] == (6, 4, 5)
    assert back(data).shape == image.shape


@pytest.mark.parametrize("dataset", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_the_whole_pipeline_is_attacked_in_scanner_units(dataset: dict[str, Any]) -> None:
    outputs = 4 if dataset is CLASSES else 3
    victim = nnunet_victim(plans(), seeded(outputs), dataset=dataset)
    image = scan()
    assert victim(image).shape == (1, outputs, *image.shape[2:])
    attack = attacks.create("fgsm", eps=0.3, label_source="prediction")
    result = attack(victim, image, None)
    assert float(result.score[0]) < 1
    assert torch.equal(victim.predict(result.image), result.prediction)
    changed = result.image != image
    assert not changed[image == 0].any()
    leaf = image.double().requires_grad_(True)
    victim.network.double()
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    direction = direction.masked_fill(image == 0, 0)

    def value(x: Tensor) -> Tensor:
        inside = (image != 0).any(1, keepdim=True)  # logits outside the crop are those of the background
        return (victim(x) * inside).square().mean()

    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    with torch.no_grad():
        slope = (value(leaf + 1e-4 * direction) - value(leaf - 1e-4 * direction)) / 2e-4
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-3, atol=1e-9)


def test_heads_and_region_conversion() -> None:
    softmax = nnunet_victim(plans(), seeded(4), dataset=CLASSES)
    assert softmax.head == Head("softmax", {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)})
    assert softmax.refine is None
    sigmoid = nnunet_victim(plans(), seeded(3), dataset=REGIONS)
    assert sigmoid.head == Head("sigmoid", ("WT", "TC", "ET"))
    conversion = sigmoid.refine
    assert isinstance(conversion, RegionConversion)
    bits = torch.zeros(1, 3, 2, 2, 2, dtype=torch.bool)
    bits[0, 2, 0, 0, 0] = True  # ET outside WT and TC
    bits[0, 0, 1, 1, 1] = True
    found = conversion(bits)
    assert found.dtype == torch.bool
    assert found[0, :, 0, 0, 0].tolist() == [True, True, True]
    assert found[0, :, 1, 1, 1].tolist() == [True, False, False]
    assert int(found.sum()) == 4


def test_ct_normalisation() -> None:
    properties = {str(c): {"percentile_00_5": -2.0, "percentile_99_5": 4.0, "mean": 1.0, "std": 2.0} for c in range(4)}
    content = {**plans(normalization_schemes=["CTNormalization"] * 4),
               "foreground_intensity_properties_per_channel": properties}  # fmt: skip
    image = torch.tensor([-9.0, 1.0, 9.0, 3.0]).view(1, 1, 1, 1, 4).expand(1, 4, 1, 1, 4).contiguous()
    assert NnUNetPreprocessing(content)(image)[0, 0].flatten().tolist() == [-1.5, 0, 1.5, 1]


def test_files_beside_each_other(tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_text(json.dumps(plans()))
    (tmp_path / "dataset.json").write_text(json.dumps(REGIONS))
    weights = seeded(3, [[3, 3, 3]] * 3).state_dict()
    logged = {"network_weights": weights, "logging": {"dice": [np.float64(0.5)]}, "current_epoch": 3}
    torch.save(logged, tmp_path / "checkpoint_final.pth")
    victim = nnunet_victim(tmp_path / "plans.json", tmp_path / "checkpoint_final.pth")
    assert victim.head.region_names == ("WT", "TC", "ET")


@pytest.mark.parametrize(
    ("content", "dataset", "options", "message"),
    [
        ({}, CLASSES, {}, "no nnU-Net v2 plans"),
        (plans(), None, {}, "dataset="),
        (plans(), CLASSES, {"configuration": "2d"}, "'2d' is not in the plans"),
        (plans(normalization_schemes=["Odd"] * 4), CLASSES, {}, "Odd"),
        (plans(previous_stage="3d_lowres"), CLASSES, {}, "cascade"),
        (plans(patch_size=[8, 8]), CLASSES, {}, "number of axes"),
        (plans(), {**CLASSES, "channel_names": {"0": "CT"}}, {}, "1 channels"),
        (plans(), {**CLASSES, "labels": {"tumour": 1}}, {}, "background 0"),
        (plans(), {**CLASSES, "labels": {"background": 0, "tumour": 2}}, {}, "must be 0, 1, 2"),
        (plans(), {k: v for k, v in REGIONS.items() if k != "regions_class_order"}, {}, "regions_class_order"),
        (plans(), CLASSES, {"mirror": (0, 0)}, "different spatial axes"),
    ],
)
def test_bad_plans(content: Any, dataset: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nnunet_victim(content, seeded(4), dataset=dataset, **options)


def test_an_image_of_other_channels_is_an_error() -> None:
    with pytest.raises(ConfigError, match="4 channels and 3 axes"):
        nnunet_victim(plans(), seeded(4), dataset=CLASSES)(torch.ones(1, 1, 8, 8, 8))
