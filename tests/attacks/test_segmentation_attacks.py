"""SegPGD and CosPGD: their weights at every step, and what they find on linear models."""

from __future__ import annotations

import pytest
import torch
from oracles import make_image, make_label, make_victim
from test_sign_attacks import EPS, binary, binary_label, create, optimum

from monai_adv import attacks
from monai_adv.attacks import PGD, CosPGD, SegPGD
from monai_adv.errors import ConfigError
from monai_adv.losses import CosPGDCrossEntropy, CrossEntropy, SegPGDCrossEntropy
from monai_adv.threats import LInf
from monai_adv.victims import Head

NAMES = ["segpgd", "cospgd"]
named = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@named
def test_the_optimum_of_a_linear_model_is_found(name, head, dims):
    """Whatever positive weights the voxels have, the sign of their gradient is the same."""
    victim, image, label = binary(dims, head), make_image(4, dims), binary_label(4, dims, head)
    options = {"random_start": False, "steps": 20}
    found = create(name, "linf", **options)(victim, image, label)
    expected = optimum(victim, image, label.long(), "linf", "std", EPS["linf"])
    torch.testing.assert_close(found.image, expected, rtol=1e-10, atol=1e-10)


def test_segpgd_golden_weights():
    """T = 10: (1, 0) at t = 1 and (.55, .45) at t = 10."""
    losses = [SegPGD(LInf(0.1), steps=10)._step_loss(step).loss for step in range(10)]
    shares = [loss.share for loss in losses]
    assert shares == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45])
    head, logits = Head("softmax", {}), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64)
    label = torch.zeros(1, 1, 2, dtype=torch.long)  # the first voxel is right, the second fooled
    right, fooled = torch.nn.functional.cross_entropy(logits, label[:, 0], reduction="none")[0].tolist()
    assert float(losses[0](logits, label, head)) == pytest.approx(right)
    assert float(losses[9](logits, label, head)) == pytest.approx(0.55 * right + 0.45 * fooled)
    assert float(losses[0].towards(logits, label, head)) == pytest.approx(-fooled)
    assert float(losses[9].towards(logits, label, head)) == pytest.approx(-0.45 * right - 0.55 * fooled)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_first_step_of_segpgd_leaves_fooled_voxels_alone(head, targeted):
    """On a voxelwise model: exactly the voxels that are right (targeted: not at the target) move."""
    victim, image, label = make_victim("linear", head), make_image(2), make_label(head, 2)
    target = make_label(head, 2, seed=6)
    options = {"target": "background"} if targeted else {}
    attack = attacks.create("segpgd", 0.3, steps=1, random_start=False, bounds=None, support="all", **options)
    moved = (attack(victim, image, label, target=target if targeted else None).perturbation != 0).all(1, keepdim=True)
    agrees = victim.predict(image) == (target if targeted else label)
    expected = ~agrees.all(1, keepdim=True) if targeted else agrees.any(1, keepdim=True)
    assert torch.equal(moved, expected)
    assert moved.any()
    assert not moved.all()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@named
def test_the_steps_are_those_of_pgd_with_the_loss_of_the_step(name, head, norm, targeted):
    victim, image, label = make_victim("smooth", head), make_image(2), make_label(head, 2)
    aim = make_label(head, 2, seed=6) if targeted else label
    options = {"target": "background"} if targeted else {}
    result = create(name, norm, steps=4, random_start=False, **options)(
        victim, image, label, target=aim if targeted else None
    )
    ball = result_ball(norm, image)
    x, expected = image, []
    victim.network.eval()
    for step in range(5):
        leaf = x.clone().requires_grad_(True)
        logits = victim.network(leaf)
        loss = SegPGDCrossEntropy(step / 8) if name == "segpgd" else CosPGDCrossEntropy()
        values = [loss.towards if targeted else loss, CrossEntropy().towards if targeted else CrossEntropy()]
        ascended, plain = (f(logits, aim, victim.head) for f in values)
        expected.append(plain.detach())
        (gradient,) = torch.autograd.grad(ascended.sum(), leaf)
        x = ball.step(x, gradient, 2.5 * EPS[norm] / 4)
    for entry, value in zip(result.trace, expected, strict=True):
        torch.testing.assert_close(entry["loss"], value, rtol=1e-10, atol=0)  # the trace holds plain cross entropy


def result_ball(norm: str, image: torch.Tensor):
    return create("fgsm", norm).threat.bind(image)


@named
def test_a_random_start_and_restarts_as_in_pgd(name):
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    result = create(name, "linf", steps=3, restarts=2)(victim, image, label)
    assert [e["restart"] for e in result.trace] == [0] * 4 + [1] * 4
    assert (result.trace[0]["loss"] != result.trace[4]["loss"]).all()
    first = create("pgd", "linf", steps=3, loss="ce")(victim, image, label).trace[0]["loss"]
    assert torch.equal(result.trace[0]["loss"], first)
    assert (result.cost.forwards, result.cost.backwards) == (9, 6)


@named
def test_a_large_budget_reaches_the_target(name):
    victim, image = make_victim("linear"), make_image(2)
    result = attacks.create(name, 30.0, steps=40, support="all", target="background")(
        victim, image, victim.predict(image)
    )
    assert (result.score > 0.95).all(), result.score


def test_defaults_and_options():
    assert SegPGD(LInf(0.1)).steps == 10
    assert CosPGD(LInf(0.1)).steps == 20
    for kind in (SegPGD, CosPGD):
        assert isinstance(kind(LInf(0.1)), PGD)
        with pytest.raises(ConfigError, match="restarts from the same point"):
            kind(LInf(0.1), random_start=False, restarts=2)
        with pytest.raises(ConfigError, match="has no option loss"):
            attacks.create(kind.name, loss="ce")
