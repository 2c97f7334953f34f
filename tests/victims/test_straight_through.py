"""A non-differentiable step of a victim, and the gradient that stands in for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import SHAPES, make_image, make_label, make_victim, smooth_network
from torch import nn

from monai_adv import attacks
from monai_adv.errors import ConfigError
from monai_adv.inferers import GradientSlidingWindowInferer
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import StraightThrough, Victim


def quantised(x: torch.Tensor) -> torch.Tensor:
    return (x * 4).round() / 4


def through_numpy(x: torch.Tensor):
    return np.round(x.detach().numpy() * 4) / 4


def in_place(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(4).round_().div_(4)


def as_integers(x: torch.Tensor) -> torch.Tensor:
    return x.round().to(torch.int16)


STEPS = [quantised, through_numpy, in_place, as_integers, lambda x: quantised(x).float()]


@pytest.mark.parametrize("step", STEPS)
def test_forward_is_the_step_and_backward_the_identity(step):
    x = make_image(2).requires_grad_(True)
    kept = x.detach().clone()
    weight = make_image(2, seed=3)
    y = StraightThrough(step)(x)
    assert torch.equal(x, kept)
    assert y.dtype == x.dtype
    assert torch.equal(y, torch.as_tensor(step(kept.clone())).to(x.dtype))
    assert torch.equal(torch.autograd.grad((y * weight).sum(), x)[0], weight)
    with torch.no_grad():
        assert torch.equal(StraightThrough(step)(x), y)


def test_an_identity_step_is_the_identity():
    x = make_image(1).requires_grad_(True)
    y = StraightThrough(lambda data: data)(x)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], 2 * x)


def test_the_gradient_of_a_surrogate_is_taken_at_the_input():
    x = make_image(2).requires_grad_(True)
    y = StraightThrough(torch.sign, torch.tanh)(x)
    assert torch.equal(y, torch.sign(x))
    expected = 1 - torch.tanh(x.detach()) ** 2
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_step_that_changes_the_shape_needs_a_surrogate():
    pool = nn.MaxPool3d(2)
    x = make_image(1).requires_grad_(True)
    with pytest.raises(ConfigError, match=r"\(1, 4, 4, 5, 6\) into \(1, 4, 2, 2, 3\).*surrogate"):
        StraightThrough(pool)(x)
    y = StraightThrough(pool, nn.AvgPool3d(2))(x)
    assert torch.equal(y, pool(x))
    assert torch.autograd.grad(y.sum(), x)[0].unique().tolist() == [0, 0.125]
    with pytest.raises(ConfigError, match="needs callables"):
        StraightThrough("round")


def victims(step) -> dict[str, Victim]:
    """The step before the network, after it, and inside it under sliding windows."""
    inferer = GradientSlidingWindowInferer(roi_size=(4, 4, 4), sw_batch_size=2, overlap=0.5, keep_windows=0)
    return {
        "preprocessing": Victim(smooth_network(), preprocessing=step),
        "postprocessing": Victim(smooth_network(), postprocessing=step),
        "network": Victim(
            nn.Sequential(step if isinstance(step, nn.Module) else Plain(step), smooth_network()), inferer
        ),
    }


class Plain(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return self.step(x)


@pytest.mark.parametrize("place", ["preprocessing", "postprocessing", "network"])
def test_a_rounding_victim_can_be_attacked_only_straight_through(place):
    image, label = make_image(2), make_label("softmax", 2)
    attack = attacks.create("ifgsm", 0.5, steps=5)
    hidden = victims(lambda x: torch.as_tensor(through_numpy(x)))[place]
    with pytest.raises(ConfigError, match=r"not connected to the image.*StraightThrough|no gradient to take"):
        attack(hidden, image, label)
    open_ = victims(StraightThrough(through_numpy))[place]
    assert torch.equal(open_(image), hidden(image))
    result = attack(open_, image, label)
    assert (result.score < result.clean_score).all()
    noise = attacks.create("noise", 0.5)(open_, image, label)
    assert (result.score < noise.score).all()
    assert torch.equal(attack.curve(open_, image, label, [0.0])[0].image, image)


def test_a_gradient_of_zero_is_reported_and_repaired():
    """torch.round is connected, with a derivative of zero: the attack says so, and gets nowhere."""
    image, label = make_image(2), make_label("softmax", 2)
    attack = attacks.create("ifgsm", 0.5, steps=5)
    flat = attack(Victim(smooth_network(), preprocessing=quantised), image, label)
    assert flat.trace[0]["zero_gradient"].tolist() == [1, 1]
    assert torch.equal(flat.image, image)
    assert (
        attack(Victim(smooth_network(), preprocessing=StraightThrough(quantised)), image, label).score < flat.score
    ).all()


def test_the_attack_is_that_of_the_smooth_victim_where_the_step_changes_nothing():
    image, label = make_image(2), make_label("softmax", 2)
    attack = attacks.create("pgd", 0.3, steps=3)
    plain = attack(Victim(smooth_network()), image, label)
    wrapped = attack(Victim(smooth_network(), preprocessing=StraightThrough(torch.Tensor.numpy)), image, label)
    assert torch.equal(plain.image, wrapped.image)


def test_a_module_step_is_left_as_it_was_found():
    denoiser = nn.Sequential(nn.BatchNorm3d(4), nn.Dropout(0.9)).double().train()
    victim = Victim(smooth_network(), preprocessing=StraightThrough(denoiser, nn.Identity()))
    image, label = make_image(2), make_label("softmax", 2)
    before = {k: v.clone() for k, v in denoiser.state_dict().items()}
    assert torch.equal(victim(image), victim(image))  # dropout is off
    attacks.create("fgsm", 0.1)(victim, image, label)
    assert denoiser[1].training
    assert all(torch.equal(v, before[k]) for k, v in denoiser.state_dict().items())


def test_windows_without_support_are_left_out_only_where_nothing_couples_the_voxels():
    image = make_image(1)
    support = torch.zeros_like(image, dtype=torch.bool)
    support[:, :, 1:2, :2, :2] = True
    assert torch.equal(StraightThrough(quantised).gradient_support(image, support), support)
    assert StraightThrough(quantised, nn.Softmax(2)).gradient_support(image, support).all()
    rule = NormalizeNonzeroBatch()
    step = StraightThrough(lambda x: rule(x).round(), rule)
    assert torch.equal(step.gradient_support(image, support), rule.gradient_support(image, support))
    # the gradient on the support is the same with all windows and with those that are needed
    label = make_label("softmax", 1)
    found = []
    for keep in (True, False):
        network, calls = smooth_network(), []
        network.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        windows = GradientSlidingWindowInferer(roi_size=(4, 3, 3), sw_batch_size=1, overlap=0.25, keep_windows=0)
        preprocessing = StraightThrough(quantised, None if keep else (lambda x: x))
        attack = attacks.create("fgsm", 0.3, bounds=None)
        found.append(attack(Victim(network, windows, preprocessing=preprocessing), image, label, support=support).image)
        found.append(sum(calls))
    torch.testing.assert_close(found[0], found[2], rtol=1e-10, atol=1e-10)
    assert 0 < found[1] < found[3]


def test_the_wrapped_pipeline_keeps_its_shapes():
    victim = make_victim("windows")
    victim.preprocessing = StraightThrough(quantised, victim.preprocessing)
    assert victim(make_image(2)).shape == (2, 4, *SHAPES[3])
