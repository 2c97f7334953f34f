"""Square and transfer: what they ask of the victim, and how near they come to the optimum."""

from __future__ import annotations

import math
import time

import pytest
import torch
from attack_contract import AnyDimensions
from oracles import linear_network, make_image, make_label, make_victim, smooth_network
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import black_box
from monai_adv.attacks.black_box import Square, Transfer, translated
from monai_adv.errors import ConfigError
from monai_adv.losses import Margin
from monai_adv.networks import baseline_unet, build_network
from monai_adv.threats import LInf
from monai_adv.victims import Head, Victim, VictimConfig, load_victim, save_checkpoint

LESION = Head("softmax", {"lesion": (1,)})
UNCLIPPED = Margin(kappa=math.inf)


class Counted(nn.Module):
    """Keeps what it was asked, and whether a gradient was wanted."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen, self.gradients = network, [], 0

    def forward(self, x):
        self.seen.append(x.detach().clone())
        self.gradients += x.requires_grad
        return self.network(x)


# ---------------------------------------------------------------------------------------------- square: cubes
def test_the_side_follows_the_published_schedule():
    """p is halved after 10, 50, 200, ... of 10,000 queries."""
    attack = Square(LInf(0.1), queries=10_000, p=0.8)
    shape = (100, 80, 90)
    for query, halvings in (
        (1, 0), (11, 0), (12, 1), (51, 1), (52, 2), (201, 2), (202, 3), (501, 3), (502, 4), (1001, 4), (1002, 5),
        (2001, 5), (2002, 6), (4001, 6), (4002, 7), (6001, 7), (6002, 8), (8001, 8), (8002, 9), (10_000, 9),
    ):  # fmt: skip
        assert attack.side(query, shape) == round((0.8 / 2**halvings * 100 * 80 * 90) ** (1 / 3)), query
    assert attack.side(12, (100, 80)) == round((0.4 * 100 * 80) ** 0.5)
    assert attack.side(12, (1, 100, 80)) == attack.side(12, (100, 80))
    assert attack.side(9_999, (2, 2, 2)) == 1
    # scaled to the queries there are
    assert [Square(LInf(0.1), queries=1000).side(q, shape) for q in (2, 3, 6, 7, 21, 22)] == [
        attack.side(q, shape) for q in (11, 21, 51, 61, 201, 211)
    ]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_query_changes_one_cube_from_the_best_before_it(dims):
    victim = make_victim("linear", dims=dims)
    victim.network = network = Counted(victim.network)
    shape = {2: (12, 10), 3: (7, 8, 9)}[dims]
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 4, *shape, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 4, (1, 1, *shape), generator=generator)
    attack = attacks.create("square", 0.1, queries=60, units="absolute", bounds=None, support="all", loss="ce")
    result = attack(victim, image, label)
    assert len(network.seen) == 61
    assert network.gradients == 0
    assert (result.cost.forwards, result.cost.backwards) == (61, 0)
    assert result.details["queries"] == [60]
    signs = [((x - image) / 0.1) for x in network.seen[1:]]
    assert all(torch.allclose(s.abs(), torch.ones_like(s)) for s in signs)
    stripes = signs[0]
    assert torch.allclose(stripes, stripes[:, :, :1].expand_as(stripes))
    assert (stripes > 0).any()
    assert (stripes < 0).any()
    losses = [float(entry["loss"]) for entry in result.trace]
    best, accepted = 0, 0
    for query in range(1, 60):
        changed = ((signs[query] - signs[best]).abs() > 1).any(1)[0]
        where = changed.nonzero()
        assert len(where), query
        width = (where.amax(0) - where.amin(0) + 1).tolist()
        side = attack.side(query, shape)
        assert all(w <= min(side, n) for w, n in zip(width, shape)), (query, width, side)
        drawn = signs[query][0][:, changed]
        moved = (drawn - drawn[:, :1]).abs() < 1e-9
        assert moved.all()  # one sign per channel
        if losses[query] > losses[best]:
            best, accepted = query, accepted + 1
    assert result.details["accepted"] == [accepted]
    assert accepted > 5


def test_cubes_stay_on_the_support():
    """A support in one corner: every query changes something, and nothing outside."""
    victim, image, label = make_victim("linear"), make_image(2), make_label("softmax", 2)
    support = torch.zeros_like(image, dtype=torch.bool)
    support[0, :, 1:3, :2, 3:] = True
    support[1, :, 2:, 3:, :3] = True
    victim.network = network = Counted(victim.network)
    attack = attacks.create("square", 0.3, queries=80, bounds=None)
    result = attack(victim, image, label, support=support)
    for query, asked in enumerate(network.seen[1:]):
        assert torch.equal(asked[~support], image[~support])
        assert (asked != image).flatten(1).any(1).all()
        if query:
            assert (asked != network.seen[query]).any()
    assert (result.perturbation != 0).flatten(1).any(1).all()


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_samples_are_searched_for_themselves(head):
    """One sample has nothing left to gain: its losses do not steer the other's."""
    victim, label = make_victim("linear", head), make_label(head, 2)
    image = make_image(2)
    result = attacks.create("square", 0.2, queries=40, loss="ce")(victim, image, label)
    losses = torch.stack([entry["loss"] for entry in result.trace])
    for b in range(2):
        running = losses[:, b].cummax(0).values
        accepted = int((running[1:] > running[:-1]).sum())
        assert result.details["accepted"][b] == accepted


def test_queries_until_success_are_counted():
    victim, image, label = make_victim("linear"), make_image(2), make_label("softmax", 2)
    result = attacks.create("square", 2.0, queries=100, goal=0.9)(victim, image, label, weight=None)
    for b in range(2):
        reached = [n for n, e in enumerate(result.trace) if e["score"][b] <= 0.9 * result.clean_score[b]]
        assert result.details["queries_to_success"][b] == (reached[0] + 1 if reached else None)
    assert any(n is not None for n in result.details["queries_to_success"])
    failed = attacks.create("square", 2.0, queries=3, goal=0.0)(victim, image, label)
    assert failed.details["queries_to_success"] == [None, None]


# ------------------------------------------------------------------------------------------ square: strength
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_square_comes_near_the_optimum_of_a_linear_victim(head, dims):
    """A label in two halves: the closed form is one sign per half and channel, which large cubes can find."""
    network = linear_network(dims, classes=2 if head == "softmax" else 1)
    victim = Victim(network, head=LESION if head == "softmax" else Head("sigmoid", ["lesion"]))
    shape = {2: (8, 8), 3: (4, 4, 4)}[dims]
    image = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.zeros(2, 1, *shape, dtype=torch.long)
    label[..., shape[-1] // 2 :] = 1
    weight = network.weight.detach().flatten(1)
    towards = weight[1] - weight[0] if len(weight) == 2 else weight[0]
    best = 0.1 * towards.abs().sum() * math.prod(shape)  # of the summed margin, over the clean one
    label = label if head == "softmax" else label.bool()
    shares: dict[int, torch.Tensor] = {}
    for queries in (20, 300):
        attack = attacks.create(
            "square", 0.1, queries=queries, units="absolute", bounds=None, support="all", loss=UNCLIPPED
        )
        result = attack(victim, image, label)
        margins = torch.stack([entry["loss"] for entry in result.trace]).amax(0)
        clean = attacks.create("fgsm", 0.1, loss=UNCLIPPED)(victim, image, label).trace[0]["loss"]
        shares[queries] = (margins - clean) / best
        assert (shares[queries] <= 1 + 1e-9).all()
    assert (shares[300] >= 0.55).all(), shares
    assert (shares[300] > shares[20] + 0.1).all(), shares


def test_square_beats_noise_and_not_the_gradient():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    found = {
        name: attacks.create(name, 0.3, loss="ce", **options)(victim, image, label)
        for name, options in (("noise", {"repeats": 20}), ("square", {"queries": 100}), ("ifgsm", {}))
    }
    loss = {name: torch.stack([e["loss"] for e in result.trace]).amax(0) for name, result in found.items()}
    assert (loss["noise"] < loss["square"]).all()
    assert (loss["square"] < loss["ifgsm"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries must be"),
        ({"p": 0}, "p must be in"),
        ({"p": 1.5}, "p must be in"),
        ({"norm": "l2"}, "square searches linf threats"),
    ],
)
def test_what_square_cannot_do(options, message):
    with pytest.raises(ConfigError, match=message):
        attacks.create("square", **options)


def test_square_needs_a_finite_budget():
    with pytest.raises(ConfigError, match="give a finite eps"):
        attacks.create("square", math.inf, queries=2)(make_victim("linear"), make_image(1), make_label("softmax", 1))


# ------------------------------------------------------------------------------------------------- transfer
def test_the_victim_is_asked_once_and_the_surrogate_searched():
    surrogate, victim = make_victim("smooth", seed=1), make_victim("smooth", seed=2)
    victim.network = network = Counted(victim.network)
    image, label = make_image(2), make_label("softmax", 2)
    attack = Transfer(LInf(0.3), surrogate, {"name": "ifgsm", "steps": 4}, loss="ce")
    result = attack(victim, image, label)
    assert len(network.seen) == 2  # the clean image, the crafted one
    assert network.gradients == 0
    assert (result.cost.forwards, result.cost.backwards) == (2, 0)
    crafted = attacks.create("ifgsm", 0.3, steps=4)(surrogate, image, label)
    assert torch.equal(result.image, crafted.image)
    assert torch.equal(result.image, network.seen[1])
    assert result.details == {
        "surrogate_score": crafted.score.tolist(),
        "surrogate_clean_score": crafted.clean_score.tolist(),
        "surrogate_success": crafted.success.tolist(),
        "surrogate_forwards": [6, 6],
        "surrogate_backwards": [4, 4],
    }


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_surrogate_that_is_the_victim_is_a_white_box(norm):
    victim, image, label = make_victim("windows"), make_image(2), make_label("softmax", 2)
    eps = {"linf": 0.3, "l2": 2.0}[norm]
    options = {"units": "range", "channels": (0, 2), "bounds": None}
    white = attacks.create("pgd", eps, norm=norm, steps=3, **options)(victim, image, label)
    attack = attacks.create("transfer", eps, norm=norm, surrogate=victim, attack={"name": "pgd", "steps": 3}, **options)
    found = attack(victim, image, label)
    assert torch.equal(found.image, white.image)
    assert torch.equal(found.score, white.score)
    other = attacks.create("transfer", eps, norm=norm, surrogate=make_victim("windows", seed=5), **options)
    assert other(victim, image, label).score.mean() > white.score.mean()


@pytest.mark.parametrize(("mine", "theirs"), [("softmax", "sigmoid"), ("sigmoid", "softmax")])
def test_labels_are_translated_between_the_heads(mine, theirs):
    surrogate, victim = make_victim("smooth", theirs, seed=1), make_victim("smooth", mine, seed=2)
    image, label = make_image(2), make_label(mine, 2)
    assert torch.equal(translated(label, Head(mine), Head(theirs)), make_label(theirs, 2))
    result = Transfer(LInf(0.3), surrogate, {"name": "ifgsm", "steps": 3})(victim, image, label)
    crafted = attacks.create("ifgsm", 0.3, steps=3)(surrogate, image, make_label(theirs, 2))
    assert torch.equal(result.image, crafted.image)
    target = make_label(mine, 2, seed=6)
    result = Transfer(LInf(0.3), surrogate, {"name": "ifgsm", "steps": 3}, target=target)(victim, image, label)
    crafted = attacks.create("ifgsm", 0.3, steps=3, target=make_label(theirs, 2, seed=6))(
        surrogate, image, make_label(theirs, 2)
    )
    assert torch.equal(result.image, crafted.image)


def test_channels_in_another_order_are_translated():
    label = make_label("sigmoid", 2)
    other = Head("sigmoid", ["WT", "TC", "ET"])
    assert torch.equal(translated(label, Head("sigmoid"), other), label[:, [1, 0, 2]])
    with pytest.raises(ConfigError, match="not BraTS"):
        translated(label[:, :1], Head("sigmoid", ["lesion"]), Head("softmax"))


def test_support_weight_and_spacing_reach_the_surrogate():
    surrogate, victim = make_victim("smooth", seed=1), make_victim("smooth", seed=2)
    image, label = make_image(2), make_label("softmax", 2)
    support = torch.zeros(2, 1, *image.shape[2:], dtype=torch.bool)
    support[..., :3] = True
    weight = torch.zeros(2, 1, *image.shape[2:])
    weight[..., 2:] = 1
    found = Transfer(LInf(0.3), surrogate, "fgsm")(victim, image, label, support=support, weight=weight)
    expected = attacks.create("fgsm", 0.3)(surrogate, image, label, support=support, weight=weight)
    assert torch.equal(found.image, expected.image)


def test_a_surrogate_from_a_checkpoint(tmp_path):
    config = baseline_unet(channels=[8, 16], strides=[2])
    network = build_network(config)
    path = save_checkpoint(tmp_path / "other.pt", network, VictimConfig(config, roi_size=[16, 16, 16]))
    image = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    label = torch.randint(0, 4, (1, 1, 16, 16, 16), generator=torch.Generator().manual_seed(1))
    victim = Victim(smooth_network(dtype=torch.float32))
    attack = attacks.create("transfer", 0.1, surrogate=str(path), attack="fgsm")
    assert attack.parameters()["surrogate"] == str(path)
    found = attack(victim, image, label)
    expected = attacks.create("fgsm", 0.1)(load_victim(path), image, label)
    assert torch.equal(found.image, expected.image)
    assert torch.equal(attack(victim, image, label).image, found.image)


@pytest.fixture
def crafting(tmp_path, monkeypatch):
    """A surrogate's checkpoint, and the list of times it was loaded: once for every crafting."""
    config = baseline_unet(channels=[8, 16], strides=[2])
    path = save_checkpoint(tmp_path / "other.pt", build_network(config), VictimConfig(config, roi_size=[16, 16, 16]))
    loaded = []

    def load(*arguments, **options):
        loaded.append(arguments)
        time.sleep(0.05)
        return load_victim(*arguments, **options)

    monkeypatch.setattr(black_box, "load_victim", load)
    return path, loaded


def crafted_on(path, memory, victim=None, image=None, label=None, generator=None, eps=(0.1, 0.3), call=None, **options):
    call = call or {}
    made = attacks.create("transfer", 0.1, **{"surrogate": str(path), "attack": {"name": "pgd", "steps": 2}, **options})
    made.memory = memory
    victim = Victim(smooth_network(dtype=torch.float32)) if victim is None else victim
    image = make_image(1, dtype=torch.float32) if image is None else image
    label = make_label(victim.head, 1) if label is None else label
    return made.curve(victim, image, label, list(eps), generator=generator, **call)


def test_an_image_is_crafted_once_for_all_victims(crafting):
    path, loaded = crafting
    victims = [Victim(smooth_network(seed=seed, dtype=torch.float32)) for seed in (1, 2)]
    numbers = [torch.Generator().manual_seed(4) for _ in range(4)]
    alone = [crafted_on(path, None, victim, generator=g) for victim, g in zip(victims, numbers)]
    memory = {}
    shared = [crafted_on(path, memory, victim, generator=g) for victim, g in zip(victims, numbers[2:])]
    assert (len(loaded), len(memory)) == (3, 2)
    assert not torch.equal(alone[0][1].score, alone[1][1].score)
    for one, other in zip([r for run in alone for r in run], [r for run in shared for r in run]):
        for name in ("image", "perturbation", "prediction", "label", "success", "score", "clean_score", "best_step"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.details == other.details
        assert (one.cost.forwards, one.cost.backwards) == (other.cost.forwards, other.cost.backwards)
    assert torch.equal(numbers[0].get_state(), numbers[3].get_state())
    # its seconds are told for every victim: the surrogate's loading took a twentieth of one
    assert all(run[0].cost.seconds >= 0.05 for run in shared)


@pytest.mark.parametrize(
    "change",
    [
        {"attack": {"name": "pgd", "steps": 3}},
        {"units": "absolute"},
        {"bounds": None},
        {"channels": (0, 1)},
        {"eps": (0.2,)},
        {"victim": Victim(smooth_network(classes=3, dtype=torch.float32), head="sigmoid")},
        {"image": 2 * make_image(1, dtype=torch.float32)},
        {"call": {"support": make_image(1)[:, :1] > 0}},
        {"call": {"weight": (make_image(1)[:, :1] > 0).float()}},
        {"call": {"spacing": (2.0, 1.0, 1.0)}},
        {"call": {"affine": torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))}},
        {"label": make_label("softmax", 1, seed=7)},
        {"generator": torch.Generator().manual_seed(3)},
        {"target": "background"},
        {"label_source": "prediction"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_nothing_that_matters_to_it_is_confused(crafting, change):
    path, loaded = crafting
    memory = {}
    crafted_on(path, memory, eps=(0.1,))
    with_memory = crafted_on(path, memory, **{"eps": (0.1,), **change})
    assert (len(loaded), len(memory)) == (2, 2)
    if isinstance(change.get("generator"), torch.Generator):
        change["generator"].manual_seed(3)
    assert torch.equal(with_memory[0].image, crafted_on(path, None, **{"eps": (0.1,), **change})[0].image)


def test_another_surrogate_under_the_same_name_is_not_confused(crafting):
    path, loaded = crafting
    memory = {}
    first = crafted_on(path, memory)
    config = baseline_unet(channels=[8, 16], strides=[2])
    torch.manual_seed(5)
    save_checkpoint(path, build_network(config), VictimConfig(config, roi_size=[16, 16, 16]))
    assert not torch.equal(crafted_on(path, memory)[0].image, first[0].image)
    assert len(loaded) == 2


def test_a_surrogate_that_is_no_file_is_not_remembered(crafting):
    surrogate, memory = Victim(smooth_network(seed=3, dtype=torch.float32)), {}
    crafted_on(None, memory, surrogate=surrogate)
    crafted_on(crafting[0], memory, attack={"name": "transfer", "surrogate": surrogate})
    assert not memory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "transfer needs a surrogate"),
        ({"surrogate": 3}, "path of a checkpoint or a Victim"),
        ({"surrogate": "missing.pt"}, "surrogate missing.pt does not exist"),
        ({"surrogate": Victim(AnyDimensions()), "attack": "pgdd"}, "attack 'pgdd' is unknown"),
        ({"surrogate": Victim(AnyDimensions()), "attack": {"name": "pgd", "stepz": 3}}, "has no option stepz"),
        ({"surrogate": Victim(AnyDimensions()), "attack": "noise", "target": "background"}, "no option target"),
    ],
)
def test_what_transfer_cannot_do(options, message):
    with pytest.raises(ConfigError, match=message):
        attacks.create("transfer", **options)
