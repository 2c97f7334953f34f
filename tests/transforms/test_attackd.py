"""Attacks as MONAI transforms."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Lambdad
from oracles import make_image, make_label, make_victim

from monai_adv import attacks
from monai_adv.transforms import Attackd, RandAttackd


@pytest.fixture
def victim():
    return make_victim("smooth")


@pytest.fixture
def data():
    affine = torch.diag(torch.tensor([2.0, 1, 3, 1], dtype=torch.float64))
    image = MetaTensor(make_image(1)[0], affine=affine, applied_operations=[{"id": 7}])
    return {"image": image, "label": make_label("softmax", 1)[0], "subject": "S1"}


def test_is_the_attack_on_a_batch_of_one(victim, data):
    attack = attacks.create("pgd", 0.2, steps=2)
    found = Attackd(attack, victim, clean_key="clean")(data)
    expected = attack(victim, data["image"].as_tensor()[None], data["label"][None]).image[0]
    assert torch.equal(found["image"].as_tensor(), expected)
    assert found["clean"] is data["image"]
    assert found["label"] is data["label"]
    assert found["subject"] == "S1"
    assert not torch.equal(found["image"], data["image"])


def test_metadata_are_kept_and_not_shared(victim, data):
    found = Attackd(attacks.create("fgsm", 0.2), victim)(data)["image"]
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, data["image"].affine)
    assert found.applied_operations == [{"id": 7}]
    found.applied_operations.pop()
    found.meta["note"] = "adversarial"
    assert data["image"].applied_operations == [{"id": 7}]
    assert "note" not in data["image"].meta


def test_a_plain_tensor_stays_one(victim, data):
    data["image"] = data["image"].as_tensor()
    assert type(Attackd(attacks.create("fgsm", 0.2), victim)(data)["image"]) is torch.Tensor


def test_support_and_prediction(victim, data):
    mask = torch.zeros(1, *data["image"].shape[1:])
    mask[..., :2] = 1
    attack = attacks.create("fgsm", 0.2, label_source="prediction")
    found = Attackd(attack, victim, label_key=None, support_key="mask")({**data, "mask": MetaTensor(mask)})
    changed = (found["image"] != data["image"]).as_tensor()
    assert changed.any()
    assert not changed[..., 2:].any()


def test_inside_a_compose(victim, data):
    chain = Compose([Lambdad("image", lambda x: 2 * x), Attackd(attacks.create("fgsm", 0.2), victim, clean_key="c")])
    found = chain(data)
    assert torch.equal(found["c"], 2 * data["image"])


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_probability(victim, data, prob):
    found = RandAttackd(attacks.create("fgsm", 0.2), victim, prob=prob, clean_key="clean")(data)
    assert torch.equal(found["image"], data["image"]) == (prob == 0)
    assert torch.equal(found["clean"], data["image"])


def test_the_transforms_own_state_replays_it(victim, data):
    def draws(seed: int) -> list[torch.Tensor]:
        transform = RandAttackd(attacks.create("noise", 0.2), victim, prob=0.5)
        transform.set_random_state(seed)
        return [transform(data)["image"].as_tensor() for _ in range(8)]

    first, again, other = draws(3), draws(3), draws(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    attacked = [x for x in first if not torch.equal(x, data["image"].as_tensor())]
    assert 0 < len(attacked) < 8
    assert not torch.equal(attacked[0], attacked[1])  # each sample has its own noise


def test_a_compose_seeds_it(victim, data):
    chain = Compose([RandAttackd(attacks.create("noise", 0.2), victim, prob=1.0)])
    results = [chain.set_random_state(5)(data)["image"].as_tensor() for _ in range(2)]
    assert torch.equal(*results)


def test_a_generator_given_in_the_call_is_used(victim, data):
    transform = Attackd(attacks.create("noise", 0.2), victim)
    results = [transform(data, torch.Generator().manual_seed(s))["image"].as_tensor() for s in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
