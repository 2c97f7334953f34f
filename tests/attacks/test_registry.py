"""Attacks by name."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
import yaml
from attack_contract import make_attack

from monai_adv import attacks
from monai_adv.attacks import ATTACKS, Attack
from monai_adv.errors import ConfigError
from monai_adv.losses import Margin
from monai_adv.threats import L2


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_name_creates_its_attack(name):
    attack = make_attack(name)
    assert type(attack) is ATTACKS[name]
    assert attack.name == name
    assert isinstance(attack, Attack)
    assert not inspect.isabstract(type(attack))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_is_documented_and_recorded(name):
    line = attacks.available()[name]
    assert ATTACKS[name].reference in line
    assert len(line) > 30
    json.dumps(make_attack(name).parameters(), default=repr)
    document = inspect.getdoc(ATTACKS[name]) or ""
    options = [o for o in attacks.option_names(name) if o in inspect.signature(ATTACKS[name].__init__).parameters]
    assert all(f"{option}:" in document for option in options), [o for o in options if f"{o}:" not in document]


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_option_is_taken_and_kept(name):
    """An option with another value than its default shows in the attack: none is parsed and ignored."""
    other = {"seed": 5, "goal": 0.25, "label_source": "prediction", "loss": Margin(2.0)}
    if ATTACKS[name].fixed_loss:
        del other["loss"]
        assert "loss" not in attacks.option_names(name)
    for option, value in other.items():
        assert option in attacks.option_names(name)
        assert getattr(make_attack(name, **{option: value}), option) == value
    for option in set(attacks.option_names(name)) - set(other):
        default = getattr(make_attack(name), option)
        changed = not default if isinstance(default, bool) else default + 1 if isinstance(default, int) else None
        if changed is not None:
            assert getattr(make_attack(name, **{option: changed}), option) == changed


def test_options_reach_threat_and_attack():
    attack = attacks.create("pgd", 2, norm="l2", units="range", channels=[0, 2], bounds=None, support="all", steps=7)
    assert attack.threat == L2(2, "range", (0, 2), None, "all")
    assert attack.steps == 7


def test_plain_data_from_yaml():
    options = yaml.safe_load("{name: targeted_ifgsm, eps: 0.2, bounds: [-1, [1, 2]], target: {hide: ET}, steps: 3}")
    attack = attacks.create(**options)
    assert attack.threat.bounds == (-1, [1, 2])
    assert attack.target == {"hide": "ET"}
    image = torch.tensor([[[0.5, -0.5], [1.5, 0.25]]])
    assert attack.threat.bind(image).high.flatten().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fgsmm"}, "attack 'fgsmm' is unknown: use one of .*fgsm"),
        ({"name": "fgsm", "steps": 3}, "attack fgsm has no option steps: it takes loss"),
        ({"name": "pgd", "stepsize": 3, "alpha": 1}, "has no option alpha, stepsize"),
        ({"name": "pgd", "options": {}}, "has no option options"),
        ({"name": "pgd", "norm": "l1"}, "norm 'l1' is unknown"),
        ({"name": "pgd", "eps": -1}, "eps must be"),
        ({"name": "pgd", "units": "255"}, "units '255'"),
    ],
)
def test_what_is_unknown_is_an_error_that_lists_what_there_is(arguments, message):
    with pytest.raises(ConfigError, match=message):
        attacks.create(**arguments)
