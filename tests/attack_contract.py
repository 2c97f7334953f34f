"""What the tests of the attacks' contract share: how each attack is made small, what it promises, what is compared."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import ATTACKS, Attack, UniversalPerturbation
from monai_adv.threats import LInf
from monai_adv.victims import Victim

BUDGET = {"linf": 0.2, "l2": 3.0}


@dataclass
class Trait:
    """How the contract's tests treat one attack; the defaults fit a gradient attack inside a norm ball."""

    options: dict = field(default_factory=dict)  # few steps: the contract holds after any number of them
    without_chance: dict | None = field(default_factory=dict)  # options that draw nothing; None: it always draws
    draws: bool = False  # whether it draws random numbers with its default options
    gradient: bool = True  # takes gradients
    uses_budget: bool = True  # reaches at least half of its budget wherever the victim answers at all
    local: bool = True  # nothing changes outside the support
    modalities: bool = True  # modalities may be chosen (not where anatomy moves)
    positive: bool = False  # needs images without negative values (magnitude MRI)
    flat: bool = True  # a slice is a volume of depth one
    best: bool = True  # keeps the best iterate by the metric (not the last, not the smallest)


class AnyGrid(UniversalPerturbation):
    """A universal perturbation for slices and volumes, every norm and every unit."""

    def __init__(self):
        drawn = torch.randn(4, 3, 4, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        super().__init__(BUDGET["linf"] * drawn.sign(), LInf(BUDGET["linf"]))

    def fits(self, threat):
        pass

    def on(self, image, affine=None, placement="world"):
        volume = image if image.dim() == 4 else image.unsqueeze(1)
        return super().on(volume, None, "tile").view(image.shape)


class AnyDimensions(nn.Module):
    """A voxelwise linear network for slices and volumes: the surrogate of a transfer attack."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return torch.einsum("kc,bc...->bk...", self.weight.to(x.dtype), x)


class CoarseFields(nn.Module):
    """Fields as a generator of the learned synthesis gives them: two values along every axis of an image of any size.

    A thin axis gets none of the numbers, so that a slice is a volume of depth one here, too.
    """

    def __init__(self, **effect):
        super().__init__()
        self.effect = effect

    def forward(self, image, drop, *, generator=None):
        batch, channels, *shape = image.shape
        moving = [axis for axis, n in enumerate(shape) if n > 1]
        grid = [2 if n > 1 else 1 for n in shape]

        def drawn(count):
            values = torch.empty(batch, count, *grid, dtype=image.dtype)
            return torch.tanh(values.normal_(generator=generator) * drop.view(-1, 1, *[1] * len(shape)) * 5)

        velocity = image.new_zeros(batch, len(shape), *grid)
        velocity[:, moving] = drawn(len(moving))
        return {"velocity": velocity, "log_bias": drawn(channels), "residual": drawn(channels), "mu": image[:, :1]}


TRAITS: dict[str, Trait] = {
    "universal": Trait({"perturbation": AnyGrid()}, gradient=False),
    "noise": Trait(without_chance=None, draws=True, gradient=False),
    "fgsm": Trait(),
    "ifgsm": Trait({"steps": 2}),
    "targeted_ifgsm": Trait({"steps": 2}),
    "pgd": Trait({"steps": 2}, without_chance={"random_start": False}, draws=True),
    "mifgsm": Trait({"steps": 2}),
    "segpgd": Trait({"steps": 2}, without_chance={"random_start": False}, draws=True),
    "cospgd": Trait({"steps": 2}, without_chance={"random_start": False}, draws=True),
    "apgd": Trait({"steps": 3, "loss": "ce"}, without_chance={"random_start": False}, draws=True),
    "sea": Trait({"steps": 4, "losses": ["masked_ce", "js"]}, without_chance={"random_start": False}, draws=True),
    "ensemble": Trait(
        {"attacks": [{"name": "pgd", "steps": 2}, {"name": "segpgd", "steps": 2}]},
        without_chance={"attacks": ["fgsm", {"name": "ifgsm", "steps": 2}]},
        draws=True,
    ),
    "ssm": Trait({"steps": 2}, uses_budget=False),
    "asm": Trait({"steps": 2}, uses_budget=False),
    "asma": Trait({"steps": 2}, uses_budget=False),
    "bias_field": Trait({"steps": 2, "knot_mm": 2.0}, without_chance=None, draws=True, uses_budget=False),
    "gamma": Trait({"steps": 2}, without_chance=None, draws=True, uses_budget=False),
    "motion": Trait({"steps": 2, "segments": 3, "axis": -1}, without_chance=None, draws=True, uses_budget=False),
    "ghosting": Trait({"steps": 2, "axis": -1, "period": 3}, without_chance=None, draws=True, uses_budget=False),
    "gibbs": Trait({"steps": 2, "step_size": 0.3}, without_chance=None, draws=True, uses_budget=False),
    "rician": Trait({"steps": 2}, without_chance=None, draws=True, uses_budget=False, positive=True),
    "deformation": Trait(
        {"steps": 2, "knot_mm": 4.0}, without_chance=None, draws=True, uses_budget=False, local=False, modalities=False
    ),
    "affine": Trait({"steps": 2}, without_chance=None, draws=True, uses_budget=False, local=False, modalities=False),
    "synthesis": Trait(
        {"generator": CoarseFields(max_mm=2.0), "steps": 2, "grid": 2, "bisections": 2},
        without_chance=None,
        draws=True,
        gradient=False,
        uses_budget=False,
        local=False,
        modalities=False,
        best=False,
    ),
    "dag": Trait({"steps": 2}, without_chance={"adversarial": "runner_up"}, draws=True, uses_budget=False),
    "fmn": Trait({"steps": 3}, uses_budget=False, best=False),
    "alma_prox": Trait({"steps": 3}, uses_budget=False, best=False),
    "minimal": Trait({"attack": {"name": "ifgsm", "steps": 2}, "start": 0.1}, uses_budget=False, best=False),
    "vafa": Trait({"steps": 2, "block": 4}),
    "square": Trait({"queries": 4}, without_chance=None, draws=True, gradient=False, flat=False),
    "transfer": Trait(
        {"surrogate": Victim(AnyDimensions()), "attack": {"name": "pgd", "steps": 2}},
        without_chance={"attack": {"name": "ifgsm", "steps": 2}},
        draws=True,
        gradient=False,
    ),
}

NAMES = list(ATTACKS)
CASES = [(name, norm) for name in NAMES for norm in ATTACKS[name].norms]
NORM_CASES = [(name, norm) for name, norm in CASES if norm != "parameter"]
GRADIENT = [name for name in NAMES if TRAITS[name].gradient]
LOSSES = [name for name in NAMES if not ATTACKS[name].fixed_loss]
DRAWN = [name for name in NAMES if TRAITS[name].draws]

named = pytest.mark.parametrize("name", NAMES)
cased = pytest.mark.parametrize(("name", "norm"), CASES)
norm_cased = pytest.mark.parametrize(("name", "norm"), NORM_CASES)
headed = pytest.mark.parametrize("head", ["softmax", "sigmoid"])


def budget(name: str, norm: str | None = None) -> float:
    """The budget the contract is tried with: that of the norm, or the attack's own."""
    norm = norm or ATTACKS[name].norms[0]
    return BUDGET[norm] if norm in BUDGET else ATTACKS[name].default_eps[0]


def make_attack(name: str, norm: str | None = None, eps: float | None = None, **options) -> Attack:
    norm = norm or ATTACKS[name].norms[0]
    eps = budget(name, norm) if eps is None else eps
    if norm == "parameter":
        options.pop("units", None)
    return attacks.create(name, eps, norm=norm, **{**TRAITS[name].options, **options})


def is_targeted(name: str) -> bool:
    return make_attack(name).targeted


def prepared(name: str, image: torch.Tensor) -> torch.Tensor:
    """The image as this attack can take it."""
    return image.abs() if TRAITS[name].positive else image


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


def assert_same_result(a, b, labels: bool = True) -> None:
    keys = ("image", "perturbation", "prediction", "success", "score", "clean_score", "best_step")
    for key in (*keys, "label") if labels else keys:
        assert torch.equal(getattr(a, key), getattr(b, key)), key
    assert a.parameters.keys() == b.parameters.keys()
    assert all(torch.equal(a.parameters[key], b.parameters[key]) for key in a.parameters)
    assert a.details == b.details
    assert len(a.trace) == len(b.trace)
    for one, other in zip(a.trace, b.trace):
        assert (one["step"], one["restart"]) == (other["step"], other["restart"])
        for key in ("loss", "score", "zero_gradient"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, equal_nan=True)
