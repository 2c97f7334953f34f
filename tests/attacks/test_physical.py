"""Worst cases of physical changes: what was found is replayed, beats chance, and moves the ground truth along."""

from __future__ import annotations

import pytest
import torch
from attack_contract import TRAITS
from monai.data import MetaTensor
from oracles import make_image, make_label, make_victim, smooth_network
from torch import nn
from warps import F64, places

from monai_adv import attacks, transforms
from monai_adv.attacks import ATTACKS
from monai_adv.attacks.physical import PhysicalAttack
from monai_adv.errors import ConfigError
from monai_adv.losses import CrossEntropy, target_agreement
from monai_adv.transforms.physics import EFFECTS
from monai_adv.victims import Head, Victim, mean_dice

# what searches a drop that was asked for, not the worst, is tested in test_synthesis_attack.py
NAMES = [n for n, kind in ATTACKS.items() if issubclass(kind, PhysicalAttack) and n != "synthesis"]
MOVING = [name for name in NAMES if EFFECTS[name].geometric]
STILL = [name for name in NAMES if not EFFECTS[name].geometric]
LESION = Head("softmax", {"lesion": (1,)})
AFFINE = torch.diag(torch.tensor([2.0, 1, 3, 1], dtype=F64))

named = pytest.mark.parametrize("name", NAMES)
moving = pytest.mark.parametrize("name", MOVING)


def blobs(batch: int = 2, size: int = 20) -> torch.Tensor:
    """Smooth images of four modalities in a round head on a background of 0."""
    place = places((size, size), (1.0, 1.0))
    generator = torch.Generator().manual_seed(4)
    image = torch.zeros(batch, 4, size, size, dtype=F64)
    for _ in range(6):
        centre = (torch.rand(batch, 4, 2, 1, 1, generator=generator, dtype=F64) - 0.5) * 0.8 * size
        width = 0.1 * size * (1 + torch.rand(batch, 4, 1, 1, generator=generator, dtype=F64))
        image += torch.exp(-(place - centre).square().sum(2) / (2 * width**2))
    return torch.where(place.norm(dim=0) < 0.45 * size, 0.2 + image, 0.0)


def create(name: str, eps: float | None = None, **options):
    return attacks.create(name, eps, **{**TRAITS[name].options, **options})


def effect_of(name: str):
    return create(name).effect


def transform(name: str, parameters, b: int):
    """The deterministic transform of what an attack found for one member."""
    cls = getattr(transforms, f"Physical{EFFECTS[name].__name__}")
    options = {k: v for k, v in TRAITS[name].options.items() if hasattr(effect_of(name), k)}
    return cls(**{k: v[b] for k, v in parameters.items()}, **options)


# ------------------------------------------------------------------------------------- one formula, three uses
@named
def test_every_effect_is_an_attack_in_its_units(name):
    assert {*NAMES, "synthesis"} == set(EFFECTS)
    attack = attacks.create(name)
    assert attack.threat.eps == EFFECTS[name].default_magnitude == ATTACKS[name].default_eps[0]
    assert attack.threat.units == EFFECTS[name].units
    assert type(attack).moves_voxels == EFFECTS[name].geometric
    with pytest.raises(ConfigError, match=f"budget of {name} is in "):
        attacks.create(name, units="std")


@pytest.mark.parametrize("control", [False, True])
@named
def test_what_was_found_is_replayed_by_the_transform(name, control):
    image, label = make_image(2), make_label("softmax", 2)
    image = image.abs() if EFFECTS[name].positive else image
    scan = MetaTensor(image, affine=AFFINE)
    result = create(name, control=control)(make_victim("smooth"), scan, label)
    magnitude = EFFECTS[name].default_magnitude
    size = effect_of(name).size(result.parameters)
    assert result.details["magnitude"] == size.tolist()
    assert (size <= magnitude * (1 + 1e-12)).all()
    for b in range(2):
        single = MetaTensor(image[b], affine=AFFINE)
        replay = transform(name, result.parameters, b)
        torch.testing.assert_close(replay(single).as_tensor(), result.image[b].as_tensor(), rtol=1e-12, atol=1e-12)
        assert torch.equal(replay.warp_label(label[b], single), result.label[b])
    assert torch.equal(result.label, label) == (name in STILL)
    assert torch.equal(mean_dice(result.prediction, result.label, Head("softmax")), result.score)


@named
def test_the_control_is_random_and_uses_the_whole_magnitude(name):
    image, label, victim = blobs(), make_label("softmax", 2, 2)[..., :1, :1].expand(2, 1, 20, 20), None
    victim = make_victim("smooth", dims=2)
    result = create(name, control=True, seed=1)(victim, image, label)
    assert (result.cost.forwards, result.cost.backwards) == (2, 0)
    assert len(result.trace) == 1
    magnitude = EFFECTS[name].default_magnitude
    assert result.details["magnitude"] == pytest.approx([magnitude] * 2, rel=1e-6)
    other = create(name, control=True, seed=2)(victim, image, label)
    assert not torch.equal(other.image, result.image)
    worst = create(name, control=True, seed=1, restarts=4)(victim, image, label)
    assert len(worst.trace) == 4
    assert torch.equal(worst.score, torch.stack([entry["score"] for entry in worst.trace]).amin(0))


class Shaded(nn.Module):
    """A threshold on the mean modality that depends on the place, so that every change matters somewhere."""

    def forward(self, x):
        gain = torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)
        bright = 8 * (gain * x.mean(1, keepdim=True) - 0.6)
        return torch.cat([-bright, bright], 1)


@named
def test_the_search_beats_its_control(name):
    """Against the victim's own segmentation: a higher loss than random changes as large, and than its own start."""
    victim, image = Victim(Shaded(), head=LESION), blobs(4)
    options = {"label_source": "prediction", "loss": "ce"}
    found = create(name, steps=8, **options)(victim, image)
    controls = [create(name, control=True, seed=seed, **options)(victim, image) for seed in range(4)]
    assert found.clean_score.tolist() == [1] * 4
    loss = torch.stack([entry["loss"] for entry in found.trace]).amax(0)
    assert loss.mean() > 1.05 * torch.stack([c.trace[0]["loss"] for c in controls]).mean()
    assert (loss > found.trace[0]["loss"]).all()
    assert (found.score < 1).all()


@named
def test_restarts_keep_the_best_parameters(name):
    victim, image = Victim(smooth_network(2)), blobs()
    options = {"label_source": "prediction", "steps": 2}
    result = create(name, restarts=3, **options)(victim, image)
    assert [entry["restart"] for entry in result.trace] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    best = torch.stack([entry["score"] for entry in result.trace])
    assert torch.equal(result.score, best.amin(0))
    for b in range(2):
        replay = transform(name, result.parameters, b)(image[b])
        torch.testing.assert_close(replay, result.image[b], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("option", "value"), [("steps", 0), ("step_size", 0), ("step_size", 2.0), ("restarts", 0)])
@named
def test_impossible_searches(name, option, value):
    with pytest.raises(ConfigError, match=option):
        create(name, **{option: value})


@pytest.mark.parametrize("name", [n for n in NAMES if EFFECTS[n].positive])
def test_negative_intensities_are_no_magnitude_image(name):
    with pytest.raises(ConfigError, match="negative"):
        create(name)(make_victim("smooth"), make_image(2), make_label("softmax", 2))


@pytest.mark.parametrize("name", STILL)
def test_parameters_of_fixed_modalities_are_zero(name):
    image = make_image(2).abs()
    result = create(name, channels=[2])(make_victim("smooth"), image, make_label("softmax", 2))
    for values in result.parameters.values():
        assert values[:, 2].any()
        assert not values[:, [0, 1, 3]].any()


# ------------------------------------------------------------------------------------------- anatomy that moves
class Threshold(nn.Module):
    """A perfect segmenter of an image of two brightnesses, 1 and 2."""

    def forward(self, x):
        bright = 8 * (x - 1.5)
        return torch.cat([-bright, bright], 1)


def lesion(centres=((12.0, 4.0), (-8.0, 10.0)), size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, each with a bright lesion off its centre, and its truth."""
    place = places((size, size), (1.0, 1.0))
    truth = (place - torch.tensor(centres, dtype=F64).view(2, 1, 2, 1, 1)).norm(dim=2) < 5
    return torch.where(truth, 2.0, 1.0).to(F64), truth.long()


@pytest.mark.parametrize("control", [False, True])
@moving
def test_a_perfect_segmenter_stays_perfect_because_the_truth_moves(name, control):
    image, truth = lesion()
    victim = Victim(Threshold(), head=LESION)
    options = {"affine": {}, "deformation": {"eps": 8.0, "knot_mm": 40.0}}
    result = create(name, control=control, **options[name])(victim, image, truth)
    assert result.clean_score.tolist() == [1, 1]
    assert (result.score > 0.93).all()
    assert not result.success.any()
    assert torch.equal(mean_dice(result.prediction, result.label, LESION), result.score)
    unmoved = mean_dice(result.prediction, truth, LESION)
    assert (unmoved < 0.8).all()


def soft_lesion(size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth bump of 0 to 1 on a brightness of 1, and its upper half."""
    place = places((size, size), (1.0, 1.0)) - 2.0
    image = 1 + torch.exp(-place.square().sum(0) / (2 * 6.0**2))[None, None]
    return image, (image > 1.5).long()


class LosesItsWay(nn.Module):
    """A segmenter that sees less and less along the last axis: lesions beyond its middle are missed."""

    def forward(self, x):
        sure = torch.linspace(2.0, 0.0, x.shape[-1], dtype=x.dtype)
        bright = 8 * (sure * (x - 1) - 0.5)
        return torch.cat([-bright, bright], 1)


@moving
def test_the_lesion_is_moved_to_where_the_victim_is_worst(name):
    """Along the last axis, in mm; the affine motion goes as far as it may, the deformation grows the lesion, too."""
    image, truth = soft_lesion(48)
    options = {
        "affine": {"eps": 1.0, "max_rotation": 0.0, "max_scaling": 0.0, "max_translation": 6.0},
        "deformation": {"eps": 6.0, "knot_mm": 80.0},
    }
    attack = create(name, steps=12, loss="ce", **options[name])
    result = attack(Victim(LosesItsWay(), head=LESION), image, truth, spacing=(1.0, 2.0))
    assert (result.score < result.clean_score - 0.05).all()
    field = attack.effect.displacement(result.parameters, (48, 48), (1.0, 2.0))
    columns = torch.arange(48.0).expand(48, 48)
    inside = result.label[0, 0] == 1
    gone = columns[inside].mean() - columns[truth[0, 0] == 1].mean()
    assert field[0, 1][inside].mean() < -(5 if name == "affine" else 3.5)
    assert gone > (2.5 if name == "affine" else 1.5)  # voxels of 2 mm


def slope_and_parts(network, image, truth, name, parameters, monkeypatch):
    """The gradient an attack steps along, and the one with the label held still."""
    attack = create(name, steps=1, loss="ce")
    monkeypatch.setattr(attack.effect, "random", lambda *_: parameters)
    seen = {}
    step = attack.effect.step
    monkeypatch.setattr(attack.effect, "step", lambda p, g, *rest: seen.update(g) or step(p, g, *rest))
    attack(Victim(network, head=LESION), image, truth)
    leaves = {k: v.clone().requires_grad_(True) for k, v in parameters.items()}
    spacing = (1.0,) * (image.dim() - 2)
    label = attack.effect.warp_label(truth, parameters, spacing)
    logits = network(attack.effect.apply(image, leaves, spacing, image != 0))
    held = torch.autograd.grad(CrossEntropy()(logits, label, LESION).sum(), list(leaves.values()))
    return seen, dict(zip(leaves, held))


def shifted(name: str, image: torch.Tensor, mm: float, degrees: float = 0.0) -> dict[str, torch.Tensor]:
    """Parameters that take every value from so many mm before it along the last axis."""
    parameters = create(name).effect.zeros(image, (1.0, 1.0))
    if name == "affine":
        parameters["rotation"] += degrees
        parameters["translation"][:, 1] = mm
    else:
        parameters["velocity"][:, 1] = -mm
    return parameters


def along_the_last_axis(name: str, slope: dict[str, torch.Tensor]) -> float:
    return float(slope["translation"][0, 1] if name == "affine" else -slope["velocity"][0, 1].sum())


@pytest.mark.parametrize(("name", "degrees", "rel"), [*((n, 0.0, 0.03) for n in MOVING), ("affine", 40.0, 0.05)])
def test_the_gradient_of_image_and_label_together(name, degrees, rel, monkeypatch):
    """Against what the objective really is one voxel to either side, where labels need no rounding."""
    image, truth = soft_lesion()
    network, effect = LosesItsWay(), create(name).effect

    def objective(mm: float) -> float:
        moved = shifted(name, image, mm, degrees)
        x = effect.apply(image, moved, (1.0, 1.0), image != 0)
        return float(CrossEntropy()(network(x), effect.warp_label(truth, moved, (1.0, 1.0)), LESION))

    # interpolation has a kink at every voxel: both sides of it
    sides = [
        slope_and_parts(network, image, truth, name, shifted(name, image, mm, degrees), monkeypatch)
        for mm in (-1e-6, 1e-6)
    ]
    together, held = (sum(along_the_last_axis(name, side[k]) for side in sides) / 2 for k in (0, 1))
    expected = (objective(1.0) - objective(-1.0)) / 2
    assert together == pytest.approx(expected, rel=rel)
    assert abs(held - expected) > 0.5 * expected


@moving
def test_moving_a_lesion_that_is_followed_is_no_progress(name, monkeypatch):
    """A threshold on another level than the truth is wrong in the same way wherever the lesion goes."""

    class Elsewhere(nn.Module):
        def forward(self, x):
            bright = 4 * (x - 1.7)
            return torch.cat([-bright, bright], 1)

    image, truth = soft_lesion()
    together, held = slope_and_parts(Elsewhere(), image, truth, name, shifted(name, image, 0.4), monkeypatch)
    assert abs(along_the_last_axis(name, held)) > 5  # with the label held still it would drive the search
    assert abs(along_the_last_axis(name, together)) < 1


@moving
def test_several_draws_of_a_victim_without_chance_are_one(name):
    """Image and label pull as the mean of the draws, both of them."""
    image, truth = soft_lesion()
    results = [create(name, draws=n)(Victim(LosesItsWay(), head=LESION), image, truth) for n in (1, 3)]
    torch.testing.assert_close(results[1].image, results[0].image)
    assert results[1].cost.backwards == 3 * results[0].cost.backwards


@moving
def test_targets_and_weights_move_with_the_image(name):
    image, label, target = make_image(2), make_label("softmax", 2), make_label("softmax", 2, seed=6)
    weight = (make_label("softmax", 2, seed=8) > 0).float()
    victim = make_victim("smooth")
    result = create(name, target=target)(victim, image, label, weight=weight)
    warp = effect_of(name).label_warp(image.shape[2:], result.parameters, (1.0,) * 3)
    expected = target_agreement(result.prediction, warp(target), warp(label), warp(weight))
    assert torch.equal(result.score, expected)
    assert torch.equal(result.label, warp(label))
    assert not torch.equal(warp(target), target)


def test_a_deformation_says_whether_it_folds():
    image, truth = lesion()
    attack = create("deformation", 3.0, knot_mm=20.0)
    result = attack(Victim(Threshold(), head=LESION), image, truth)
    field = attack.effect.displacement(result.parameters, (48, 48), (1.0, 1.0))
    assert field.norm(dim=1).max() <= 3.0
    smallest = transforms.jacobian_determinant(field, (1.0, 1.0)).flatten(1).amin(1)
    assert result.details["min_jacobian"] == smallest.tolist()
    assert (smallest > 0).all()
    assert (smallest < 1).all()


@moving
def test_bounds_are_kept_where_anatomy_moves(name):
    image = make_image(2)
    result = create(name, bounds=[-20.0, 20.0])(make_victim("smooth"), image, make_label("softmax", 2))
    assert result.image.abs().max() <= 20
    tight = create(name, bounds="data")(make_victim("smooth"), image, make_label("softmax", 2))
    axes = (2, 3, 4)
    assert (tight.image.amax(axes) <= image.amax(axes)).all()
    with pytest.raises(ConfigError, match="leave channels out"):
        create(name, channels=[1])
