"""RobustTrainer: autocast, early stopping, metadata, and a resume that is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver, EarlyStopHandler
from monai.transforms import Compose, RandGaussianNoised
from robust import CPU, batches, constant_generator, network, same, trainer, watch

from monai_adv.engines import METHODS
from monai_adv.errors import ConfigError


def test_metadata_and_decollation_survive() -> None:
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    items = [
        {"image": MetaTensor(b["image"][0], affine=affine), "label": MetaTensor(b["label"][0], affine=affine)}
        for b in batches(4)
    ]
    for name in METHODS:
        if name == "distillation":
            continue
        needed: dict[str, Any] = {"vafa_at": {"steps": 2}, "synthesis": {"generator": constant_generator(3)}}
        options = needed.get(name, {})
        engine = trainer(network(), DataLoader(Dataset(items), batch_size=2), {"name": name, **options}, decollate=True)
        engine.run()
        assert [o["image"].shape for o in engine.state.output] == [(4, 8, 8, 8)] * 2
        assert all(torch.equal(o["image"].affine, affine) for o in engine.state.output)
        assert len(engine.state.batch) == 2


@pytest.mark.parametrize("method", ["plain", "pgd_at", "free", "trades"])
def test_amp_on_a_cpu_is_bfloat16_with_float32_weights(method: str) -> None:
    found = {}
    for amp in (False, True):
        net = network(norm="none")
        engine = trainer(net, batches(2), method, amp=amp)
        seen = watch(engine)
        engine.run()
        found[amp] = [s["loss"] for s in seen]
        assert all(p.dtype == torch.float32 for p in net.parameters())
        assert seen[-1]["pred"].dtype == torch.float32
        assert engine.scaler is None
    assert found[True] != found[False]
    assert found[True] == pytest.approx(found[False], rel=0.02)


class _Patches(Dataset):
    """Sixteen patches, with the transforms of a training set."""

    def __init__(self) -> None:
        items = [{k: v[i] for k, v in b.items()} for b in batches(4) for i in range(4)]
        super().__init__(items, Compose([RandGaussianNoised("image", prob=0.5, std=0.1)]))


@pytest.mark.parametrize("method", ["pgd_at", "free", "trades", "noise", "synthesis"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(method: str, tmp_path: Path) -> None:
    """Dropout, a shuffled loader, random transforms and the method's own numbers all go on where they stopped."""

    def prepared(epochs: int, *handlers: Any) -> tuple[SupervisedTrainer, dict[str, Any]]:
        net = network(norm="dropout")
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        loader = DataLoader(_Patches(), batch_size=4, shuffle=True)
        options: Any = {"name": method, "generator": constant_generator(3)} if method == "synthesis" else method
        engine = trainer(net, loader, options, optimizer=optimizer, max_epochs=epochs, data_seed=3)
        kept = {"trainer": engine, "network": net, "optimizer": optimizer}
        for make in handlers:
            make(kept).attach(engine)
        return engine, kept

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        whole, first = prepared(3)
        whole.run()
        torch.manual_seed(5)
        part, _ = prepared(1, lambda kept: CheckpointSaver(tmp_path, kept, save_final=True, final_filename="last.pt"))
        part.run()
        torch.manual_seed(99)
        torch.rand(7)
        rest, second = prepared(3, lambda kept: CheckpointLoader(str(tmp_path / "last.pt"), kept))
        seen = watch(rest)
        rest.run()
    assert len(seen) == 8
    assert same(first["network"], second["network"])
    if method == "free":
        with pytest.raises(ConfigError, match="another training method"):
            trainer(network(), batches(1), "pgd_at").load_state_dict(rest.state_dict())


@pytest.mark.filterwarnings(
    "ignore:'(min|cumulative)_delta' is deprecated:DeprecationWarning"
)  # MONAI passes it on to ignite
def test_early_stopping_ends_the_training() -> None:
    net = network()
    engine = trainer(net, batches(2), "pgd_at", max_epochs=9)
    validation = SupervisedEvaluator(CPU, batches(1), net, epoch_length=1, decollate=False)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: validation.run(e.state.epoch))
    EarlyStopHandler(2, lambda e: 0.5, engine).attach(validation)
    engine.run()
    assert engine.state.epoch == 3


def test_a_seed_gives_the_same_bits_and_another_does_not() -> None:
    nets = []
    for seed in (0, 0, 1):
        net = network()
        trainer(net, batches(3), {"name": "pgd_at", "seed": seed}).run()
        nets.append(net)
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("adversarial", "unknown: use one of plain, noise"),
        ("offline", "copies are data"),
        ({"name": "plain", "eps": 0.1}, "has no option eps"),
        ({"name": "pgd_at", "stepz": 3}, "has no option stepz"),
        ({"name": "free", "steps": 3}, "has no option steps"),
        ({"name": "distillation", "eps": 3}, "has no option eps"),
        ({"name": "fgsm_at", "steps": 3}, "fixes steps"),
        ({"name": "noise", "kind": "sign"}, "fixes kind"),
        ({"name": "pgd_at", "eps": 0}, "finite number > 0"),
        ({"name": "pgd_at", "share": 0}, "share must be"),
        ({"name": "pgd_at", "budget": "wide"}, "budget 'wide'"),
        ({"name": "pgd_at", "seed": -1}, "seed must be"),
        ({"name": "trades", "beta": -1}, "beta must be"),
        ({"name": "trades", "loss": "margin"}, "leave the attack's loss out"),
        ({"name": "trades", "random_start": False}, "one random start"),
        ({"name": "free", "replays": 0}, "replays must be"),
    ],
)
def test_a_wrong_method_is_told(method: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        trainer(network(), batches(1), method)
