"""MI-FGSM: its recursion, and the optimum of a linear model."""

from __future__ import annotations

import pytest
import torch
from oracles import make_image, make_label, make_victim
from test_sign_attacks import EPS, UNCLIPPED, binary, binary_label, create, optimum
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import MIFGSM
from monai_adv.errors import ConfigError
from monai_adv.losses import CrossEntropy
from monai_adv.threats import L2, LInf
from monai_adv.victims import Victim


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_optimum_of_a_linear_margin_is_found(head, norm, dims):
    victim, image, label = binary(dims, head), make_image(4, dims), binary_label(4, dims, head)
    found = create("mifgsm", norm, units="range", loss=UNCLIPPED)(victim, image, label).image
    expected = optimum(victim, image, label.long(), norm, "range", EPS[norm])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_recursion_step_by_step(norm, targeted):
    """m <- decay m + g / ||g||_1, by hand for one sample of unit scale; the trace holds the same losses."""
    victim, image, label = make_victim("smooth"), make_image(1), make_label("softmax", 1)
    aim = make_label("softmax", 1, seed=9) if targeted else label
    eps, size, decay = (0.5, 0.2, 0.7) if norm == "linf" else (4.0, 1.5, 0.7)
    sign = -1 if targeted else 1
    moves = (image != 0).double()
    x, m, losses = image, torch.zeros_like(image), []
    victim.network.eval()
    for _ in range(5):
        leaf = x.clone().requires_grad_(True)
        value = sign * nn.functional.cross_entropy(victim.network(leaf), aim[:, 0], reduction="sum")
        losses.append(float(value.detach()))
        (g,) = torch.autograd.grad(value, leaf)
        g = g * moves
        m = decay * m + g / g.abs().sum()
        d = x + size * (m.sign() if norm == "linf" else m / m.norm()) - image
        d = d.clamp(-eps, eps) if norm == "linf" else d * min(1, eps / float(d.norm()))
        x = image + d * moves
    attack = attacks.create(
        "mifgsm", eps, norm=norm, units="absolute", bounds=None, steps=5, step_size=size, decay=decay, loss="ce",
        **({"target": "background"} if targeted else {}),
    )  # fmt: skip
    trace = attack(victim, image, label, target=aim if targeted else None).trace
    assert [float(e["loss"]) for e in trace[:5]] == pytest.approx(losses, rel=1e-10)
    assert len(trace) == 6


def test_decay_is_the_memory():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    plain = create("ifgsm", "linf", steps=4)(victim, image, label)
    without = create("mifgsm", "linf", steps=4, decay=0.0)(victim, image, label)
    assert torch.equal(without.image, plain.image)
    traces = [
        [e["loss"] for e in create("mifgsm", "l2", steps=6, decay=d)(victim, image, label).trace] for d in (0.0, 1.0)
    ]
    assert torch.equal(traces[0][0], traces[1][0])
    assert torch.equal(traces[0][1], traces[1][1])  # one gradient is its own memory
    assert (traces[0][2] != traces[1][2]).all()


def test_channels_of_other_units_are_attacked_alike():
    """One modality in other units, and a network that knows: the same change in units of the standard deviation."""
    factor = torch.tensor([1.0, 8, 0.25, 2], dtype=torch.float64).view(1, 4, 1, 1, 1)
    image, label = make_image(2), make_label("softmax", 2)
    plain, scaled = make_victim("smooth"), make_victim("smooth")
    scaled.network[0].weight.data.div_(factor)
    attack = MIFGSM(L2(3.0, bounds=None), steps=4)
    expected = attack(plain, image, label).perturbation
    torch.testing.assert_close(attack(scaled, image * factor, label).perturbation, expected * factor, rtol=1e-9, atol=0)


@pytest.mark.parametrize("threat", [LInf(0.3, bounds=None), L2(2.0, bounds=None)], ids=["linf", "l2"])
def test_a_gradient_of_a_saturated_network(threat):
    victim = binary()
    victim.network.float().weight.data.mul_(1e-33)
    image, label = make_image(2, dtype=torch.float32), binary_label(2)
    result = MIFGSM(threat, loss=UNCLIPPED, steps=1)(victim, image, label)
    size = threat.bind(image).size(result.image)
    torch.testing.assert_close(size, torch.full_like(size, threat.eps), rtol=1e-4, atol=0)


def test_a_gradient_of_zero_moves_nothing():
    class Constant(nn.Module):
        def forward(self, x):
            return x.sum(1, keepdim=True) * torch.zeros(1, 4, 1, 1, 1, dtype=x.dtype)

    image = make_image(2)
    for norm in ("linf", "l2"):
        result = create("mifgsm", norm)(Victim(Constant()), image, make_label("softmax", 2))
        assert torch.equal(result.image, image)


def test_momentum_is_per_sample():
    """Samples whose gradients differ by 1e6: the large one does not drown the small one."""
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    weight = torch.ones(2, 1, *image.shape[2:], dtype=torch.float64)
    weight[0] *= 1e6
    together = create("mifgsm", "l2", steps=4, loss="ce")(victim, image, label, weight=weight)
    alone = create("mifgsm", "l2", steps=4, loss="ce")(victim, image[1:], label[1:])
    torch.testing.assert_close(together.image[1:], alone.image, rtol=1e-10, atol=1e-10)


def test_targeted():
    victim, image = make_victim("linear"), make_image(2)
    result = attacks.create("mifgsm", 30.0, steps=40, support="all", loss="ce", target="background")(
        victim, image, victim.predict(image)
    )
    assert (result.score > 0.95).all()


def test_cost_and_options():
    victim, image, label = make_victim("smooth"), make_image(1), make_label("softmax", 1)
    result = create("mifgsm", "linf", steps=3)(victim, image, label)
    assert (result.cost.forwards, result.cost.backwards) == (5, 3)
    assert torch.equal(result.trace[0]["loss"], create("ifgsm", "linf")(victim, image, label).trace[0]["loss"])
    for decay in (-0.1, float("nan"), float("inf"), "much", True):
        with pytest.raises(ConfigError, match="decay must be"):
            MIFGSM(LInf(0.1), decay=decay)
    assert MIFGSM(LInf(0.1), loss=CrossEntropy(), decay=0).parameters()["decay"] == 0
    with pytest.raises(ConfigError, match="mifgsm without a finite eps needs a step_size"):
        MIFGSM(LInf(float("inf")))(victim, image, label)
    assert (MIFGSM(LInf(float("inf")), step_size=0.1)(victim, image, label).perturbation != 0).any()
