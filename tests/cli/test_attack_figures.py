"""The figure that `monai-adv attack` draws of an attack that moved the anatomy."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from builders import make_case
from cli_caller import call
from matplotlib.image import imread
from victims_on_disk import tiny_checkpoint

SUBJECT = "BraTS2021_00000"


def test_attack_draws_what_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_case(tmp_path / "data", SUBJECT)
    checkpoint = tiny_checkpoint(tmp_path / "tiny.pt")
    arguments = ["attack", str(tmp_path / "data"), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert call(monkeypatch, *arguments, "--attack", "deformation", "--option", "steps=1") == 0
    folder = tmp_path / "out" / SUBJECT
    figure = folder / f"{SUBJECT}_synthesis.png"
    picture = imread(figure)
    assert picture.shape[1] > picture.shape[0] > 200
    assert picture[..., :3].std() > 0.1
    assert nib.load(folder / f"{SUBJECT}_displacement.nii.gz").shape == (14, 16, 12, 1, 3)
    assert np.asarray(nib.load(folder / f"{SUBJECT}_displacement.nii.gz").dataobj).any()
    assert call(monkeypatch, *arguments, "--attack", "fgsm", "--eps", "0.5") == 0
    assert not figure.exists()  # nothing moved now
