"""Learned synthesis as it is measured: is the drop hit, at what size, does it take the search, does it look real.

    python benchmarks/synthesis.py FOLDER --checkpoint v.pt --generator g.pt -o OUT [--dims 2] [--drops .1 .2 .3 .5]
    python benchmarks/synthesis.py -o OUT --summary

Kinds: ``generator`` (one pass, then the search of the scale), ``refined`` (the generator's fields, then a few gradient
steps on them), ``optimize`` (fields by gradient, case by case, within the generator's limits), ``control`` (random
fields of the root mean square that ``generator`` found), ``pgd`` and ``fgsm`` with the budget at which Dice falls by
the same drop. A row of ``OUT/cases.csv`` per subject, victim, generator, kind and drop; rows that are there are not
measured again, so that the command goes on where it was ended, and several victims and generators share a folder. Costs
of ``pgd`` and ``fgsm`` are those of all drops so far, which share their evaluations. In two dimensions (``--dims 2``;
else what the generator has) a subject is its axial slice with most tumour.

The drop is that of the mean Dice over the regions that the truth has, against the moved truth where anatomy moves. The
oracle sees the truth itself, painted into an image that is warped and interpolated as the scan is, and thresholds it.
SSIM is that of the attacked with the clean image, and with the clean image warped alike (for the appearance alone).
``--summary`` prints the tables: the drops, generator against control (exact Wilcoxon, Holm), SSIM at equal Dice, and
how well a network that is trained afresh on half of the subjects tells attacked from real axial slices of the other
half (cross-fitted; AUC with a bootstrap interval over subjects).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from monai.data import MetaTensor
from monai.transforms import Spacing
from synthesis_tables import KEYS, read, slices_path, summary
from torch import Tensor

from monai_adv import attacks
from monai_adv.data import scan
from monai_adv.data.meta import plain
from monai_adv.errors import MonaiAdvError
from monai_adv.losses.region_dice import counted_regions, region_bits, region_dice
from monai_adv.metrics import image_quality
from monai_adv.networks import load_generator
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.studies.records import replace_rows
from monai_adv.transforms import NormalizeNonzeroBatch
from monai_adv.victims import Victim, load_victim
from monai_adv.victims.checkpoint import file_hash

KINDS = ("generator", "refined", "optimize", "control", "pgd", "fgsm")
LEARNED = ("generator", "refined", "control")
LARGEST = 4.0  # eps in standard deviations
SLICES = 16  # of a volume, for the classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--checkpoint", type=Path, help="the victim's")
    parser.add_argument("--generator", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--dims", type=int, choices=(2, 3), help="the generator's, else 3")
    parser.add_argument("--spacing", type=float, help="resample the scans to this voxel size in mm first")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--subjects", type=int, help="how many, spread over the folder; all by default")
    parser.add_argument(
        "--every", type=int, default=1, help="only every n-th, from the first: those left out of training"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--samples", type=int, default=1, help="codes per case")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of the drop; searches stop there")
    parser.add_argument("--optimize-steps", type=int, default=20)
    parser.add_argument("--refine-steps", type=int, default=5, help="of the kind refined")
    parser.add_argument("--pgd-steps", type=int, default=5)
    parser.add_argument("--slices-drop", type=float, default=0.3, help="drop whose images the classifier gets to see")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--classifier-steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.summary:
        print(summary(options.output, options.slices_drop, options.classifier_steps))
        return
    if options.folder is None or options.checkpoint is None:
        parser.error("FOLDER and --checkpoint are needed, or --summary")
    if options.generator is None and set(options.kinds) & set(LEARNED):
        parser.error(f"--generator is needed for the kinds {', '.join(LEARNED)}")
    measure(options)


# --------------------------------------------------------------------------------------------------------- measuring
def measure(options: argparse.Namespace) -> None:
    victim = load_victim(options.checkpoint)
    generator = None if options.generator is None else load_generator(options.generator)
    dims = options.dims or (3 if generator is None else generator.spatial_dims)
    path = options.output / "cases.csv"
    tag = "none" if options.generator is None else f"{options.generator.stem}-{file_hash(options.generator)[:6]}"
    name = f"{victim.name}-{file_hash(options.checkpoint)[:6]}"
    items = scan(options.folder).items[:: options.every]
    chosen = np.unique(
        np.linspace(0, len(items) - 1, min(options.subjects or len(items), len(items))).round().astype(int)
    )
    for item in (items[i] for i in chosen):
        wanted = [
            {"subject": item["subject"], "victim": name, "dims": dims, "kind": kind, "drop": drop,
             "generator": tag if kind in (*LEARNED, "optimize") else "none"}
            for kind in options.kinds
            for drop in options.drops
        ]  # fmt: skip
        done = read(path)
        known = set() if done is None else set(zip(*(done[key] for key in KEYS)))
        wanted = [row for row in wanted if tuple(row[key] for key in KEYS) not in known]
        if not wanted:
            continue
        try:
            subject = Subject(item, victim, generator, dims, (name, tag), options)
        except (MonaiAdvError, ValueError) as error:
            print(f"{item['subject']}: {error}", flush=True)
            continue
        for row in wanted:
            try:
                row |= subject.row(row["kind"], row["drop"])
            except MonaiAdvError as error:
                print(f"{row['subject']} {row['kind']} {row['drop']}: {error}", flush=True)
                continue
            with FileLock(path.with_suffix(".lock")):  # several of these commands may fill one table
                replace_rows(path, [row], KEYS)
            shown = ("achieved", "min_jacobian", "max_mm", "eps", "ssim", "oracle_moved", "forwards", "seconds")
            values = ", ".join(f"{k} {row[k]:.3g}" for k in shown if row.get(k) is not None)
            print(f"{row['subject']} {row['kind']} {row['drop']}: clean {row['clean_dice']:.3f}, {values}", flush=True)


class Subject:
    """One scan (or slice), what the victim makes of it, and one row per kind and drop."""

    def __init__(
        self, item: Any, victim: Victim, generator: Any, dims: int, names: tuple[str, str], options: argparse.Namespace
    ) -> None:
        self.victim_name, self.tag = names
        self.victim, self.generator, self.options, self.dims = victim, generator, options, dims
        self.name = item["subject"]
        image, classes, self.spacing = load(item, options)
        if dims == 2:
            axial = int((classes > 0).sum((0, 1, 2, 3)).argmax())
            image, classes, self.spacing = image[..., axial], classes[..., axial], self.spacing[:2]
        self.image = image.contiguous()
        self.label = victim.head.label_from_classes(classes)
        started = time.process_time()
        self.clean_dice = self.dice(victim.predict(self.image), self.label)
        self.forward_seconds = time.process_time() - started
        self.ladders: dict[str, Ladder] = {}
        self.keep("clean", "none", self.image)

    def dice(self, prediction: Tensor, label: Tensor) -> float:
        truth = region_bits(self.victim.head, label)
        counted = counted_regions(self.victim.head, truth)
        return float(region_dice(region_bits(self.victim.head, prediction), truth, counted))

    def row(self, kind: str, drop: float) -> dict[str, Any]:
        row = self._at_equal_dice(kind, drop) if kind in ("pgd", "fgsm") else self._synthesis(kind, drop)
        row["difference"] = abs(row["achieved"] - drop)
        return row | {"clean_dice": self.clean_dice, "forward_seconds": self.forward_seconds}

    def _synthesis(self, kind: str, drop: float) -> dict[str, Any]:
        spec: dict[str, Any] = {"drop": drop, "samples": self.options.samples, "tolerance": self.options.tolerance}
        if kind == "optimize":
            effect = None if self.generator is None else self.generator.effect
            spec |= {"optimize": True, "steps": self.options.optimize_steps, "effect": effect}
        else:
            spec |= {"generator": self.generator, "control": kind == "control"}
            if kind == "refined":
                spec |= {"optimize": True, "steps": self.options.refine_steps}
        attack: Any = attacks.create("synthesis", **spec)
        found = attack(self.victim, self.image, self.label, spacing=self.spacing)
        told = {name: values[0] for name, values in found.details.items()}
        warped = attack.effect.apply(self.image, self._moving(found.parameters), self.spacing, self.image != 0)
        self._keep(kind, drop, found.image)
        return {
            "achieved": told["drop"],
            "scale": told["scale"],
            "magnitude": told["magnitude"],
            "min_jacobian": told["min_jacobian"],
            "max_mm": told["max_displacement_mm"],
            "max_bias": told["max_bias"],
            "max_residual": told["max_residual"],
            **self._likeness(found.image),
            "ssim_warped": self._likeness(found.image, warped)["ssim"],
            **self._oracle(attack.effect, found.parameters, found.label),
            "forwards": found.cost.forwards,
            "backwards": found.cost.backwards,
            "seconds": found.cost.seconds,
            "generation_seconds": self._generation(attack.effect, drop) if kind == "generator" else None,
        }

    def _moving(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters without what changes the appearance."""
        return {k: v if k == "velocity" else torch.zeros_like(v) for k, v in parameters.items()}

    def _oracle(self, effect: Any, parameters: dict[str, Tensor], moved: Tensor) -> dict[str, float]:
        """By how much the Dice of a perfect reader falls, against the moved truth and against the truth left still."""
        head, velocity = self.victim.head, {k: v for k, v in parameters.items() if k == "velocity"}
        painted = 1 + region_bits(head, self.label)
        if velocity:
            painted = effect.apply(painted, velocity, self.spacing, painted != 0)
        seen = (painted > 1.5).float()
        truths = {"oracle_moved": region_bits(head, moved), "oracle_unmoved": region_bits(head, self.label)}
        return {name: 1 - float(region_dice(seen, truth)) for name, truth in truths.items()}

    def _generation(self, effect: Any, drop: float) -> float:
        """CPU seconds of one generated image: the generator's pass, its fields, the image and the moved label."""
        with torch.no_grad():
            started = time.process_time()
            raw = self.generator(self.image, torch.tensor([drop]), generator=torch.Generator().manual_seed(0))
            parameters = effect.from_unit(raw, self.image, self.spacing)
            effect.apply(self.image, parameters, self.spacing, self.image != 0)
            effect.warp_label(self.label, parameters, self.spacing)
        return time.process_time() - started

    def _at_equal_dice(self, kind: str, drop: float) -> dict[str, Any]:
        ladder = self.ladders.setdefault(kind, Ladder(self, kind))
        found = ladder.hit(drop)
        self._keep(kind, drop, found["image"])
        return {
            "achieved": found["drop"],
            "eps": found["eps"],
            **self._likeness(found["image"]),
            "forwards": ladder.forwards,
            "backwards": ladder.backwards,
            "seconds": ladder.seconds,
        }

    def _likeness(self, image: Tensor, clean: Tensor | None = None) -> dict[str, float]:
        clean = self.image if clean is None else clean
        quality = image_quality(clean[0].numpy(), image[0].detach().numpy(), (clean[0] != 0).numpy())
        return {"ssim": quality["ssim"], "psnr": quality["psnr"]}

    def _keep(self, kind: str, drop: float, image: Tensor) -> None:
        if drop == self.options.slices_drop:
            self.keep(f"{kind}-{drop:g}", "none" if kind in ("pgd", "fgsm") else self.tag, image)

    def keep(self, kind: str, tag: str, image: Tensor) -> None:
        """Axial slices as the classifier sees them: z-scored over the scan's foreground, those of the clean scan."""
        scores = NormalizeNonzeroBatch()(image.detach())[0]
        if self.dims == 3:
            filled = (self.image[0] != 0).any(0).sum((0, 1))
            usable = (filled >= 0.3 * filled.max()).nonzero().flatten()
            scores = scores[..., usable[torch.linspace(0, len(usable) - 1, min(SLICES, len(usable))).round().long()]]
        else:
            scores = scores[..., None]
        path = slices_path(self.options.output, self.victim_name, self.dims, tag, kind, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, slices=scores.movedim(-1, 0).half().numpy())


def load(item: Any, options: argparse.Namespace) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """Image, classes ``(1, 1, *spatial)`` and voxel size, in RAS, cropped, resampled where that is asked for."""
    case = cases.load(item, DataConfig(root=options.folder))
    if options.spacing is None:
        return case.image, case.classes, case.spacing

    def to(data: Tensor, mode: str) -> Tensor:
        found = Spacing([options.spacing] * 3, mode=mode, padding_mode="border")(MetaTensor(data, affine=case.affine))
        return plain(found)[None]

    inside = to((case.image[0] != 0).float(), "nearest") > 0  # no shell of faint voxels around the brain
    image = torch.where(inside, to(case.image[0], "bilinear"), 0.0)
    return image, to(case.classes[0].float(), "nearest").long(), (options.spacing,) * 3


@dataclass
class Ladder:
    """A norm-bounded attack at the budgets at which Dice falls by the drops asked for."""

    subject: Subject
    kind: str
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    seen: dict[float, float] = field(default_factory=dict)
    best: dict[float, dict[str, Any]] = field(default_factory=dict)

    def at(self, eps: float) -> float:
        """The drop at a budget in standard deviations; what it made is kept for the drops that it is nearest to."""
        if eps not in self.seen:
            subject = self.subject
            steps = {"steps": subject.options.pgd_steps} if self.kind == "pgd" else {}
            attack = attacks.create(self.kind, eps=eps, units="std", **steps)
            found = attack(subject.victim, subject.image, subject.label, spacing=subject.spacing)
            drop = self.seen[eps] = subject.clean_dice - subject.dice(found.prediction, subject.label)
            self.forwards, self.backwards = self.forwards + found.cost.forwards, self.backwards + found.cost.backwards
            self.seconds += found.cost.seconds
            for wanted in subject.options.drops:
                gap = abs(drop - min(wanted, subject.clean_dice))
                if wanted not in self.best or gap < self.best[wanted]["gap"]:
                    self.best[wanted] = {"gap": gap, "eps": eps, "drop": drop, "image": found.image}
        return self.seen[eps]

    def hit(self, wanted: float) -> dict[str, Any]:
        """Doubled until the drop is reached, then bisected; costs are those of all drops so far."""
        target = min(wanted, self.subject.clean_dice)
        low, high = 0.0, 0.01
        while self.at(high) < target and high < LARGEST:
            low, high = high, 2 * high
        for _ in range(8):
            if self.best[wanted]["gap"] <= self.subject.options.tolerance or self.at(high) < target:
                break
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(middle) < target else (low, middle)
        return self.best[wanted]


if __name__ == "__main__":
    main()
