"""The tables of ``synthesis.py`` from what it measured, and the classifier of real and attacked slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.networks.nets import DenseNet
from torch import Tensor
from torch.nn import functional

from monai_adv.defenses.detection import detection_roc
from monai_adv.stats import holm, wilcoxon
from monai_adv.stats.tables import markdown
from monai_adv.studies.units import safe_name

KEYS = ["subject", "victim", "dims", "generator", "kind", "drop"]
EQUAL = 0.03  # of drops that count as the same
PAIRS = [(kind, other) for kind in ("generator", "refined", "optimize") for other in ("pgd", "fgsm")]


def read(path: Path) -> pd.DataFrame | None:
    return pd.read_csv(path, dtype={"subject": str, "victim": str, "generator": str}, keep_default_na=False,
                       na_values=[""]) if path.is_file() else None  # fmt: skip


def slices_path(output: Path, victim: str, dims: int, tag: str, kind: str, subject: str) -> Path:
    return output / "slices" / safe_name(f"{victim}_{dims}d_{tag}_{kind}") / f"{safe_name(subject)}.npz"


def summary(output: Path, slices_drop: float, classifier_steps: int) -> str:
    """All tables as Markdown, written to ``summary.md`` too."""
    table = read(output / "cases.csv")
    if table is None:
        raise SystemExit(f"{output} holds no cases.csv")
    drops: list[list[str]] = []
    random: list[tuple[list[str], dict[str, Any]]] = []
    likeness: list[list[str]] = []
    for (victim, dims, tag), group in synthesised(table):
        for (kind, drop), rows in group.groupby(["kind", "drop"]):
            drops.append(drop_row(victim, dims, tag, str(kind), float(drop), rows))
        for drop, rows in group.groupby("drop"):
            test = control_row(rows)
            if test:
                random.append(([str(victim), f"{dims}D", str(tag), f"{drop:g}"], test))
        for kind, other in PAIRS:
            for drop in sorted(set(group["drop"])):
                row = likeness_row(*alike(table, group, kind, other, float(drop)))
                if row:
                    likeness.append([str(victim), f"{dims}D", str(tag), kind, other, f"{drop:g}", *row])
    for index, p in enumerate(holm([row[1]["p"] for row in random]) if random else []):
        random[index][1]["Holm p"] = p
    where = ["victim", "dims", "generator"]
    parts = [
        "Drops asked for and achieved (oracle: drop of a perfect reader against the moved truth / the unmoved one)",
        markdown([*where, "kind", "drop", "n", "clean Dice", "achieved", "mean abs. diff.", "within .03",
                  "Dice below the drop", "min det J", "max mm", "oracle", "forwards", "seconds",
                  "generation / forward"], drops),
        "Generator against random fields of the same root mean square",
        markdown([*where, "drop", "n", "generator", "control", "p", "Holm p", "rank-biserial"],
                 [[*head, *(show(v) for v in row.values())] for head, row in random]),
        f"SSIM where Dice fell alike (drops of both within {EQUAL})",
        markdown([*where, "synthesis", "against", "drop", "n", "SSIM of the synthesis", "to the warped image",
                  "of the other", "p"], likeness),
        f"A fresh classifier of real and attacked slices, where Dice fell alike, drop {slices_drop:g}",
        markdown([*where, "synthesis", "against", "subjects", "slices", "AUC of the synthesis", "95 % interval",
                  "of the other", "95 % interval"], classifiers(table, output, slices_drop, classifier_steps)),
    ]  # fmt: skip
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    (output / "summary.md").write_text(text)
    return text


def synthesised(table: pd.DataFrame) -> Any:
    return table[table["kind"].isin(("generator", "refined", "optimize", "control"))].groupby(
        ["victim", "dims", "generator"]
    )


def show(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def drop_row(victim: Any, dims: Any, tag: Any, kind: str, drop: float, rows: pd.DataFrame) -> list[str]:
    ratio = rows["generation_seconds"] / rows["forward_seconds"]
    return [
        str(victim), f"{dims}D", str(tag), kind, f"{drop:g}", str(len(rows)), f"{rows['clean_dice'].mean():.3f}",
        f"{rows['achieved'].mean():.3f}", f"{rows['difference'].mean():.3f}",
        f"{int((rows['difference'] <= EQUAL).sum())}/{len(rows)}", str(int((rows["clean_dice"] < drop).sum())),
        f"{rows['min_jacobian'].min():.3f}", f"{rows['max_mm'].max():.2f}",
        f"{rows['oracle_moved'].mean():.3f} / {rows['oracle_unmoved'].mean():.3f}", f"{rows['forwards'].mean():.1f}",
        f"{rows['seconds'].mean():.1f}", f"{ratio.mean():.2f}" if ratio.notna().any() else "",
    ]  # fmt: skip


def control_row(rows: pd.DataFrame) -> dict[str, Any]:
    """Generator against control, paired by subject."""
    pairs = rows.pivot_table(index="subject", columns="kind", values="achieved")
    if not {"generator", "control"} <= set(pairs):
        return {}
    pairs = pairs[["generator", "control"]].dropna()
    test = wilcoxon(pairs["generator"].to_numpy(), pairs["control"].to_numpy())
    means = {kind: float(pairs[kind].mean()) for kind in ("generator", "control")}
    return {"n": len(pairs), **means, "p": test.pvalue, "Holm p": test.pvalue, "rank-biserial": test.rank_biserial}


def alike(
    table: pd.DataFrame, group: pd.DataFrame, kind: str, other: str, drop: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of a synthesis and of another attack, by subject, of the subjects whose Dice fell alike by both."""
    same = (table["victim"] == group["victim"].iloc[0]) & (table["dims"] == group["dims"].iloc[0])
    first = group[(group["kind"] == kind) & (group["drop"] == drop)].set_index("subject")
    second = table[same & (table["kind"] == other) & (table["drop"] == drop)].set_index("subject")
    both = first.index.intersection(second.index)
    gap = (first.loc[both, "achieved"] - second.loc[both, "achieved"]).abs()
    both = both[gap.to_numpy() <= EQUAL]
    return first.loc[both], second.loc[both]


def likeness_row(first: pd.DataFrame, second: pd.DataFrame) -> list[str]:
    if not len(first):
        return []
    p = wilcoxon(first["ssim"].to_numpy(), second["ssim"].to_numpy()).pvalue
    means = (first["ssim"].mean(), first["ssim_warped"].mean(), second["ssim"].mean())
    return [str(len(first)), *(f"{mean:.4f}" for mean in means), f"{p:.3g}"]


# ------------------------------------------------------------------------------------------------------ classifier
def classifiers(table: pd.DataFrame, output: Path, slices_drop: float, classifier_steps: int) -> list[list[str]]:
    found = []
    for (victim, dims, tag), group in synthesised(table):
        for kind, other in PAIRS:
            subjects = sorted(alike(table, group, kind, other, slices_drop)[0].index)
            if len(subjects) < 4:
                continue

            def slices(name: str, owner: str, who: list[str] = subjects, v: str = victim, d: int = dims) -> list[Any]:
                return [np.load(slices_path(output, v, d, owner, name, s))["slices"].astype(np.float32) for s in who]

            real = slices("clean", "none")
            row = [str(victim), f"{dims}D", str(tag), kind, other, str(len(subjects)), str(sum(map(len, real)))]
            for name, owner in ((kind, tag), (other, "none")):
                roc = detection_roc(*told_apart(real, slices(f"{name}-{slices_drop:g}", owner), classifier_steps))
                low, high = roc.confidence_interval
                row += [f"{roc.auc:.3f}", f"{low:.3f} to {high:.3f}"]
            found.append(row)
    return found


def told_apart(real: list[Any], attacked: list[Any], steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every subject's real and attacked slices by a network that has seen the other half of the subjects."""
    size = np.max([s.shape[2:] for s in (*real, *attacked)], axis=0)
    order = np.random.default_rng(seed).permutation(len(real))
    scores = np.zeros((2, len(real)))
    for test in (order[::2], order[1::2]):
        train = np.setdiff1d(order, test)
        sets = [torch.cat([padded(kind[i], size) for i in train]) for kind in (real, attacked)]
        network = trained(sets, steps, seed)
        with torch.no_grad():
            part = np.array([[float(network(padded(k[i], size)).mean()) for i in test] for k in (real, attacked)])
        scores[:, test] = part - part.mean()  # two networks have two zeros
    return scores[0], scores[1]


def trained(sets: list[Tensor], steps: int, seed: int) -> DenseNet:
    """A small DenseNet: real slices 0, attacked ones 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DenseNet(2, sets[0].shape[1], 1, init_features=8, growth_rate=8, block_config=(2, 2, 2))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    target = torch.cat([torch.zeros(8, 1), torch.ones(8, 1)])
    for _ in range(steps):
        batch = torch.cat([s[torch.randint(len(s), (8,), generator=generator)] for s in sets])
        flipped = torch.rand(16, 1, 1, 1, generator=generator) < 0.5
        batch = torch.where(flipped, batch.flip(2), batch)  # left and right
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(network(batch), target).backward()
        optimizer.step()
    return network.eval()


def padded(slices: Any, size: Any) -> Tensor:
    """Slices in the middle of a common size."""
    missing = np.asarray(size) - slices.shape[2:]
    before = missing // 2
    return torch.from_numpy(np.pad(slices, [(0, 0), (0, 0), *zip(before, missing - before)]))
