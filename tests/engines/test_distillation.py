"""Defensive distillation: the loss at temperature T, the plain case, and the gradient it masks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from builders import make_cohort
from monai.engines import SupervisedTrainer
from robust import batches, entropy, network, same, trainer, watch
from torch import nn

from monai_adv import attacks
from monai_adv.data import brats_datalist
from monai_adv.engines import DistillationIteration, TrainConfig, train
from monai_adv.engines.robust.distillation import scale_logits
from monai_adv.errors import ConfigError
from monai_adv.networks import baseline_unet, build_network
from monai_adv.victims import Victim, VictimConfig, load_victim, save_checkpoint

CASES = [(2, "softmax"), (3, "softmax"), (3, "sigmoid")]


@pytest.mark.parametrize(("dims", "head"), CASES)
def test_hard_labels_at_temperature_one_are_plain_training(dims: int, head: str) -> None:
    nets = []
    for method in (None, DistillationIteration(temperature=1, labels="hard", head=head)):
        net = network(dims)
        # the engine's own loss is not used by the second: a wrong one shows
        loss = entropy(head) if method is None else nn.MSELoss()
        trainer(net, batches(3, dims, head), method, SupervisedTrainer, head, loss_function=loss).run()
        nets.append(net)
    assert same(*nets)


@pytest.mark.parametrize(("dims", "head"), CASES)
@pytest.mark.parametrize("temperature", [1.0, 5.0, 100.0])
def test_the_loss_is_the_cross_entropy_of_both_at_the_same_temperature(
    dims: int, head: str, temperature: float
) -> None:
    batch, teacher, net = batches(1, dims, head)[0], network(dims, seed=1), network(dims, norm="none")
    teacher.train()
    with torch.no_grad():
        student = net(batch["image"]) / temperature
        told = teacher.eval()(batch["image"]) / temperature
    teacher.train()
    if head == "softmax":
        expected = -(told.softmax(1) * student.log_softmax(1)).sum(1).mean()
    else:
        p, q = told.sigmoid(), student.sigmoid()
        expected = -(p * q.log() + (1 - p) * (1 - q).log()).mean()
    before = [p.clone() for p in teacher.state_dict().values()]
    iteration = DistillationIteration(teacher, temperature, head=head)
    engine = trainer(net, [batch], iteration, head=head)
    seen = watch(engine)
    engine.run()
    assert seen[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.state_dict().values()))
    assert teacher.training
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_the_teacher_is_the_minimum() -> None:
    """A student that is its teacher has no gradient, at any temperature."""
    batch, teacher, net = batches(1)[0], network(norm="none"), network(norm="none")
    for temperature in (1.0, 20.0):
        trainer(net, [batch], DistillationIteration(teacher, temperature)).run()
        assert all(float(p.grad.abs().max()) < 1e-6 for p in net.parameters() if p.grad is not None)


def test_the_temperature_masks_the_gradient_of_cross_entropy_only() -> None:
    """The textbook case: logits T times as large saturate the softmax; a margin loss still sees them."""
    image, net = batches(1)[0]["image"], network(norm="none")
    with torch.no_grad():
        for p in net[3].parameters():
            p.mul_(1e6)
    victim = Victim(net)
    label = victim.predict(image)
    options = {"eps": 0.1, "units": "absolute", "steps": 1}
    zero = {
        loss: attacks.create("ifgsm", loss=loss, **options)(victim, image, label).trace[0]["zero_gradient"].mean()
        for loss in ("ce", "margin")
    }
    assert zero["ce"] > 0.1
    assert zero["margin"] < 0.01


def test_a_teacher_may_be_a_checkpoint(tmp_path: Path) -> None:
    small = {"channels": [4, 8], "strides": [2]}
    torch.manual_seed(0)
    net = build_network(baseline_unet("softmax", **small))
    config = VictimConfig(baseline_unet("softmax", **small))
    save_checkpoint(tmp_path / "teacher.pt", net, config)
    students = []
    for teacher in (net, tmp_path / "teacher.pt"):
        student = network()
        method = {"name": "distillation", "teacher": teacher, "temperature": 5}
        trainer(student, batches(1), method).run()
        students.append(student)
    assert same(*students)
    with pytest.raises(ConfigError, match="softmax head"):
        DistillationIteration(tmp_path / "teacher.pt", head="sigmoid")


def test_wrong_distillations_are_told() -> None:
    for temperature in (0, 0.5, math.inf, math.nan, True, "hot"):
        with pytest.raises(ConfigError, match="temperature must be"):
            DistillationIteration(network(), temperature)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a teacher"):
        DistillationIteration()
    with pytest.raises(ConfigError, match="takes no teacher"):
        DistillationIteration(network(), labels="hard")
    with pytest.raises(ConfigError, match="labels 'warm'"):
        DistillationIteration(network(), labels="warm")
    teacher = nn.Conv3d(4, 3, 1)
    with pytest.raises(ConfigError, match="teacher and student disagree"):
        trainer(network(), batches(1), DistillationIteration(teacher)).run()


@pytest.mark.parametrize(("dims", "head"), CASES)
def test_a_start_from_another_temperature_keeps_its_probabilities(dims: int, head: str) -> None:
    net, image = network(dims), batches(1, dims, head)[0]["image"]
    with torch.no_grad():
        before = net.eval()(image)
        scale_logits(net.train(), 20.0, image.shape[2:])
        assert net.training
        torch.testing.assert_close(net.eval()(image) / 20, before)


def test_a_network_whose_logits_are_not_of_its_last_convolution_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv3d(4, 4, 1), nn.Softplus())
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ConfigError, match="last convolution"):
        scale_logits(net, 16.0, (4, 4, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_a_teacher_started_from_a_checkpoint_does_not_forget_it(tmp_path: Path) -> None:
    make_cohort(tmp_path / "data", 2)
    items = brats_datalist(tmp_path / "data")
    recipe = {"network": {"channels": [4, 8], "strides": [2]}, "patch": (16,) * 3, "steps": 1, "ema": 0.0}
    train(items, tmp_path / "plain.pt", TrainConfig(**recipe, learning_rate=1e-3))
    image = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = {"plain": load_victim(tmp_path / "plain.pt")(image)}
    for name, init, labels in (("teacher", "plain", "hard"), ("again", "teacher", "hard")):
        method = {"name": "distillation", "labels": labels, "temperature": 10}
        out = tmp_path / f"{name}.pt"
        train(items, out, TrainConfig(**recipe, learning_rate=1e-8, init=str(tmp_path / f"{init}.pt"), method=method))
        logits[name] = load_victim(out)(image)
    torch.testing.assert_close(logits["teacher"], 10 * logits["plain"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits["again"], logits["teacher"], rtol=1e-3, atol=1e-3)  # at that temperature already
