"""SynthesisTrainer: its terms by hand, what it leaves alone, and a resume that is exact."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.handlers import CheckpointLoader, CheckpointSaver, StatsHandler
from synthesis_toy import SPACING, batches, discs, generator, threshold_victim, trainer
from torch import Tensor

from monai_adv.engines import SynthesisTrainer, loss_terms
from monai_adv.engines.synthesis import TERMS, Synthesized, code_divergence, folding, loss_weights, roughness
from monai_adv.errors import ConfigError


def watch(engine: SynthesisTrainer) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    return seen


def weights(engine: SynthesisTrainer) -> list[Tensor]:
    parts = [engine.generator, *([engine.critic] if engine.critic is not None else [])]
    return [v.detach().clone() for part in parts for v in part.state_dict().values()]


def with_dice(dice: Tensor, clean: float = 0.9, drop: float = 0.3) -> Synthesized:
    nothing = torch.zeros(1, 1, 4, 4)
    return Synthesized(
        nothing, nothing, nothing, nothing, torch.tensor([drop]), torch.tensor([clean]), dice,
        {"velocity": torch.zeros(1, 2, 2, 2), "mu": torch.zeros(1, 1), "log_var": torch.zeros(1, 1)}, {},
    )  # fmt: skip


@pytest.mark.parametrize(("dice", "error", "slope"), [(0.8, 0.2, 1.0), (0.5, 0.1, -1.0)])
def test_the_dice_is_pulled_to_its_target_from_both_sides(dice: float, error: float, slope: float) -> None:
    """The target is .9 - .3; a Dice above it has to fall, one below it has to rise."""
    engine, value = trainer([1], critic=False), torch.tensor([dice], requires_grad=True)
    loss = engine.terms(with_dice(value))["dice_error"]
    assert float(loss.detach()) == pytest.approx(error, abs=1e-6)
    assert float(torch.autograd.grad(loss, value)[0]) == slope


def test_a_drop_larger_than_the_dice_asks_for_zero() -> None:
    engine = trainer([1], critic=False)
    assert float(engine.terms(with_dice(torch.tensor([0.15]), clean=0.2, drop=0.6))["dice_error"]) == pytest.approx(
        0.15
    )


def test_terms_of_one_sample_by_hand() -> None:
    """Every term of a trainer's step, computed here from the pieces the step is made of."""
    engine = trainer([1])
    torch.nn.init.normal_(engine.generator.heads["velocity"].conv.weight, std=2.0)
    image, label = discs(1)
    drop = torch.tensor([0.25])
    with torch.no_grad(), engine.victim.attacked():
        made = engine.synthesize(image, label, drop)
        terms = engine.terms(made)

        def soft_dice(x: Tensor, y: Tensor) -> float:
            p = torch.sigmoid(engine.victim(x)).double()
            return float(2 * (p * y).sum() / (p.sum() + y.sum()))

        clean = soft_dice(image, label.double())
        assert float(made.clean) == pytest.approx(clean, abs=1e-6)
        moved = engine.effect.soft_warp(label.float(), made.parameters, engine.spacing)
        assert float((moved - label.float()).abs().max()) > 0.05
        assert float(terms["dice_error"]) == pytest.approx(
            abs(soft_dice(made.synthetic, moved.double()) - (clean - 0.25)), abs=1e-6
        )
        assert engine.critic is not None
        judged = engine.critic.eval()(made.synthetic)
        assert float(terms["critic"]) == pytest.approx(float((1 - torch.tanh(judged)).mean()), abs=1e-6)
    fields = [made.raw[k] for k in ("velocity", "log_bias", "residual")]
    assert float(terms["size"]) == pytest.approx(float(sum(f.square().mean() for f in fields)) / 3, rel=1e-5)
    slopes = [(f[:, :, 1:] - f[:, :, :-1]).square().mean() for f in fields]
    slopes += [(f[..., 1:] - f[..., :-1]).square().mean() for f in fields]
    assert float(terms["smoothness"]) == pytest.approx(float(sum(slopes)) / 6, rel=1e-5)
    mu, log_var = made.raw["mu"].double(), made.raw["log_var"].double()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (log_var / 2).exp()), normal(0.0, 1.0)).mean()
    assert float(terms["kl"]) == pytest.approx(float(expected), abs=1e-5)
    assert float(terms["folding"]) == 0
    assert set(terms) | {"loss", "critic_loss", "drop_asked", "drop_reached"} == set(TERMS)


def test_folding_counts_folds_only() -> None:
    place = SPACING * torch.arange(12.0).expand(1, 1, 12, 12)
    still = torch.zeros_like(place)

    def stretched(share: float) -> Tensor:  # p + u(p) = (1 + share) p along the last axis
        return folding(torch.cat([still, share * place], dim=1), (SPACING, SPACING))

    assert float(stretched(-0.5)) == 0
    assert float(stretched(0.5)) == 0
    assert float(stretched(-1.5)) == pytest.approx(0.1 + 0.5, abs=1e-5)  # det J = -.5 everywhere
    field = torch.cat([still, torch.where(place > 5 * SPACING, -1.5 * place, 0.0)], dim=1).requires_grad_(True)
    folding(field, (SPACING, SPACING)).backward()
    assert field.grad is not None
    assert float(field.grad.abs().max()) > 0


def test_a_constant_field_is_smooth_and_a_normal_code_costs_nothing() -> None:
    assert float(roughness({"velocity": torch.full((1, 2, 3, 3), 0.7)})) == 0
    assert float(code_divergence(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))) == 0
    assert float(code_divergence(torch.zeros(1, 2), torch.full((1, 2), 1.0))) > 0
    assert float(code_divergence(torch.zeros(1, 2), torch.full((1, 2), -1.0))) > 0


@pytest.mark.parametrize("dims", [2, 3])
def test_the_victim_stays_bit_for_bit_and_gets_no_gradient(dims: int) -> None:
    victim = threshold_victim(dims)
    before = copy.deepcopy(victim.network.state_dict())
    engine = trainer(batches(2, dims=dims), dims, victim=victim)
    start = weights(engine)
    engine.run()
    assert all(torch.equal(before[k], v) for k, v in victim.network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in victim.network.parameters())
    assert all(m.training for m in victim.network.modules())
    assert not all(torch.equal(a, b) for a, b in zip(start, weights(engine)))


@pytest.mark.parametrize("drop", [0.15, 0.35])
def test_some_steps_reach_the_wanted_drop(drop: float) -> None:
    engine = trainer(batches(40, batch=4), critic=False, drop=(drop, drop))
    seen = watch(engine)
    engine.run()
    assert abs(seen[0]["drop_reached"]) < 0.02
    assert sum(s["drop_reached"] for s in seen[-8:]) / 8 == pytest.approx(drop, abs=0.06)
    assert sum(s["dice_error"] for s in seen[-8:]) < 0.4 * sum(s["dice_error"] for s in seen[:8])


def test_one_generator_serves_every_drop() -> None:
    engine = trainer(batches(120, batch=4), critic=False, rate=5e-3, drop=(0.05, 0.5))
    engine.run()
    image, label = discs(8, seed=77)
    engine.generator.eval()
    with torch.no_grad():
        reached = []
        for drop in (0.1, 0.45):
            made = engine.synthesize(image, label, torch.full((8,), drop))
            reached.append(float((made.clean - made.dice).mean()))
    assert reached[0] < 0.2
    assert reached[1] > reached[0] + 0.15


def test_the_critic_learns_and_without_its_weight_there_is_none() -> None:
    engine = trainer(batches(2))
    assert engine.critic is not None
    before = [p.detach().clone() for p in engine.critic.parameters()]
    seen = watch(engine)
    engine.run()
    assert not all(torch.equal(a, b) for a, b in zip(before, engine.critic.parameters()))
    assert {"critic", "critic_loss"} <= set(loss_terms(seen[-1]))
    data = [{k: v for k, v in batch.items() if k != "real"} for batch in batches(2)]
    plain = trainer(data, critic=False)
    seen = watch(plain)
    plain.run()
    assert not {"critic", "critic_loss"} & set(loss_terms(seen[-1]))
    with pytest.raises(ConfigError, match="other subjects' images"):
        _quiet(trainer(data)).run()


def test_the_step_of_the_generator_does_not_move_the_critic() -> None:
    """Its gradient passes through, nothing is left: spectral normalisation keeps statistics of its own."""
    engine = trainer(batches(1))
    assert engine.critic is not None
    before = copy.deepcopy(engine.critic.state_dict())
    image, label = discs(2)
    sum(engine.terms(engine.synthesize(image, label, torch.tensor([0.2, 0.3]))).values()).backward()  # type: ignore[union-attr]
    assert all(torch.equal(before[k], v) for k, v in engine.critic.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in engine.critic.parameters())
    assert engine.critic.training


def test_terms_of_weight_zero_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_adv.engines import synthesis

    for name in ("roughness", "folding", "code_divergence"):
        monkeypatch.setattr(synthesis, name, lambda *_: pytest.fail("computed"))
    engine = trainer(batches(1), critic=False, weights={"size": 0, "smoothness": 0, "folding": 0, "kl": 0})
    seen = watch(engine)
    engine.run()
    assert set(loss_terms(seen[0])) == {"loss", "dice_error", "drop_asked", "drop_reached"}
    assert seen[0]["loss"] == pytest.approx(seen[0]["dice_error"])


def test_a_generator_without_a_deformation_trains() -> None:
    network = generator(effect={"max_mm": 0.0, "max_residual": 1.0})
    engine = trainer(batches(1), generator=network)
    seen = watch(engine)
    engine.run()
    assert "folding" not in loss_terms(seen[0])
    assert torch.isfinite(torch.tensor(seen[0]["loss"]))


def test_drops_are_drawn_from_their_range_and_a_seed_gives_the_same_bits() -> None:
    def run(seed: int) -> tuple[SynthesisTrainer, list[dict[str, Any]]]:
        engine = trainer(batches(3), seed=seed, drop=(0.2, 0.3))
        seen = watch(engine)
        engine.run()
        return engine, seen

    (first, seen), (again, _), (other, _) = run(0), run(0), run(1)
    assert all(0.2 <= s["drop_asked"] <= 0.3 for s in seen)
    assert len({s["drop_asked"] for s in seen}) == 3
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again)))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first), weights(other)))


class _Drawn(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Other discs in every epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = discs(1, seed=10 * self.epoch + index)
        return {"image": image[0], "label": label[0], "real": discs(1, seed=500 + 10 * self.epoch + index)[0][0]}


@pytest.mark.parametrize("critic", [True, False])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(critic: bool, tmp_path: Path) -> None:
    def prepared(epochs: int, *handlers: Any) -> SynthesisTrainer:
        loader = torch.utils.data.DataLoader(_Drawn(), batch_size=2, shuffle=True)
        engine = trainer(loader, critic=critic, max_epochs=epochs)
        for make in handlers:
            make({"trainer": engine}).attach(engine)
        return engine

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        whole = prepared(3)
        whole.run()
        torch.manual_seed(5)
        prepared(1, lambda kept: CheckpointSaver(tmp_path, kept, save_final=True, final_filename="last.pt")).run()
        torch.manual_seed(99)
        torch.rand(7)
        rest = prepared(3, lambda kept: CheckpointLoader(str(tmp_path / "last.pt"), kept))
        seen = watch(rest)
        rest.run()
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(rest)))
    with pytest.raises(ConfigError, match="has a critic"):
        trainer([1], critic=not critic).load_state_dict(rest.state_dict())


def test_stats_handler_prints_the_terms(capsys: pytest.CaptureFixture[str]) -> None:
    engine = trainer(batches(1))
    StatsHandler(name="terms", output_transform=loss_terms).attach(engine)
    logging.getLogger("terms").setLevel(logging.INFO)
    engine.run()
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in TERMS)


def test_tensorboard_gets_the_terms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from monai.handlers import TensorBoardStatsHandler

    engine = trainer(batches(1))
    TensorBoardStatsHandler(log_dir=str(tmp_path), output_transform=loss_terms).attach(engine)
    engine.run()
    assert list(tmp_path.glob("events*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"beauty": 1.0}}, "beauty"),
        ({"weights": {"kl": -1.0}}, "kl"),
        ({"drop": (0.5, 0.1)}, "range"),
        ({"region": "liver"}, "liver"),
        ({"weights": {"critic": 0.0}}, "critic"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer([1], **options)
    assert loss_weights({"kl": 0})["kl"] == 0


def _quiet(engine: SynthesisTrainer) -> SynthesisTrainer:
    engine.logger.setLevel(logging.CRITICAL)
    return engine
