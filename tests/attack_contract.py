"""What the tests of the attacks' contract share: how each attack is made small, and what is compared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import ATTACKS, Attack
from monai_adv.threats import THREATS

NAMES = list(ATTACKS)
NORMS = list(THREATS)
# few steps: the contract holds after any number of them
OPTIONS: dict[str, dict] = {"pgd": {"steps": 2}, "ifgsm": {"steps": 2}, "targeted_ifgsm": {"steps": 2}}
# attacks that draw random numbers, with the options that make them draw none
WITHOUT_CHANCE: dict[str, dict | None] = {"noise": None, "pgd": {"random_start": False}}
GRADIENT_FREE = ("noise",)
BUDGET = {"linf": 0.2, "l2": 3.0}

named = pytest.mark.parametrize("name", NAMES)
normed = pytest.mark.parametrize("norm", NORMS)
headed = pytest.mark.parametrize("head", ["softmax", "sigmoid"])


def make_attack(name: str, norm: str = "linf", eps: float | None = None, **options) -> Attack:
    budget = BUDGET[norm] if eps is None else eps
    return attacks.create(name, budget, norm=norm, **{**OPTIONS.get(name, {}), **options})


def snapshot(network: nn.Module):
    return (
        [module.training for module in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        [parameter.grad for parameter in network.parameters()],
        [value.clone() for value in network.state_dict().values()],
    )


def assert_as_found(network: nn.Module, before) -> None:
    after = snapshot(network)
    assert after[:3] == before[:3]
    assert all(torch.equal(a, b) for a, b in zip(after[3], before[3]))


def assert_same_result(a, b) -> None:
    for key in ("image", "perturbation", "prediction", "success", "score", "clean_score", "best_step"):
        assert torch.equal(getattr(a, key), getattr(b, key)), key
    assert len(a.trace) == len(b.trace)
    for one, other in zip(a.trace, b.trace):
        assert (one["step"], one["restart"]) == (other["step"], other["restart"])
        for key in ("loss", "score", "zero_gradient"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, equal_nan=True)
