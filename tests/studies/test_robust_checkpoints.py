"""Robustly trained checkpoints: they say their method, and offline copies are files with the true labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import make_cohort
from cli_caller import call

from monai_adv.data import brats_datalist, load_case
from monai_adv.engines import TrainConfig, train
from monai_adv.engines.training import training_transforms
from monai_adv.errors import ConfigError
from monai_adv.studies.offline import adversarial_copies
from monai_adv.studies.training import train_and_score
from monai_adv.victims import read_checkpoint

SMALL: dict[str, Any] = {
    "network": {"channels": [4, 8], "strides": [2]}, "patch": (16, 16, 16), "ema": 0.0, "learning_rate": 1e-2,
}  # fmt: skip
BARE = {**SMALL, "network": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects, and a network trained on them for some steps."""
    folder = tmp_path_factory.mktemp("robust")
    make_cohort(folder / "data", 3)
    train(brats_datalist(folder / "data"), folder / "unet.pt", TrainConfig(steps=30, **SMALL))
    return folder


def weights(path: Path) -> list[torch.Tensor]:
    return list(read_checkpoint(path)[0].state_dict().values())


def training(path: Path) -> dict[str, Any]:
    return read_checkpoint(path)[1].training


def test_the_plain_method_is_plain_training_and_init_goes_on(root: Path, tmp_path: Path) -> None:
    items = brats_datalist(root / "data")
    for name, method in (("a", None), ("b", {"name": "plain"})):
        train(items, tmp_path / f"{name}.pt", TrainConfig(steps=3, method=method, **SMALL))
        assert training(tmp_path / f"{name}.pt")["method"] == {"name": "plain"}
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt")))
    start = str(root / "unet.pt")
    train(items, tmp_path / "c.pt", TrainConfig(steps=1, init=start, **{**BARE, "learning_rate": 1e-4}))
    moved = [float((a - b).abs().max()) for a, b in zip(weights(root / "unet.pt"), weights(tmp_path / "c.pt"))]
    assert 0 < max(moved) < 1e-3
    assert training(tmp_path / "c.pt")["init"]["file"] == start


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("method", "steps"),
    [({"name": "pgd_at", "eps": 0.2, "steps": 2}, 5), ({"name": "free", "replays": 3}, 6), ({"name": "trades"}, 5)],
    ids=lambda v: v["name"] if isinstance(v, dict) else None,
)
def test_a_checkpoint_says_its_method_and_counts_optimiser_steps(
    root: Path, tmp_path: Path, head: str, method: dict[str, Any], steps: int
) -> None:
    _, losses = train(
        brats_datalist(root / "data"), tmp_path / "a.pt", TrainConfig(head=head, steps=5, method=method, **SMALL)
    )
    stored = training(tmp_path / "a.pt")
    assert stored["method"] == method
    assert stored["steps"] == steps
    assert len(losses) == (2 if method["name"] == "free" else 5)


def test_the_support_is_the_brain_before_the_augmentation(tmp_path: Path) -> None:
    """Shifts and noise leave no exact zeros; the crop and the flips are those of the image."""
    make_cohort(tmp_path, 1)
    items = brats_datalist(tmp_path)
    for file in items[0]["image"]:  # a brain without any symmetry
        scan = nib.load(file)
        voxels = np.asarray(scan.dataobj).copy()
        voxels[:9, 4:, 2:], voxels[:, :5, :7] = 0, 0
        nib.save(type(scan)(voxels, scan.affine, scan.header), file)
    robust, plain = (training_transforms(TrainConfig(method=m, **SMALL)) for m in ({"name": "noise"}, None))
    shifted = 0
    for seed in range(6):
        for transforms in (robust, plain):
            transforms.set_random_state(seed)
        found, same = robust(dict(items[0]))[0], plain(dict(items[0]))[0]
        assert torch.equal(found["image"], same["image"])
        assert "support" not in same
        support = found["support"]
        assert support.dtype == torch.bool
        assert support.shape == found["image"].shape
        for channel, mask in zip(found["image"], support):
            value = channel.flatten().mode().values
            if int((channel == value).sum()) > 50:  # no noise: the background is one value, which marks it exactly
                assert torch.equal(channel != value, mask)
                shifted += bool(value != 0)
    assert shifted > 0


def test_a_students_checkpoint_names_its_teacher(root: Path, tmp_path: Path) -> None:
    method = {"name": "distillation", "teacher": str(root / "unet.pt"), "temperature": 20}
    train(brats_datalist(root / "data"), tmp_path / "student.pt", TrainConfig(steps=2, method=method, **SMALL))
    stored = training(tmp_path / "student.pt")["method"]
    assert {k: stored[k] for k in method} == method
    assert len(stored["teacher_sha256"]) == 64


def test_what_does_not_fit_the_checkpoint_is_told(root: Path, tmp_path: Path) -> None:
    items, start = brats_datalist(root / "data"), str(root / "unet.pt")
    with pytest.raises(ConfigError, match="has a softmax head"):
        train(items, tmp_path / "a.pt", TrainConfig(head="sigmoid", init=start, **BARE))
    with pytest.raises(ConfigError, match="leave the network out"):
        train(items, tmp_path / "a.pt", TrainConfig(init=start, **{**SMALL, "network": {"channels": [4, 4]}}))
    with pytest.raises(ConfigError, match="give its checkpoint as init"):
        train_and_score(root / "data", tmp_path / "a.pt", {"method": {"name": "offline"}, **SMALL})
    with pytest.raises(ConfigError, match="attack by its name"):
        adversarial_copies(items, root / "data", start, tmp_path, {"eps": 0.1})


def test_offline_copies_are_attacked_scans_with_true_labels(root: Path, tmp_path: Path) -> None:
    items = brats_datalist(root / "data")[:2]
    attack = {"name": "ifgsm", "eps": 0.3, "steps": 2}
    done: list[tuple[int, int]] = []
    both, problems = adversarial_copies(
        items, root / "data", root / "unet.pt", tmp_path, attack, on_subject=lambda i, n: done.append((i, n))
    )
    assert problems == []
    assert done == [(1, 2), (2, 2)]
    assert both[:2] == items
    assert [item["subject"] for item in both[2:]] == [f"{item['subject']}+ifgsm" for item in items]
    for original, copied in zip(items, both[2:]):
        assert copied["label"] == original["label"]
        a, b = load_case(original), load_case(copied)
        assert torch.equal(a["label"], b["label"])
        assert np.array_equal(a["image"].affine, b["image"].affine)
        for channel in range(4):
            brain = a["image"][channel] != 0
            change = (b["image"] - a["image"])[channel].as_tensor()
            assert not change[~brain].any()
            spread = float(a["image"][channel].as_tensor()[brain].std())
            assert 0.2 * spread < float(change.abs().max()) <= 0.31 * spread
    assert nib.load(both[2]["image"][0]).shape == nib.load(items[0]["image"][0]).shape


def test_the_command_line_trains_robustly(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, start = str(root / "data"), str(root / "unet.pt")
    short = ["--steps", "2", "--patch", "16", "--hold-out", "3"]
    online = ["--method", "pgd_at", "--option", "eps=0.1", "--option", "steps=2", "--init", start]
    assert call(monkeypatch, "train", folder, "-o", str(tmp_path / "at.pt"), *short, *online) == 0
    assert training(tmp_path / "at.pt")["method"] == {"name": "pgd_at", "eps": 0.1, "steps": 2}
    assert read_checkpoint(tmp_path / "at.pt")[1].network == read_checkpoint(start)[1].network
    student = ["--method", "distillation", "--option", f"teacher={start}", "--option", "temperature=20"]
    wide = ["--channels", "4,8"]
    assert call(monkeypatch, "train", folder, "-o", str(tmp_path / "student.pt"), *short, *student, *wide) == 0
    assert training(tmp_path / "student.pt")["method"]["temperature"] == 20
    offline = ["--method", "offline", "--option", "attack=ifgsm", "--option", "eps=0.2", "--option", "steps=2"]
    assert call(monkeypatch, "train", folder, "-o", str(tmp_path / "off.pt"), *short, *offline, "--init", start) == 0
    stored = training(tmp_path / "off.pt")
    assert stored["method"] == {"name": "offline", "attack": "ifgsm", "eps": 0.2, "steps": 2}
    assert [name.endswith("+ifgsm") for name in stored["subjects"]] == [False, False, True, True]
    assert sorted(p.name for p in (tmp_path / "off_copies").iterdir() if p.is_dir()) == sorted(
        name for name in stored["subjects"] if not name.endswith("+ifgsm")
    )
    capsys.readouterr()
    assert call(monkeypatch, "train", folder, *short, "--option", "eps=0.1") == 1
    assert "belongs to a method" in capsys.readouterr().err
