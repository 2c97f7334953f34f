"""Detection by squeezing disagreement, for attacks that do not know the detector and one that does.

    python benchmarks/detection.py FOLDER CHECKPOINT [--filter median] [--eps 0.2] [--subjects 8]

Per attack: mean Dice over regions, the AUC of disagreement (mean over regions) between clean and adversarial images
with its bootstrap interval over subjects, and the share of adversarial images found when no clean one is flagged.
``noise`` is the control. ``aware`` is PGD on the detector-aware victim, whose logits are the mean before and after the
filter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from monai_adv import attacks
from monai_adv.defenses import Purify, detection_roc, detector_aware, disagreement
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.victims import load_victim, mean_dice


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--filter", default="median")
    parser.add_argument("--eps", type=float, default=0.2)
    parser.add_argument("--subjects", type=int, default=8)
    arguments = parser.parse_args()
    victim, purify = load_victim(arguments.checkpoint), Purify(arguments.filter)
    aware = detector_aware(victim, purify)
    crafted = {
        "noise": ({"name": "noise"}, victim),
        "FGSM": ({"name": "fgsm"}, victim),
        "PGD": ({"name": "pgd", "steps": 10}, victim),
        "PGD aware": ({"name": "pgd", "steps": 10}, aware),
    }
    scores: dict[str, list[float]] = {name: [] for name in ["clean", *crafted]}
    dice: dict[str, list[float]] = {name: [] for name in scores}
    for item in cases.select(arguments.folder, None, None)[1][: arguments.subjects]:
        case = cases.load(item, DataConfig(root=arguments.folder))
        label = victim.head.label_from_classes(case.classes)
        images: dict[str, torch.Tensor] = {"clean": case.image}
        for name, (spec, attacked) in crafted.items():
            attack = attacks.create(**spec, eps=arguments.eps)
            images[name] = attack(attacked, case.image, label, spacing=case.spacing, affine=case.affine).image
        for name, image in images.items():
            scores[name].append(float(disagreement(victim, image, purify, case.affine)["mean"][0]))
            dice[name].append(float(mean_dice(victim.predict(image, case.affine), label, victim.head)[0]))
        print(case.subject, {name: round(values[-1], 3) for name, values in scores.items()}, flush=True)
    rows = []
    for name in crafted:
        roc = detection_roc(scores["clean"], scores[name])
        none = roc.table[roc.table["fpr"] == 0]["tpr"].max()
        low, high = roc.confidence_interval
        rows.append({"attack": name, "mean Dice": np.mean(dice[name]), "AUC": roc.auc, "95 % low": low, "high": high,
                     "found without a false alarm": none})  # fmt: skip
    print(f"clean Dice {np.mean(dice['clean']):.3f}, {len(dice['clean'])} subjects, filter {arguments.filter}")
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
