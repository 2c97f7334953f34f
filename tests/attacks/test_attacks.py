"""The contract that every attack of the registry keeps, whatever the victim."""

from __future__ import annotations

import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch
from monai.data.utils import list_data_collate
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import ATTACKS, Attack, Run
from monai_adv.errors import ConfigError, MonaiAdvError, NonFiniteError
from monai_adv.losses import AttackLoss, CrossEntropy, target_agreement
from monai_adv.threats import THREATS, LInf
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import Head, Victim, mean_dice
from oracles import SHAPES, make_image, make_label, make_victim, out_channels, smooth_network

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


# ------------------------------------------------------------------------------------ what comes back
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["linear", "smooth", "windows"])
@headed
@normed
@named
def test_the_result_is_allowed_evaluated_and_scored(name, norm, head, kind, dims, batch):
    victim, image, label = make_victim(kind, head, dims), make_image(batch, dims), make_label(head, batch, dims)
    attack = make_attack(name, norm)
    before = snapshot(victim.network)
    result = attack(victim, image, label)
    assert_as_found(victim.network, before)

    ball = attack.threat.bind(image)
    axes = tuple(range(2, 2 + dims))
    assert result.image.shape == image.shape
    assert result.image.dtype == image.dtype
    assert (ball.size(result.image) <= attack.threat.eps * (1 + 1e-12)).all()
    assert (result.image <= image.amax(axes, keepdim=True)).all()
    assert (result.image >= image.amin(axes, keepdim=True)).all()
    assert torch.equal(result.image[image == 0], image[image == 0])
    assert torch.equal(result.perturbation, result.image - image)
    assert (result.perturbation != 0).flatten(1).any(1).all()
    assert not result.image.requires_grad

    # the image that is returned is the one that was evaluated
    assert torch.equal(victim.predict(result.image), result.prediction)
    if not attack.targeted:
        assert torch.equal(mean_dice(result.prediction, label, victim.head), result.score)
        assert torch.equal(mean_dice(victim.predict(image), label, victim.head), result.clean_score)
    for b in range(batch):
        entry = result.trace[int(result.best_step[b])]
        assert entry["step"] == result.best_step[b]
        assert entry["score"][b] == result.score[b]
    assert result.success.dtype == torch.bool
    assert result.success.shape == result.score.shape == (batch,)


@pytest.mark.parametrize("units", ["std", "range", "absolute"])
@normed
@named
def test_the_budget_is_in_its_units(name, norm, units):
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    eps = BUDGET[norm] / {"std": 1, "range": 4, "absolute": 1}[units]
    attack = make_attack(name, norm, eps, units=units, bounds=None)
    result = attack(victim, image, label)
    delta = result.image - image
    for b in range(2):
        for c in range(4):
            values = image[b, c][image[b, c] != 0].numpy()
            low, high = np.percentile(values, [0.5, 99.5])
            delta[b, c] /= {"std": values.std(), "range": high - low, "absolute": 1.0}[units]
    size = delta.abs().flatten(1).amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert (size <= eps * (1 + 1e-12)).all()
    assert (size >= 0.5 * eps).all()


@pytest.mark.parametrize("kind", ["smooth", "windows"])
@pytest.mark.parametrize("units", ["std", "absolute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@normed
@named
def test_without_a_budget_the_image_comes_back_bit_for_bit(name, norm, dtype, units, kind):
    victim, image, label = make_victim(kind, dtype=dtype), make_image(2, dtype=dtype), make_label("softmax", 2)
    result = make_attack(name, norm, 0.0, units=units)(victim, image, label)
    assert torch.equal(result.image, image)
    assert not result.perturbation.any()
    if name not in ("targeted_ifgsm",):
        assert not result.success.any()


@normed
@named
def test_single_precision_stays_single(name, norm):
    victim, image = make_victim("windows", dtype=torch.float32), make_image(2, dtype=torch.float32)
    result = make_attack(name, norm)(victim, image, make_label("softmax", 2))
    assert result.image.dtype == torch.float32
    assert LInf(9).bind(image).size(result.image).max() < 9


# ----------------------------------------------------------------------------------- where it may change
@normed
@named
def test_only_the_chosen_modality_changes(name, norm):
    victim, image, label = make_victim("windows"), make_image(2), make_label("softmax", 2)
    changed = make_attack(name, norm, channels=(1, -1))(victim, image, label).perturbation != 0
    assert changed.flatten(2).any(2).tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize("channels", [1, 4])
@normed
@named
def test_nothing_changes_outside_a_given_support(name, norm, channels):
    victim, image, label = make_victim("windows"), make_image(2), make_label("softmax", 2)
    support = torch.rand(2, channels, *SHAPES[3], generator=torch.Generator().manual_seed(4)) < 0.3
    result = make_attack(name, norm, bounds=None)(victim, image, label, support=support)
    outside = ~support.expand_as(image)
    assert torch.equal(result.image[outside], image[outside])
    assert result.perturbation[~outside].any()


@normed
@named
def test_given_bounds_are_kept(name, norm):
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    low, high = [[float(f(image[:, c])) for c in range(4)] for f in (torch.amin, torch.amax)]
    result = make_attack(name, norm, bounds=[low, high])(victim, image, label)
    for c in range(4):
        assert result.image[:, c].min() >= low[c]
        assert result.image[:, c].max() <= high[c]


# ------------------------------------------------------------------------------------------- per sample
@pytest.mark.parametrize("kind", ["linear", "smooth", "windows"])
@pytest.mark.parametrize("dims", [2, 3])
@headed
@normed
@named
def test_a_batch_is_the_stack_of_its_members(name, norm, head, kind, dims):
    """B = C = 4 = the first size of 3D; members of different brightness."""
    options = WITHOUT_CHANCE.get(name, {})
    if options is None:
        pytest.skip("draws random numbers")
    victim = make_victim(kind, head, dims)
    image = make_image(4, dims) * torch.arange(1, 5).view(-1, *[1] * (dims + 1))
    label = make_label(head, 4, dims)
    attack = make_attack(name, norm, **options)
    together = attack(victim, image, label)
    for b in range(4):
        alone = attack(victim, image[b : b + 1], label[b : b + 1])
        torch.testing.assert_close(together.image[b : b + 1], alone.image, rtol=1e-10, atol=1e-10)
        assert torch.equal(together.score[b : b + 1], alone.score)
        assert torch.equal(together.best_step[b : b + 1], alone.best_step)


@pytest.mark.parametrize("kind", ["linear", "smooth"])
@headed
@normed
@named
def test_two_dimensions_are_three_with_a_depth_of_one(name, norm, head, kind):
    flat, deep = make_victim(kind, head, 2), make_victim(kind, head, 3)
    for two, three in zip(flat.network.state_dict().items(), deep.network.state_dict().items()):
        value = two[1]
        if value.ndim == 4 and value.shape[-1] == 3:  # only the middle of the depth sees the slice
            three[1].zero_()
            three[1][:, :, 1] = value
        else:
            three[1].copy_(value.unsqueeze(2) if value.ndim == 4 else value)
    image, label = make_image(2, 2), make_label(head, 2, 2)
    attack = make_attack(name, norm)
    two = attack(flat, image, label)
    three = attack(deep, image.unsqueeze(2), label.unsqueeze(2))
    torch.testing.assert_close(three.image.squeeze(2), two.image, rtol=1e-10, atol=1e-10)
    assert torch.equal(two.score, three.score)


# ------------------------------------------------------------------------------------------ many budgets
@normed
@named
def test_a_curve_is_its_single_calls_bit_for_bit(name, norm):
    victim, image, label = make_victim("windows"), make_image(2), make_label("softmax", 2)
    budgets = [BUDGET[norm], 0.0, BUDGET[norm] / 3]
    curve = make_attack(name, norm).curve(victim, image, label, budgets)
    assert len(curve) == 3
    for eps, result in zip(budgets, curve):
        assert_same_result(result, make_attack(name, norm, eps)(victim, image, label))
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    drawn = make_attack(name, norm).curve(victim, image, label, budgets, generator=generators[0])[2]
    assert_same_result(drawn, make_attack(name, norm, budgets[2])(victim, image, label, generator=generators[1]))


# ---------------------------------------------------------------------------------------------- chance
@normed
@named
def test_a_seed_gives_the_same_bits_and_the_global_state_is_untouched(name, norm):
    victim, image, label = make_victim("windows"), make_image(2), make_label("softmax", 2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = make_attack(name, norm, seed=3)(victim, image, label)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    torch.rand(5)
    assert_same_result(first, make_attack(name, norm, seed=3)(victim, image, label))
    given = make_attack(name, norm)(victim, image, label, generator=torch.Generator().manual_seed(3))
    assert_same_result(first, given)
    other = make_attack(name, norm, seed=4)(victim, image, label)
    assert torch.equal(first.image, other.image) == (name not in WITHOUT_CHANCE)


@named
def test_a_generator_goes_on_from_call_to_call(name):
    victim, image, label = make_victim("smooth"), make_image(1), make_label("softmax", 1)
    generator = torch.Generator().manual_seed(0)
    results = [make_attack(name)(victim, image, label, generator=generator).image for _ in range(2)]
    assert torch.equal(*results) == (name not in WITHOUT_CHANCE)


# ------------------------------------------------------------------------ the victim and the caller's types
class Explodes(AttackLoss):
    """Fails in the middle of an attack."""

    calls = 0

    def __call__(self, logits, label, head, weight=None):
        self.calls += 1
        if self.calls > 1 or not torch.is_grad_enabled():
            raise KeyError("in the middle")
        return CrossEntropy()(logits, label, head, weight)


@named
def test_the_network_is_restored_after_an_exception(name):
    victim = make_victim("windows")
    victim.network[0].weight.requires_grad_(False)
    victim.network[1].eval()
    before = snapshot(victim.network)
    attack = make_attack(name, loss=Explodes())
    with pytest.raises(KeyError, match="in the middle"):
        attack(victim, make_image(2), make_label("softmax", 2))
    assert_as_found(victim.network, before)
    attack = make_attack(name)
    assert attack(victim, make_image(2), make_label("softmax", 2)).image.isfinite().all()


class ForcesTraining(nn.Sequential):
    def forward(self, x):
        self[1].training = True
        return super().forward(x)


@named
def test_a_network_that_ignores_evaluation_mode_is_reported(name):
    network = ForcesTraining(*smooth_network())
    before = snapshot(network)
    with pytest.raises(MonaiAdvError, match=r"1\.running_mean"):
        make_attack(name)(Victim(network), make_image(2), make_label("softmax", 2))
    assert_as_found(network, before)


@named
def test_metatensors_come_back_as_metatensors(name):
    victim, image, label = make_victim("windows"), make_image(2), make_label("softmax", 2)
    affine = torch.diag(torch.tensor([2.0, 1, 3, 1], dtype=torch.float64))
    items = [
        {"image": MetaTensor(x, affine=affine, meta={"id": i}, applied_operations=[{"n": i}]), "label": MetaTensor(y)}
        for i, (x, y) in enumerate(zip(image, label))
    ]
    batch = list_data_collate(items)
    result = make_attack(name)(victim, batch["image"], batch["label"])
    for found in (result.image, result.perturbation):
        assert isinstance(found, MetaTensor)
        members = decollate_batch(found)
        assert [m.applied_operations for m in members] == [[{"n": 0}], [{"n": 1}]]
        assert all(torch.equal(m.affine, affine) for m in members)
        assert [m.meta["id"] for m in members] == [0, 1]
    plain = make_attack(name)(victim, image, label)
    assert type(plain.image) is torch.Tensor
    assert torch.equal(result.image.as_tensor(), plain.image)
    assert type(result.prediction) is torch.Tensor
    assert type(result.trace[0]["loss"]) is torch.Tensor


@named
def test_metatensor_masks_are_taken_as_tensors(name):
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    mask = torch.zeros(2, 1, *SHAPES[3])
    mask[..., :3] = 1
    expected = make_attack(name)(victim, image, label, support=mask, weight=mask)
    found = make_attack(name)(victim, image, label, support=MetaTensor(mask), weight=MetaTensor(mask))
    assert type(found.trace[0]["loss"]) is torch.Tensor
    assert_same_result(expected, found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@named
def test_the_callers_gradient_mode_does_not_matter(name, mode):
    expected = make_attack(name)(make_victim("windows"), make_image(2), make_label("softmax", 2))
    victim = make_victim("windows")
    with mode():
        image, label = make_image(2), make_label("softmax", 2)
        found = make_attack(name)(victim, image, label, support=image != 0, weight=torch.ones(2, 1, *SHAPES[3]))
        assert not torch.is_grad_enabled()
    assert torch.equal(found.image, expected.image)
    assert not found.image.is_inference()


@named
def test_the_inputs_are_not_written_to(name):
    victim, image, label = make_victim("windows"), make_image(2).requires_grad_(True), make_label("softmax", 2)
    kept = image.detach().clone(), label.clone()
    result = make_attack(name)(victim, image, label)
    assert torch.equal(image, kept[0])
    assert torch.equal(label, kept[1])
    assert image.grad is None
    assert result.image.data_ptr() != image.data_ptr()


# ------------------------------------------------------------------------------------------ failing well
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@named
def test_a_non_finite_image(name, value):
    image = make_image(2)
    image[1, 2, 1, 1, 1] = value
    with pytest.raises(NonFiniteError, match="clean image"):
        make_attack(name)(make_victim("smooth"), image, make_label("softmax", 2))


@named
def test_non_finite_logits(name):
    victim = make_victim("smooth")
    victim.network[-1].bias.data[0] = float("nan")
    before = snapshot(victim.network)[:3]
    with pytest.raises(NonFiniteError, match="logits"):
        make_attack(name)(victim, make_image(2), make_label("softmax", 2))
    assert snapshot(victim.network)[:3] == before


class Infinite(AttackLoss):
    def __call__(self, logits, label, head, weight=None):
        return CrossEntropy()(logits, label, head, weight) * float("inf")


class Steep(AttackLoss):
    """Finite, with an infinite slope."""

    def __call__(self, logits, label, head, weight=None):
        return CrossEntropy()(logits, label, head, weight) + (logits - logits.detach()).clamp_min(0).sqrt().sum()


@named
def test_a_non_finite_loss(name):
    with pytest.raises(NonFiniteError, match="loss"):
        make_attack(name, loss=Infinite())(make_victim("smooth"), make_image(2), make_label("softmax", 2))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in GRADIENT_FREE])
def test_a_non_finite_gradient(name):
    with pytest.raises(NonFiniteError, match="gradient"):
        make_attack(name, loss=Steep())(make_victim("smooth"), make_image(2), make_label("softmax", 2))


class Constant(nn.Module):
    """Says class 1 whatever it sees, with a gradient of zero."""

    def forward(self, x):
        logits = x.sum(1, keepdim=True) * torch.zeros(1, 4, *[1] * (x.ndim - 2), dtype=x.dtype)
        return logits + torch.tensor([0.0, 1, 0, 0], dtype=x.dtype).view(1, 4, *[1] * (x.ndim - 2))


@normed
@named
def test_no_attack_helps_against_a_constant_model(name, norm):
    image, label = make_image(2), make_label("softmax", 2)
    result = make_attack(name, norm)(Victim(Constant()), image, label)
    assert torch.equal(result.score, result.clean_score)
    assert not result.success.any()
    assert (result.prediction == 1).all()
    if name not in GRADIENT_FREE:
        assert result.trace[0]["zero_gradient"].tolist() == [1.0, 1.0]


@named
def test_a_clean_dice_of_zero_is_no_success(name):
    """The constant model says NCR; nothing of it is in the label, so every region has Dice 0 from the start."""
    victim = Victim(Constant(), head=Head("softmax", {"ET": (3,)}))
    label = torch.full((2, 1, *SHAPES[3]), 3)
    result = make_attack(name, goal=1.0)(victim, make_image(2), label)
    assert result.clean_score.tolist() == [0, 0]
    if not ATTACKS[name].targeted:
        assert not result.success.any()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in GRADIENT_FREE])
def test_a_pipeline_that_detaches_is_explained(name):
    for step in (torch.Tensor.detach, lambda x: x.detach().requires_grad_(True)):
        victim = Victim(smooth_network(), preprocessing=step, name="quantised")
        with pytest.raises(ConfigError, match="logits of quantised are not connected to the image"):
            make_attack(name)(victim, make_image(1), make_label("softmax", 1))


@named
def test_what_does_not_fit(name):
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    attack = make_attack(name)
    with pytest.raises(ConfigError, match="takes 4 channels but the data have 3"):
        attack(victim, image[:, :3], label)
    with pytest.raises(ConfigError, match="needs a label of shape"):
        attack(victim, image, label[:1])
    with pytest.raises(ConfigError, match="do not fit 4 classes"):
        attack(victim, image, label + 1)
    with pytest.raises(ConfigError, match="needs a label, or label_source"):
        attack(victim, image)
    with pytest.raises(ConfigError, match="support is empty"):
        attack(victim, image, label, support=torch.zeros(2, 1, *SHAPES[3]))
    with pytest.raises(ConfigError, match="support .* does not fit the image"):
        attack(victim, image, label, support=torch.ones(2, 1, 3, 3, 3))
    with pytest.raises(ConfigError, match=r"weight \(2, 4, 4, 5, 6\) must be"):
        attack(victim, image, label, weight=torch.ones(2, 4, *SHAPES[3]))
    with pytest.raises(ConfigError, match=r"floating point image, got torch\.int64"):
        attack(victim, image.long(), label)
    if not attack.targeted:
        with pytest.raises(ConfigError, match="takes no target"):
            attack(victim, image, label, target=label)
    assert victim.network.training


@named
def test_impossible_attacks(name):
    for options, message in (
        ({"goal": 1.5}, "goal must be in"),
        ({"label_source": "rumour"}, "label_source 'rumour'"),
        ({"loss": "focal"}, "loss 'focal' is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_attack(name, **options)
    with pytest.raises(ConfigError, match="needs a threat"):
        ATTACKS[name](0.1)


# --------------------------------------------------------------------------------- labels, weights, goals
@headed
@named
def test_the_clean_prediction_as_label(name, head):
    victim, image = make_victim("smooth", head), make_image(2)
    found = make_attack(name, label_source="prediction")(victim, image)
    expected = make_attack(name)(victim, image, victim.predict(image))
    assert_same_result(found, expected)
    if not ATTACKS[name].targeted:
        assert found.clean_score.tolist() == [1, 1]
    ignored = make_attack(name, label_source="prediction")(victim, image, make_label(head, 2))
    assert_same_result(found, ignored)


@headed
@named
def test_ignored_voxels_change_nothing(name, head):
    """Whatever label stands where the weight is 0, the attack is the same; and the score is that of the rest."""
    victim, image, label = make_victim("smooth", head), make_image(2), make_label(head, 2)
    weight = torch.zeros(2, 1, *SHAPES[3])
    weight[..., 2:] = 1
    other = torch.where(weight.bool(), label, make_label(head, 2, seed=77))
    first = make_attack(name)(victim, image, label, weight=weight)
    assert_same_result(first, make_attack(name)(victim, image, other, weight=weight))
    if not ATTACKS[name].targeted:
        expected = mean_dice(first.prediction[..., 2:], label[..., 2:], victim.head)
        assert torch.equal(first.score, expected)


# ---------------------------------------------------------------------- the best iterate, by a scripted attack
class Scripted(Attack):
    """Offers given images, so that the right answer is known."""

    name: ClassVar[str] = "scripted"
    reference: ClassVar[str] = "test"

    def __init__(self, images, **options):
        super().__init__(LInf(10.0, "absolute", bounds=None, support="all"), **options)
        self.images = images

    def _search(self, run: Run) -> None:
        for image in self.images:
            run.consider(image)


class Says(nn.Module):
    """Two classes; the logit difference is the voxel itself."""

    def forward(self, x):
        return torch.cat([-x, x], 1)


def scripted(values: list[list[list[float]]], label: list[int], **options):
    """Attack of two samples of four voxels; ``values[step][sample]`` are their voxels."""
    images = [torch.tensor(v, dtype=torch.float64).view(2, 1, 4) for v in values]
    victim = Victim(Says(), head=Head("softmax", {"lesion": (1,)}))
    clean = torch.tensor(label, dtype=torch.float64).view(1, 1, 4).expand(2, 1, 4) * 2 - 1
    truth = torch.tensor(label).view(1, 1, 4).expand(2, 1, 4)
    return Scripted(images, loss="ce", **options)(victim, clean, truth), images


def test_the_best_iterate_is_kept_per_sample_by_dice():
    label = [1, 1, 0, 0]
    perfect, half, none = [1.0, 1, -1, -1], [1.0, -1, -1, -1], [-1.0, -1, -1, -1]
    result, images = scripted([[half, perfect], [none, half], [perfect, perfect]], label)
    assert result.best_step.tolist() == [1, 1]
    assert result.score.tolist() == [0.0, 2 / 3]
    assert torch.equal(result.image, images[1])
    result, images = scripted([[none, perfect], [half, half], [perfect, none]], label)
    assert result.best_step.tolist() == [0, 2]
    assert torch.equal(result.image, torch.stack([images[0][0], images[2][1]]))
    assert torch.equal(result.prediction.flatten(1), torch.zeros(2, 4, dtype=torch.long))
    assert result.success.tolist() == [True, True]
    assert [entry["step"] for entry in result.trace] == [0, 1, 2]
    assert (result.cost.forwards, result.cost.backwards) == (4, 0)


def test_at_equal_dice_the_loss_decides_and_then_the_first():
    label = [1, 1, 0, 0]
    weak, strong = [1.0, -1, -1, -1], [1.0, -3, -1, -1]
    result, _ = scripted([[weak, strong], [strong, weak], [strong, strong]], label)
    assert result.best_step.tolist() == [1, 0]


def test_a_failed_attack_returns_its_best_iterate_and_not_the_clean_image():
    label = [1, 1, 0, 0]
    unmoved = [3.0, 3, -3, -3]  # another image, the same Dice 1 and a lower loss
    result, images = scripted([[unmoved, unmoved]], label)
    assert result.success.tolist() == [False, False]
    assert result.score.tolist() == [1.0, 1.0]
    assert torch.equal(result.image, images[0])


@pytest.mark.parametrize(
    ("goal", "success"), [(0.0, [False, True]), (0.5, [False, True]), (0.7, [True, True]), (1.0, [True, True])]
)
def test_the_goal_is_a_share_of_the_clean_dice(goal, success):
    result, _ = scripted([[[1.0, -1, -1, -1], [-1.0, -1, -1, -1]]], [1, 1, 0, 0], goal=goal)
    assert result.score.tolist() == [2 / 3, 0.0]
    assert result.success.tolist() == success


class Backwards(AttackLoss):
    """An attack on the wrong side: it improves the segmentation."""

    def __call__(self, logits, label, head, weight=None):
        return -CrossEntropy()(logits, label, head, weight)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in GRADIENT_FREE and not ATTACKS[n].targeted])
def test_an_attack_that_only_helps_the_victim_still_moves(name):
    victim, image, label = make_victim("linear"), make_image(2), make_label("softmax", 2)
    result = make_attack(name, eps=1.0, loss=Backwards())(victim, image, label)
    assert (result.score >= result.clean_score).all()
    assert not result.success.any()
    assert (result.perturbation != 0).flatten(1).any(1).all()


# -------------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize("name", [n for n in NAMES if ATTACKS[n].targeted])
@headed
def test_targeted_scores_are_the_agreement_with_the_target(name, head):
    victim, image, label = make_victim("smooth", head), make_image(2), make_label(head, 2)
    target = make_label(head, 2, seed=6)
    result = make_attack(name)(victim, image, label, target=target)
    assert torch.equal(result.score, target_agreement(result.prediction, target, label))
    assert torch.equal(result.clean_score, target_agreement(victim.predict(image), target, label))
    assert_same_result(result, make_attack(name, target=MetaTensor(target))(victim, image, label))
    for goal in (0.0, float(result.score[0]), 1.0):
        again = make_attack(name, goal=goal)(victim, image, label, target=target)
        assert again.success.tolist() == (result.score >= goal).tolist()
    weight = torch.zeros(2, 1, *SHAPES[3])
    weight[..., 2:] = 1
    part = make_attack(name)(victim, image, label, target=target, weight=weight)
    assert torch.equal(part.score, target_agreement(*(x[..., 2:] for x in (part.prediction, target, label))))


def test_normalisation_inside_the_victim_makes_the_scale_of_the_scanner_irrelevant():
    """Attacking z-scores and attacking scanner units through the pipeline's own z-score find the same change."""
    label, image = make_label("softmax", 2), make_image(2)
    raw = torch.where(image != 0, 500 + 80 * image, image)
    network = smooth_network()
    victim = Victim(network, preprocessing=NormalizeNonzeroBatch())
    attack = make_attack("ifgsm", eps=0.05, bounds=None)
    small = attack(victim, raw, label)
    large = attack(victim, 7 * raw, label)
    torch.testing.assert_close(large.image, 7 * small.image, rtol=1e-9, atol=1e-9)


def test_out_channels_of_the_fixtures_fit():
    for head in ("softmax", "sigmoid"):
        assert make_victim("windows", head)(make_image(1)).shape[1] == out_channels(head)
