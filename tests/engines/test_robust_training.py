"""Robust training in MONAI's trainer: the step really steps, and crafting leaves nothing behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver, EarlyStopHandler
from monai.transforms import Compose, RandGaussianNoised
from robust import CPU, batches, entropy, network, same, trainer, watch
from scipy import fft
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from monai_adv.engines import (
    METHODS,
    AdversarialIteration,
    FreeIteration,
    RobustTrainer,
    TradesIteration,
    VAFTIteration,
    create_method,
)
from monai_adv.errors import ConfigError

ONLINE = [
    {"name": "noise"},
    {"name": "fgsm_at"},
    {"name": "pgd_at", "steps": 2},
    {"name": "pgd_at", "steps": 2, "norm": "l2", "eps": 3.0},
]


@pytest.mark.parametrize("method", ONLINE, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize(("dims", "head"), [(2, "softmax"), (3, "softmax"), (3, "sigmoid")])
def test_the_step_steps_inside_the_budget_and_leaves_the_background(
    method: dict[str, Any], dims: int, head: str
) -> None:
    engine = trainer(network(dims), batches(4, dims, head), {**method, "share": 1.0}, head=head)
    seen = watch(engine)
    engine.run()
    sizes = []
    for step in seen:
        change = step["image"] - step["clean"]
        assert not change[step["clean"] == 0].any()
        assert (change.flatten(1).abs().amax(1) > 0).all()
        sizes.append(float(change.flatten(1).norm(dim=1).max() if "norm" in method else change.abs().max()))
    if method["name"] != "noise":  # Gaussian noise has no largest value
        assert max(sizes) <= method.get("eps", 0.1) + 1e-6
    assert len({round(s, 5) for s in sizes}) == 4  # a budget of its own for every batch


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_a_share_of_the_samples_is_attacked_on_average(share: float) -> None:
    engine = trainer(network(2), batches(40, 2), {"name": "noise", "share": share})
    seen = watch(engine)
    engine.run()
    counts = [int((s["image"] != s["clean"]).flatten(1).any(1).sum()) for s in seen]
    assert set(counts) <= {int(share * 4), int(share * 4) + (share != 0.5)}
    assert np.mean(counts) == pytest.approx(4 * share, abs=0.3)


def test_the_noise_control_has_the_rms_of_a_sign_step() -> None:
    options = {"share": 1.0, "budget": "fixed", "eps": 0.1, "bounds": None}
    noise = trainer(network(), batches(8), {"name": "noise", **options})
    signs = trainer(network(), batches(8), AdversarialIteration({"name": "fgsm", **_attack(options)}, **_own(options)))
    rms = []
    for engine in (noise, signs):
        seen = watch(engine)
        engine.run()
        change = torch.cat([(s["image"] - s["clean"])[s["clean"] != 0] for s in seen])
        rms.append(float(change.square().mean().sqrt()))
    assert rms[0] == pytest.approx(0.1, rel=0.01)
    assert rms[1] == pytest.approx(0.1, rel=0.01)


def _attack(options: dict[str, Any]) -> dict[str, Any]:
    return {"eps": options["eps"], "bounds": options["bounds"], "units": "absolute"}


def _own(options: dict[str, Any]) -> dict[str, Any]:
    return {"share": options["share"], "budget": options["budget"]}


@pytest.mark.parametrize("method", [*ONLINE, {"name": "apgd", "eps": 0.1, "steps": 3}], ids=lambda m: m["name"])
@pytest.mark.parametrize("cls", [RobustTrainer, SupervisedTrainer])
def test_crafting_leaves_no_trace_in_gradients_and_statistics(method: dict[str, Any], cls: Any) -> None:
    """Plain training on the images a method made gives the same weights and BatchNorm statistics, bit for bit."""
    data = batches(3)
    robust = network()
    iteration = create_method(method) if method["name"] in METHODS else AdversarialIteration(method, share=1.0)
    engine = trainer(robust, data, iteration, cls)
    seen = watch(engine)
    engine.run()
    again = network()
    made = [{"image": s["image"], "label": b["label"]} for s, b in zip(seen, data)]
    trainer(again, made, None, SupervisedTrainer).run()
    assert any(not torch.equal(m["image"], b["image"]) for m, b in zip(made, data))
    assert same(robust, again)
    assert int(robust[1].num_batches_tracked) == 3
    assert robust.training
    assert all(p.requires_grad for p in robust.parameters())


def test_a_step_raises_the_loss_more_than_noise() -> None:
    """At the budget of the control, on the network they were made for."""
    data, loss = batches(1), {}
    for name in ("noise", "pgd_at"):
        net = network()
        method = {"name": name, "share": 1.0, "budget": "fixed", "eps": 0.3}
        engine = trainer(net, data, method, optimizer=torch.optim.SGD(net.parameters(), 0.0))
        seen = watch(engine)
        engine.run()
        net.eval()
        with torch.no_grad():
            loss[name] = float(entropy()(net(seen[0]["image"]), data[0]["label"]))
            clean = float(entropy()(net(data[0]["image"]), data[0]["label"]))
    assert loss["pgd_at"] > clean + 3 * abs(loss["noise"] - clean)


def test_free_takes_m_steps_and_keeps_the_perturbation() -> None:
    data, net = batches(3), network()
    method = FreeIteration({"eps": 0.1, "units": "absolute"}, replays=3)
    engine = trainer(net, data, method)
    inputs: list[Tensor] = []
    net.register_forward_pre_hook(lambda m, x: inputs.append(x[0].detach().clone()))
    seen, steps = watch(engine), []
    engine.optimizer.register_step_post_hook(lambda *a: steps.append(1))
    engine.run()
    assert len(steps) == len(inputs) == 9
    assert int(net[1].num_batches_tracked) == 9
    assert torch.equal(inputs[0], data[0]["image"])  # it begins at the clean image,
    for index, image in enumerate(inputs):
        change = image - data[index // 3]["image"]
        assert float(change.abs().max()) <= 0.1 + 1e-6
        assert not change[data[index // 3]["image"] == 0].any()
        assert index == 0 or float(change.abs().mean()) > 0.02  # and is warm from then on
    assert method.delta is not None
    assert not seen[-1]["image"].requires_grad


def test_frees_step_is_the_sign_of_the_training_gradient() -> None:
    batch = batches(1)[0]
    net, reference = network(), network()
    method = FreeIteration({"eps": 0.1, "units": "absolute", "bounds": None, "support": "all"}, replays=1)
    trainer(net, [batch], method).run()
    leaf = batch["image"].clone().requires_grad_(True)
    entropy()(reference.train()(leaf), batch["label"]).backward()
    assert method.delta is not None
    assert leaf.grad is not None
    assert torch.allclose(method.delta, 0.1 * leaf.grad.sign(), atol=1e-6)
    plain = network()
    trainer(plain, [batch], None, SupervisedTrainer).run()
    assert same(net, plain)  # the first replay is a plain step


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_trades_without_beta_is_plain_training(head: str, norm: str) -> None:
    nets = []
    for method, cls in (({"name": "trades", "beta": 0}, RobustTrainer), (None, SupervisedTrainer)):
        net = network(norm=norm)
        trainer(net, batches(3, head=head), method, cls, head).run()
        nets.append(net)
    assert same(*nets)


@pytest.mark.parametrize(("dims", "head"), [(2, "softmax"), (3, "sigmoid")])
def test_trades_minimises_the_published_loss_in_one_forward(dims: int, head: str) -> None:
    batch, net = batches(1, dims, head)[0], network(dims, "none")
    start = copy.deepcopy(net)
    inputs: list[Tensor] = []
    net.register_forward_pre_hook(lambda m, x: inputs.append(x[0].detach().clone()) if m.training else None)
    engine = trainer(net, [batch], {"name": "trades", "beta": 2.0, "eps": 0.3, "steps": 3}, head=head)
    seen = watch(engine)
    engine.run()
    assert len(inputs) == 1
    clean, adversarial = inputs[0][:4], inputs[0][4:]
    assert torch.equal(clean, batch["image"])
    assert 0 < float((adversarial - clean).abs().max()) <= 0.3 + 1e-6
    assert torch.equal(seen[0]["image"], clean)
    assert seen[0]["pred"].shape == start(clean).shape

    def divergence(other: Tensor) -> Tensor:
        z, y = start(clean).movedim(1, -1), start(other).movedim(1, -1)
        kind = Categorical if head == "softmax" else Bernoulli
        return kl_divergence(kind(logits=z), kind(logits=y)).mean()

    expected = entropy(head)(start(clean), batch["label"]) + 2 * divergence(adversarial)
    assert seen[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for new, old in zip(net.parameters(), start.parameters()):
        assert old.grad is not None
        assert torch.allclose(new, old - 0.1 * old.grad, atol=1e-6)
    noise = clean + 0.3 * torch.randn_like(clean).sign() * (clean != 0)
    assert divergence(adversarial).item() > 2 * divergence(noise).item()  # it was ascended


def test_frequency_training_minimises_the_published_loss() -> None:
    batch, net = batches(1)[0], network(norm="none")
    start = copy.deepcopy(net)
    inputs: list[Tensor] = []
    net.register_forward_pre_hook(lambda m, x: inputs.append(x[0].detach().clone()) if m.training else None)
    engine = trainer(net, [batch], {"name": "vafa_at", "steps": 2, "q_max": 30, "weight": 0.5})
    seen = watch(engine)
    engine.run()
    clean, adversarial = inputs[0][:4], inputs[0][4:]
    assert not torch.equal(clean, adversarial)
    a, b = (fft.dctn(start(x).detach().numpy(), axes=(2, 3, 4), norm="ortho") for x in (clean, adversarial))
    losses = [entropy()(start(x), batch["label"]).item() for x in (clean, adversarial)]
    expected = sum(losses) + 0.5 * np.abs(a - b).sum() / np.abs(a).sum()
    assert seen[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["pgd_at", "free", "trades", "vafa_at", "noise"])
def test_the_batchs_support_is_kept_and_a_sample_without_any_stays_clean(name: str) -> None:
    data = batches(2, 2)
    for batch in data:
        batch["support"] = torch.zeros(4, 4, 8, 8, dtype=torch.bool)
        batch["support"][1:, :, 2:5] = True
    net = network(2, "none")
    inputs: list[Tensor] = []
    net.register_forward_pre_hook(lambda m, x: inputs.append(x[0].detach().clone()) if m.training else None)
    options: dict[str, Any] = {"vafa_at": {"steps": 2}, "pgd_at": {"share": 1.0}, "noise": {"share": 1.0}}
    trainer(net, data, {"name": name, **options.get(name, {})}).run()
    change = inputs[-1][-4:] - data[1]["image"]
    assert not change[0].any()
    assert not change[~data[1]["support"]].any()
    assert (change[1:].flatten(1).abs().amax(1) > 0).all()
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_metadata_and_decollation_survive() -> None:
    affine = torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    items = [
        {"image": MetaTensor(b["image"][0], affine=affine), "label": MetaTensor(b["label"][0], affine=affine)}
        for b in batches(4)
    ]
    for name in METHODS:
        if name == "distillation":
            continue
        options = {"steps": 2} if name == "vafa_at" else {}
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


@pytest.mark.parametrize("method", ["pgd_at", "free", "trades", "noise"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(method: str, tmp_path: Path) -> None:
    """Dropout, a shuffled loader, random transforms and the method's own numbers all go on where they stopped."""

    def prepared(epochs: int, *handlers: Any) -> tuple[SupervisedTrainer, dict[str, Any]]:
        net = network(norm="dropout")
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        loader = DataLoader(_Patches(), batch_size=4, shuffle=True)
        engine = trainer(net, loader, method, optimizer=optimizer, max_epochs=epochs, data_seed=3)
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


def test_what_a_method_cannot_follow_is_refused() -> None:
    net = network()
    with pytest.raises(ConfigError, match="not as iteration_update"):
        trainer(net, batches(1), "pgd_at", iteration_update=lambda e, b: {})
    with pytest.raises(ConfigError, match="accumulation_steps"):
        trainer(net, batches(2), "free", accumulation_steps=2).run()
    with pytest.raises(ConfigError, match="needs labels"):
        trainer(net, [{"image": batches(1)[0]["image"]}], "trades").run()
    with pytest.raises(ConfigError, match="give it to a SupervisedTrainer"):
        SupervisedEvaluator(
            CPU, batches(1), net, iteration_update=AdversarialIteration({"name": "fgsm", "eps": 0.1}), decollate=False
        ).run()
    with pytest.raises(ConfigError, match="moves the anatomy"):
        TradesIteration({"name": "deformation", "eps": 1.0})
    with pytest.raises(ConfigError, match="with vafa"):
        VAFTIteration({"name": "pgd", "eps": 0.1})
    with pytest.raises(ConfigError, match="L-inf or L2"):
        FreeIteration({"norm": "parameter", "eps": 1.0, "units": "mm"})


def test_moving_anatomy_moves_its_labels() -> None:
    """An attack that is no search of steps is run as it is, labels included."""
    iteration = AdversarialIteration({"name": "deformation", "eps": 2.0, "steps": 2}, share=0.5, budget="fixed")
    engine = SupervisedTrainer(
        CPU, 1, batches(1), (net := network()), torch.optim.SGD(net.parameters(), 0.1), entropy(),
        iteration_update=iteration, decollate=False,
    )  # fmt: skip
    engine.run()
    assert iteration.result is not None
    moved = engine.state.output["label"]
    assert torch.equal(moved[:2], iteration.result.label)
    assert torch.equal(moved[2:], engine.state.batch["label"][2:])
    assert not torch.equal(moved[:2], engine.state.batch["label"][:2])


def test_kl_is_zero_at_itself_and_finite_at_saturation() -> None:
    from monai_adv.defenses.objectives import frequency_distance
    from monai_adv.defenses.objectives import kl_divergence as ours
    from monai_adv.victims import Head

    z = 200 * torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    for kind in ("softmax", "sigmoid"):
        leaf = (-z).requires_grad_(True)
        value = ours(z, leaf, Head(kind, ["a", "b", "c", "d"] if kind == "sigmoid" else None))
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        assert torch.equal(ours(z, z, Head(kind)), torch.zeros(2))
    assert float(frequency_distance(z, z, 2)) == 0
    assert float(frequency_distance(z, 2 * z)) == pytest.approx(1)
    with pytest.raises(ConfigError, match="block must be"):
        frequency_distance(z, z, 0)
