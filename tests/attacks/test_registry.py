"""Attacks by name."""

from __future__ import annotations

import inspect
import json
import sys

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
        ({"name": "fgsmm"}, "attack 'fgsmm' is unknown; did you mean 'fgsm'. use one of noise, .*fgsm"),
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


@pytest.fixture
def own():
    """An attack of a user's, forgotten afterwards."""

    class Own(attacks.IFGSM):
        """I-FGSM in some rounds."""

        name = "own"
        reference = "the user"

        def __init__(self, threat, rounds=3, **options):
            super().__init__(threat, **options)
            self.rounds = rounds

    yield Own
    ATTACKS.pop("own", None)


def test_an_own_attack_is_known_by_its_name(own):
    with pytest.raises(ConfigError, match="has to be registered first"):
        attacks.create("own")
    assert attacks.register(own) is own
    assert attacks.create("own", eps=0.2, rounds=2).rounds == 2
    assert attacks.option_defaults("own") == {"rounds": 3, "steps": 10, "step_size": None}
    assert attacks.available()["own"] == "I-FGSM in some rounds. [the user]"
    assert attacks.register(own) is own  # the same cell run again


def test_what_cannot_be_registered_is_named(own):
    attacks.register(own)
    with pytest.raises(ConfigError, match=r"belongs to monai_adv\.attacks\.sign\.PGD"):
        attacks.register(type("Other", (own,), {"__doc__": "x", "name": "pgd", "reference": "x"}))
    with pytest.raises(ConfigError, match="a text of its own for name, reference, __doc__"):
        attacks.register(type("Nameless", (own,), {}))
    for no_attack in (Margin, Attack, "pgd"):
        with pytest.raises(ConfigError, match="is no attack"):
            attacks.register(no_attack)
    assert ATTACKS["pgd"] is attacks.PGD


TYPED = """
class Typed(IFGSM):
    name, reference = "typed", "the user"
    def _search(self, run):
        run.consider(run.ball.random(run.generator)){}
"""


def test_the_code_of_an_own_attack_is_part_of_what_is_recorded(own):
    assert "code" not in attacks.create("ifgsm").parameters()
    codes = {own(L2(1.0)).parameters()["code"]}
    for more in ("", "", "; run.consider(run.clean)"):  # in an interpreter that keeps no source
        names = {"IFGSM": attacks.IFGSM, "__name__": "typed"}
        exec(TYPED.format(more), names)
        codes.add(names["Typed"](L2(1.0)).parameters()["code"])
    assert len(codes) == 3


INSTALLED = '''
from monai_adv.attacks import FGSM
class Installed(FGSM):
    """One step, from a package."""
    name = "installed_attack"
    reference = "a package"
'''


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ("installed_attack = a_package:Installed", None),
        ("installed_attack = a_package:Missing", "cannot be loaded"),
        ("other_name = a_package:Installed", "is an attack named installed_attack"),
    ],
)
def test_attacks_of_installed_packages(tmp_path, monkeypatch, point, says):
    (tmp_path / "a_package.py").write_text(INSTALLED)
    metadata = tmp_path / "a_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: a_package\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[monai_adv.attacks]\n{point}\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(ATTACKS)
    try:
        if says is None:
            assert attacks.create("installed_attack").reference == "a package"
            assert "installed_attack" in attacks.available()
        else:
            with pytest.raises(ConfigError, match=says):
                attacks.create(point.split()[0])
    finally:
        for name in set(ATTACKS) - set(before):
            del ATTACKS[name]
        sys.modules.pop("a_package", None)
