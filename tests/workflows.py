"""A small cohort on disk and what a MONAI user puts around a network, for the tests of the workflows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import MODALITIES, case_file, make_cohort
from monai.networks.nets import UNet
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    Spacingd,
)

from monai_adv.inferers import GradientSlidingWindowInferer

SHAPE = (10, 14, 8)
ANISOTROPIC_LPS = np.array([[-1.0, 0, 0, 20], [0, -1.5, 0, 30], [0, 0, 2.0, -5], [0, 0, 0, 1]])
KEYS = ("image", "label")


def cohort(root: Path, n: int = 3) -> list[dict[str, Any]]:
    """Files of ``n`` asymmetric anisotropic LPS cases as a MONAI datalist."""
    subjects = make_cohort(root, n, shape=SHAPE, affine=ANISOTROPIC_LPS, naming="2023")
    return [
        {
            "image": [str(case_file(root, s, m, "2023")) for m in MODALITIES],
            "label": str(case_file(root, s, "label", "2023")),
            "subject": s,
        }
        for s in subjects
    ]


def preprocessing(*last: Any, spacing: Sequence[float] | None = (1.5, 1.5, 2.0)) -> Compose:
    """Loading, RAS, resampling and z-scores, as deployed."""
    resample = [] if spacing is None else [Spacingd(KEYS, spacing, mode=("bilinear", "nearest"))]
    return Compose(
        [
            LoadImaged(KEYS),
            EnsureChannelFirstd(KEYS),
            Orientationd(KEYS, "RAS", labels=None),
            *resample,
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            *last,
        ]
    )


def small_unet(seed: int = 0) -> torch.nn.Module:
    """A U-Net with random weights: four modalities in, four classes out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(3, 4, 4, (4, 8), (2,), norm="instance")


def windows() -> GradientSlidingWindowInferer:
    return GradientSlidingWindowInferer((8, 8, 8), 2, 0.25)


def one_hot() -> Compose:
    """What MONAI's metrics want of logits and class indices."""
    return Compose([AsDiscreted("pred", argmax=True, to_onehot=4), AsDiscreted("label", to_onehot=4)])
