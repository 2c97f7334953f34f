"""The Dice that survives on disk: an attack on the stored voxels, beside the same attack on the normalised tensor.

    python benchmarks/from_disk.py FOLDER CHECKPOINT OUTPUT [--resample] [--attack pgd] [--eps 0.0314] [--steps 10]

First road: ``attack_files`` attacks the voxels as their files store them and scores the files again from disk. Second
road, the control: the same attack with the same budget on the z-scored tensor, saved as float32 NIfTI and loaded by the
same pipeline, which normalises it again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from monai_adv import attacks
from monai_adv.data import MODALITIES, save_nifti, scan
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.studies.export import attack_files
from monai_adv.victims import Victim, load_victim, mean_dice, read_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--subject", action="append")
    parser.add_argument("--attack", default="pgd")
    parser.add_argument("--eps", type=float, default=8 / 255)
    parser.add_argument("--units", default="range")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--resample", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = {"name": options.attack, "eps": options.eps, "units": options.units, "steps": options.steps}
    items = {item["subject"]: item for item in scan(options.folder).items}
    rows = []
    for done in attack_files(
        options.folder, options.checkpoint, options.output, spec, options.subject, resample=options.resample
    ):
        if done.error or done.folder is None:
            print(done.error, flush=True)
            continue
        clean, memory, disk = (sum(d[i] for d in done.dice.values()) / len(done.dice) for i in range(3))
        row = {"subject": done.subject, "clean": clean, "voxels in memory": memory, "voxels from disk": disk}
        row |= control(items[done.subject], options, spec, done.folder)
        rows.append(row)
        print(row, flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.3f"))
    print(table.drop(columns="subject").mean().to_string(float_format="%.4f"))
    for road in ("voxels", "z-scores"):
        gap = (table[f"{road} from disk"] - table[f"{road} in memory"]).abs()
        print(f"{road}: largest difference {gap.max():.4f}, mean {gap.mean():.4f}")


def control(item: dict, options: argparse.Namespace, spec: dict, folder: Path) -> dict[str, float]:
    """The attack on the z-scored tensor, in memory and after a round trip through float32 files."""
    config = DataConfig(root=options.folder)
    case = cases.load(item, config)
    victim = load_victim(options.checkpoint)
    if options.resample:
        victim = victim.resampled(case.spacing, read_checkpoint(options.checkpoint)[1].spacing)
    assert victim.preprocessing is not None
    bare = Victim(victim.network, victim.inferer, victim.head)
    label = victim.head.label_from_classes(case.classes)
    attack = attacks.create(**spec)
    found = attack(bare, victim.preprocessing(case.image), label, spacing=case.spacing)
    paths = []
    for channel, modality in enumerate(MODALITIES):
        path = folder / f"normalised_{modality}.nii.gz"
        like = item["image"][channel] if isinstance(item["image"], (list, tuple)) else case.native
        save_nifti(case.restore(found.image[0])[channel].numpy(), like, path)
        paths.append(str(path))
    again = cases.load({**item, "image": paths}, config)
    kept = victim.predict(again.image)
    truth = victim.head.label_from_classes(again.classes)
    return {
        "z-scores in memory": float(found.score),
        "z-scores from disk": float(mean_dice(kept, truth, victim.head)),
    }


if __name__ == "__main__":
    main()
