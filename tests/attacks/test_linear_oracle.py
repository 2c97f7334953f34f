"""Every norm-bounded attack against a victim whose worst case is known in closed form.

Two classes (or one region), each voxel for itself, logits ``-m, m`` with ``m = w x + b``: inside ``|d| <= eps`` a
voxel can be turned exactly if its margin is at most ``eps sum |w|``, and turning every such voxel is the lowest Dice.
"""

from __future__ import annotations

import pytest
import torch
from attack_contract import TRAITS
from oracles import CONV, SHAPES
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import ATTACKS
from monai_adv.victims import Head, Victim, mean_dice

EPS = 0.4
# what finds its own size, draws queries or is made elsewhere has tests of its own
OTHER = ("noise", "universal", "transfer", "square", "vafa", "fmn", "alma_prox", "minimal")
NAMES = [n for n, kind in ATTACKS.items() if "linf" in kind.norms and n not in OTHER]
STEPS = {
    "fgsm": {},
    "ensemble": {},
    "sea": {"steps": 40},
    "apgd": {"steps": 50},
    "dag": {"steps": 100, "nu": 1.0, "counts": "all"},
}


def linear_victim(head: str, dims: int) -> tuple[Victim, torch.Tensor, float]:
    weight, bias = torch.tensor([1.0, -0.6, 0.3, 0.8], dtype=torch.float64), 0.1
    rows = torch.stack([-weight, weight]) if head == "softmax" else weight[None]
    network = CONV[dims](4, len(rows), 1).double()
    with torch.no_grad():
        network.weight.copy_(rows.view(len(rows), 4, *[1] * dims))
        network.bias.copy_(torch.tensor([-bias, bias] if head == "softmax" else [bias]))
    regions = {"lesion": (1,)} if head == "softmax" else ("lesion",)
    return Victim(nn.Sequential(network), head=Head(head, regions)), weight, bias


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", NAMES)
def test_the_attack_reaches_the_optimum(name: str, head: str, dims: int) -> None:
    victim, weight, bias = linear_victim(head, dims)
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(4, 4, *SHAPES[dims], generator=generator, dtype=torch.float64)
    margin = (image * weight.view(-1, *[1] * dims)).sum(1, keepdim=True) + bias
    clean = margin > 0
    label = clean if head == "sigmoid" else clean.long()
    worst = torch.where(margin.abs() < EPS * weight.abs().sum(), ~clean, clean)
    expected = mean_dice(worst if head == "sigmoid" else worst.long(), label, victim.head)
    assert ((expected > 0.05) & (expected < 0.9)).all()  # some voxels can be turned, not all

    options = STEPS.get(name, {"steps": 20})
    if ATTACKS[name].modes == "targeted":
        options = {**options, "target": ~clean if head == "sigmoid" else 1 - label}
    attack = attacks.create(name, EPS, units="absolute", bounds=None, support="all", **options)
    result = attack(victim, image, label)
    found = mean_dice(result.prediction, label, victim.head)
    assert (found >= expected - 1e-12).all()  # the closed form is a bound
    if name == "fgsm":
        assert torch.equal(found, expected)
        assert torch.allclose(result.perturbation.abs(), torch.full_like(image, EPS))
    else:
        assert (found <= expected + 0.01).all(), (found, expected)
    assert result.cost.backwards > 0 or not TRAITS[name].gradient
