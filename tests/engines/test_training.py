from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import make_cohort

from monai_adv.data import brats_datalist
from monai_adv.engines import TrainConfig, train
from monai_adv.errors import ConfigError, NonFiniteError
from monai_adv.studies.demo import RECIPE
from monai_adv.studies.training import train_and_score
from monai_adv.victims import load_victim

SMALL = {"network": {"channels": [4, 8], "strides": [2]}, "patch": (16, 16, 16), "ema": 0.0, "learning_rate": 1e-2}


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, object]]:
    make_cohort(tmp_path / "data", 3)
    return brats_datalist(tmp_path / "data")


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_training_lowers_the_loss_and_the_checkpoint_is_the_victim(
    items: list[dict[str, object]], tmp_path: Path, head: str
) -> None:
    config = TrainConfig(head=head, steps=40, **SMALL)
    victim, losses = train(items, tmp_path / "victim.pt", config)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    loaded = load_victim(tmp_path / "victim.pt")
    image = torch.rand(1, 4, 16, 16, 16)
    assert torch.equal(loaded(image), victim(image))
    assert loaded.head.kind == head


def test_a_seed_reproduces_the_weights_and_another_does_not(items: list[dict[str, object]], tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> list[torch.Tensor]:
        victim, _ = train(items, tmp_path / name, TrainConfig(steps=3, seed=seed, **SMALL))
        return list(victim.network.state_dict().values())

    first, again, other = weights("a.pt", 0), weights("b.pt", 0), weights("c.pt", 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def test_averaged_weights_are_kept_when_the_training_is_long_enough(
    items: list[dict[str, object]], tmp_path: Path
) -> None:
    plain, _ = train(items, tmp_path / "a.pt", TrainConfig(steps=30, **SMALL))
    averaged, _ = train(items, tmp_path / "b.pt", TrainConfig(steps=30, **{**SMALL, "ema": 0.5}))
    short, _ = train(items, tmp_path / "c.pt", TrainConfig(steps=30, **{**SMALL, "ema": 0.999}))
    a, b, c = (v.network.state_dict()["model.0.conv.weight"] for v in (plain, averaged, short))
    assert not torch.equal(a, b)
    assert torch.equal(a, c)


def test_the_clock_ends_a_training(items: list[dict[str, object]], tmp_path: Path) -> None:
    _, losses = train(items, tmp_path / "a.pt", TrainConfig(steps=100_000, minutes=0.01, **SMALL))
    assert 1 <= len(losses) < 1000


def test_errors_say_what_to_do(items: list[dict[str, object]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no subject"):
        train([], tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="not a multiple"):
        train(items, tmp_path / "a.pt", TrainConfig(batch=3, per_subject=2))
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        train(items, tmp_path / "a.pt", TrainConfig(steps=30, **{**SMALL, "learning_rate": 1e30}))


def test_the_packaged_recipe_trains_a_few_steps(items: list[dict[str, object]], tmp_path: Path) -> None:
    """The recipe behind the packaged demo network, shortened: same network, patches, loss and schedule."""
    victim, losses = train(items, tmp_path / "a.pt", TrainConfig(**{**RECIPE, "steps": 8}))
    assert losses[-1] < losses[0]
    assert sum(p.numel() for p in victim.network.parameters()) == 489322


def test_train_and_score_holds_out_every_nth_subject(tmp_path: Path) -> None:
    make_cohort(tmp_path / "data", 4)
    bad = next((tmp_path / "data" / "BraTS2021_00001").glob("*_t2*"))
    bad.write_bytes(b"")
    table, problems = train_and_score(tmp_path / "data", tmp_path / "a.pt", {"steps": 5, **SMALL}, hold_out=2)
    assert len(problems) == 1
    assert bad.name in problems[0]
    assert table is not None
    assert table["subject"].tolist() == ["BraTS2021_00000", "BraTS2021_00002", "mean", "median"]
    assert table.set_index("subject").loc["mean", "Dice WT"] == pytest.approx(table["Dice WT"][:2].mean())
    stored = torch.load(tmp_path / "a.pt", weights_only=True)["config"]["training"]
    assert stored["subjects"] == ["BraTS2021_00003"]
    assert stored["held_out"] == ["BraTS2021_00000", "BraTS2021_00002"]
    with pytest.raises(ConfigError, match="nothing to train on"):
        train_and_score(tmp_path / "data", tmp_path / "a.pt", {}, hold_out=1)
