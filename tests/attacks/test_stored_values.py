"""Every attack on voxels as a file stores them: what it tries and returns are values of that file."""

from __future__ import annotations

import pytest
import torch
from attack_contract import TRAITS, budget, cased, make_attack
from oracles import make_image, make_label, make_victim

RULES = {"whole": "int16", "slope": {"dtype": "int16", "slope": 0.5, "inter": 0.0}}


def scanner_image(name: str, slope: float) -> torch.Tensor:
    image = (make_image(2, 3) * 100).round() * slope
    return image.abs() if TRAITS[name].positive else image


@pytest.mark.parametrize("rule", RULES)
@cased
def test_an_attack_on_stored_voxels_returns_stored_voxels(name, norm, rule):
    quantize = RULES[rule]
    slope = 1.0 if isinstance(quantize, str) else quantize["slope"]
    image, label = scanner_image(name, slope), make_label("softmax", 2)
    victim = make_victim("windows")
    options = {} if norm == "parameter" else {"bounds": "data"}
    attack = make_attack(name, norm, quantize=quantize, **options)
    result = attack(victim, image, label)
    number = result.image / slope
    assert torch.equal(number, number.round())
    assert torch.equal(victim.predict(result.image), result.prediction)  # scored as it is stored
    if attack.threat.norm != "parameter":
        assert (attack.threat.bind(image).size(result.image) <= attack.threat.eps * (1 + 1e-9)).all()
    if TRAITS[name].local:
        assert torch.equal(result.image[image == 0], image[image == 0])
    assert (result.image != image).any()


@cased
def test_a_budget_of_nothing_stores_the_scan_itself(name, norm):
    image = scanner_image(name, 1.0)
    if TRAITS[name].uses_budget is False and budget(name, norm) == float("inf"):
        pytest.skip("an unbounded attack has no budget of nothing")
    attack = make_attack(name, norm, eps=0.0, quantize="int16")
    assert torch.equal(attack(make_victim("windows"), image, make_label("softmax", 2)).image, image)


def test_small_steps_add_up_beneath_a_level():
    """The search keeps what rounding would lose: with rounded iterates steps of a third of a level go nowhere."""
    image, label = scanner_image("ifgsm", 1.0), make_label("softmax", 2)
    attack = make_attack("ifgsm", eps=3.0, units="absolute", steps=12, step_size=0.3, quantize="int16")
    result = attack(make_victim("windows"), image, label)
    assert result.perturbation.abs().max() == 3
