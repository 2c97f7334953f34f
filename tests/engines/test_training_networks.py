"""Training any of MONAI's networks, on volumes or on slices, and the victim that comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_cohort
from cli_caller import call

from monai_adv import attacks
from monai_adv.data import brats_datalist
from monai_adv.engines import TrainConfig, train
from monai_adv.engines.training import training_transforms
from monai_adv.errors import CheckpointError, ConfigError
from monai_adv.networks import NETWORKS, build_network, trainable_network
from monai_adv.studies.training import train_and_score
from monai_adv.victims import VictimConfig, build_victim, load_victim

SMALL: dict[str, dict[str, Any]] = {
    "UNet": {"channels": [4, 8], "strides": [2]},
    "BasicUNet": {"features": [4, 4, 4, 4, 4, 4]},
    "SegResNet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "DynUNet": {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]},
    "AttentionUnet": {"channels": [4, 8], "strides": [2, 2]},
    "UNETR": {"feature_size": 4, "hidden_size": 8, "mlp_dim": 8, "num_heads": 2},
    "SwinUNETR": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 2},
    "VNet": {},
}
# the networks that halve their input most often need the larger patches
SIDES = {"BasicUNet": 32, "SwinUNETR": 64, "VNet": 32}
QUICK = {"steps": 2, "ema": 0.0}


def needed(name: str) -> None:
    """Skips where the package is absent that MONAI's transformers are written with."""
    if name in ("UNETR", "SwinUNETR"):
        pytest.importorskip("einops")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("cohort")
    make_cohort(root, 2)
    return brats_datalist(root)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_on_slices_and_comes_back_from_its_checkpoint(
    items: list[dict[str, Any]], tmp_path: Path, name: str
) -> None:
    needed(name)
    side = SIDES.get(name, 16)
    config = TrainConfig(network={"name": name, **SMALL[name]}, patch=(side, side), head="sigmoid", **QUICK)
    victim, losses = train(items, tmp_path / "victim.pt", config)
    assert len(losses) == 2
    assert type(victim.network).__name__ == name
    image = torch.rand(1, 4, 20, 18, 3)
    loaded = load_victim(tmp_path / "victim.pt")
    logits = loaded(image)
    assert logits.shape == (1, 3, 20, 18, 3)
    assert torch.equal(logits, victim(image))


@pytest.mark.parametrize("name", ["SegResNet", "DynUNet", "UNETR"])
def test_networks_train_on_volumes(items: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    needed(name)
    config = TrainConfig(network={"name": name, **SMALL[name]}, patch=(16, 16, 16), batch=1, **QUICK)
    victim, _ = train(items, tmp_path / "victim.pt", config)
    image = torch.rand(1, 4, 16, 18, 16)
    assert torch.equal(load_victim(tmp_path / "victim.pt")(image), victim(image))


def test_the_baselines_arguments_stay_the_u_nets() -> None:
    assert trainable_network("sigmoid")["channels"] == [16, 32, 64, 128]
    assert trainable_network(name="SegResNet") == {
        "name": "SegResNet", "spatial_dims": 3, "in_channels": 4, "out_channels": 4
    }  # fmt: skip
    fixed = trainable_network(patch=(32, 48), name="UNETR", in_channels=2)
    assert fixed["img_size"] == [32, 48]
    assert fixed["in_channels"] == 2  # what is said goes before what is filled in
    assert "img_size" not in trainable_network(name="SwinUNETR")
    for wrong, text in (
        ({"name": "Nope"}, "unknown"),
        ({"spatial_dims": 2}, "does not take patches of \\(64, 64, 64\\)"),
    ):
        with pytest.raises(ConfigError, match=text):
            trainable_network(**wrong)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"network": {"name": "DynUNet", **SMALL["DynUNet"], "deep_supervision": True}}, "deep supervision"),
        ({"network": {"name": "SegResNet", "channels": [4, 8]}}, "SegResNet cannot be built"),
        ({"network": {"name": "DynUNet"}}, "kernel_size"),
        ({"network": {"name": "VNet"}, "patch": (8, 8)}, "cannot be trained on patches of"),
        ({"network": {"strides": [2, 2], "channels": [4, 8, 8]}, "patch": (18, 18)}, "cannot be trained on patches of"),
        ({"patch": (16,)}, "two sides"),
    ],
)
def test_networks_that_cannot_be_trained_are_refused_before_the_first_step(
    items: list[dict[str, Any]], tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        train(items, tmp_path / "a.pt", TrainConfig(**{"patch": (16, 16), **QUICK, **changes}))
    assert not (tmp_path / "a.pt").exists()


def test_the_trial_of_a_patch_leaves_no_trace(items: list[dict[str, Any]], tmp_path: Path) -> None:
    config = TrainConfig(network={**SMALL["UNet"], "norm": "BATCH", "dropout": 0.2}, patch=(16, 16), **QUICK)
    victim, _ = train(items, tmp_path / "a.pt", config)
    counts = [int(b) for k, b in victim.network.named_buffers() if k.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {2}


def test_slices_are_cut_around_tumour_and_brain_and_are_those_of_the_victim(items: list[dict[str, Any]]) -> None:
    config = TrainConfig(patch=(16, 16), foreground=1.0)
    transforms = training_transforms(config)
    transforms.set_random_state(0)
    drawn = [transforms(items[0])[0] for _ in range(20)]
    assert all(d["image"].shape == (4, 16, 16) and d["label"].shape == (1, 16, 16) for d in drawn)
    assert all(bool((d["label"] > 0).any()) for d in drawn)
    # before the augmentation a slice is what the deployed preprocessing makes of it
    fixed = training_transforms(TrainConfig(patch=(16, 16)))
    cached = fixed(items[0], end=7)
    assert cached["image"].dim() == 4
    for channel in range(4):
        one = cached["image"][channel, ..., 6]
        brain = one[one != 0]
        assert len(brain) > 20
        assert float(brain.mean()) == pytest.approx(0, abs=1e-5)
        assert float(brain.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


def flat(seed: int = 0, head: str = "softmax", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    network = trainable_network(head, (8, 8), channels=[4, 8], strides=[2])
    config = VictimConfig(network, head, preprocessing="zscore_nonzero_slices", roi_size=[8, 8], sw_batch_size=4)
    return build_victim(build_network(network).to(dtype).eval(), config)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_a_2d_victim_of_a_volume_is_that_of_its_slices_with_the_same_gradient(head: str) -> None:
    victim = flat(head=head, dtype=torch.float64)
    image = 100 * torch.rand(1, 4, 12, 10, 4, dtype=torch.float64) + 50
    image[..., :2, :, :] = 0
    image[..., 2] = 0  # no brain in it
    image.requires_grad_()
    logits = victim(image)
    weight = torch.randn(logits.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad((logits * weight).sum(), image)
    parts = [victim(image[..., d]) for d in range(4)]
    assert torch.allclose(torch.stack(parts, -1), logits, atol=1e-12)
    total = sum((part * weight[..., d]).sum() for d, part in enumerate(parts))
    (expected,) = torch.autograd.grad(total, image)
    assert torch.allclose(found, expected, atol=1e-12)
    assert float(found.abs().max()) > 1e-4
    # the network sees nothing there and is not asked
    assert not found[..., 2].any()
    assert not victim.predict(image.detach())[..., 2].any()


def test_attacks_on_volumes_work_through_a_2d_victim() -> None:
    victim = flat()
    image = 100 * torch.rand(1, 4, 12, 10, 4) + 50
    image[..., 0] = 0
    label = torch.randint(0, 4, (1, 1, 12, 10, 4))
    for name in ("pgd", "deformation", "bias_field"):
        options = {"steps": 2} if name != "pgd" else {"steps": 2, "eps": 0.1}
        result = attacks.create(name, **options)(victim, image, label)
        assert result.image.shape == image.shape
        assert not torch.equal(result.image, image)
        assert not result.image[..., 0].any() or name == "deformation"


def test_windows_must_fit_the_network() -> None:
    network = trainable_network("softmax", (8, 8), channels=[4, 8], strides=[2])
    with pytest.raises(CheckpointError, match="2 axes"):
        build_victim(build_network(network), VictimConfig(network))
    needed("UNETR")
    fixed = trainable_network("softmax", (16, 16), name="UNETR", **SMALL["UNETR"])
    with pytest.raises(CheckpointError, match="built for images of"):
        build_victim(build_network(fixed), VictimConfig(fixed, roi_size=[32, 32]))


def test_train_2d_score_attack_and_train_further_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cohort(tmp_path / "data", 2)
    data, first, second = str(tmp_path / "data"), tmp_path / "flat.pt", tmp_path / "more.pt"
    common = ("--steps", "2", "--patch", "16", "--hold-out", "2")
    options = ("init_filters=8", "blocks_down=[1, 1]", "blocks_up=[1]")
    segresnet = ("--network", "SegResNet", *(part for o in options for part in ("--network-option", o)))
    assert call(monkeypatch, "train", data, "-o", str(first), "--dims", "2", *segresnet, *common) == 0
    assert "mean" in capsys.readouterr().out
    stored = torch.load(first, weights_only=True)["config"]
    assert stored["network"] == {
        "name": "SegResNet", "spatial_dims": 2, "in_channels": 4, "out_channels": 4, "init_filters": 8,
        "blocks_down": [1, 1], "blocks_up": [1],
    }  # fmt: skip
    assert (stored["roi_size"], stored["preprocessing"]) == ([16, 16], "zscore_nonzero_slices")
    assert (stored["sw_batch_size"], len(stored["spacing"])) == (16, 3)
    assert call(monkeypatch, "train", data, "-o", str(second), "--init", str(first), *common) == 0
    assert torch.load(second, weights_only=True)["config"]["network"] == stored["network"]
    attacked = ("attack", data, "--checkpoint", str(second), "-o", str(tmp_path / "out"), "--attack", "fgsm")
    assert call(monkeypatch, *attacked, "--subject", "BraTS2021_00000", "--eps", "0.2") == 0
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) >= 4
    for wrong, text in (
        (("--network", "SegResNet", "--channels", "8,16"), "are the U-Net's"),
        (("--init", str(first), "--dims", "3"), "network of 2 axes"),
        (("--init", str(first), *segresnet[:4]), "leave the network out"),
        (("--network-option", "act"), "key=value"),
    ):
        assert call(monkeypatch, "train", data, "-o", str(tmp_path / "no.pt"), *wrong, *common) == 1
        assert text in " ".join(capsys.readouterr().err.split())


def test_a_study_runs_a_2d_victim_on_volumes(tmp_path: Path) -> None:
    from monai_adv.studies import load_study, run_study

    make_cohort(tmp_path / "data", 2)
    recipe = {"network": SMALL["UNet"], "patch": (16, 16), **QUICK}
    table, problems = train_and_score(tmp_path / "data", tmp_path / "flat.pt", recipe, hold_out=2)
    assert table is not None
    assert not problems
    study = tmp_path / "study.yaml"
    study.write_text(
        "data: {root: data}\nvictims: [{name: flat, checkpoint: flat.pt, roi_size: [16, 16]}]\n"
        "attacks: [{name: fgsm}]\nbudgets: {eps: [0.2]}\nfigures: {montages: 0}\noutput: run\n"
    )
    result = run_study(load_study(study))
    assert result.computed == 4
    assert not result.problems
