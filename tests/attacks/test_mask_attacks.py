"""SSM, ASM, ASMA: Equation 2 in closed form, the multiplier, the best iterate, and what is reported."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SHAPES, make_image, make_label, make_victim
from torch import nn

from monai_adv import attacks
from monai_adv.attacks import ASM, ASMA, SSM, target_accuracy, target_iou
from monai_adv.errors import ConfigError
from monai_adv.losses import TargetLogits, logit_margin
from monai_adv.metrics import perturbation_norms
from monai_adv.threats import L2, LInf
from monai_adv.victims import Head, Victim

FREE = {"units": "absolute", "bounds": None, "support": "all"}
NAMES = ["ssm", "asm", "asma"]
BINARY = Head("softmax", {"lesion": (1,)})


def linear(weights: list[list[float]], bias: list[float], head: str | Head, dims: int = 3) -> Victim:
    """A voxelwise linear victim with given weights, classes x channels."""
    layer = (nn.Conv2d, nn.Conv3d)[dims - 2](len(weights[0]), len(bias), 1).double()
    layer.weight.data = torch.tensor(weights, dtype=torch.float64).view(len(bias), -1, *[1] * dims)
    layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return Victim(layer, head=head)


def voxel(value: float, dtype=torch.float64) -> torch.Tensor:
    return torch.full((1, 1, 1, 1, 1), value, dtype=dtype)


def final(name: str, steps: int, **options) -> float:
    """The voxel after some steps in paper mode: weights .5 (target, class 0) and -1; it flips below z = 0."""
    victim = linear([[0.5], [-1.0]], [-0.3, 0.0], BINARY)
    attack = attacks.create(name, mode="paper", steps=steps, **FREE, **options)
    result = attack(victim, voxel(-1.0), voxel(1).long())
    return float(result.image)


# -------------------------------------------------------------------------------------------- Equation 2
def test_a_voxel_that_is_not_at_its_target_has_the_gradient_w_minus_2d():
    first, second = final("asm", 1, tau=0.1), final("asm", 2, tau=0.1)
    assert first == pytest.approx(-1 + 0.1 * 0.5, abs=1e-15)
    assert second == pytest.approx(first + 0.1 * (0.5 - 2 * 0.05), abs=1e-15)
    assert final("asm", 2, tau=0.1, l2_weight=0.5) == pytest.approx(first + 0.1 * (0.5 - 0.05), abs=1e-15)


def test_a_voxel_at_its_target_has_the_gradient_minus_2d_with_the_indicator_and_w_minus_2d_without():
    tau = 3.0  # one step, to .5, and the voxel is at its target
    delta = tau * 0.5
    assert final("asm", 1, tau=tau) == pytest.approx(-1 + delta)
    assert final("asm", 2, tau=tau, l2_weight=0.1) == pytest.approx(-1 + delta + tau * -0.2 * delta)
    assert final("ssm", 2, tau=tau, l2_weight=0.1) == pytest.approx(-1 + delta + tau * (0.5 - 0.2 * delta))
    assert final("asm", 2, tau=tau, l2_weight=0.1, kappa=9.0) == final("ssm", 2, tau=tau, l2_weight=0.1)


def test_bits_count_for_themselves_with_the_sign_of_the_target():
    """Bits (true, false) are wanted; the second is at its target from the start, so only the first pulls."""
    victim = linear([[0.5], [0.25]], [0.0, 0.0], Head("sigmoid", ("a", "b")))
    image, label = voxel(-1.0), torch.zeros(1, 2, 1, 1, 1, dtype=torch.bool)
    target = torch.tensor([True, False]).view(1, 2, 1, 1, 1)
    found = {}
    for name in ("ssm", "asm"):
        attack = attacks.create(name, mode="paper", steps=1, tau=0.1, **FREE)
        found[name] = float(attack(victim, image, label, target=target).image)
    assert found["asm"] == pytest.approx(-1 + 0.1 * 0.5)
    assert found["ssm"] == pytest.approx(-1 + 0.1 * (0.5 - 0.25))


def test_the_trace_holds_equation_2():
    victim, image, label = make_victim("linear"), make_image(2), make_label("softmax", 2)
    target = make_label("softmax", 2, seed=5)
    attack = attacks.create("asm", mode="paper", steps=3, tau=0.02, l2_weight=2.0, **FREE)
    result = attack(victim, image, label, target=target)
    logits = victim(result.image).detach()
    wrong = victim.head.predict(logits) != target
    expected = (logits.gather(1, target) * wrong).flatten(1).sum(1)
    expected -= 2 * (result.perturbation**2).flatten(1).sum(1)
    torch.testing.assert_close(result.trace[-1]["loss"], expected)
    assert result.best_step.tolist() == [3, 3]


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_loss_against_a_label_lowers_its_logits_where_it_is_predicted(head):
    logits = torch.randn(2, 4 if head == "softmax" else 3, 3, 3, dtype=torch.float64, requires_grad=True)
    head = Head(head)
    label = head.predict(logits.detach().roll(1, 2))
    TargetLogits()(logits, label, head).sum().backward()
    right = head.predict(logits.detach()) == label
    sign = head.encode(label, logits) if head.exclusive else 2 * head.encode(label, logits) - 1
    torch.testing.assert_close(logits.grad, -sign * right, rtol=0, atol=0)
    wide = TargetLogits(kappa=1e9)(logits, label, head)
    torch.testing.assert_close(wide, TargetLogits(adaptive=False)(logits, label, head))


def test_paper_steps_are_not_lost_in_single_precision():
    victim = linear([[1.0], [-1.0]], [-9.0, 0.0], BINARY)
    victim.network.float()
    attack = attacks.create("ssm", mode="paper", steps=100, tau=1e-8, **FREE)
    result = attack(victim, voxel(1.0, torch.float32), voxel(1).long())
    assert result.image.dtype == torch.float32
    assert float(result.perturbation) == pytest.approx(1e-6, rel=0.1)


# ------------------------------------------------------------------------------- the dynamic multiplier
def test_published_multipliers():
    ious = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    paper, ours = (ASMA(LInf(math.inf), mode=mode) for mode in ("paper", "calibrated"))
    torch.testing.assert_close(paper._multiplier(ious), torch.tensor([1e-7, 6e-7, 1.1e-6], dtype=torch.float64))
    torch.testing.assert_close(ours._multiplier(ious), torch.tensor([1.0, 6, 11], dtype=torch.float64))
    assert (paper.steps, paper.tau, paper.beta, paper.kappa, paper.l2_weight) == (2501, 1e-7, 1e-6, 0, 1)
    assert paper.first_step is None
    assert ASM(LInf(math.inf), mode="paper")._multiplier(ious).tolist() == [1e-7] * 3


@pytest.mark.parametrize("options", [{"mode": "paper", "tau": 0.01, "beta": 0.03}, {"first_step": 0.05, "kappa": 0.0}])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_step_grows_with_the_iou_of_the_iterate(head, options):
    """a_0 is tau; the second step is the adaptive one's, times 1 + beta / tau IoU(x_1)."""
    victim, image, label = make_victim("smooth", head), make_image(2), make_label(head, 2)
    target = make_label(head, 2, seed=6)

    ratio = options.get("beta", 1e-6) / options.get("tau", 1e-7)
    original = SSM._rank

    def last(self, run, image, prediction, score, objective):
        original(self, run, image, prediction, score, objective)
        return torch.full((2, 1), float(run.trace[-1]["step"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSM, "_rank", last)
        found = {}
        for name in ("asm", "asma"):
            own = {k: v for k, v in options.items() if k != "beta" or name == "asma"}
            found[name] = [
                attacks.create(name, steps=n, l2_weight=0, **own, **FREE)(victim, image, label, target=target)
                for n in (1, 2)
            ]
    assert torch.equal(found["asm"][0].image, found["asma"][0].image)
    iou = target_iou(found["asm"][0].prediction, target, victim.head)
    assert (iou > 0.01).all()
    plain, dynamic = (found[name][1].image - found[name][0].image for name in ("asm", "asma"))
    torch.testing.assert_close(dynamic, plain * (1 + ratio * iou).view(-1, 1, 1, 1, 1))


def test_the_multiplier_reaches_the_target_in_fewer_steps_when_tau_is_small():
    """An IoU of .9 on a binary voxelwise model."""
    victim = linear([[1.0, -0.5], [-1.0, 0.5]], [0.1, -0.1], BINARY, dims=2)
    image = make_image(4, 2, 2)
    label, target = victim.predict(image), victim.predict(image.flip(2))
    steps = {}
    for name in ("asm", "asma"):
        own = {"beta": 0.2} if name == "asma" else {}
        attack = attacks.create(name, mode="paper", steps=200, tau=0.02, l2_weight=0, **own, **FREE)
        result = attack(victim, image, label, target=target)
        trace = torch.stack([entry["iou"] for entry in result.trace[1:]])
        assert (trace[-1] >= 0.9).all()
        steps[name] = (trace >= 0.9).double().argmax(0)
    assert (steps["asma"] < steps["asm"] / 2).all()


# ------------------------------------------------------------------------------------- calibrated mode
@pytest.mark.parametrize("threat", [LInf(math.inf, bounds=None), L2(math.inf, "range", bounds=None)])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_has_the_stated_size_and_its_scale_is_reported(name, threat):
    victim, image, label = make_victim("smooth"), make_image(4), make_label("softmax", 4)
    image = image * torch.arange(1, 5).view(-1, 1, 1, 1, 1)
    attack = attacks.ATTACKS[name](threat, steps=1, first_step=0.03)
    result = attack(victim, image, label)
    ball = threat.bind(image)
    step = result.perturbation / ball.scale
    torch.testing.assert_close(step.flatten(1).abs().amax(1), torch.full((4,), 0.03, dtype=torch.float64))
    leaf = image.clone().requires_grad_(True)
    loss = attack.loss.towards(victim(leaf), torch.zeros_like(label), victim.head)
    raw = torch.autograd.grad(loss.sum(), leaf)[0] * ball.mask * ball.scale
    scale = torch.tensor(result.details["scale"], dtype=torch.float64).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(step, scale * raw)


@pytest.mark.parametrize("name", NAMES)
def test_the_scale_is_set_once(name):
    """The scale of five steps is that of the first; the later gradients have other peaks."""
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    first, fifth = (attacks.create(name, steps=n, bounds=None)(victim, image, label).details for n in (1, 5))
    assert first["scale"] == fifth["scale"]
    assert first["scale"][0] != first["scale"][1]


def test_a_step_that_reaches_nothing_is_repeated():
    """The gradient of a linear model does not change while a voxel is wrong, nor does the step."""
    victim = linear([[0.5, 0.1], [-1.0, 0.2]], [-30.0, 0.0], BINARY)
    image = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1, 1)
    attack = attacks.create("asm", steps=7, first_step=0.1, l2_weight=0, **FREE)
    result = attack(victim, image, torch.ones(1, 1, 1, 1, 1).long())
    # no step reaches the target, so the best iterate by IoU and L2 is the first
    assert result.best_step.item() == 1
    assert result.perturbation.flatten().tolist() == pytest.approx([0.1, 0.02])
    losses = torch.cat([entry["loss"] for entry in result.trace])
    torch.testing.assert_close(losses.diff(), losses.diff()[0].expand(7))


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_the_best_iterate_is_the_one_with_the_best_iou_and_then_the_smallest(kappa):
    victim, image = make_victim("linear"), make_image(4)
    target = victim.predict(image.roll(1, -1))
    attack = attacks.create("asma", steps=40, kappa=kappa, first_step=0.3, l2_weight=0.1, bounds=None)
    result = attack(victim, image, victim.predict(image), target=target)
    iou = torch.stack([entry["iou"] for entry in result.trace[1:]])
    assert torch.equal(torch.tensor(result.details["iou"], dtype=torch.float64), iou.amax(0))
    assert (iou[-1] < iou.amax(0)).any()  # the last one is not the best


def test_with_a_margin_the_image_is_not_left_on_the_boundary():
    victim = linear([[1.0, -0.5], [-1.0, 0.5]], [0.1, -0.1], BINARY)
    image = make_image(2, channels=2)
    target = victim.predict(image.flip(3))
    margins = []
    for kappa in (0.0, 0.3):
        attack = attacks.create("asm", steps=80, first_step=0.2, kappa=kappa, l2_weight=0, bounds=None, support="all")
        result = attack(victim, image, victim.predict(image), target=target)
        assert result.details["iou"] == [1, 1]
        margins.append(float(-logit_margin(victim(result.image), target, victim.head).max()))
    assert 0 < margins[0] < 0.3 < margins[1]


def test_the_l2_term_shortens_the_perturbation_and_never_reverses_it():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    lengths = []
    for weight in (0.0, 0.3, 3.0, 1e6):
        result = attacks.create("ssm", steps=25, l2_weight=weight, bounds=None)(victim, image, label)
        lengths.append(torch.tensor(result.details["l2"]))
        assert result.image.isfinite().all()
        assert result.details["linf"][0] < 3
    assert (lengths[2] < lengths[0]).all()


def test_the_mask_beats_no_mask():
    """ASM against SSM at equal first steps: a smaller perturbation that is closer to the target, on every pair."""
    victim, image = make_victim("smooth"), make_image(4)
    label, target = victim.predict(image), victim.predict(make_image(4, seed=9))
    static, adaptive = (
        attacks.create(name, steps=60, bounds=None)(victim, image, label, target=target).details
        for name in ("ssm", "asm")
    )
    assert all(a < s for a, s in zip(adaptive["l2"], static["l2"]))
    assert all(a > s for a, s in zip(adaptive["iou"], static["iou"]))


# --------------------------------------------------------------------------------------- what is reported
@pytest.mark.parametrize("mode", ["calibrated", "paper"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_details_describe_the_clipped_image(head, mode):
    victim, image, label = make_victim("windows", head, 2), make_image(4, 2), make_label(head, 4, 2)
    weight = (torch.rand(4, 1, *SHAPES[2], generator=torch.Generator().manual_seed(0)) < 0.7).double()
    options = {"tau": 0.01} if mode == "paper" else {}
    target = make_label(head, 4, 2, seed=6)
    result = attacks.create("asma", mode=mode, steps=6, **options)(victim, image, label, target=target, weight=weight)
    for b in range(4):
        norms = perturbation_norms(image[b].numpy(), result.image[b].numpy(), (image[b] != 0).numpy())
        for name in ("l2", "linf"):
            assert result.details[name][b] == pytest.approx(norms[f"{name}_std"], rel=1e-9)
            assert result.details[f"{name}_absolute"][b] == pytest.approx(norms[f"{name}_absolute"], rel=1e-9)
    assert result.details["iou"] == target_iou(result.prediction, target, victim.head, weight).tolist()
    assert result.details["pixel_accuracy"] == target_accuracy(result.prediction, target, weight).tolist()


def test_masks_over_time():
    victim, image, label = make_victim("smooth"), make_image(2), make_label("softmax", 2)
    target = victim.predict(make_image(2, seed=9))
    attack = attacks.create("asm", steps=30, snapshots=4, kappa=0.0, bounds=None)
    result = attack(victim, image, label, target=target)
    assert result.details["mask_steps"] == [[0, 2, 9, 29]] * 2
    for b in range(2):
        masks = result.details["masks"][b]
        assert [mask.shape for mask in masks] == [label.shape[1:]] * 4
        assert torch.equal(masks[0], (victim.predict(image) != target)[b])
        assert int(masks[-1].sum()) < int(masks[0].sum()) / 2
    plain = attacks.create("asm", steps=30, kappa=0.0, bounds=None)(victim, image, label, target=target)
    assert "masks" not in plain.details
    assert torch.equal(plain.image, result.image)


def test_iou_by_hand():
    head = Head("softmax")
    target = torch.tensor([0, 0, 1, 1, 3, 0]).view(1, 1, 6)
    prediction = torch.tensor([0, 1, 1, 1, 0, 0]).view(1, 1, 6)
    # background 2 of 4, class 1 2 of 3, class 3 0 of 1; class 2 is in neither
    assert target_iou(prediction, target, head).item() == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)
    weight = torch.tensor([1, 1, 1, 0, 0, 1]).view(1, 1, 6)
    assert target_iou(prediction, target, head, weight).item() == pytest.approx((2 / 3 + 1 / 2) / 2)
    both = torch.cat([prediction, target])
    expected = [target_iou(prediction, target, head).item(), 1.0]
    assert target_iou(both, target.expand(2, -1, -1), head).tolist() == expected
    assert target_accuracy(prediction, target).item() == pytest.approx(4 / 6)
    assert target_accuracy(prediction, target, weight).item() == pytest.approx(3 / 4)


def test_iou_of_regions():
    head = Head("sigmoid")
    target, prediction = torch.zeros(2, 2, 3, 4, dtype=torch.bool)
    target[0, 0, :2], target[0, 1, :3] = True, True
    prediction[0, 0, 1:3], prediction[0, 1, :3] = True, True
    # the first sample: 1 of 3 and 3 of 3, the third region is empty; the second: nothing anywhere
    assert target_iou(prediction, target, head).tolist() == [pytest.approx((1 / 3 + 1) / 2), 1.0]
    assert target_accuracy(prediction, target).tolist() == [0.5, 1.0]
    weight = torch.tensor([True, True, False, False]).view(1, 1, 4).expand(2, 1, 4)
    assert target_iou(prediction, target, head, weight).tolist() == [pytest.approx((1 / 2 + 1) / 2), 1.0]


# ------------------------------------------------------------------------------------------------ options
@pytest.mark.parametrize("name", NAMES)
def test_unbounded_unless_a_budget_is_given(name):
    assert attacks.create(name).threat.eps == math.inf
    result = attacks.create(name, 0.01, steps=3)(make_victim("smooth"), make_image(2), make_label("softmax", 2))
    assert result.details["linf"] == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ssm", {"mode": "published"}, "mode 'published'"),
        ("ssm", {"kappa": 0.1}, "no option kappa"),
        ("ssm", {"snapshots": 1}, "no option snapshots"),
        ("asm", {"beta": 1}, "no option beta"),
        ("asm", {"tau": 1e-7}, "tau belongs to mode 'paper'"),
        ("asma", {"mode": "paper", "first_step": 0.1}, "first_step belongs to mode 'calibrated'"),
        ("ssm", {"first_step": 0}, "first_step must be a finite number > 0"),
        ("asm", {"kappa": -1}, "kappa must be a finite number >= 0"),
        ("asm", {"l2_weight": math.inf}, "l2_weight must be"),
        ("asma", {"beta": "big"}, "beta must be"),
        ("asma", {"steps": 2.5}, "steps must be"),
        ("asm", {"snapshots": -1}, "snapshots must be"),
        ("asm", {"target": None}, "needs a target"),
    ],
)
def test_what_cannot_be_asked_for(name, options, message):
    with pytest.raises(ConfigError, match=message):
        attacks.create(name, **options)
