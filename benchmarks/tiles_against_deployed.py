"""What a perturbation crafted on separate tiles is worth in the deployed pipeline, beside one crafted through it.

    python benchmarks/tiles_against_deployed.py FOLDER CHECKPOINT [--every 5] [--eps 0.1] [--steps 10]

Many tools attack windows of a volume one by one. The deployed network sees overlapping windows, blended. Both roads get
the same budget (L-inf, standard deviations of the foreground per modality), the same loss and the same number of
windows to compute: tiles do not overlap, so they get more steps. Both are scored by the deployed pipeline, paired over
subjects by the exact Wilcoxon signed-rank test.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.inferers.utils import dense_patch_slices
from monai.utils import fall_back_tuple

from monai_adv import attacks
from monai_adv.data import scan
from monai_adv.stats import wilcoxon
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.threats import LInf
from monai_adv.victims import Victim, load_victim, mean_dice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--loss", default="dice_ce")
    options = parser.parse_args()
    torch.set_num_threads(1)
    victim = load_victim(options.checkpoint)
    rows = []
    for item in scan(options.folder).items[:: options.every]:
        case = cases.load(item, DataConfig(root=options.folder))
        label = victim.head.label_from_classes(case.classes)
        spec = {"eps": options.eps, "bounds": None, "loss": options.loss, "steps": options.steps}
        deployed = attacks.create("pgd", **spec)(victim, case.image, label, spacing=case.spacing)
        image, steps = on_tiles(victim, case.image, label, options.eps, options.steps, options.loss)
        row = {"subject": case.subject, "clean": float(deployed.clean_score), "deployed": float(deployed.score)}
        row["tiles"] = float(mean_dice(victim.predict(image), label, victim.head))
        row["tile steps"] = steps
        rows.append(row)
        print(row, flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.3f"))
    print(table[["clean", "deployed", "tiles"]].mean())
    test = wilcoxon(table["tiles"].to_numpy(), table["deployed"].to_numpy())
    print(f"tiles - deployed: {test}")


def on_tiles(
    victim: Victim, image: torch.Tensor, label: torch.Tensor, eps: float, steps: int, loss: str
) -> tuple[torch.Tensor, int]:
    """The image with every tile attacked for itself, in scanner units, and the steps each tile got."""
    assert victim.preprocessing is not None
    ball = LInf(eps, bounds=None).bind(image)
    data = victim.preprocessing(image)
    size = fall_back_tuple(victim.inferer.roi_size, data.shape[2:])
    size = tuple(min(a, b) for a, b in zip(size, data.shape[2:]))
    tiles = dense_patch_slices(data.shape[2:], size, tuple(size))
    windows = dense_patch_slices(data.shape[2:], size, tuple(max(1, int(s * (1 - 0.5))) for s in size))
    more = max(1, round(steps * len(windows) / len(tiles)))
    # z-scores are linear in the voxels: one standard deviation of the foreground is what it is divided by
    divisor = torch.stack([image[0, c][image[0, c] != 0].std(correction=0) for c in range(image.shape[1])])
    radius = tuple((ball.scale.flatten() / divisor).tolist())
    bare = Victim(victim.network, head=victim.head)
    attack = attacks.create("pgd", eps=eps, units="absolute", proportions=radius, bounds=None, loss=loss, steps=more)
    change = torch.zeros_like(data)
    for tile in tiles:
        where = (slice(None), slice(None), *tile)
        if bool((data[where] != 0).any()):
            change[where] = attack(bare, data[where].contiguous(), label[where].contiguous()).perturbation
    return image + change * divisor.view(1, -1, *[1] * (image.dim() - 2)), more


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
