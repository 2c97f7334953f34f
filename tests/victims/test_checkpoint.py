"""Checkpoints: one file, plain data, nothing executed, and errors that say what to do."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from torch import nn

from monai_adv.errors import CheckpointError, WriteError
from monai_adv.networks import baseline_unet, build_network
from monai_adv.victims import VictimConfig, build_victim, load_victim, read_checkpoint, save_checkpoint
from monai_adv.victims.checkpoint import FORMAT, file_hash

SMALL = {"channels": [4, 8], "strides": [2]}


def small(head: str = "softmax") -> tuple[nn.Module, VictimConfig]:
    config = VictimConfig(network=baseline_unet(head, norm="BATCH", **SMALL), head=head, roi_size=[8, 8, 8])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_network(config.network), config


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_checkpoint(tmp_path / "victim.pt", *small())


def rewrite(path: Path, **changes) -> Path:
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save({k: v for k, v in content.items() if v is not None}, path)
    return path


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_roundtrip(tmp_path, head):
    network, config = small(head)
    config = replace(config, training={"seed": 3}, spacing=[1.0, 1.0, 1.0])
    path = save_checkpoint(tmp_path / "new" / "folder" / "a.pt", network, config)
    again, found = read_checkpoint(path)
    assert found == config
    assert not again.training
    state = network.state_dict()
    assert all(torch.equal(state[k], v) for k, v in again.state_dict().items())
    image = torch.randn(1, 4, 10, 9, 8)
    victim = load_victim(path)
    assert victim.name == "a"
    assert victim.head.kind == head
    assert torch.equal(victim(image), build_victim(network, config)(image))
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]


def test_half_precision_rounds_the_weights_and_nothing_else(tmp_path):
    network, config = small()
    found = read_checkpoint(save_checkpoint(tmp_path / "a.pt", network, config, half=True))[0].state_dict()
    full = read_checkpoint(save_checkpoint(tmp_path / "b.pt", network, config))[0].state_dict()
    for name, value in network.state_dict().items():
        assert found[name].dtype == value.dtype
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(found[name], expected)
        assert torch.equal(full[name], value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_weights_that_would_be_lost_are_not_saved(tmp_path, value):
    network, config = small()
    next(network.parameters()).data.flatten()[0] = value
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        save_checkpoint(tmp_path / "a.pt", network, config, half=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.float32(0.5), torch.ones(1), Path("x")])
def test_only_plain_data_are_saved(tmp_path, value):
    network, config = small()
    with pytest.raises(CheckpointError, match="not plain data"):
        save_checkpoint(tmp_path / "a.pt", network, replace(config, training={"dice": value}))
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(_: object, stream: IO[bytes]) -> None:
        stream.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(WriteError, match="No space"):
        save_checkpoint(saved, *small())
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["victim.pt"]


def test_saving_again_replaces_the_file_instead_of_writing_into_it(saved):
    """Whoever has the old file open keeps it whole."""
    before = saved.read_bytes()
    with saved.open("rb") as reader:
        network, config = small()
        save_checkpoint(saved, network, replace(config, training={"seed": 4}))
        assert reader.read() == before
    assert read_checkpoint(saved)[1].training == {"seed": 4}


@pytest.mark.parametrize(
    ("head", "regions"), [("softmax", {"whole": [1, 2, 3]}), ("sigmoid", ["core", "whole", "enhancing"])]
)
def test_what_the_configuration_says_is_built(head, regions):
    network, config = small(head)
    config = replace(config, overlap=0.125, mode="constant", sw_batch_size=3, preprocessing="none", regions=regions)
    victim = build_victim(network, config, name="n", keep_windows=1)
    inferer = victim.inferer
    assert (tuple(inferer.roi_size), inferer.overlap, inferer.sw_batch_size) == ((8, 8, 8), 0.125, 3)
    assert victim.head.region_names == tuple(regions)
    assert (inferer.mode, inferer.keep_windows) == ("constant", 1)
    assert victim.preprocessing is None
    assert victim.name == "n"
    image = 5 + torch.randn(1, 4, 8, 8, 8)
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(victim(image), network(image))
    normal = build_victim(network, replace(config, preprocessing="zscore_nonzero"))
    assert not torch.allclose(normal(image), victim(image), atol=1e-2)
    torch.testing.assert_close(normal(image), normal(3 * image + 2), rtol=1e-3, atol=1e-3)


def test_changes_replace_stored_values(saved):
    victim = load_victim(saved, name="other", overlap=0.25, mode=None)
    assert victim.inferer.overlap == 0.25
    assert victim.inferer.mode == "gaussian"
    assert victim.name == "other"


@pytest.mark.parametrize("field", ["overlaps", "network", "training", "__class__"])
def test_what_cannot_be_changed_is_refused(saved, field):
    with pytest.raises(CheckpointError, match=f"'{field}' cannot be changed"):
        load_victim(saved, **{field: {"name": "SegResNet"}})


def test_unknown_preprocessing(saved):
    with pytest.raises(CheckpointError, match="preprocessing 'minmax' is unknown"):
        load_victim(saved, preprocessing="minmax")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.pt does not exist"):
        read_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="is a folder: give the file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_a_truncated_file(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"victim\.pt cannot be read"):
        read_checkpoint(saved)


@pytest.mark.parametrize("content", [b"no checkpoint", b"PK\x03\x04 neither", b"\x80\x02K\x01.", bytes(200)])
def test_another_kind_of_file(saved, content):
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"victim\.pt"):
        read_checkpoint(saved)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("container", ["torch", "pickle"])
def test_a_pickle_that_would_execute_code_is_refused(tmp_path, container):
    bait = tmp_path / "executed"
    payload = Malicious()
    payload.path = str(bait)
    file = tmp_path / "evil.pt"
    content = {"format": FORMAT, "config": {}, "state_dict": {}, "x": payload}
    if container == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="weights_only=True"):
        read_checkpoint(file)
    assert not bait.exists()


def test_a_bare_state_dict_is_explained(tmp_path):
    torch.save(small()[0].state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"monai-adv victim .*--network"):
        read_checkpoint(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=FORMAT):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "config",
    [None, 3, {}, {"network": None}, {"network": {"name": "Nope"}}, {"network": baseline_unet(), "unknown": 1}],
)
def test_a_configuration_of_another_version(saved, config):
    with pytest.raises(CheckpointError, match="its configuration is not one of this version"):
        read_checkpoint(rewrite(saved, config=config))


def test_weights_of_another_network(saved):
    other = build_network(baseline_unet(norm="BATCH", channels=[8, 16], strides=[2])).state_dict()
    with pytest.raises(CheckpointError, match="does not fit its network"):
        read_checkpoint(rewrite(saved, state_dict=other))
    with pytest.raises(CheckpointError, match="does not fit its network"):
        read_checkpoint(rewrite(saved, state_dict={}))
    with pytest.raises(CheckpointError, match="does not fit its network"):
        read_checkpoint(rewrite(saved, state_dict={"a": 1}))
    with pytest.raises(CheckpointError, match="does not fit its network"):
        read_checkpoint(rewrite(saved, state_dict=None))


def test_weights_that_are_not_finite(saved):
    state = small()[0].state_dict()
    next(iter(state.values())).flatten()[0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        read_checkpoint(rewrite(saved, state_dict=state))


def test_the_hash_is_sha256(saved):
    assert file_hash(saved) == hashlib.sha256(saved.read_bytes()).hexdigest()
