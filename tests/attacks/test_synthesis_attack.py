"""Learned synthesis: the requested drop is hit, by fields that do not fold, against the truth that moved along."""

from __future__ import annotations

import pytest
import torch
from attack_contract import CoarseFields, assert_same_result
from monai.data import MetaTensor
from torch import nn
from warps import F64, places

from monai_adv import attacks
from monai_adv.attacks import SynthesisAttack
from monai_adv.errors import CheckpointError, ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.networks import SynthesisGenerator, save_generator
from monai_adv.transforms import PhysicalSynthesis, jacobian_determinant
from monai_adv.victims import Head, Victim, mean_dice

EFFECT = {"max_mm": 3.0, "knot_mm": 12.0, "bias_knot_mm": 16.0, "residual_knot_mm": 12.0}
WARP_ONLY = {**EFFECT, "max_bias": 0, "max_residual": 0}
OPTIMIZED = {"optimize": True, "effect": EFFECT, "steps": 6}


class Threshold(nn.Module):
    """A segmenter by brightness: perfect whatever moves, wrong where the brightness changes."""

    def __init__(self, head: str = "softmax", level: float = 1.5, steep: float = 8.0):
        super().__init__()
        self.head, self.level, self.steep = head, level, steep

    def forward(self, x):
        bright = self.steep * (x - self.level)
        return torch.cat([-bright, bright], 1) if self.head == "softmax" else bright


def case(dims: int = 2, head: str = "softmax", batch: int = 2, inferer=None):
    """Smooth bumps in a head of 1 on a background of 0, their upper halves, and a segmenter that finds just those."""
    size = 40 if dims == 2 else 20
    place = places((size,) * dims, (1.0,) * dims)
    shift = torch.tensor([1.0, -2.0, 2.0, 0.0], dtype=F64)[:batch].view(-1, 1, *[1] * dims)
    image = 1 + torch.exp(-(place - shift).square().sum(1, keepdim=True) / (2 * (0.16 * size) ** 2))
    label = image > 1.5
    image = torch.where(place.norm(dim=0) < 0.48 * size, image, 0.0)
    regions = {"lesion": (1,)} if head == "softmax" else ("lesion",)
    victim = Victim(Threshold(head), inferer=inferer, head=Head(head, regions))
    return victim, image, label.long() if head == "softmax" else label


class Given(nn.Module):
    """The same fields whatever is asked: a generator without chance."""

    def __init__(self, effect=None, **raw):
        super().__init__()
        self.effect, self.raw = effect or EFFECT, raw

    def forward(self, image, drop, *, generator=None):
        one = torch.ones(len(image), 1, *[2] * (image.dim() - 2), dtype=image.dtype)
        counts = {"velocity": image.dim() - 2, "log_bias": image.shape[1], "residual": image.shape[1]}
        return {k: self.raw.get(k, 0.0) * one.expand(-1, n, *one.shape[2:]) for k, n in counts.items()}


def dice_of(result, victim, b=None) -> torch.Tensor:
    return mean_dice(result.prediction, result.label, victim.head)


# ------------------------------------------------------------------------------ the drop that was asked for
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("dims", "drop"), [(2, 0.1), (2, 0.5), (3, 0.2), (3, 0.3)])
def test_the_drop_is_hit_for_every_case(dims, drop, head, optimize):
    victim, image, label = case(dims, head)
    options = OPTIMIZED if optimize else {"generator": CoarseFields(**EFFECT)}
    attack = attacks.create("synthesis", drop=drop, samples=3, **options)
    result = attack(victim, image, label)
    told = result.details
    assert told["clean_dice"] == [1.0, 1.0]
    assert told["requested_drop"] == [drop] * 2
    assert told["drop"] == pytest.approx([drop] * 2, abs=0.01 + 1e-12)
    assert told["hit"] == [True, True]
    assert dice_of(result, victim).tolist() == pytest.approx(told["dice"])
    assert torch.equal(victim.predict(result.image), result.prediction)
    size = attack.effect.size(result.parameters)
    assert told["magnitude"] == size.tolist()
    assert (size <= 1).all()
    assert all(0 < scale <= attack.s_max for scale in told["scale"])
    assert all(value > 0 for value in told["min_jacobian"])
    assert all(0 < mm <= 3 for mm in told["max_displacement_mm"])
    assert all(0 < share <= 0.5 + 1e-12 for share in told["max_bias"])
    assert all(0 < std <= 0.5 for std in told["max_residual"])
    assert torch.equal(result.image == 0, attack.effect.warp_label(image == 0, result.parameters, (1.0,) * dims))
    assert bool(result.success.any()) == (drop == 0.5 and bool((result.score <= 0.5).any()))  # the goal is its own


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("optimize", [False, True])
def test_a_perfect_segmenter_loses_nothing_against_the_truth_that_moved(optimize, control):
    victim, image, label = case()
    effect = {**WARP_ONLY, "max_mm": 8.0, "knot_mm": 40.0}
    options = {"optimize": True, "effect": effect, "steps": 4} if optimize else {"generator": CoarseFields(**effect)}
    result = attacks.create("synthesis", drop=0.5, control=control, **options)(victim, image, label)
    assert result.details["dice"] == pytest.approx([1, 1], abs=0.08)
    assert not any(result.details["hit"])
    if not optimize:  # its search has nothing to follow here
        assert (mean_dice(result.prediction, label, victim.head) < 0.92).all()
        assert not torch.equal(result.label, label)


def test_more_than_can_be_reached_is_the_closest_and_said():
    victim, image, label = case()
    attack = attacks.create("synthesis", 0.2, generator=CoarseFields(**EFFECT), drop=0.9)
    result = attack(victim, image, label)
    reached = torch.stack([1 + 0 * entry["score"] - entry["score"] for entry in result.trace])
    assert result.details["drop"] == pytest.approx(reached.amax(0).tolist())
    assert not any(result.details["hit"])
    assert (attack.effect.size(result.parameters) <= 0.2 * (1 + 1e-12)).all()


def test_a_clean_dice_below_the_drop_aims_at_nothing():
    victim, image, label = case()
    victim.network.level = 1.9  # finds the middle alone
    result = attacks.create("synthesis", drop=0.8, generator=Given(log_bias=-0.5))(victim, image, label)
    assert all(0.2 < clean < 0.8 for clean in result.details["clean_dice"])
    assert result.details["dice"] == [0.0, 0.0]
    assert result.details["drop"] == result.details["clean_dice"]
    assert not any(result.details["hit"])  # what was asked for is not there
    assert result.cost.forwards < 1 + 8  # nothing is searched beyond a Dice of 0


def test_the_first_scale_that_does_is_taken():
    """From small to large: a brightness that goes on changing brings the Dice down only once, early."""
    victim, image, label = case()
    attack = attacks.create("synthesis", drop=0.3, generator=Given(log_bias=-1.0), grid=4, tolerance=0.005)
    result = attack(victim, image, label)
    assert result.details["hit"] == [True, True]
    for b, scale in enumerate(result.details["scale"]):
        bias = scale * torch.log(torch.tensor(1.5, dtype=F64))
        assert result.parameters["log_bias"][b].unique().tolist() == pytest.approx([-float(bias)])
        expected = ((image[b] * torch.exp(-bias) > 1.5) & label[b].bool()).sum()
        assert result.prediction[b].sum() == expected
        assert scale < 0.5  # found in the first interval, on a grid of halves
        assert result.details["max_bias"][b] == pytest.approx(float(torch.expm1(bias)))
    assert not torch.equal(result.label, result.label * 0)
    assert torch.equal(result.label, label)  # nothing moved


@pytest.mark.parametrize("region", ["present", "core", "rim"])
def test_the_region_whose_dice_shall_fall(region):
    victim, image, _ = case()
    regions = {"lesion": (1, 2), "core": (2,), "rim": (1,), "absent": (3,)}

    class Two(nn.Module):
        def forward(self, x):
            return torch.cat([0 * x, 8 * (x - 1.3), 8 * (x - 1.3) + 16 * (x - 1.65), 0 * x - 9], 1)

    victim = Victim(Two(), head=Head("softmax", regions))
    label = victim.predict(image)
    assert {1, 2} <= set(label.unique().tolist())
    options = {"generator": CoarseFields(**EFFECT), "drop": 0.25, "samples": 4}
    result = attacks.create("synthesis", region=region, **options)(victim, image, label)
    truth, found = victim.head.regions_of(result.label), victim.head.regions_of(result.prediction)
    names = ["lesion", "core", "rim"] if region == "present" else [region]
    each = [
        2 * (truth[n] & found[n]).flatten(1).sum(1) / (truth[n].flatten(1).sum(1) + found[n].flatten(1).sum(1))
        for n in names
    ]
    assert torch.stack(each).mean(0).tolist() == pytest.approx(result.details["dice"])
    assert result.details["hit"] == [True, True]
    lost = attacks.create("synthesis", region="absent", **options)(victim, image, label)
    assert lost.details["drop"] == [0.0, 0.0]
    with pytest.raises(ConfigError, match="region 'ET' is unknown: use 'present' or one of lesion"):
        attacks.create("synthesis", region="ET", **options)(victim, image, label)


# ------------------------------------------------------------------------------------------------- fields of every case
class MeanOfAll(Threshold):
    """Looks at the mean of the modalities, in which chances cancel."""

    def forward(self, x):
        return super().forward(x.mean(1, keepdim=True))


def test_optimised_fields_do_what_random_ones_of_equal_strength_do_not():
    victim, image, label = case(batch=4)
    victim = Victim(MeanOfAll(), head=victim.head)
    drops = []
    for control in (False, True):
        attack = attacks.create("synthesis", drop=0.4, control=control, **OPTIMIZED)
        drops.append(torch.tensor(attack(victim, image.expand(4, 6, 40, 40), label).details["drop"]))
    assert (drops[0] > 0.38).all()
    assert drops[1].mean() < 0.5 * drops[0].mean()
    assert (drops[1] < drops[0]).all()


def test_refining_gets_where_the_generator_does_not():
    victim, image, label = case()
    options = {"generator": CoarseFields(**EFFECT), "drop": 0.6}
    alone = attacks.create("synthesis", 0.4, **options)(victim, image, label)
    refined = attacks.create("synthesis", 0.4, optimize=True, steps=10, **options)(victim, image, label)
    assert refined.cost.backwards == 10  # it is not reached: no step is left out
    assert alone.cost.backwards == 0
    assert all(a > b for a, b in zip(refined.details["drop"], alone.details["drop"]))


def test_fields_that_do_too_much_are_scaled_and_take_no_step():
    victim, image, label = case()
    attack = attacks.create("synthesis", drop=0.2, generator=Given(log_bias=-0.9), optimize=True, steps=12)
    result = attack(victim, image, label)
    assert (result.trace[0]["score"] < 0.5).all()
    assert result.cost.backwards == 1  # which told that they do
    assert result.details["hit"] == [True, True]
    assert all(scale < 1 for scale in result.details["scale"])


def test_gradient_steps_end_where_the_drop_is_reached_so_that_no_field_grows_for_nothing():
    """Every case for itself; from the same start, fields for a small drop are smaller than those for a large one."""
    victim, image, label = case()
    small, large = (
        attacks.create("synthesis", drop=drop, optimize=True, effect=EFFECT, steps=20)(victim, image, label)
        for drop in (0.05, 0.5)
    )
    assert small.details["hit"] == large.details["hit"] == [True, True]
    assert small.cost.backwards < large.cost.backwards < 20
    assert all(a < b for a, b in zip(small.details["magnitude"], large.details["magnitude"]))


def test_a_pipeline_without_gradient_is_explained_and_enough_for_a_generator():
    victim, image, label = case()
    victim.preprocessing = torch.Tensor.detach
    assert attacks.create("synthesis", generator=CoarseFields(**EFFECT))(victim, image, label).cost.backwards == 0
    with pytest.raises(ConfigError, match="not connected to the image"):
        attacks.create("synthesis", **OPTIMIZED)(victim, image, label)


@pytest.mark.parametrize("optimize", [False, True])
def test_sliding_windows_change_nothing_where_the_segmenter_sees_one_voxel(optimize):
    windows = GradientSlidingWindowInferer((16, 16), sw_batch_size=2, overlap=0.25, mode="gaussian", keep_windows=0)
    options = OPTIMIZED if optimize else {"generator": CoarseFields(**EFFECT)}
    results = []
    for inferer in (None, windows):
        victim, image, label = case(inferer=inferer)
        results.append(attacks.create("synthesis", **options)(victim, image, label))
    torch.testing.assert_close(results[1].image, results[0].image)
    assert results[1].details["drop"] == pytest.approx(results[0].details["drop"])
    assert results[1].cost.forwards == results[0].cost.forwards


# ------------------------------------------------------------------------------------------------------- the control
def test_the_control_is_random_and_as_strong():
    victim, image, label = case(3)
    options = {"generator": CoarseFields(**EFFECT), "drop": 0.3}
    found = attacks.create("synthesis", **options)(victim, image, label)
    attack = attacks.create("synthesis", control=True, **options)
    control = attack(victim, image, label)
    assert control.cost.forwards == found.cost.forwards + 1  # no search of its own
    assert control.best_step.tolist() == [len(found.trace)] * 2
    inside = (image != 0).expand_as(image)

    def strengths(parameters):
        fields = attack.effect.splines(image, parameters, (1.0,) * 3)
        fields["velocity"] = attack.effect.displacement(parameters, image.shape[2:], (1.0,) * 3)
        return {
            k: torch.stack([(v[b] * inside[b]).square().sum() for b in range(2)]).tolist() for k, v in fields.items()
        }

    ours, theirs = strengths(found.parameters), strengths(control.parameters)
    for name in ours:
        assert theirs[name] == pytest.approx(ours[name], rel=0.01)
        assert not torch.allclose(found.parameters[name], control.parameters[name], atol=1e-3)
    assert all(value > 0 for value in control.details["min_jacobian"])
    assert control.details["scale"] == found.details["scale"]
    assert torch.equal(mean_dice(control.prediction, control.label, victim.head), control.score)


# --------------------------------------------------------------------------------------------------- what is promised
@pytest.mark.parametrize("control", [False, True])
def test_what_was_found_is_replayed(control):
    victim, image, label = case()
    image = MetaTensor(image, affine=torch.diag(torch.tensor([1.0, 1.0, 1.0], dtype=F64)))
    result = attacks.create("synthesis", generator=CoarseFields(**EFFECT), control=control)(victim, image, label)
    for b in range(2):
        replay = PhysicalSynthesis(**{k: v[b] for k, v in result.parameters.items()}, **EFFECT)
        again = replay(image[b]).as_tensor()
        torch.testing.assert_close(again, result.image[b].as_tensor(), rtol=1e-12, atol=1e-12)
        assert torch.equal(replay.warp_label(label[b], image[b]), result.label[b])


FOLDS = {"max_mm": 30.0, "knot_mm": 2.0, "max_bias": 0, "max_residual": 0, "squarings": 1}


class Wild(Given):
    """Stripes that push at each other: the first sample as hard as may be, the third not at all."""

    def forward(self, image, drop, *, generator=None):
        raw = super().forward(image, drop)
        stripes = torch.tensor([1.0, -1.0], dtype=image.dtype).repeat(11)[:21]  # one value for every control point
        raw["velocity"] = stripes.view(1, 1, 1, -1) * torch.tensor([1.0, 0.3, 0.0]).view(-1, 1, 1, 1).to(image)
        raw["velocity"] = raw["velocity"].expand(-1, 2, 21, -1)
        return raw


def test_what_folds_is_refused():
    """Control points of one voxel pushed by many: scaled down until nothing folds, whatever the drop."""
    victim, image, label = case(batch=3)

    attack = attacks.create("synthesis", generator=Wild(FOLDS))
    result = attack(victim, image, label)
    full = attack.effect.from_unit(attack.generator(image, None), image, (1.0, 1.0))
    field = attack.effect.displacement(full, (40, 40), (1.0, 1.0))
    assert jacobian_determinant(field, (1.0, 1.0)).flatten(1).amin(1)[0] <= 0  # as it was given it folds
    assert all(value > 0 for value in result.details["min_jacobian"])
    assert 0 < result.details["scale"][0] < result.details["scale"][2]
    found = attack.effect.displacement(result.parameters, (40, 40), (1.0, 1.0))
    smallest = jacobian_determinant(found, (1.0, 1.0)).flatten(1).amin(1)
    assert result.details["min_jacobian"] == smallest.tolist()
    assert result.details["max_displacement_mm"] == found.norm(dim=1).flatten(1).amax(1).tolist()


def test_what_folds_is_refused_on_the_way_too():
    """The first gradient is taken where it folds; the image there does most, and is not returned."""
    victim, image, label = case(batch=3)
    generator = Wild({**FOLDS, "max_bias": 0.5}, log_bias=-0.8)
    result = attacks.create("synthesis", generator=generator, optimize=True, steps=1, drop=0.9)(victim, image, label)
    assert (result.trace[0]["score"][:2] < result.score[:2]).all()
    assert all(value > 0 for value in result.details["min_jacobian"])


def test_a_batch_is_the_stack_of_its_members():
    victim, image, label = case(batch=4)
    image = image * torch.tensor([1.0, 1.1, 1.0, 0.95], dtype=F64).view(-1, 1, 1, 1)
    attack = attacks.create("synthesis", generator=Given(log_bias=-0.4, velocity=0.5, residual=0.1), samples=2)
    together = attack(victim, image, label)
    for b in range(4):
        alone = attack(victim, image[b : b + 1], label[b : b + 1])
        assert torch.equal(alone.image[0], together.image[b])
        assert alone.best_step[0] == together.best_step[b]
        assert all(alone.details[k][0] == values[b] for k, values in together.details.items())


def test_codes_are_tried_until_one_hits():
    victim, image, label = case()
    options = {"generator": CoarseFields(**EFFECT), "drop": 0.3}
    enough = attacks.create("synthesis", samples=5, tolerance=0.03, **options)(victim, image, label)
    assert {entry["restart"] for entry in enough.trace} != {0, 1, 2, 3, 4}
    assert all(enough.details["hit"])
    misses = []
    for samples in (1, 4):
        result = attacks.create("synthesis", samples=samples, tolerance=1e-9, **options)(victim, image, label)
        misses.append([abs(drop - 0.3) for drop in result.details["drop"]])
        assert {entry["restart"] for entry in result.trace} == set(range(samples))
    assert all(b <= a for a, b in zip(*misses))


def test_every_pass_is_counted():
    victim, image, label = case()
    calls = []
    victim.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    result = attacks.create("synthesis", generator=CoarseFields(**EFFECT), drop=0.9, optimize=True, steps=3)(
        victim, image, label
    )
    assert (result.cost.forwards, result.cost.backwards) == (len(calls), 3)
    few = attacks.create("synthesis", generator=CoarseFields(**EFFECT), drop=0.9, grid=3, bisections=2)
    assert few(victim, image, label).cost.forwards <= 1 + 3 + 2


def test_weights_and_bounds():
    victim, image, label = case()
    weight = (places((40, 40), (1.0, 1.0))[0] > 0).double().expand(2, 1, 40, 40)
    attack = attacks.create("synthesis", generator=CoarseFields(**EFFECT), bounds=[0.0, 1.9], samples=4)
    result = attack(victim, image.clamp_max(1.9), label, weight=weight)
    assert result.image.max() <= 1.9
    moved = attack.effect.warp_label(weight, result.parameters, (1.0, 1.0))
    expected = mean_dice(result.prediction, result.label, victim.head, moved)
    assert expected.tolist() == pytest.approx(result.details["dice"])
    assert not torch.equal(moved, weight)


def test_a_random_victim_is_measured_by_the_mean_of_its_draws():
    class Noise(nn.Module):
        generator = torch.Generator().manual_seed(0)

        def forward(self, x):
            return x + 0.1 * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

    victim, image, label = case()
    victim.preprocessing = Noise()
    result = attacks.create("synthesis", generator=CoarseFields(**EFFECT), draws=3)(victim, image, label)
    score = result.trace[int(result.best_step[0])]["score"][0]
    assert result.details["dice"][0] == pytest.approx(float(score))  # one region: the mean over the draws, too
    assert result.details["clean_dice"][0] < 1


# ------------------------------------------------------------------------------------------------------ the generator
def make_generator(**effect) -> SynthesisGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = SynthesisGenerator(2, 1, channels=(4, 4, 8), latent=2, effect={**EFFECT, **effect})
        for head in network.heads.values():
            nn.init.normal_(head.conv.weight, std=1.0)
    return network


def test_a_generator_from_its_file(tmp_path):
    victim, image, label = case()
    network = make_generator()
    path = save_generator(tmp_path / "generator.pt", network, {})
    attack = attacks.create("synthesis", generator=str(path), samples=3)
    result = attack(victim, image, label)
    path.unlink()  # read once
    assert_same_result(attack(victim, image, label), result)
    network.train()
    assert_same_result(attacks.create("synthesis", generator=network, samples=3)(victim, image, label), result)
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert all(values.flatten(1).any(1).all() for values in result.parameters.values())
    other = attacks.create("synthesis", generator=network, samples=3, seed=1)(victim, image, label)
    assert not torch.equal(other.parameters["velocity"], result.parameters["velocity"])
    assert attack.parameters()["generator"] == str(path)
    assert attack.parameters()["effect"] == network.effect
    assert not {"loss", "restarts", "step_size"} & set(attack.parameters())
    with pytest.raises(CheckpointError, match=r"generator\.pt does not exist"):
        attacks.create("synthesis", generator=path)


def test_a_generator_without_appearance():
    victim, image, label = case()
    result = attacks.create("synthesis", generator=make_generator(max_bias=0, max_residual=0))(victim, image, label)
    assert set(result.parameters) == {"velocity"}
    assert result.details["max_bias"] == result.details["max_residual"] == [0.0, 0.0]
    assert all(mm > 0 for mm in result.details["max_displacement_mm"])


@pytest.mark.parametrize("optimize", [False, True])
def test_a_synthesis_without_anatomy(optimize):
    victim, image, label = case()
    effect = {**EFFECT, "max_mm": 0}
    options = {"optimize": True, "effect": effect, "steps": 4} if optimize else {"generator": CoarseFields(**effect)}
    for control in (False, True):
        result = attacks.create("synthesis", samples=3, control=control, **options)(victim, image, label)
        assert torch.equal(result.label, label)
        assert result.details["max_displacement_mm"] == [0.0, 0.0]
        assert result.details["min_jacobian"] == [1.0, 1.0]
        assert control or result.details["hit"] == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "synthesis needs a generator, e.g. generator: generator.pt, or optimize: true"),
        ({"generator": nn.Conv2d(1, 1, 1)}, "generator must be a file or a SynthesisGenerator, got Conv2d"),
        ({"generator": CoarseFields(), "effect": {}}, "effect belongs to the generator"),
        ({"optimize": True, "effect": {"max_m": 2}}, "the effect has no max_m"),
        ({"optimize": True, "drop": 0}, r"drop must be a number in \(0, 1\], got 0"),
        ({"optimize": True, "drop": 1.5}, "drop must be"),
        ({"optimize": True, "s_max": -1}, "s_max must be"),
        ({"optimize": True, "tolerance": True}, "tolerance must be"),
        ({"optimize": True, "samples": 0}, "samples must be"),
        ({"optimize": True, "grid": 1.5}, "grid must be"),
        ({"optimize": True, "bisections": 0}, "bisections must be"),
        ({"optimize": True, "steps": 0}, "steps must be"),
        ({"optimize": True, "restarts": 2}, "has no option restarts"),
        ({"optimize": True, "target": "background"}, "has no option target"),
        ({"optimize": True, "channels": [0]}, "leave channels out"),
        ({"optimize": True, "units": "mm"}, "budget of synthesis is in limits"),
    ],
)
def test_impossible_syntheses(options, message):
    with pytest.raises(ConfigError, match=message):
        attacks.create("synthesis", **options)


def test_default_limits():
    attack = attacks.create("synthesis", optimize=True)
    assert isinstance(attack, SynthesisAttack)
    assert attack.threat.describe() == "parameters <= 1 limits"
    assert attack.effect.unit_limits()["velocity"] == 8.0
