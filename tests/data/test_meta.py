"""Metadata taken off and given back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate

from monai_adv.data.meta import like, plain, spacing_of, voxel_size
from monai_adv.errors import ConfigError

ROTATED = torch.tensor([[0.0, -2.0, 0, 5], [1.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]], dtype=torch.float64)


def image(scale: float = 1.0) -> MetaTensor:
    meta = {"filename_or_obj": f"{scale}.nii", "original_channel_dim": 0}  # as LoadImage writes it
    return MetaTensor(torch.zeros(4, 3, 4, 5), affine=ROTATED * scale, meta=meta, applied_operations=[{"id": scale}])


def test_like_gives_back_a_sample_and_shares_nothing() -> None:
    reference = image()
    found = like(torch.ones(1, 3, 4, 5), reference)
    assert isinstance(found, MetaTensor)
    assert torch.equal(found.affine, reference.affine)
    found.meta["note"] = 1
    found.applied_operations.pop()
    assert "note" not in reference.meta
    assert reference.applied_operations == [{"id": 1.0}]
    tensor = torch.ones(2)
    assert like(tensor, torch.zeros(2)) is tensor


def test_like_gives_back_a_collated_batch() -> None:
    batch = list_data_collate([{"x": image(1.0)}, {"x": image(2.0)}])["x"]
    found: Any = like(torch.ones(2, 1, 3, 4, 5, requires_grad=True), batch)
    assert found.is_batch
    assert found.requires_grad
    assert torch.equal(found[1].affine, ROTATED * 2)
    for sample, scale in zip(decollate_batch(found), (1.0, 2.0)):
        assert torch.equal(sample.affine, ROTATED * scale)
        assert sample.meta["filename_or_obj"] == f"{scale}.nii"
        assert sample.applied_operations == [{"id": scale}]
    assert voxel_size(found, 3, 1) == (3.0, 4.0, 6.0)
    assert spacing_of(found) == (1.5, 2.0, 3.0)


def test_plain_takes_arrays_and_tensors() -> None:
    assert type(plain(image())) is torch.Tensor
    assert plain(np.ones(2, np.int16)).dtype == torch.int16


def test_voxel_sizes() -> None:
    assert voxel_size(ROTATED, 3) == (1.5, 2.0, 3.0)
    assert voxel_size(ROTATED[[0, 2, 1, 3]], 2) == (1.5, 2.0)  # a slice whose axes are not the first two of the world
    assert spacing_of(torch.zeros(1, 4, 3, 4)) == (1.0, 1.0)
    assert spacing_of(image(), batched=False) == (1.5, 2.0, 3.0)
    assert spacing_of(image()[None], (1, 2, 4)) == (1.0, 2.0, 4.0)
    with pytest.raises(ConfigError, match="3 sizes in mm, each > 0"):
        spacing_of(image()[None], (1, 0, 1))
    with pytest.raises(ConfigError, match="an affine of 3 axes"):
        voxel_size(torch.eye(3), 3)
