"""Axial pictures are upright and radiological whatever the orientation of the array."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_adv.data.labels import REGIONS, region_masks
from monai_adv.visualize import AxialView, most_changed_slice

ORIENTATIONS = [
    "".join(pair[side] for pair, side in zip(axes, sides))
    for axes in itertools.permutations(("LR", "PA", "SI"))
    for sides in itertools.product((0, 1), repeat=3)
]
SPACING = {"L": 1.0, "P": 2.0, "S": 3.0}  # mm along each direction of the body


def reoriented(lps: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume stored with other axes, and its affine (voxel to RAS mm)."""
    affine = np.diag([-SPACING["L"], -SPACING["P"], SPACING["S"], 1.0])
    target = nib.orientations.axcodes2ornt(tuple(codes))
    transform = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(("L", "P", "S")), target)
    stored = nib.orientations.apply_orientation(lps, transform)
    return stored, affine @ nib.orientations.inv_ornt_aff(transform, lps.shape)


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    """An asymmetric volume, axes L, P, S."""
    return np.random.default_rng(0).random((5, 6, 7))


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_gives_the_same_picture(head: np.ndarray, codes: str) -> None:
    stored, affine = reoriented(head, codes)
    assert "".join(nib.aff2axcodes(affine)) == codes
    view = AxialView.of(stored.shape, affine)
    before, after = np.zeros(stored.shape, int), np.zeros(stored.shape, int)
    marked = np.zeros(head.shape, int)
    marked[:, :, 2] = 1  # the third slice from below
    after[reoriented(marked, codes)[0] == 1] = 1
    index = most_changed_slice(before, after, affine)
    assert view.slices == 7
    np.testing.assert_array_equal(view.picture(stored, index), head[:, :, 2].T)
    assert view.pixel(None, affine) == pytest.approx((SPACING["P"], SPACING["L"]))
    assert view.pixel(nib.affines.voxel_sizes(affine)) == pytest.approx((SPACING["P"], SPACING["L"]))


def test_anterior_is_up_and_the_right_hand_on_the_left() -> None:
    """In RAS storage index 0 is left and posterior: the marker at anterior left must come to the top right."""
    volume = np.zeros((4, 5, 6))
    volume[0, -1, 3] = 1.0
    picture = AxialView.of(volume.shape, np.eye(4)).picture(volume, 3)
    assert picture.shape == (5, 4)
    assert np.argwhere(picture).tolist() == [[0, 3]]


def test_without_an_affine_axes_are_l_p_s() -> None:
    volume = np.zeros((4, 5, 6))
    volume[3, 0, 1] = 1.0  # left, anterior
    assert np.argwhere(AxialView.of(volume.shape).picture(volume, 1)).tolist() == [[0, 3]]
    flat = AxialView.of((4, 5))
    assert np.argwhere(flat.picture(volume[:, :, 1], 0)).tolist() == [[0, 3]]
    assert flat.slices == 1
    assert flat.pixel((2.0, 0.5)) == (0.5, 2.0)
    assert flat.pixel(None) == (1.0, 1.0)


def test_oblique_affines_go_to_the_nearest_axes(head: np.ndarray) -> None:
    angle = np.deg2rad(20)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-1.0, -1.0, 2.5])
    view = AxialView.of(head.shape, affine)
    np.testing.assert_array_equal(view.picture(head, 4), head[:, :, 4].T)
    assert view.pixel(None, affine) == pytest.approx((1.0, 1.0))


def test_most_changed_slice_counts_voxels() -> None:
    before = np.zeros((4, 4, 6), int)
    after = before.copy()
    before[0, 0, 1] = 1
    after[0, 0, 1] = 3  # a change of class, not of the foreground
    after[:2, 1, 4] = 2
    assert most_changed_slice(before, after) == 4
    assert most_changed_slice(torch.from_numpy(before)[None], torch.from_numpy(after)[None]) == 4
    masks = [region_masks(classes, tuple(REGIONS)) for classes in (before, after)]
    assert most_changed_slice(*masks) == 4
    after[:2, 1, 4] = 0
    assert most_changed_slice(before, after) == 1


def test_most_changed_slice_where_nothing_changed() -> None:
    classes = np.zeros((4, 4, 7), int)
    assert most_changed_slice(classes, classes) == 3
    classes[1, 1, 5] = classes[1, 1, 6] = classes[2, 1, 6] = 1
    assert most_changed_slice(classes, classes) == 6
    assert most_changed_slice(classes[:, :, 0], classes[:, :, 0]) == 0


@pytest.mark.parametrize(
    ("affine", "message"),
    [(np.eye(3), "4 x 4"), (np.full((4, 4), np.nan), "finite"), (np.diag([1.0, 0.0, 1.0, 1.0]), "direction")],
)
def test_bad_affines_are_refused(affine: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AxialView.of((4, 4, 4), affine)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="spatial shape"):
        AxialView.of((4, 4, 4, 4))
    with pytest.raises(ValueError, match="shapes"):
        most_changed_slice(np.zeros((4, 4, 4)), np.zeros((4, 4, 5)))
    with pytest.raises(ValueError, match="spacing"):
        AxialView.of((4, 4, 4)).pixel((1.0, 1.0))
    with pytest.raises(ValueError, match="spacing"):
        AxialView.of((4, 4, 4)).pixel((1.0, 1.0, 0.0))
