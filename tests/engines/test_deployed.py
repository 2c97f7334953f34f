"""Engines score what is deployed: the vote of a smoothed network, the refined segmentation, the filtered image."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.utils import CommonKeys
from torch import Tensor, nn

from monai_adv import attacks
from monai_adv.defenses import Purify, purified, smoothed
from monai_adv.engines import AttackEvaluator, AttackIteration, AttackKeys
from monai_adv.handlers import AttackRecordSaver
from monai_adv.victims import Head, KeepLargest, Victim, mean_dice

CPU = torch.device("cpu")
SMOOTH = partial(smoothed, sigma=2.0, samples=5)
KEEP = KeepLargest()
DEFENSES: dict[str, dict[str, Any]] = {
    "vote": {"defend": SMOOTH},
    "refined": {"refine": KEEP},
    "refined vote": {"defend": SMOOTH, "refine": KEEP},
    "filtered": {"defend": lambda victim: purified(victim, Purify("median"))},
}


class Counted(nn.Module):
    """Whole-volume passes of a small network."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.Softplus(), nn.Conv3d(6, classes, 1))
        self.passes = 0
        self.inputs: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.passes += 1
        self.inputs.append(image.detach().clone())
        return self.network(image)


def loader(head: str = "softmax", cases: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    data = []
    for index in range(cases):
        label = Head(head).label_from_classes(torch.randint(0, 4, (1, 1, 6, 6, 6), generator=generator))[0]
        image = MetaTensor(torch.randn(4, 6, 6, 6, generator=generator), affine=affine)
        data.append({"image": image, "label": label.float(), "subject": f"case{index}"})
    return DataLoader(Dataset(data), batch_size=cases)


def run(cls: Any, network: nn.Module, head: str, attack: Any, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The one undecollated output of an evaluator."""
    if cls is SupervisedEvaluator:
        more["iteration_update"] = AttackIteration(attack, head, **options)
    else:
        more |= {"attack": attack, "head": head, **options}
    engine = cls(device=CPU, val_data_loader=loader(head), network=network, decollate=False, **more)
    outputs: list[dict[str, Any]] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(dict(e.state.output)))
    engine.run()
    return outputs[0]


def deployed(network: nn.Module, head: str, options: dict[str, Any]) -> Victim:
    victim = Victim(network.eval(), head=head, refine=options.get("refine"))
    return options["defend"](victim) if "defend" in options else victim


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", DEFENSES)
@pytest.mark.parametrize("cls", [SupervisedEvaluator, AttackEvaluator])
def test_both_passes_are_of_the_deployed_victim(cls: Any, kind: str, head: str) -> None:
    network, options = Counted(4 if head == "softmax" else 3), DEFENSES[kind]
    attack = attacks.create("ifgsm", eps=0.5, steps=2)
    found = run(cls, network, head, attack, options)
    victim = deployed(network, head, options)
    image = found[CommonKeys.IMAGE].as_tensor()
    expected = victim.predict(image)
    seen = Head(head).predict(found[CommonKeys.PRED].as_tensor())
    assert torch.equal(seen, expected)
    assert not torch.equal(expected, Victim(network, head=head).predict(image))
    # the attack goes through it too
    clean = torch.stack([case["image"].as_tensor() for case in loader(head).dataset])
    victim.reseed(attack.seed)
    label = torch.stack([case["label"] for case in loader(head).dataset])
    result = attack(victim, clean, label)
    assert torch.equal(result.image, image)
    if cls is AttackEvaluator:
        before = Head(head).predict(found[AttackKeys.CLEAN_PRED].as_tensor())
        assert torch.equal(before, victim.predict(clean))
        assert torch.equal(found[AttackKeys.SCORE], result.score)


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", DEFENSES)
def test_the_records_are_those_of_the_deployed_victim(kind: str, head: str, tmp_path: Path) -> None:
    network, options = Counted(4 if head == "softmax" else 3), DEFENSES[kind]
    attack = attacks.create("fgsm", eps=0.5)
    saver = AttackRecordSaver(tmp_path / "records.csv", head=head)
    found = run(AttackEvaluator, network, head, attack, options, val_handlers=[saver])
    victim = deployed(network, head, options)
    table = pd.read_csv(tmp_path / "records.csv").groupby(["attack", "subject"])["dice"].mean()
    label = Head(head).check_label(found[CommonKeys.LABEL], found[CommonKeys.PRED].as_tensor())
    for name, key in (("clean", AttackKeys.CLEAN_IMAGE), ("fgsm", CommonKeys.IMAGE)):
        dice = mean_dice(victim.predict(found[key].as_tensor()), label, victim.head)
        for index, value in enumerate(dice.tolist()):
            assert table[name, f"case{index}"] == pytest.approx(value, abs=1e-12)


def test_a_deterministic_victim_costs_no_pass_more() -> None:
    attack = attacks.create("ifgsm", eps=0.5, steps=2)
    for cls, passes in ((SupervisedEvaluator, 5), (AttackEvaluator, 6)):  # clean, 2 steps, the last one; then scoring
        for options in ({}, {"refine": KEEP}):
            network = Counted()
            run(cls, network, "softmax", attack, options)
            assert network.passes == passes


def test_refined_logits_differ_only_where_the_refinement_decides() -> None:
    network = Counted().eval()
    plain, refined = Victim(network), Victim(network, refine=KEEP)
    image = next(iter(loader()))["image"].as_tensor()
    a, b = plain.predict_logits(image), refined.predict_logits(image)
    with torch.no_grad():
        assert torch.equal(a, network(image))
    changed = plain.predict(image) != refined.predict(image)
    assert 0 < changed.sum() < changed.numel()
    assert torch.equal((a != b).any(1, keepdim=True), changed)
    assert torch.equal(refined.head.predict(b), refined.predict(image))


def test_a_trainer_draws_new_noise_for_every_batch_and_never_refines() -> None:
    network = Counted()
    batch = next(iter(loader()))
    trainer = SupervisedTrainer(
        device=CPU, max_epochs=1, train_data_loader=[batch] * 3, network=network, decollate=False,
        optimizer=torch.optim.SGD(network.parameters(), 0.0), inferer=SimpleInferer(),
        loss_function=lambda z, y: nn.functional.cross_entropy(z, y[:, 0].long()),
        iteration_update=AttackIteration({"name": "noise", "eps": 0.0}, refine=torch.zeros_like, defend=SMOOTH),
    )  # fmt: skip
    noise: list[Tensor] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def _look(engine: Any) -> None:
        taken = network.inputs[-1]
        noise.append(taken - batch["image"].as_tensor())
        with torch.no_grad():  # the step is one of a noisy pass
            assert torch.equal(engine.state.output[CommonKeys.PRED].as_tensor(), network.network(taken))
        assert float(network.network[0].weight.grad.abs().sum()) > 0

    trainer.run()
    assert [float(n.std()) for n in noise] == pytest.approx([2.0] * 3, rel=0.1)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[1], noise[2])
