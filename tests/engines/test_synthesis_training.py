"""train_synthesis: from a datalist and a victim's checkpoint to a generator's, and the command around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import LPS, make_case, make_cohort
from cli_caller import call
from victims_on_disk import tiny_checkpoint

from monai_adv.data import brats_datalist
from monai_adv.engines import SynthesisConfig, SynthesisPreview, train_synthesis
from monai_adv.engines.synthesis_data import TumourCrops, load_cohort
from monai_adv.errors import CheckpointError, ConfigError, NonFiniteError
from monai_adv.networks import build_network, load_generator
from monai_adv.victims import Head, Victim, VictimConfig, read_checkpoint, save_checkpoint
from monai_adv.victims.checkpoint import file_hash

SMALL: dict[str, Any] = {"patch": (16, 16, 16), "channels": (4, 4, 8), "latent": 2, "epoch_steps": 2, "steps": 4}


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, Any]]:
    make_cohort(tmp_path / "data", 3)
    return brats_datalist(tmp_path / "data")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("victim") / "tiny.pt"
    with torch.random.fork_rng(devices=[]):
        network, config = read_checkpoint(tiny_checkpoint(path, steps=20))
    return save_checkpoint(path, network, replace(config, roi_size=[16, 16, 16]))


@pytest.fixture(scope="module")
def flat_victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2D network with random weights."""
    network = {"name": "UNet", "spatial_dims": 2, "in_channels": 4, "out_channels": 3, "channels": [4, 8],
               "strides": [2], "num_res_units": 0, "norm": "INSTANCE"}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build_network(network)
    config = VictimConfig(network=network, head="sigmoid", roi_size=[16, 16])
    return save_checkpoint(tmp_path_factory.mktemp("flat") / "flat.pt", built, config)


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_checkpoint_previews_and_terms(items: list[dict[str, Any]], victim: Path, tmp_path: Path) -> None:
    shown: list[SynthesisPreview] = []
    steps: list[float] = []
    generator, history = train_synthesis(
        items, victim, tmp_path / "g.pt", SynthesisConfig(**{**SMALL, "steps": 5}), provenance={"command": "here"},
        preview=shown.append, on_step=lambda done, terms: steps.append(done),
    )  # fmt: skip
    assert len(history) == 5
    assert steps == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [s.epoch for s in shown] == [0, 1, 2]
    first, last = shown[0], shown[-1]
    assert torch.equal(first.image, last.image)  # the same crop
    assert not torch.equal(first.synthetic, last.synthetic)
    assert first.truth.shape == first.moved_truth.shape == (16, 16, 16)
    assert first.truth.dtype == torch.bool
    assert bool(first.truth.any())
    assert first.fields["displacement"].shape == (3, 16, 16, 16)
    assert type(first.image) is torch.Tensor
    loaded = load_generator(tmp_path / "g.pt")
    assert same(loaded, generator)
    info = loaded.training_info
    assert info["victim"] == {"file": str(victim), "sha256": file_hash(victim)}
    assert info["subjects"] == [str(item["subject"]) for item in items]
    assert info["spacing"] == [1.0, 1.0, 1.0]
    assert info["recipe"]["patch"] == [16, 16, 16]
    assert info["command"] == "here"
    assert info["steps"] == 5
    assert info["final"]["loss"] == pytest.approx(sum(h["loss"] for h in history) / 5)


def test_slices_for_a_flat_victim(items: list[dict[str, Any]], flat_victim: Path, tmp_path: Path) -> None:
    shown: list[SynthesisPreview] = []
    generator, _ = train_synthesis(
        items, flat_victim, tmp_path / "g.pt", SynthesisConfig(**{**SMALL, "patch": (16, 16), "steps": 2}),
        preview=shown.append,
    )  # fmt: skip
    assert generator.spatial_dims == 2
    assert shown[0].image.shape == (4, 16, 16)
    assert shown[0].fields["displacement"].shape == (2, 16, 16)
    with pytest.raises(ConfigError, match="2 axes"):
        train_synthesis(items, flat_victim, tmp_path / "g.pt", SynthesisConfig(**SMALL))


def test_a_seed_gives_the_same_bits_and_another_does_not(
    items: list[dict[str, Any]], victim: Path, tmp_path: Path
) -> None:
    def run(seed: int) -> Any:
        return train_synthesis(items, victim, tmp_path / f"{seed}.pt", SynthesisConfig(**SMALL, seed=seed))[0]

    first = run(0)
    torch.rand(3)
    assert same(first, run(0))
    assert not same(first, run(1))


def test_an_error_keeps_the_last_epoch_and_the_state_goes_on_bit_for_bit(
    items: list[dict[str, Any]], victim: Path, tmp_path: Path
) -> None:
    config = SynthesisConfig(**{**SMALL, "steps": 6})
    whole, history = train_synthesis(items, victim, tmp_path / "whole.pt", config)

    def fail(done: float, terms: dict[str, float]) -> None:
        if done > 0.6:
            raise RuntimeError("pulled the plug")

    state, out = tmp_path / "state.pt", tmp_path / "part.pt"
    with pytest.raises(RuntimeError, match="plug"):
        train_synthesis(items, victim, out, config, state=state, on_step=fail)
    assert load_generator(out).training_info["steps"] == 2
    rest, again = train_synthesis(items, victim, out, config, state=state)
    assert again == history
    assert same(whole, rest)
    assert load_generator(out).training_info["steps"] == 6
    finished, _ = train_synthesis(items, victim, out, config, state=state)  # nothing left to do
    assert same(whole, finished)
    state.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        train_synthesis(items, victim, out, config, state=state)


def test_the_clock_ends_a_training(items: list[dict[str, Any]], victim: Path, tmp_path: Path) -> None:
    config = SynthesisConfig(**{**SMALL, "steps": 100_000, "minutes": 0.01})
    _, history = train_synthesis(items, victim, tmp_path / "g.pt", config)
    assert 1 <= len(history) < 1000
    assert load_generator(tmp_path / "g.pt").training_info["steps"] == len(history)


def test_subjects_that_cannot_be_used_cost_themselves(
    items: list[dict[str, Any]], victim: Path, tmp_path: Path
) -> None:
    make_case(tmp_path / "data", "BraTS2021_00007", corrupt="truncated")
    make_case(tmp_path / "data", "BraTS2021_00008", label_dtype=np.uint8, corrupt="zero", role="label")
    broken = [*items, *(dict(items[0], subject=name) for name in ("BraTS2021_00007", "BraTS2021_00008"))]
    for item in broken[3:]:
        for key in ("image", "label"):
            swap = str(items[0]["subject"])
            paths = item[key] if isinstance(item[key], list) else [item[key]]
            found = [str(p).replace(swap, item["subject"]) for p in paths]
            item[key] = found if isinstance(item[key], list) else found[0]
    generator, _ = train_synthesis(broken, victim, tmp_path / "g.pt", SynthesisConfig(**{**SMALL, "steps": 2}))
    assert len(generator.training_info["subjects"]) == 3
    problems = generator.training_info["problems"]
    assert "BraTS2021_00007" in problems[0]
    assert "BraTS2021_00008: there is no tumour" in problems[1]


def test_errors_say_what_to_do(items: list[dict[str, Any]], victim: Path, tmp_path: Path) -> None:
    def run(data: Any = items, **changes: Any) -> None:
        train_synthesis(data, victim, tmp_path / "g.pt", SynthesisConfig(**{**SMALL, **changes}))

    with pytest.raises(ConfigError, match="too few subjects"):
        run([])
    with pytest.raises(ConfigError, match="critic's weight 0"):
        run(items[:1])
    run(items[:1], weights={"critic": 0.0}, steps=1)
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        run(batch=0)
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        run(learning_rate=1e30, steps=20)
    make_case(tmp_path / "other", "BraTS2021_00009", affine=LPS @ np.diag([2.0, 2, 2, 1]))
    with pytest.raises(ConfigError, match=r"BraTS2021_00009 has voxels of 2 x 2 x 2 mm.*one voxel size"):
        run([*items, *brats_datalist(tmp_path / "other")])
    with pytest.raises(CheckpointError, match="does not exist"):
        train_synthesis(items, tmp_path / "none.pt", tmp_path / "g.pt")


def test_a_log_dir_needs_tensorboard(items: list[dict[str, Any]], victim: Path, tmp_path: Path) -> None:
    config = SynthesisConfig(**{**SMALL, "steps": 1})
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install tensorboard"):
            train_synthesis(items, victim, tmp_path / "g.pt", config, log_dir=tmp_path / "logs")
    else:
        train_synthesis(items, victim, tmp_path / "g.pt", config, log_dir=tmp_path / "logs")
        assert list((tmp_path / "logs").glob("events*"))


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8), (20, 20, 20)])
def test_crops_hold_tumour_and_another_subject_and_depend_on_their_index_only(
    items: list[dict[str, Any]], patch: tuple[int, ...]
) -> None:
    cohort = load_cohort(items, patch)
    crops = TumourCrops(cohort, patch, Head("sigmoid"), seed=3, length=8, real=True)
    crops.set_epoch(2)
    first = [crops[i] for i in range(8)]
    again = [crops[i] for i in reversed(range(8))][::-1]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again) for k in a)
    assert all(c["image"].shape == c["real"].shape == (4, *patch) and c["label"].shape == (3, *patch) for c in first)
    assert all(bool(c["label"][1].any()) for c in first)  # WT
    whole = [v["image"] for v in cohort.volumes]
    assert all(v.max() > 100 for v in whole)  # scanner units
    for crop in first:
        home = [i for i, v in enumerate(whole) if bool(torch.isin(crop["image"][0].amax(), v[0]))]
        away = [i for i, v in enumerate(whole) if bool(torch.isin(crop["real"][0], v[0]).all())]
        assert home
        assert away
    crops.set_epoch(3)
    assert not all(torch.equal(a["image"], crops[i]["image"]) for i, a in enumerate(first))
    assert "real" not in TumourCrops(cohort, patch, Head("softmax"), seed=3, length=1, real=False)[0]


def test_real_crops_are_of_other_subjects(items: list[dict[str, Any]]) -> None:
    cohort = load_cohort(items, (8, 8, 8))
    for number, volume in enumerate(cohort.volumes):
        volume["image"] = torch.full_like(volume["image"], number + 1.0)
    crops = TumourCrops(cohort, (8, 8, 8), Head("softmax"), seed=0, length=40, real=True)
    pairs = {(float(c["image"].max()), float(c["real"].max())) for c in (crops[i] for i in range(40))}
    assert pairs == {(a, b) for a in (1.0, 2.0, 3.0) for b in (1.0, 2.0, 3.0) if a != b}


def test_a_victim_in_memory(items: list[dict[str, Any]], tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Conv3d(4, 4, 1)
    generator, _ = train_synthesis(
        items, Victim(network, name="linear"), tmp_path / "g.pt", SynthesisConfig(**{**SMALL, "steps": 1})
    )
    assert generator.training_info["victim"] == {"name": "linear"}
    with pytest.raises(ConfigError, match="no convolution"):
        train_synthesis(items, Victim(torch.nn.Identity()), tmp_path / "g.pt")


def test_the_command(
    victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cohort(tmp_path / "data", 4)
    out = tmp_path / "gen.pt"
    code = call(
        monkeypatch, "train-synthesis", str(tmp_path / "data"), "--checkpoint", str(victim), "-o", str(out),
        "--steps", "2", "--patch", "16", "--batch", "1", "--seed", "3", "--no-critic", "--max-mm", "3", "--max-bias",
        "0", "--max-residual", "1", "--hold-out", "2", "--weight", "size=0.2", "--learning-rate", "5e-4",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0, printed
    generator = load_generator(out)
    assert (generator.effect["max_mm"], generator.effect["max_bias"], generator.effect["max_residual"]) == (3, 0, 1)
    info = generator.training_info
    assert info["held_out"] == ["BraTS2021_00000", "BraTS2021_00002"]
    assert info["subjects"] == ["BraTS2021_00001", "BraTS2021_00003"]
    assert info["recipe"]["seed"] == 3
    assert info["recipe"]["batch"] == 1
    assert info["recipe"]["weights"] == {"size": 0.2, "critic": 0.0}
    assert (info["recipe"]["learning_rate"], info["recipe"]["critic_learning_rate"]) == (5e-4, 5e-4)
    assert "critic" not in info["final"]
    assert info["command"].startswith("monai-adv train-synthesis")
    assert "dice_error" in printed
    picture = tmp_path / "gen_epochs" / "epoch_000.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_in_2d_holds_all_out_and_goes_on(
    flat_victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cohort(tmp_path / "data", 2)
    arguments = ["train-synthesis", str(tmp_path / "data"), "--checkpoint", str(flat_victim),
                 "-o", str(tmp_path / "gen.pt"), "--patch", "16", "--steps", "1"]  # fmt: skip
    assert call(monkeypatch, *arguments, "--hold-out", "1") == 1
    assert "2 subjects held out" in capsys.readouterr().err
    state = tmp_path / "state.pt"
    assert call(monkeypatch, *arguments, "--hold-out", "0", "--minutes", "5", "--state", str(state)) == 0
    assert load_generator(tmp_path / "gen.pt").spatial_dims == 2
    assert (tmp_path / "gen_epochs" / "epoch_000.png").is_file()
