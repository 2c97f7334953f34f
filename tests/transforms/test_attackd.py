"""Attacks as MONAI transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, ThreadDataLoader, decollate_batch
from monai.transforms import AsDiscreted, Compose, Invertd, Lambdad, SaveImaged
from oracles import make_image, make_label, make_victim
from workflows import ANISOTROPIC_LPS, KEYS, SHAPE, cohort, preprocessing, small_unet, windows

from monai_adv import attacks
from monai_adv.transforms import Attackd, RandAttackd
from monai_adv.victims import Victim


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


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> list[dict[str, Any]]:
    return cohort(tmp_path_factory.mktemp("cohort"), 2)


def attackd(kind: type = Attackd, **options: Any) -> Attackd:
    network = small_unet().eval()
    return kind(attacks.create("pgd", eps=0.5, steps=2), Victim(network, windows()), clean_key="clean", **options)


@pytest.mark.parametrize(("batch", "spacing"), [(1, (1.5, 1.5, 2.0)), (2, (1.5, 1.5, 2.0)), (2, None)])
def test_invert_and_save_behind_it(items, tmp_path: Path, batch: int, spacing: Any) -> None:
    """Load, resample, normalise, attack, segment, and write on the grid of the file."""
    transforms = preprocessing(attackd(), spacing=spacing)
    loader = DataLoader(Dataset(items, transforms), batch_size=batch)
    network, inferer = small_unet().eval(), windows()
    back = Compose(
        [
            AsDiscreted("pred", argmax=True),
            Invertd("pred", transforms, orig_keys="image", nearest_interp=True),
            Invertd(("clean", "image"), transforms, orig_keys="image", nearest_interp=False),  # the image last
            *(
                SaveImaged(key, output_dir=tmp_path, output_postfix=key, separate_folder=False, print_log=False)
                for key in ("pred", "image", "clean")
            ),
        ]
    )
    for data in loader:
        with torch.no_grad():
            data["pred"] = inferer(data["image"], network)
        for sample in decollate_batch(data):
            back(sample)
    for item in items:
        saved = {key: nib.load(tmp_path / f"{item['subject']}-t1n_{key}.nii.gz") for key in ("pred", "image", "clean")}
        source = nib.load(item["image"][0])
        for image in saved.values():
            assert image.shape[:3] == source.shape == SHAPE
            assert np.array_equal(image.affine, source.affine)
            assert np.array_equal(image.affine, ANISOTROPIC_LPS)
            assert np.allclose(image.header.get_zooms()[:3], source.header.get_zooms())
        image, clean = (saved[key].get_fdata() for key in ("image", "clean"))
        voxels = np.stack([nib.load(file).get_fdata() for file in item["image"]], -1)
        assert 0.01 < np.abs(image - clean).max() <= 0.5 * 1.5  # the budget is in standard deviations
        for channel in range(4) if spacing is None else ():  # not resampled: voxel by voxel the file's
            inside = voxels[..., channel][voxels[..., channel] > 0]
            score = np.where(voxels[..., channel] > 0, (voxels[..., channel] - inside.mean()) / inside.std(), 0)
            assert np.allclose(clean[..., channel], score, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "options"), [(DataLoader, {}), (DataLoader, {"num_workers": 1}), (ThreadDataLoader, {})]
)
def test_in_loaders_it_is_what_it_is_in_this_thread(items, cls: Any, options: dict[str, Any]) -> None:
    chain = preprocessing(attackd(RandAttackd, prob=1.0))
    dataset = Dataset(items, chain)
    loaded = [batch["image"][0] for batch in cls(dataset, batch_size=1, **options)]
    assert len(loaded) == 2
    for image, item in zip(loaded, items):
        clean = preprocessing()(item)["image"]
        change = (image - clean).as_tensor()
        assert 0.1 < float(change.abs().max()) <= 0.5 * 1.5
        assert not change[clean.as_tensor() == 0].any()
        assert torch.equal(image.affine, clean.affine)
        assert [step["class"] for step in image.applied_operations] == [s["class"] for s in clean.applied_operations]
    if cls is ThreadDataLoader:
        chain.set_random_state(3)
        first = [batch["image"] for batch in cls(dataset, batch_size=1)]
        chain.set_random_state(3)
        again = [batch["image"] for batch in DataLoader(dataset, batch_size=1)]
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_in_a_lazy_compose_pending_resampling_is_applied_before(items) -> None:
    eager, lazy = preprocessing(attackd()), preprocessing(attackd())
    lazy.lazy, lazy.overrides = True, {"label": {"mode": "nearest"}}  # without it MONAI interpolates lazy labels
    one, two = eager(items[0]), lazy(items[0])
    assert one["image"].shape == two["image"].shape
    assert not two["image"].pending_operations
    for key in KEYS:
        assert torch.allclose(one[key].affine, two[key].affine)
