"""The contract that every attack keeps with its caller: the victim, the types, and failing well."""

from __future__ import annotations

import pytest
import torch
from attack_contract import (
    GRADIENT,
    LOSSES,
    TRAITS,
    assert_as_found,
    assert_same_result,
    cased,
    is_targeted,
    make_attack,
    named,
    prepared,
    snapshot,
)
from monai.data import MetaTensor, decollate_batch
from monai.data.utils import list_data_collate
from oracles import SHAPES, make_image, make_label, make_victim, smooth_network
from torch import nn

from monai_adv.attacks import ATTACKS
from monai_adv.errors import ConfigError, MonaiAdvError, NonFiniteError
from monai_adv.losses import AttackLoss, CrossEntropy
from monai_adv.victims import Head, Victim


# ------------------------------------------------------------------------ the victim and the caller's types
class Explodes(AttackLoss):
    """Fails in the middle of an attack."""

    calls = 0

    def __call__(self, logits, label, head, weight=None):
        self.calls += 1
        if self.calls > 1 or not torch.is_grad_enabled():
            raise KeyError("in the middle")
        return CrossEntropy()(logits, label, head, weight)


@pytest.mark.parametrize("name", LOSSES)
def test_the_network_is_restored_after_an_exception(name):
    victim = make_victim("windows")
    victim.network[0].weight.requires_grad_(False)
    victim.network[1].eval()
    before = snapshot(victim.network)
    attack = make_attack(name, loss=Explodes())
    with pytest.raises(KeyError, match="in the middle"):
        attack(victim, prepared(name, make_image(2)), make_label("softmax", 2))
    assert_as_found(victim.network, before)
    attack = make_attack(name)
    assert attack(victim, prepared(name, make_image(2)), make_label("softmax", 2)).image.isfinite().all()


class ForcesTraining(nn.Sequential):
    def forward(self, x):
        self[1].training = True
        return super().forward(x)


@named
def test_a_network_that_ignores_evaluation_mode_is_reported(name):
    network = ForcesTraining(*smooth_network())
    before = snapshot(network)
    with pytest.raises(MonaiAdvError, match=r"1\.running_mean"):
        make_attack(name)(Victim(network), prepared(name, make_image(2)), make_label("softmax", 2))
    assert_as_found(network, before)


@named
def test_metatensors_come_back_as_metatensors(name):
    victim, image, label = make_victim("windows"), prepared(name, make_image(2)), make_label("softmax", 2)
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
    plain = make_attack(name)(victim, image, label, spacing=(2, 1, 3))
    assert type(plain.image) is torch.Tensor
    assert torch.equal(result.image.as_tensor(), plain.image)
    assert type(result.prediction) is torch.Tensor
    assert type(result.trace[0]["loss"]) is torch.Tensor


@named
def test_metatensor_masks_are_taken_as_tensors(name):
    victim, image, label = make_victim("smooth"), prepared(name, make_image(2)), make_label("softmax", 2)
    mask = torch.zeros(2, 1, *SHAPES[3])
    mask[..., :3] = 1
    expected = make_attack(name)(victim, image, label, support=mask, weight=mask)
    found = make_attack(name)(victim, image, label, support=MetaTensor(mask), weight=MetaTensor(mask))
    assert type(found.trace[0]["loss"]) is torch.Tensor
    assert_same_result(expected, found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@named
def test_the_callers_gradient_mode_does_not_matter(name, mode):
    expected = make_attack(name)(make_victim("windows"), prepared(name, make_image(2)), make_label("softmax", 2))
    victim = make_victim("windows")
    with mode():
        image, label = prepared(name, make_image(2)), make_label("softmax", 2)
        found = make_attack(name)(victim, image, label, support=image != 0, weight=torch.ones(2, 1, *SHAPES[3]))
        assert not torch.is_grad_enabled()
    assert torch.equal(found.image, expected.image)
    assert not found.image.is_inference()


@named
def test_the_inputs_are_not_written_to(name):
    victim, image, label = (
        make_victim("windows"),
        prepared(name, make_image(2)).requires_grad_(True),
        make_label("softmax", 2),
    )
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
    image = prepared(name, make_image(2))
    image[1, 2, 1, 1, 1] = value
    with pytest.raises(NonFiniteError, match="clean image"):
        make_attack(name)(make_victim("smooth"), image, make_label("softmax", 2))


@named
def test_non_finite_logits(name):
    victim = make_victim("smooth")
    victim.network[-1].bias.data[0] = float("nan")
    before = snapshot(victim.network)[:3]
    with pytest.raises(NonFiniteError, match="logits"):
        make_attack(name)(victim, prepared(name, make_image(2)), make_label("softmax", 2))
    assert snapshot(victim.network)[:3] == before


class Infinite(AttackLoss):
    def __call__(self, logits, label, head, weight=None):
        return CrossEntropy()(logits, label, head, weight) * float("inf")


class Steep(AttackLoss):
    """Finite, with an infinite slope."""

    def __call__(self, logits, label, head, weight=None):
        return CrossEntropy()(logits, label, head, weight) + (logits - logits.detach()).clamp_min(0).sqrt().sum()


@pytest.mark.parametrize("name", LOSSES)
def test_a_non_finite_loss(name):
    with pytest.raises(NonFiniteError, match="loss"):
        make_attack(name, loss=Infinite())(
            make_victim("smooth"), prepared(name, make_image(2)), make_label("softmax", 2)
        )


@pytest.mark.parametrize("name", [n for n in GRADIENT if n in LOSSES])
def test_a_non_finite_gradient(name):
    with pytest.raises(NonFiniteError, match="gradient"):
        make_attack(name, loss=Steep())(make_victim("smooth"), prepared(name, make_image(2)), make_label("softmax", 2))


class Constant(nn.Module):
    """Says class 1 whatever it sees, with a gradient of zero."""

    def forward(self, x):
        logits = x.sum(1, keepdim=True) * torch.zeros(1, 4, *[1] * (x.ndim - 2), dtype=x.dtype)
        return logits + torch.tensor([0.0, 1, 0, 0], dtype=x.dtype).view(1, 4, *[1] * (x.ndim - 2))


@cased
def test_no_attack_helps_against_a_constant_model(name, norm):
    image, label = prepared(name, make_image(2)), make_label("softmax", 2)
    result = make_attack(name, norm)(Victim(Constant()), image, label)
    if not ATTACKS[name].moves_voxels:  # a moved label has other shares of voxels
        assert torch.equal(result.score, result.clean_score)
    assert not result.success.any()
    assert (result.prediction == 1).all()
    if name in GRADIENT:
        assert result.trace[0]["zero_gradient"].tolist() == [1.0, 1.0]


@named
def test_a_clean_dice_of_zero_is_no_success(name):
    """The constant model says NCR; nothing of it is in the label, so every region has Dice 0 from the start."""
    victim = Victim(Constant(), head=Head("softmax", {"ET": (3,)}))
    label = torch.full((2, 1, *SHAPES[3]), 3)
    result = make_attack(name, goal=1.0)(victim, prepared(name, make_image(2)), label)
    assert result.clean_score.tolist() == [0, 0]
    if not is_targeted(name):
        assert not result.success.any()


@pytest.mark.parametrize("name", GRADIENT)
def test_a_pipeline_that_detaches_is_explained(name):
    for step in (torch.Tensor.detach, lambda x: x.detach().requires_grad_(True)):
        victim = Victim(smooth_network(), preprocessing=step, name="quantised")
        with pytest.raises(ConfigError, match="logits of quantised are not connected to the image"):
            make_attack(name)(victim, prepared(name, make_image(1)), make_label("softmax", 1))


@named
def test_what_does_not_fit(name):
    victim, image, label = make_victim("smooth"), prepared(name, make_image(2)), make_label("softmax", 2)
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
    with pytest.raises(ConfigError, match=r"support \(2, 1, 3, 3, 3\) does not fit the image"):
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
        ({"loss": "rumour"}, "loss 'rumour' is unknown|has no option loss"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_attack(name, **options)
    with pytest.raises(ConfigError, match="needs a threat"):
        ATTACKS[name](0.1, **TRAITS[name].options)
