"""Learned synthesis as augmentation: what the network sees is what the fields say, labels and background included."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_cohort
from cli_caller import call
from monai.engines import SupervisedTrainer
from robust import PUSH, batches, constant_generator, network, same, trainer, watch
from torch import Tensor

from monai_adv.engines import AdversarialIteration, SynthesisIteration, create_method
from monai_adv.errors import CheckpointError, ConfigError
from monai_adv.networks import SynthesisGenerator, save_generator
from monai_adv.studies.config import VictimEntry
from monai_adv.studies.victims import defense_kind
from monai_adv.victims import read_checkpoint


def shift(dims: int, **effect: Any) -> SynthesisGenerator:
    """Moves everything by two voxels along every axis: control vectors too long are shortened to the limit."""
    return constant_generator(dims, max_mm=2 * math.sqrt(dims), max_bias=0, max_residual=0, **effect)


def shifted(data: Tensor) -> Tensor:
    """``data(p + 2)``, at the border the border."""
    index = (torch.arange(8) + 2).clamp_max(7)
    for axis in range(2, data.dim()):
        data = data.index_select(axis, index)
    return data


def augmented(dims: int, head: str = "softmax") -> dict[str, Tensor]:
    """A batch with its support, whose background is not zero any more."""
    batch = batches(1, dims, head)[0]
    batch["image"][..., 5:] = 0  # the brain leaves voxels behind that were none
    batch["support"] = batch["image"] != 0
    noise = torch.randn(batch["image"].shape, generator=torch.Generator().manual_seed(5))
    batch["image"] = batch["image"] + 0.3 + 0.1 * noise
    return batch


def seen_by(iteration: Any, batch: dict[str, Tensor], dims: int, head: str = "softmax") -> dict[str, Tensor]:
    """The batch that the training step is taken on."""
    found: dict[str, Tensor] = {}

    def step(engine: Any, handed: Any) -> Any:
        found.update(handed)
        return engine._iteration(engine, handed)

    iteration.iteration_update = step
    trainer(network(dims), [batch], iteration, SupervisedTrainer, head).run()
    return found


@pytest.mark.parametrize(("dims", "head"), [(2, "softmax"), (3, "softmax"), (3, "sigmoid")])
def test_image_label_support_and_background_move_together(dims: int, head: str) -> None:
    batch = augmented(dims, head)
    iteration = SynthesisIteration(shift(dims), share=1.0, scale=(1.0, 1.0))
    found = seen_by(iteration, batch, dims, head)
    assert torch.allclose(found["image"], shifted(batch["image"]), atol=1e-4)
    assert torch.equal(found["label"], shifted(batch["label"]))
    assert torch.equal(found["support"], shifted(batch["support"]))
    assert found["label"].dtype == batch["label"].dtype
    assert not torch.equal(found["label"], batch["label"])


def test_appearance_changes_the_foreground_only() -> None:
    batch = augmented(2)
    brighter = constant_generator(max_mm=0, max_bias=0.5, max_residual=0)
    found = seen_by(SynthesisIteration(brighter, share=1.0, scale=(0.5, 0.5)), batch, 2)
    factor = math.exp(0.5 * math.log(1.5) * math.tanh(PUSH))
    expected = torch.where(batch["support"], factor * batch["image"], batch["image"])
    assert torch.allclose(found["image"], expected, atol=1e-5)
    assert torch.equal(found["image"][~batch["support"]], batch["image"][~batch["support"]])
    assert torch.equal(found["label"], batch["label"])
    # a scale of its own for every sample
    found = seen_by(SynthesisIteration(brighter, share=1.0), batch, 2)
    factors = [float((a / b)[batch["support"][0]].mean()) for a, b in zip(found["image"], batch["image"])]
    assert len({round(f, 4) for f in factors}) == 4
    assert all(1 <= f <= factor**2 for f in factors)


def test_foreground_that_is_zero_after_normalisation_is_no_background() -> None:
    batch = batches(1, 2)[0]
    batch["support"] = batch["image"] != 0
    batch["image"][0, :, 3, 3] = 0  # the mean of the brain
    found = seen_by(SynthesisIteration(shift(2), share=1.0, scale=(1.0, 1.0)), batch, 2)
    # the voxel moves as brain: a quarter of a voxel further its neighbours would be mixed with it, not cut at it
    assert torch.allclose(found["image"], shifted(batch["image"]), atol=1e-4)
    assert torch.equal(found["support"], shifted(batch["support"]))
    raised = constant_generator(max_mm=0, max_bias=0, max_residual=0.5)
    found = seen_by(SynthesisIteration(raised, share=1.0, scale=(1.0, 1.0)), batch, 2)
    assert bool((found["image"][0, :, 3, 3] > 0.3).all())


def test_a_scale_of_zero_is_plain_training() -> None:
    data, nets = [augmented(2) for _ in range(3)], []
    for method in (None, SynthesisIteration(constant_generator(), share=1.0, scale=(0.0, 0.0))):
        net = network(2)
        trainer(net, data, method, SupervisedTrainer).run()
        nets.append(net)
    assert same(*nets)


def test_the_generator_gets_no_gradient_and_stays_as_it_was() -> None:
    made = constant_generator()
    made.train()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    net, start = network(2), network(2)
    trainer(net, batches(2, 2), SynthesisIteration(made, share=1.0), SupervisedTrainer).run()
    assert not same(net, start)
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())
    assert made.training
    assert all(p.requires_grad and p.grad is None for p in made.parameters())


def test_the_share_is_met_on_average_and_the_numbers_are_those_of_seed_and_iteration() -> None:
    def changed(**options: Any) -> tuple[list[list[bool]], list[Tensor]]:
        data = [batches(1, 2)[0]] * 40
        engine = trainer(network(2), data, SynthesisIteration(constant_generator(), **options))
        seen = watch(engine)
        engine.run()
        return [[not torch.equal(a, b) for a, b in zip(s["clean"], s["image"])] for s in seen], [
            s["image"] for s in seen
        ]

    counts, images = changed(share=0.4)
    mean = sum(map(sum, counts)) / (40 * 4)
    assert mean == pytest.approx(0.4, abs=0.08)
    assert {sum(c) for c in counts} == {1, 2}
    again = changed(share=0.4)[1]
    assert all(torch.equal(a, b) for a, b in zip(images, again))
    other = changed(share=0.4, seed=1)[1]
    assert not all(torch.equal(a, b) for a, b in zip(images, other))
    # the scale is drawn for every sample
    first = [i for i, c in enumerate(counts) if c[0]]
    assert not torch.equal(images[first[0]][0], images[first[1]][0])


def test_samples_without_foreground_stay_and_without_a_support_zero_is_background() -> None:
    batch = batches(1, 2)[0]
    batch["image"][1] = 0
    found = seen_by(SynthesisIteration(shift(2), share=1.0, scale=(1.0, 1.0)), batch, 2)
    assert torch.equal(found["label"][1], batch["label"][1])
    assert torch.allclose(found["image"][0], shifted(batch["image"])[0], atol=1e-4)
    assert torch.equal(found["image"] == 0, shifted(batch["image"]) == 0)
    assert "support" not in found


def test_an_attack_may_follow_on_the_moved_support() -> None:
    batch = augmented(2)
    attack = AdversarialIteration({"name": "pgd", "eps": 0.1, "steps": 1, "units": "absolute"}, share=1.0)
    iteration = SynthesisIteration(shift(2), share=1.0, scale=(1.0, 1.0), iteration_update=attack)
    engine = trainer(network(2), [batch], iteration, SupervisedTrainer)
    seen = watch(engine)
    engine.run()
    moved = (seen[0]["image"] - shifted(batch["image"])).abs() > 1e-3
    assert moved.any()
    assert not (moved & ~shifted(batch["support"])).any()


def test_a_label_that_prepare_batch_does_not_hand_over_is_an_error() -> None:
    def other(batch: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return batch["image"], 3 - batch["label"]

    engine = trainer(network(2), batches(1, 2), SynthesisIteration(shift(2), share=1.0), prepare_batch=other)
    with pytest.raises(ConfigError, match=r"under .?label.? unchanged"):
        engine.run()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"share": 0}, "share must be in"),
        ({"drop": (0.5, 0.1)}, "drop must have 0 <= low <= high <= 1"),
        ({"scale": (0, 2)}, "scale must have"),
        ({"scale": 0.5}, "scale must be a range"),
        ({"spacing": (1.0, 1.0, 1.0)}, "2 numbers of mm"),
        ({"seed": -1}, "seed"),
        ({"eps": 0.1}, "no option eps"),
        ({"generator": 3}, "needs a generator or its file"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        create_method({"name": "synthesis", "generator": constant_generator(), **options})


def test_what_the_method_needs() -> None:
    with pytest.raises(ConfigError, match="needs generator"):
        create_method("synthesis")
    with pytest.raises(ConfigError, match="give spacing in mm"):
        create_method({"name": "synthesis", "generator": constant_generator(spacing=False)})
    with pytest.raises(CheckpointError, match="does not exist"):
        create_method({"name": "synthesis", "generator": "nowhere.pt"})
    own = create_method({"name": "synthesis", "generator": constant_generator(), "spacing": [2, 3], "drop": [0.1, 0.2]})
    assert isinstance(own, SynthesisIteration)
    assert (own.spacing, own.drop) == ((2.0, 3.0), (0.1, 0.2))


def test_the_spacing_is_what_millimetres_are_measured_in() -> None:
    batch = batches(1, 2)[0]
    iteration = SynthesisIteration(shift(2, knot_mm=4.0), share=1.0, scale=(1.0, 1.0), spacing=(2.0, 2.0))
    found = seen_by(iteration, batch, 2)
    index = (torch.arange(8) + 1).clamp_max(7)  # two millimetres are one voxel
    assert torch.equal(found["label"], batch["label"].index_select(2, index).index_select(3, index))


def test_train_with_synthesis_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_cohort(tmp_path / "data", 2)
    made = constant_generator(spacing=False)
    save_generator(tmp_path / "gen.pt", made, {"spacing": [1.0, 1.0]})
    common = ("--dims", "2", "--patch", "16", "--steps", "2", "--hold-out", "0", "--channels", "4,8")
    method = ("--method", "synthesis", "--option", f"generator={tmp_path / 'gen.pt'}", "--option", "share=1.0")
    out = tmp_path / "synthesis.pt"
    assert call(monkeypatch, "train", str(tmp_path / "data"), "-o", str(out), *common, *method) == 0
    stored = read_checkpoint(out)[1].training["method"]
    assert stored["name"] == "synthesis"
    assert len(stored["generator_sha256"]) == 64
    assert defense_kind(VictimEntry(name="augmented", checkpoint=out)) == "adversarial_training"
    bad = (*common[2:], *method)  # a generator of slices for volumes
    assert call(monkeypatch, "train", str(tmp_path / "data"), "-o", str(tmp_path / "no.pt"), *bad) == 1
    assert "takes images" in " ".join(capsys.readouterr().err.split())
