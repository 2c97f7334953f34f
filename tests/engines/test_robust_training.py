"""Robust training in MONAI's trainer: the step really steps, and crafting leaves nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
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
        assert (float(change.abs().std()) > 0.05) == (engine is noise)  # half normal, or all the same size
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
    steps: list[int] = []
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
    assert not engine.state.output["image"].requires_grad


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
    assert divergence(adversarial).item() > 2 * divergence(noise).item()  # it was ascended, whatever the label
    other = {**batch, "label": batch["label"].flip(0)}
    net.load_state_dict(start.state_dict())
    trainer(net, [other], {"name": "trades", "eps": 0.3, "steps": 3}, head=head).run()
    assert torch.equal(inputs[1][4:], adversarial)


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


def test_noise_for_smoothing_is_everywhere_and_unbounded() -> None:
    """A threat of support "all" does not ask the batch."""
    data = batches(1)
    data[0]["support"] = data[0]["image"] != 0
    method = {"name": "noise", "eps": 0.25, "share": 1.0, "budget": "fixed", "support": "all", "bounds": None}
    engine = trainer(network(), data, method)
    seen = watch(engine)
    engine.run()
    change = seen[0]["image"] - seen[0]["clean"]
    assert float(change[seen[0]["clean"] == 0].std()) == pytest.approx(0.25, rel=0.05)
    assert float(change.std()) == pytest.approx(0.25, rel=0.05)
