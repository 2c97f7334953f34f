"""Real patients through the whole pipeline with the packaged network; skipped where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from builders import real_data

from monai_adv.data import brats_datalist
from monai_adv.studies.demo import packaged_victim
from monai_adv.studies.export import attack_files
from monai_adv.victims import load_victim

SUBJECT = "BraTS2021_01659"


@pytest.mark.real
@pytest.mark.slow
def test_adversarial_files_of_a_real_patient_keep_its_geometry(tmp_path: Path) -> None:
    root, out = real_data("brats_2mm"), tmp_path
    (done,) = attack_files(root, packaged_victim(), out, {"name": "fgsm", "eps": 0.2}, [SUBJECT])
    assert done.error is None
    item = next(i for i in brats_datalist(root) if i["subject"] == SUBJECT)
    for source, ending in zip(item["image"], ("t1", "t1ce", "t2", "flair")):
        before = sitk.ReadImage(source)
        after = sitk.ReadImage(str(out / SUBJECT / f"{SUBJECT}_{ending}.nii.gz"))
        assert after.GetSize() == before.GetSize()
        for name in ("GetOrigin", "GetSpacing", "GetDirection"):
            assert np.allclose(getattr(after, name)(), getattr(before, name)(), atol=1e-5)
        x, y = (sitk.GetArrayFromImage(v).astype(float) for v in (before, after))
        assert (y[x == 0] == 0).all()
        assert np.abs(y - x).max() == np.floor(0.2 * x[x != 0].std())  # whole numbers, as the source stores them


@pytest.mark.real
def test_the_gradient_reaches_the_scanner_units_of_a_real_patient() -> None:
    from monai_adv.data import load_case

    root = real_data("brats_2mm")
    item = next(i for i in brats_datalist(root) if i["subject"] == SUBJECT)
    image = load_case(item)["image"].as_tensor()[None, :, 20:84, 30:94, 5:69].clone().requires_grad_(True)
    logits = load_victim(packaged_victim())(image)
    (gradient,) = torch.autograd.grad(logits[:, 1:].sum(), image)
    assert torch.isfinite(gradient).all()
    assert (gradient[image == 0] == 0).all()
    assert (gradient != 0).float().mean() > 0.3
