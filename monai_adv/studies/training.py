"""Train a victim on a folder and score it on the subjects left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from monai_adv.data import load_case, scan
from monai_adv.data.files import check_writable
from monai_adv.engines import TrainConfig, train
from monai_adv.errors import ConfigError, DataError
from monai_adv.handlers import case_rows
from monai_adv.studies import cases
from monai_adv.studies.config import DataConfig
from monai_adv.studies.offline import adversarial_copies
from monai_adv.victims import Victim


def train_and_score(
    root: str | Path,
    output: str | Path,
    recipe: Mapping[str, Any],
    *,
    hold_out: int = 5,
    scheme: str | None = None,
    command: str | None = None,
    on_step: Callable[[float, float], None] | None = None,
) -> tuple[pd.DataFrame | None, list[str]]:
    """Train a network on a folder, write its checkpoint, and score the subjects left out.

    Args:
        root: folder of NIfTI files with labels.
        output: checkpoint to write.
        recipe: fields of :class:`monai_adv.engines.TrainConfig`. A method ``{"name": "offline", "attack": "ifgsm",
            **options}`` attacks the network of ``init`` once on every training subject, writes the copies beside the
            checkpoint (``<name>_copies``), and trains it further on originals and copies.
        hold_out: leave out every n-th subject by name, from the first; 0 trains on all.
        scheme: label scheme where the names do not settle it.
        command: command line to store beside the weights.
        on_step: see :func:`monai_adv.engines.train`.

    Returns:
        Dice and HD95 per left-out subject and region with the mean and median of Dice, or None without any; and one
        line for every subject that could not be used (it costs only itself).
    """
    check_writable(output)
    found = scan(root, scheme)
    problems = [str(p) for p in found.problems if p.severity == "error"]
    items = found.items
    held = items[::hold_out] if hold_out else []
    kept = [item for item in items if item not in held]
    kept, held = (_readable(part, problems) for part in (kept, held))
    if not kept:
        why = (
            "leave out fewer (--hold-out 5; 0 leaves out none)" if held else f"none can be used: monai-adv check {root}"
        )
        said = [f"nothing to train on in {root}: {len(held)} subjects held out; {why}", *problems[:3]]
        raise ConfigError("\n".join(said + [f"... and {len(problems) - 3} more"] * (len(problems) > 3)))
    spacing = cases.load(kept[0], DataConfig(root=Path(root))).spacing
    provenance: dict[str, Any] = {"command": command, "held_out": [item["subject"] for item in held]}
    config = TrainConfig(**recipe)
    if config.method is not None and config.method.get("name") == "offline":
        provenance["method"] = dict(config.method)
        kept = _with_copies(kept, root, Path(output), config, scheme, problems)
        config = replace(config, method=None)
    victim, _ = train(kept, output, config, spacing=spacing, provenance=provenance, on_step=on_step)
    table = score(victim, held, DataConfig(root=Path(root))) if held else None
    return table, problems


def _with_copies(
    items: list[dict[str, Any]],
    root: str | Path,
    output: Path,
    config: TrainConfig,
    scheme: str | None,
    problems: list[str],
) -> list[dict[str, Any]]:
    """The items and an adversarial copy of each; what is wrong with a subject is added to ``problems``."""
    if config.init is None:
        raise ConfigError("offline copies are made with a trained network: give its checkpoint as init (--init)")
    attack = {key: value for key, value in (config.method or {}).items() if key not in ("name", "attack")}
    attack["name"] = (config.method or {}).get("attack", "ifgsm")
    folder = output.with_name(f"{output.stem}_copies")
    both, failed = adversarial_copies(items, root, config.init, folder, attack, scheme=scheme)
    problems += failed
    return both


def _readable(items: list[dict[str, Any]], problems: list[str]) -> list[dict[str, Any]]:
    """The items that can be loaded; what is wrong with the others is added to ``problems``."""
    good = []
    for item in items:
        try:
            load_case(item)
        except DataError as error:
            problems.append(str(error))
        else:
            good.append(item)
    return good


def score(victim: Victim, items: list[dict[str, Any]], config: DataConfig) -> pd.DataFrame:
    """Clean scores of a victim: one row per subject, a column of Dice and HD95 per region, mean and median below."""
    rows: dict[str, dict[str, float]] = {}
    for item in items:
        case = cases.load(item, config)
        with torch.no_grad():
            prediction = victim.predict(case.image, case.affine)
        scored = case_rows(
            {"subject": case.subject},
            head=victim.head,
            prediction=prediction,
            label=victim.head.label_from_classes(case.classes),
            spacing=case.spacing,
            truth_outside=case.truth_outside(victim.head),
        )
        rows[case.subject] = {f"Dice {r['region']}": r["dice"] for r in scored} | {
            f"HD95 {r['region']}": r["hd95"] for r in scored
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    dice = [c for c in table.columns if c.startswith("Dice")]
    summary = pd.DataFrame({"mean": table[dice].mean(), "median": table.median()}).T
    return pd.concat([table, summary]).rename_axis("subject").reset_index()
