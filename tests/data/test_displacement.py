"""Displacement fields: turned to the world and back, written as vectors, and refused where they are none."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from builders import write_nifti
from scipy.spatial.transform import Rotation

from monai_adv.data import along_axes, along_world, load_displacement, save_displacement
from monai_adv.errors import DataError

SHAPE = (4, 5, 6)
OBLIQUE = nib.affines.from_matvec(
    Rotation.from_euler("xyz", (10, -20, 35), degrees=True).as_matrix()[:, [2, 0, 1]] * (-1, 0.7, 3.0), (9, 8, -7)
)


@pytest.fixture
def field() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)


def test_a_step_along_an_axis_is_a_step_in_the_world():
    """One voxel along each axis goes where the affine says, however long the voxel is."""
    sizes = nib.affines.voxel_sizes(OBLIQUE)
    for axis in range(3):
        step = np.zeros((3, 1, 1, 1))
        step[axis] = sizes[axis]
        assert np.allclose(along_world(step, OBLIQUE).ravel(), OBLIQUE[:3, axis])


def test_lengths_stay_and_the_way_back_is_the_inverse(field):
    world = along_world(field, OBLIQUE)
    assert np.allclose(np.linalg.norm(world, axis=0), np.linalg.norm(field, axis=0), atol=1e-6)
    assert not np.allclose(world, field, atol=0.1)
    assert np.allclose(along_axes(world, OBLIQUE), field, atol=1e-6)


def test_a_file_holds_lps_vectors_and_reads_back(field, tmp_path):
    like = write_nifti(tmp_path / "like.nii.gz", np.zeros(SHAPE, np.int16), OBLIQUE)
    path = save_displacement(field, like, tmp_path / "u.nii.gz")
    stored = nib.load(path)
    assert stored.shape == (*SHAPE, 1, 3)
    assert stored.get_data_dtype() == np.float32
    assert int(stored.header["intent_code"]) == 1007
    assert np.array_equal(stored.affine, nib.load(like).affine)
    vectors = np.asarray(stored.dataobj)[:, :, :, 0]
    assert np.array_equal(vectors, np.stack([-field[0], -field[1], field[2]], axis=-1))
    again, affine = load_displacement(path)
    assert np.array_equal(again, field)
    assert np.array_equal(affine, stored.affine)


def test_errors_name_the_file(field, tmp_path):
    like = write_nifti(tmp_path / "like.nii.gz", np.zeros(SHAPE, np.int16), OBLIQUE)
    with pytest.raises(DataError, match=r"u.nii.gz: a displacement field must be \(3, X, Y, Z\), got \(2, 4, 5, 6\)"):
        save_displacement(field[:2], like, tmp_path / "u.nii.gz")
    with pytest.raises(DataError, match="grid of shape"):
        save_displacement(field[:, 1:], like, tmp_path / "u.nii.gz")
    field[0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        save_displacement(field, like, tmp_path / "u.nii.gz")
    with pytest.raises(DataError, match="no displacement field"):
        load_displacement(like)
    with pytest.raises(DataError, match="cannot be read as NIfTI"):
        load_displacement(Path(tmp_path / "none.nii.gz"))
