"""Masks a user brings: read with their scheme, and brought to the grid of an image by world coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import write_nifti
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Orientation

from monai_adv import attacks
from monai_adv.data import align_mask, load_mask
from monai_adv.errors import DataError
from monai_adv.threats import LInf
from monai_adv.victims import Victim

IMAGE_AFFINE = np.array([[1.5, 0, 0, -20], [0, 1.0, 0, -18], [0, 0, 2.0, -16], [0, 0, 0, 1]])  # RAS
IMAGE_SHAPE = (27, 36, 17)
CENTER, RADIUS = np.array([2.0, -3.0, 1.0]), 9.0


def rotated(spacing, degrees, origin) -> np.ndarray:
    turn = np.radians(degrees)
    affine = np.eye(4)
    affine[:3, :3] = [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    affine[:3, :3] *= spacing
    affine[:3, 3] = origin
    return affine


GRIDS = {  # name -> affine and shape; all hold the ball
    "same": (IMAGE_AFFINE, IMAGE_SHAPE),
    "finer": (np.diag([0.75, 0.5, 1.0, 1.0]) + np.array([[0, 0, 0, -20], [0, 0, 0, -18], [0, 0, 0, -16], [0] * 4]),
              (54, 72, 34)),
    "LPS": (np.array([[-1.0, 0, 0, 20], [0, -1.0, 0, 15], [0, 0, 1.0, -14], [0, 0, 0, 1]]), (40, 40, 30)),
    "PIR": (np.array([[0, 0, 1.0, -18], [-1.2, 0, 0, 14], [0, -0.9, 0, 15], [0, 0, 0, 1]]), (30, 32, 40)),
    "rotated": (rotated((1.1, 0.9, 1.3), 25, (-9, -28, -14)), (44, 44, 24)),
}  # fmt: skip


def world_distance(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return np.linalg.norm(index @ affine[:3, :3].T + affine[:3, 3] - CENTER, axis=-1)


def ball(affine: np.ndarray, shape: tuple[int, ...]) -> MetaTensor:
    """Class 2 around class 3, the same in the world on every grid."""
    distance = world_distance(affine, shape)
    label = np.where(distance < RADIUS, 2, 0)
    label[distance < RADIUS / 2] = 3
    return MetaTensor(torch.from_numpy(label)[None].to(torch.uint8), affine=affine)


def image(channels: int = 4) -> MetaTensor:
    return MetaTensor(torch.zeros(channels, *IMAGE_SHAPE), affine=IMAGE_AFFINE)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_mask_keeps_its_place_in_the_world(grid):
    affine, shape = GRIDS[grid]
    mask = ball(affine, shape)
    before = mask.clone()
    found = align_mask(mask, image())
    assert type(found) is torch.Tensor
    assert found.dtype == torch.int64
    assert found.shape == (1, *IMAGE_SHAPE)
    assert found.unique().tolist() == [0, 2, 3]
    distance = world_distance(IMAGE_AFFINE, IMAGE_SHAPE)
    half = np.linalg.norm(affine[:3, :3], axis=0)
    slack = np.linalg.norm(half) / 2 + 1e-6  # nearest neighbour: half a voxel of the mask's grid
    assert (found[0].numpy()[distance > RADIUS + slack] == 0).all()
    assert (found[0].numpy()[distance < RADIUS / 2 - slack] == 3).all()
    between = (distance > RADIUS / 2 + slack) & (distance < RADIUS - slack)
    assert between.any()
    assert (found[0].numpy()[between] == 2).all()
    assert torch.equal(mask, before)
    assert torch.equal(mask.affine, before.affine)
    if grid == "same":
        assert torch.equal(found, mask.as_tensor().long())


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SAR"])
def test_turned_axes_are_turned_back_exactly(codes):
    mask = ball(IMAGE_AFFINE, IMAGE_SHAPE)
    turned = Orientation(axcodes=codes, labels=None)(mask)
    assert turned.shape != mask.shape or not torch.equal(turned.as_tensor(), mask.as_tensor())
    assert torch.equal(align_mask(turned, image()), mask.as_tensor().long())


def test_outside_of_the_masks_field_of_view_is_background():
    mask = MetaTensor(torch.full((1, 4, 4, 4), 3, dtype=torch.uint8), affine=IMAGE_AFFINE)
    found = align_mask(mask, image())
    assert (found[:, :4, :4, :4] == 3).all()
    assert int((found != 0).sum()) == 64


def test_batches_with_one_affine_or_one_each():
    affine, shape = GRIDS["LPS"]
    mask, one = ball(affine, shape), image()
    alone = align_mask(mask, one)
    assert torch.equal(align_mask(mask, one[None]), alone[None])
    moved_affine = IMAGE_AFFINE.copy()
    moved_affine[:3, 3] += (3.0, 2.0, -4.0)
    moved = MetaTensor(torch.zeros(4, *IMAGE_SHAPE), affine=moved_affine)
    batch = next(iter(DataLoader(Dataset([{"image": one}, {"image": moved}]), batch_size=2)))["image"]
    assert batch.affine.shape == (2, 4, 4)
    found = align_mask(mask, batch)
    assert torch.equal(found, torch.stack([alone, align_mask(mask, moved)]))
    assert not torch.equal(found[0], found[1])


def test_a_file_becomes_the_target_of_an_attack(tmp_path):
    affine, shape = GRIDS["LPS"]
    classes = ball(affine, shape).numpy()[0]
    path = write_nifti(tmp_path / "mask.nii.gz", np.array([0, 1, 2, 4], dtype=np.uint8)[classes], affine)
    mask = load_mask(path, "brats2021")
    assert np.array_equal(mask.numpy()[0], classes)
    clean = MetaTensor(torch.randn(1, 4, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0)), affine=IMAGE_AFFINE)
    for kind, channels in (("softmax", 4), ("sigmoid", 3)):
        network = torch.nn.Conv3d(4, channels, 1, bias=False)  # the logits are the first modalities
        network.weight.data = torch.eye(4)[:channels].view(channels, 4, 1, 1, 1)
        victim = Victim(network, head=kind)
        target = victim.head.label_from_classes(align_mask(mask, clean))
        label = torch.zeros_like(target)
        attack = attacks.TargetedIFGSM(LInf(20.0, support="all", bounds=None), target=target, steps=20)
        result = attack(victim, clean, label)
        assert float(result.score) == 1
        assert torch.equal(victim.predict(result.image.as_tensor()), target)


@pytest.mark.parametrize(
    ("mask", "like", "message"),
    [
        (torch.zeros(1, 2, 2, 2), image(), "needs MetaTensors"),
        (ball(IMAGE_AFFINE, IMAGE_SHAPE), torch.zeros(1, 2, 2, 2), "needs MetaTensors"),
        (image(2), image(), r"a mask \(1, X, Y, Z\)"),
        (ball(IMAGE_AFFINE, IMAGE_SHAPE)[0], image(), r"a mask \(1, X, Y, Z\)"),
        (ball(IMAGE_AFFINE, IMAGE_SHAPE), image()[0], r"got \(1, 27, 36, 17\) and \(27, 36, 17\)"),
    ],
)
def test_what_cannot_be_aligned(mask, like, message):
    with pytest.raises(DataError, match=message):
        align_mask(mask, like)
