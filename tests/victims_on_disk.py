"""A victim that is good at `builders.brain_volumes` without training: its classes are read off one linear layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from builders import brain_volumes
from torch import nn

from monai_adv.networks import build_network
from monai_adv.transforms import NormalizeNonzero
from monai_adv.victims import VictimConfig, save_checkpoint

TINY = {"name": "UNet", "spatial_dims": 3, "in_channels": 4, "out_channels": 4, "channels": [4, 8], "strides": [2],
        "num_res_units": 0, "norm": "INSTANCE"}  # fmt: skip


def tiny_checkpoint(path: Path, steps: int = 60, head: str = "softmax") -> Path:
    """Train a tiny U-Net for some steps on one built subject, so that attacks have something to break."""
    torch.manual_seed(0)
    network = build_network({**TINY, "out_channels": 4 if head == "softmax" else 3})
    volumes = brain_volumes()
    image = torch.from_numpy(np.stack([volumes[m] for m in ("T1", "T1c", "T2", "FLAIR")]).astype(np.float32))
    image = NormalizeNonzero()(image)[None]
    label = torch.from_numpy(volumes["label"].astype(np.int64))[None]
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
    bits = torch.stack([torch.isin(label[0], torch.tensor(c)) for c in ((1, 3), (1, 2, 3), (3,))])[None].float()
    for _ in range(steps):
        optimizer.zero_grad()
        logits = network(image)
        if head == "softmax":
            loss = nn.functional.cross_entropy(logits, label)
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, bits)
        loss.backward()
        optimizer.step()
    config = VictimConfig(
        network={**TINY, "out_channels": 4 if head == "softmax" else 3}, head=head, roi_size=[8, 8, 8], overlap=0.25
    )
    return save_checkpoint(path, network, config)
