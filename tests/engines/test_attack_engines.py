from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.utils import CommonKeys
from torch import nn

from monai_adv import attacks
from monai_adv.engines import AttackEvaluator, AttackIteration, AttackKeys
from monai_adv.errors import ConfigError
from monai_adv.handlers import AttackRecordSaver
from monai_adv.stats import compare
from monai_adv.victims import Victim

CPU = torch.device("cpu")


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, 1))


def loader(subjects: int = 4, batch: int = 2) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    data = [
        {
            "image": MetaTensor(torch.randn(4, 8, 8, 8, generator=generator), affine=affine),
            "label": MetaTensor(torch.randint(0, 4, (1, 8, 8, 8), generator=generator), affine=affine),
            "subject": f"case{i}",
        }
        for i in range(subjects)
    ]
    return DataLoader(Dataset(data), batch_size=batch)


def evaluator(network: nn.Module, cls: Any = SupervisedEvaluator, **options: Any) -> Any:
    options = {"inferer": SlidingWindowInferer((6, 6, 6), 2, 0.25), **options}
    return cls(device=CPU, val_data_loader=loader(), network=network, **{"decollate": False, **options})


def test_the_iteration_attacks_the_batch_and_keeps_the_clean_one(network: nn.Module) -> None:
    attack = attacks.create("fgsm", eps=0.3)
    engine = evaluator(network, iteration_update=AttackIteration(attack))
    fired = []
    engine.add_event_handler(IterationEvents.INNER_ITERATION_STARTED, lambda: fired.append("start"))
    engine.add_event_handler(IterationEvents.INNER_ITERATION_COMPLETED, lambda: fired.append("end"))
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    @engine.on(Events.ITERATION_COMPLETED)
    def _look(engine: Any) -> None:
        out = engine.state.output
        seen.append((engine.state.batch["image"], out[CommonKeys.IMAGE], out[CommonKeys.PRED]))

    engine.run()
    assert fired == ["start", "end"] * 2
    clean, adversarial, logits = seen[0]
    assert isinstance(adversarial, MetaTensor)
    assert torch.equal(adversarial.affine, clean.affine)
    change = (adversarial - clean).as_tensor().abs()
    assert float(change.max()) > 0.1
    victim = Victim(network, SlidingWindowInferer((6, 6, 6), 2, 0.25))
    assert torch.allclose(victim(adversarial.as_tensor()), logits.as_tensor(), atol=1e-5)


def test_evaluator_is_paired_with_the_clean_pass_and_saves_records(network: nn.Module, tmp_path: Path) -> None:
    attack = attacks.create("ifgsm", eps=0.5, steps=3)
    saver = AttackRecordSaver(tmp_path / "records.csv", victim="net")
    engine = evaluator(network, AttackEvaluator, attack=attack, val_handlers=[saver])
    outputs = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(dict(e.state.output)))
    engine.run()
    first = outputs[0]
    network.eval()
    assert (
        torch.allclose(
            first[AttackKeys.CLEAN_PRED].as_tensor(), network(first[AttackKeys.CLEAN_IMAGE].as_tensor()), atol=1e-5
        )
        is False
    )  # windows differ from one forward: padding sees other neighbours
    plain = SlidingWindowInferer((6, 6, 6), 2, 0.25)
    with torch.no_grad():
        assert torch.equal(first[AttackKeys.CLEAN_PRED].as_tensor(), plain(first["clean_image"].as_tensor(), network))
        assert torch.equal(first[CommonKeys.PRED].as_tensor(), plain(first[CommonKeys.IMAGE].as_tensor(), network))
    table = pd.read_csv(tmp_path / "records.csv")
    assert len(table) == 4 * 2 * 3
    means = table.groupby("attack")["dice"].mean()
    assert means["ifgsm"] < means["clean"]
    other = attacks.create("fgsm", eps=0.5)
    saver = AttackRecordSaver(tmp_path / "records.csv", victim="net")
    evaluator(network, AttackEvaluator, attack=other, val_handlers=[saver], decollate=True).run()
    both = pd.read_csv(tmp_path / "records.csv")
    assert len(both) == 4 * 3 * 3  # the clean rows are there once
    assert set(both["attack"]) == {"clean", "ifgsm", "fgsm"}
    result = compare(table, by="attack", baseline="clean")
    assert result.table["n"].tolist() == [4, 4, 4]
    with pytest.raises(ConfigError, match="duplicated case"):
        evaluator(network, AttackEvaluator, attack=attack,
                  val_handlers=[AttackRecordSaver(tmp_path / "records.csv")]).run()  # fmt: skip


def test_in_a_trainer_it_is_adversarial_training(network: nn.Module) -> None:
    losses: dict[str, list[float]] = {}
    for name, update in (("plain", None), ("adversarial", AttackIteration({"name": "fgsm", "eps": 0.5}))):
        torch.manual_seed(0)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        trainer = SupervisedTrainer(
            device=CPU, max_epochs=1, train_data_loader=loader(), network=network, decollate=False,
            optimizer=torch.optim.SGD(network.parameters(), 0.1), iteration_update=update, inferer=SimpleInferer(),
            loss_function=lambda z, y: nn.functional.cross_entropy(z, y[:, 0].long()),
        )  # fmt: skip
        losses[name] = []
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e, n=name: losses[n].append(float(e.state.output["loss"].detach()))
        )
        trainer.run()
    assert losses["adversarial"][0] > losses["plain"][0]
    assert network.training
    assert all(p.requires_grad for p in network.parameters())


def test_a_share_of_the_batch(network: nn.Module) -> None:
    engine = evaluator(network, iteration_update=AttackIteration(attacks.create("noise", eps=0.5), share=0.5))
    seen = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: seen.append((e.state.batch["image"], e.state.output["image"]))
    )
    engine.run()
    clean, mixed = seen[0]
    assert not torch.equal(clean[0].as_tensor(), mixed[0].as_tensor())
    assert torch.equal(clean[1].as_tensor(), mixed[1].as_tensor())


def test_a_share_is_met_on_average_at_batch_size_one(network: nn.Module) -> None:
    attacked = []
    for batch in loader(40, 1):
        engine = evaluator(network, iteration_update=None)
        engine.state.device = CPU
        if not attacked:
            iteration = AttackIteration(attacks.create("noise", eps=0.5), share=0.25)
        attacked.append(not torch.equal(iteration._attacked(engine, batch)[0], batch["image"]))
    assert 3 <= sum(attacked) <= 17


def test_hooks_chain_and_errors_advise(network: nn.Module) -> None:
    called = []

    def follow(engine: Any, batch: Any) -> Any:
        called.append(batch["image"])
        return engine._iteration(engine, batch)

    evaluator(
        network, iteration_update=AttackIteration(attacks.create("noise", eps=0.1), iteration_update=follow)
    ).run()
    assert len(called) == 2
    with pytest.raises(ConfigError, match="its own iteration"):
        evaluator(network, AttackEvaluator, attack=attacks.create("fgsm"), iteration_update=follow)
    with pytest.raises(ConfigError, match="share"):
        AttackIteration(attacks.create("fgsm"), share=0)
    engine = evaluator(network, val_handlers=[AttackRecordSaver("x.csv")])
    with pytest.raises(ConfigError, match="attach it to one"):
        engine.run()
