"""Weights trained elsewhere: the checkpoint computes what the network they come from computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_caller import call
from monai.networks.nets import BasicUNet, SegResNet, UNet
from monai.transforms import NormalizeIntensity

from monai_adv.errors import CheckpointError, ConfigError
from monai_adv.networks import build_network
from monai_adv.victims import Head, import_weights, load_victim, save_checkpoint

SEGRESNET = {"name": "SegResNet", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}
ORDER = ["T1c", "T1", "T2", "FLAIR"]


def segresnet(out_channels: int = 3, dims: int = 3) -> SegResNet:
    torch.manual_seed(0)
    return SegResNet(
        spatial_dims=dims, init_filters=8, in_channels=4, out_channels=out_channels, blocks_down=[1, 1], blocks_up=[1]
    ).eval()


def file(tmp_path: Path, content: Any, name: str = "weights.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_the_logits_are_those_of_the_network_in_its_own_order(tmp_path: Path, wrap: Any, prefix: str) -> None:
    network = segresnet()
    weights = file(tmp_path, wrap({prefix + name: value for name, value in network.state_dict().items()}))
    built, config = import_weights(weights, SEGRESNET, inputs=ORDER, roi_size=[16, 16, 16], spacing=[1.0] * 3)
    victim = load_victim(save_checkpoint(tmp_path / "victim.pt", built, config))
    image = torch.rand(2, 4, 16, 16, 16) * 900 + 100
    image[:, :, :5] = 0
    with torch.no_grad():
        normalised = torch.stack([NormalizeIntensity(nonzero=True, channel_wise=True)(one.clone()) for one in image])
        expected = network(normalised.as_tensor()[:, [1, 0, 2, 3]])
        assert torch.allclose(victim(image), expected, atol=1e-5)
        assert not torch.allclose(victim(image[:, [1, 0, 2, 3]]), expected, atol=1e-3)
    assert victim.head == Head("sigmoid")
    assert config.spacing == [1.0] * 3


def test_the_gradient_comes_back_in_the_images_order(tmp_path: Path) -> None:
    network = segresnet()
    built, _ = import_weights(file(tmp_path, network.state_dict()), SEGRESNET, inputs=["FLAIR", "T1", "T1c", "T2"])
    image = torch.rand(1, 4, 8, 8, 8, requires_grad=True)
    (own,) = torch.autograd.grad(built(image).square().sum(), image)
    turned = image.detach()[:, [3, 0, 1, 2]].requires_grad_(True)
    (theirs,) = torch.autograd.grad(network(turned).square().sum(), turned)
    assert torch.allclose(own[:, [3, 0, 1, 2]], theirs, atol=1e-6)


@pytest.mark.parametrize(("outputs", "head"), [(3, "sigmoid"), (4, "softmax")])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_head_is_the_one_that_fits(tmp_path: Path, outputs: int, head: str, dims: int) -> None:
    weights = file(tmp_path, segresnet(outputs, dims).state_dict())
    _, config = import_weights(weights, {**SEGRESNET, "spatial_dims": dims})
    assert (config.head, config.regions, config.roi_size) == (head, None, [128] * dims)
    other = "softmax" if head == "sigmoid" else "sigmoid"
    with pytest.raises(CheckpointError, match=r"do not fit SegResNet\(.*out_channels"):
        import_weights(weights, {**SEGRESNET, "spatial_dims": dims}, head=other)


@pytest.mark.parametrize(
    ("outputs", "head", "regions"),
    [
        (["Whole tumor", "TC", "enhancing"], "sigmoid", ["WT", "TC", "ET"]),
        (["WT"], "sigmoid", ["WT"]),
        (["edema", "NET", "ET"], "softmax", {"WT": [1, 2, 3], "TC": [2, 3], "ET": [3]}),
        (["NCR", "ED", "ET"], "softmax", None),
    ],
)
def test_outputs_are_named_in_the_networks_order(tmp_path: Path, outputs: list[str], head: str, regions: Any) -> None:
    weights = file(tmp_path, segresnet(len(outputs) + (head == "softmax")).state_dict())
    _, config = import_weights(weights, SEGRESNET, head=head, outputs=outputs)
    assert config.regions == regions


def test_classes_in_another_order_are_scored_as_what_they_are() -> None:
    head = Head("softmax", {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)})
    canonical = torch.tensor([0, 1, 2, 3]).view(1, 1, 4, 1)  # background, NCR, ED, ET
    label = head.label_from_classes(canonical)
    assert label.flatten().tolist() == [0, 2, 1, 3]
    usual = Head("softmax").regions_of(Head("softmax").label_from_classes(canonical))
    for name, mask in head.regions_of(label).items():
        assert torch.equal(mask, usual[name])
    assert torch.equal(head.classes_from_prediction(label), canonical.to(torch.uint8))


def test_a_head_of_one_region_unites_the_classes() -> None:
    head = Head("softmax", {"WT": (1,)})
    assert head.label_from_classes(torch.tensor([[[0, 1, 2, 3]]])).flatten().tolist() == [0, 1, 1, 1]
    assert head.classes_from_prediction(torch.tensor([[[0, 1]]])).flatten().tolist() == [0, 2]
    with pytest.raises(ConfigError, match="NCR of BraTS"):
        Head("softmax", {"WT": (1, 2), "TC": (3,), "ET": (2,)}).label_from_classes(torch.tensor([[[1]]]))


def test_what_does_not_fit_is_named_with_the_fix(tmp_path: Path) -> None:
    weights = file(tmp_path, segresnet().state_dict())
    with pytest.raises(
        CheckpointError, match=r"convInit.conv.weight is \(8, 4, 3, 3, 3\) in the file and \(16,.*--netw"
    ):
        import_weights(weights, {**SEGRESNET, "init_filters": 16})
    with pytest.raises(CheckpointError, match=r"weights are not in the file.*of the file are not in the network"):
        import_weights(weights, {"name": "UNet"})
    with pytest.raises(ConfigError, match=r"T1c, T1, T2 are not T1, T1c"):
        import_weights(weights, SEGRESNET, inputs=["T1c", "T1", "T2"])
    with pytest.raises(ConfigError, match="window"):
        import_weights(weights, SEGRESNET, window=[16])
    with pytest.raises(CheckpointError, match="hold no state dict"):
        import_weights(file(tmp_path, {"epoch": 3}, "none.pt"), SEGRESNET)
    built, config = import_weights(weights, SEGRESNET)
    with pytest.raises(CheckpointError, match="checkpoint already"):
        import_weights(save_checkpoint(tmp_path / "v.pt", built, config), SEGRESNET)


@pytest.mark.parametrize(
    ("network", "described"),
    [
        (
            UNet(3, 4, 3, channels=(4, 8), strides=(2,), num_res_units=1),
            {"name": "UNet", "channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "INSTANCE"},
        ),
        (BasicUNet(3, 4, 4, features=(4, 4, 8, 8, 8, 4)), {"name": "BasicUNet", "features": [4, 4, 8, 8, 8, 4]}),
    ],
)
def test_other_networks_of_monai(tmp_path: Path, network: torch.nn.Module, described: dict[str, Any]) -> None:
    built, _ = import_weights(file(tmp_path, network.state_dict()), described)
    image = torch.rand(1, 4, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(built(image), network.eval()(image))


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="input_order"):
        build_network({**SEGRESNET, "in_channels": 4, "out_channels": 3, "input_order": [0, 1, 1, 3]})


def test_the_command_writes_a_victim_that_other_commands_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from monai_adv.data import simulate_cohort

    simulate_cohort(tmp_path / "cohort", 1, spacing=4.0, seed=1)
    weights, victim = file(tmp_path, segresnet().state_dict()), tmp_path / "victim.pt"
    options = [f"--network-option={k}={v}" for k, v in SEGRESNET.items() if k != "name"]
    code = call(
        monkeypatch, "victim", str(weights), "-o", str(victim), "--network", "SegResNet", *options,
        "--inputs", "T1c,T1,T2,FLAIR", "--window", "32", "--spacing", "1", "--on", str(tmp_path / "cohort"),
    )  # fmt: skip
    assert code == 0
    said = capsys.readouterr()
    assert "Dice WT" in said.out
    assert "--inputs in the network's order" in said.err  # it has never seen a tumour
    assert "4 x 4 x 4 mm: use resample" in said.err
    out = tmp_path / "out"
    arguments = ("--checkpoint", str(victim), "-o", str(out), "--attack", "fgsm")
    assert call(monkeypatch, "attack", str(tmp_path / "cohort"), *arguments) == 0
    assert "was trained at 1 x 1 x 1 mm and Sim001_00000 has 4 x 4 x 4 mm: use resample" in capsys.readouterr().err
    assert (out / "records.csv").is_file()
    assert call(monkeypatch, "attack", str(tmp_path / "cohort"), "--checkpoint", str(weights), *arguments[2:]) == 1
    assert "monai-adv victim" in capsys.readouterr().err
