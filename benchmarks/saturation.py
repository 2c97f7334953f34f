"""How much of a network's output gives plain cross entropy no gradient: what defensive distillation hides behind.

    python benchmarks/saturation.py FOLDER undefended.pt student.pt ... [--every 5]

Per checkpoint, over the voxels of the foreground of all subjects and of the clean images: the share whose gradient of
the cross entropy by the logits is exactly 0 in float32, the same of the logit margin, and the median of the largest
logit. The share that an attack reports (``zero_gradient``) is of voxels of the *image*, and stays near 0: every one of
them lies in the receptive field of some voxel that is not saturated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from monai_adv.losses import as_loss
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.victims import load_victim


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--every", type=int, default=1, help="only every n-th subject by name")
    arguments = parser.parse_args()
    items = cases.select(arguments.folder, None, None)[1][:: arguments.every]
    rows = []
    for path in arguments.checkpoints:
        victim = load_victim(path)
        for item in items:
            case = cases.load(item, DataConfig(root=arguments.folder))
            inside = (case.image != 0).any(1)
            with torch.no_grad():
                logits = victim(case.image)
            row = {"checkpoint": path.name, "median largest logit": float(logits.amax(1)[inside].median())}
            for loss in ("ce", "margin"):
                leaf = logits.clone().requires_grad_(True)
                value = as_loss(loss)(leaf, victim.head.label_from_classes(case.classes), victim.head)
                slope = torch.autograd.grad(value.sum(), leaf)[0]
                row[f"{loss} without gradient"] = float((slope == 0).all(1)[inside].double().mean())
            rows.append(row)
    print(pd.DataFrame(rows).groupby("checkpoint", sort=False).mean().round(4).to_string())
    print(f"{len(items)} subjects")


if __name__ == "__main__":
    main()
