"""The published ablation of the segmentation-mask attack: SSM, ASM, ASMA and, beside them, targeted PGD."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from monai_adv.attacks import Attack, AttackResult, create, option_names, target_accuracy, target_iou
from monai_adv.data.files import check_writable, write_atomic
from monai_adv.errors import ConfigError, DataError, MonaiAdvError
from monai_adv.losses import make_target
from monai_adv.metrics import perturbation_norms
from monai_adv.stats.tables import markdown
from monai_adv.studies import cases
from monai_adv.studies.export import CONFIG
from monai_adv.studies.records import csv_bytes
from monai_adv.victims import Victim, load_victim

METHODS = ("ssm", "asm", "asma")
MEASURES = ("l2", "linf", "iou", "pixel_accuracy")
PUBLISHED: dict[str, dict[str, tuple[str, str, str, str]]] = {
    "glaucoma": {
        "ssm": ("4.60", "0.22", "47 %", "94 %"),
        "asm": ("2.82", "0.17", "94 %", "99 %"),
        "asma": ("2.47", "0.17", "97 %", "99 %"),
    },
    "ISIC": {
        "ssm": ("11.76", "-", "43 %", "-"),
        "asm": ("4.11", "-", "89 %", "-"),
        "asma": ("3.88", "-", "89 %", "-"),
    },
}
"""L2, L-inf, IoU and pixel accuracy of Ozbulak et al. 2019 on their own data: 2D images in [0, 1]."""


@dataclass
class Shown:
    """One method on one subject, for the figure.

    Attributes:
        image: adversarial ``(C, *spatial)``.
        prediction: region name -> mask.
        masks: voxels that counted in the loss, one mask per step of ``steps``; empty without an adaptive mask.
        steps: their steps.
        note: the measures in one line.
    """

    image: np.ndarray
    prediction: dict[str, np.ndarray]
    masks: list[np.ndarray] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    note: str = ""


@dataclass
class View:
    """One subject, for the figure: clean image, masks by region, and every method."""

    image: np.ndarray
    label: dict[str, np.ndarray]
    target: dict[str, np.ndarray]
    prediction: dict[str, np.ndarray]
    spacing: tuple[float, ...]
    affine: np.ndarray
    methods: dict[str, Shown] = field(default_factory=dict)


@dataclass
class Ablated:
    """What became of one subject.

    Attributes:
        subject: its name.
        rows: one record per method.
        view: what a figure shows; None where none was asked for.
        error: why there is nothing, or None.
    """

    subject: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    view: View | None = None
    error: str | None = None


def ablate(
    root: str | Path,
    checkpoint: str | Path,
    *,
    target: str | Mapping[str, Any] = "next",
    mode: str = "calibrated",
    steps: int | None = None,
    eps: Sequence[float] = (0.1,),
    units: str = "std",
    options: Mapping[str, Any] | None = None,
    subjects: Sequence[str] | None = None,
    scheme: str | None = None,
    figures: int | None = None,
    snapshots: int = 5,
    on_progress: Callable[[float, str], None] | None = None,
) -> Iterator[Ablated]:
    """Run SSM, ASM, ASMA and targeted PGD on subjects of a folder, all towards the same target.

    Args:
        root: folder of NIfTI files with labels.
        checkpoint: the victim.
        target: "next" (the mask of the next subject by name, brought over by world coordinates, as a cohort has no
            other pairs), ``{"subject": name}``, ``{"file": path, "scheme": ...}``, or a rule of
            :func:`monai_adv.losses.make_target`.
        mode: "calibrated" or "paper", of the three.
        steps: gradient steps of all four; the mode's own number if None.
        eps: budgets of PGD; the three are unbounded.
        units: of norms, of PGD's budgets and of the first step.
        options: further options of the three, e.g. ``{"first_step": .05}``; each takes those it knows.
        subjects: names of subjects; all if None.
        scheme: label scheme where the names do not settle it.
        figures: number of subjects whose ``view`` is kept, the first ones; all if None.
        snapshots: steps at which the adaptive mask is kept for the figure.
        on_progress: told the share done and what is going on.

    Yields:
        One :class:`Ablated` per subject, as it is done; a bad subject costs only itself.

    Raises:
        ConfigError: for an unknown subject, target or option.
    """
    attacks = _attacks(mode, steps, eps, units, dict(options or {}))
    victim = load_victim(checkpoint)
    usable, wanted, broken = cases.select(root, scheme, subjects)
    items = {item["subject"]: item for item in usable}
    for problem in broken:
        yield Ablated(problem.subject, error=str(problem))
    if target == "next" and len(items) < 2:
        raise ConfigError(f"target 'next' needs two usable subjects in {root}; use target 'background' for one")
    drawn = 0
    chosen = sorted(item["subject"] for item in wanted)
    for index, name in enumerate(chosen):

        def say(share: float, what: str, index: int = index) -> None:
            if on_progress is not None:
                on_progress((index + share) / len(chosen), what)

        kept = snapshots if figures is None or drawn < figures else 0
        try:
            yield _one(items[name], target, items, victim, attacks, kept, say)
            drawn += 1
        except (MonaiAdvError, RuntimeError, MemoryError) as error:
            yield Ablated(name, error=f"{name}: {error}")


def _attacks(
    mode: str, steps: int | None, eps: Sequence[float], units: str, options: dict[str, Any]
) -> list[tuple[str, dict[str, Any], Attack]]:
    """Title, what :func:`create` was given, and the attack; PGD takes the steps of the others."""
    unknown = sorted(set(options) - {o for name in METHODS for o in option_names(name)})
    if unknown:
        raise ConfigError(f"no option {', '.join(unknown)}: asma takes {', '.join(option_names('asma'))}")
    made = []
    for name in METHODS:
        spec: dict[str, Any] = {"name": name, "eps": math.inf, "units": units, "mode": mode, "steps": steps}
        spec |= {k: v for k, v in options.items() if k in option_names(name)}
        made.append((name, spec, create(**spec)))
    count = made[0][2].steps  # type: ignore[attr-defined]
    for value in eps:
        spec = {"name": "pgd", "eps": value, "units": units, "steps": count, "loss": "ce", "target": "background"}
        made.append((f"pgd {value:g} {units}", spec, create(**spec)))
    return made


def _one(
    item: Mapping[str, Any],
    rule: str | Mapping[str, Any],
    items: Mapping[str, Mapping[str, Any]],
    victim: Victim,
    attacks: Sequence[tuple[str, dict[str, Any], Attack]],
    snapshots: int,
    say: Callable[[float, str], None],
) -> Ablated:
    case = cases.load(item, CONFIG)
    head, image = victim.head, case.image
    label, mask = head.label_from_classes(case.classes), None
    with torch.no_grad():
        logits = victim(image, case.affine)
    if rule == "next":
        rule, mask = _next(case, items, victim)
    elif isinstance(rule, Mapping) and set(rule) & {"subject", "file"}:
        mask = cases.target_mask(rule, case, items, head)
    brain = (image != 0).any(1, keepdim=True)
    target = make_target(rule if mask is None else mask, label, logits, head, spacing=case.spacing, support=brain)
    clean = victim.discretise(logits)
    done = Ablated(case.subject)
    if snapshots:
        shown = [_masks(victim, found) for found in (label, target, clean)]
        done.view = View(image[0].numpy(), shown[0], shown[1], shown[2], case.spacing, case.affine.numpy())
    for number, (title, spec, made) in enumerate(attacks):
        say(number / len(attacks), f"{case.subject} {title}")
        attack = create(**spec, snapshots=snapshots) if "snapshots" in option_names(spec["name"]) else made
        result = attack(victim, image, label, target=target, spacing=case.spacing)
        row = _row(title, attack, result, image, target, clean, victim)
        about = rule if isinstance(rule, str) else ", ".join(f"{k} {v}" for k, v in rule.items())
        done.rows.append({"subject": case.subject, "target": about, **row})
        if done.view is not None:
            done.view.methods[title] = Shown(
                image=result.image[0].numpy(),
                prediction=_masks(victim, result.prediction),
                masks=[mask.any(0).numpy() for mask in result.details.get("masks", [[]])[0]],
                steps=result.details.get("mask_steps", [[]])[0],
                note=f"L2 {row['l2']:.3g}, L-inf {row['linf']:.2g} {attack.threat.units}, IoU {100 * row['iou']:.1f} %",
            )
    return done


def _next(case: cases.Case, items: Mapping[str, Mapping[str, Any]], victim: Victim) -> tuple[dict[str, str], Tensor]:
    """The mask of the first subject after this one that can be read: a bad file costs only its own subject."""
    names = sorted(items)
    start = names.index(case.subject)
    for name in [*names[start + 1 :], *names[:start]]:
        try:
            return {"subject": name}, cases.target_mask({"subject": name}, case, items, victim.head)
        except DataError:
            continue
    raise DataError("no other subject of the cohort can be read: use target 'background'")


def _row(
    title: str, attack: Attack, result: AttackResult, image: Tensor, target: Tensor, clean: Tensor, victim: Victim
) -> dict[str, Any]:
    norms = perturbation_norms(image[0].numpy(), result.image[0].numpy(), (image[0] != 0).numpy())
    units = attack.threat.units
    return {
        "method": title,
        "mode": getattr(attack, "mode", ""),
        "eps": attack.threat.eps,
        "units": units,
        "l2": norms[f"l2_{units}"],
        "linf": norms[f"linf_{units}"],
        "iou": float(target_iou(result.prediction, target, victim.head)[0]),
        "pixel_accuracy": float(target_accuracy(result.prediction, target)[0]),
        "clean_iou": float(target_iou(clean, target, victim.head)[0]),
        "l2_absolute": norms["l2_absolute"],
        "linf_absolute": norms["linf_absolute"],
        "scale": result.details.get("scale", [math.nan])[0],
        "success": bool(result.success[0]),
        "steps": attack.steps,  # type: ignore[attr-defined]
        "best_step": int(result.best_step[0]),
        "seconds": result.cost.seconds,
        "forwards": result.cost.forwards,
        "backwards": result.cost.backwards,
    }


def _masks(victim: Victim, segmentation: Tensor) -> dict[str, np.ndarray]:
    return {name: mask[0].cpu().numpy() for name, mask in victim.head.regions_of(segmentation).items()}


def summarise_ablation(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over subjects (NaN for one subject) of every measure, a row per method.

    Args:
        rows: records of :func:`ablate`.

    Returns:
        Columns method, n, and for each of L2, L-inf, IoU, pixel accuracy and seconds ``_mean`` and ``_sd``.
    """
    groups = rows.groupby("method", sort=False)
    table = groups.size().rename("n").to_frame()
    for measure in (*MEASURES, "seconds"):
        table[f"{measure}_mean"] = groups[measure].mean()
        table[f"{measure}_sd"] = groups[measure].std(ddof=1)
    return table.reset_index()


def write_ablation(folder: str | Path, rows: Sequence[Mapping[str, Any]]) -> tuple[Path, Path]:
    """Write ``ablation.csv`` (every subject and method) and ``ablation.md`` (the table beside the published one).

    Args:
        folder: where to.
        rows: records of :func:`ablate`.

    Returns:
        The two paths.
    """
    table = pd.DataFrame(list(rows))
    paths = Path(folder) / "ablation.csv", Path(folder) / "ablation.md"
    write_atomic(paths[0], csv_bytes(table))
    write_atomic(paths[1], _document(table).encode())
    return paths


def check_ablation_folder(folder: str | Path) -> None:
    """Make sure that the tables can be written before the attacks are run.

    Raises:
        WriteError: if they cannot.
    """
    check_writable(Path(folder) / "ablation.csv")


def _document(table: pd.DataFrame) -> str:
    first = table.iloc[0]
    units = first["units"]
    headers = ["method", "n", f"L2 [{units}]", f"L-inf [{units}]", "IoU [%]", "pixel accuracy [%]", "seconds"]
    measured = []
    for _, row in summarise_ablation(table).iterrows():
        cells = [str(row["method"]), str(row["n"])]
        for measure, factor, digits in (("l2", 1, 2), ("linf", 1, 3), ("iou", 100, 1), ("pixel_accuracy", 100, 2),
                                        ("seconds", 1, 1)):  # fmt: skip
            mean, sd = factor * row[f"{measure}_mean"], factor * row[f"{measure}_sd"]
            cells.append(f"{mean:.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}"))
        measured.append(cells)
    quoted = [
        [method, *(value for data in PUBLISHED.values() for value in data[method])] for method in METHODS
    ]  # fmt: skip
    columns = [f"{data}, {name}" for data in PUBLISHED for name in ("L2", "L-inf", "IoU", "pixel accuracy")]
    shown = [0, *(i for i in range(1, len(columns) + 1) if any(row[i] != "-" for row in quoted))]
    return "\n".join(
        [
            "# Ablation of the segmentation-mask attack",
            "",
            f"Mean ± SD over subjects; mode {first['mode']}, {first['steps']} steps. IoU (mean over the classes or "
            "regions that are in target or prediction) and pixel accuracy are against the target, on the clipped "
            "image.",
            "",
            markdown(headers, measured, notes=_ordering(table)),
            "## Published on other data",
            "",
            "Ozbulak et al. 2019: 2D images in [0, 1], other networks, 2,501 iterations of the paper mode. The norms "
            "have other units; only the order of the methods can be compared.",
            "",
            markdown([["method", *columns][i] for i in shown], [[row[i] for i in shown] for row in quoted]),
        ]
    )


def _ordering(table: pd.DataFrame) -> list[str]:
    """On how many subjects the published order of the methods holds."""
    wide = table.pivot(index="subject", columns="method", values=["l2", "iou"])
    lines = []
    for better, worse in (("asm", "ssm"), ("asma", "ssm"), ("asma", "asm")):
        small = wide["l2"][better] < wide["l2"][worse]
        close = wide["iou"][better] > wide["iou"][worse]
        lines.append(
            f"{better} against {worse}: smaller L2 on {small.sum()}, higher IoU on {close.sum()}, both on "
            f"{(small & close).sum()} of {len(wide)} subjects."
        )
    return lines
