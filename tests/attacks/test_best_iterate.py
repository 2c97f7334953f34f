"""Which iterate is returned, by which metric, and what counts as success."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from attack_contract import (
    GRADIENT,
    LOSSES,
    NAMES,
    TRAITS,
    assert_same_result,
    headed,
    is_targeted,
    make_attack,
    named,
    prepared,
)
from monai.data import MetaTensor
from oracles import SHAPES, make_image, make_label, make_victim
from torch import nn

from monai_adv.attacks import ATTACKS, Attack, Run
from monai_adv.losses import AttackLoss, CrossEntropy, target_agreement
from monai_adv.threats import LInf
from monai_adv.victims import Head, Victim, mean_dice


# --------------------------------------------------------------------------------- labels, weights, goals
@headed
@named
def test_the_clean_prediction_as_label(name, head):
    victim, image = make_victim("smooth", head), prepared(name, make_image(2))
    found = make_attack(name, label_source="prediction")(victim, image)
    expected = make_attack(name)(victim, image, victim.predict(image))
    assert_same_result(found, expected)
    if not is_targeted(name):
        assert found.clean_score.tolist() == [1, 1]
    ignored = make_attack(name, label_source="prediction")(victim, image, make_label(head, 2))
    assert_same_result(found, ignored)


@headed
@named
def test_ignored_voxels_change_nothing(name, head):
    """Whatever label stands where the weight is 0, the attack is the same; and the score is that of the rest."""
    victim, image, label = make_victim("smooth", head), prepared(name, make_image(2)), make_label(head, 2)
    weight = torch.zeros(2, 1, *SHAPES[3])
    weight[..., 2:] = 1
    other = torch.where(weight.bool(), label, make_label(head, 2, seed=77))
    first = make_attack(name)(victim, image, label, weight=weight)
    assert_same_result(first, make_attack(name)(victim, image, other, weight=weight), labels=False)
    if not is_targeted(name) and not ATTACKS[name].moves_voxels:
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
    """Attack of two samples of four voxels, of clean Dice 1; ``values[step][sample]`` are their voxels."""
    images = [torch.tensor(v, dtype=torch.float64).view(2, 1, 4) for v in values]
    victim = Victim(Says(), head=Head("softmax", {"lesion": (1,)}))
    start = torch.tensor([2.0 * bit - 1 for bit in label], dtype=torch.float64).view(1, 1, 4).expand(2, 1, 4)
    truth = torch.tensor(label).view(1, 1, 4).expand(2, 1, 4)
    return Scripted(images, loss="ce", **options)(victim, start, truth), images


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


def test_the_goal_is_measured_from_where_the_victim_started():
    """A clean Dice of 2/5: 1/3 is below one half, but not half of what there was."""
    clean, found = [1.0, -1, -1, -1, 1, 1], [1.0, -1, -1, 1, 1, 1]
    victim = Victim(Says(), head=Head("softmax", {"lesion": (1,)}))
    clean, found = (torch.tensor(x, dtype=torch.float64).view(1, 1, 6) for x in (clean, found))
    label = torch.tensor([1, 1, 0, 0, 0, 0]).view(1, 1, 6)
    for goal, success in ((0.5, False), (0.8, False), (0.85, True)):
        result = Scripted([found], loss="ce", goal=goal)(victim, clean, label)
        assert (result.clean_score.item(), result.score.item()) == (2 / 5, 1 / 3)
        assert result.success.item() == success


class Backwards(AttackLoss):
    """An attack on the wrong side: it improves the segmentation."""

    def __call__(self, logits, label, head, weight=None):
        return -CrossEntropy()(logits, label, head, weight)


@pytest.mark.parametrize("name", [n for n in GRADIENT if n in LOSSES and not is_targeted(n) and TRAITS[n].uses_budget])
def test_an_attack_that_only_helps_the_victim_still_moves(name):
    victim, image, label = make_victim("linear"), make_image(2), make_label("softmax", 2)
    result = make_attack(name, eps=1.0, loss=Backwards())(victim, image, label)
    assert (result.score >= result.clean_score).all()
    assert not result.success.any()
    assert (result.perturbation != 0).flatten(1).any(1).all()


# -------------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize("name", [n for n in NAMES if is_targeted(n)])
@headed
def test_targeted_scores_are_the_agreement_with_the_target(name, head):
    victim, image, label = make_victim("smooth", head), prepared(name, make_image(2)), make_label(head, 2)
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
