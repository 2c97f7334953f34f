"""Signs in a run's records and traces that an attack is weaker than it should be.

Reference:
    Carlini et al., On evaluating adversarial robustness, 2019; Athalye et al., Obfuscated gradients give a false sense
    of security, ICML 2018.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from monai_adv.attacks import ATTACKS, attack_class
from monai_adv.studies.check import Check
from monai_adv.studies.defended import Declared

MARGIN = 0.01
"""Mean Dice by which an order must be reversed before it is said: half of what repeats of an attack differ by."""
ZERO_SHARE = 0.10
"""Share of support voxels without any gradient above which masking is suspected; a ReLU network has some per mille."""
CELL = ["victim", "eps", "units", "norm", "region"]
ITERATIVE = ("ifgsm", "pgd", "targeted_ifgsm")  # ascend one loss from start to end, so that their traces compare


class Objectives:
    """What the checks need of the traces of unit files: a few numbers of each.

    Args:
        units: contents of unit files, read one after the other.
    """

    def __init__(self, units: Iterable[Mapping[str, Any]]) -> None:
        self.steps = 0
        self.broken: set[str] = set()
        """Settings with a loss or a score that is not finite."""
        self.one: dict[tuple[Any, ...], tuple[float, float]] = {}
        """Loss of the clean image and after one step, by victim, eps, subject and what is ascended."""
        self.many: list[tuple[tuple[Any, ...], str, float]] = []
        """The same key, the attack's title and its largest loss."""
        for unit in units:
            self._add(unit)

    def _add(self, unit: Mapping[str, Any]) -> None:
        who, trace = unit["identity"], unit.get("trace") or []
        self.steps += len(trace)
        if not finite([(step["loss"], step["score"]) for step in trace]):
            self.broken.add(str(who["setting"]))
        if unit["status"] != "ok" or who["method"] not in ("fgsm", *ITERATIVE) or len(trace) < 2:
            return
        about = tuple(str(unit["attack"].get(k)) for k in ("threat", "loss", "target", "label_source", "draws"))
        place = (who["victim"], who["eps"], who["subject"], about)
        if who["method"] == "fgsm":
            self.one.setdefault(place, (float(trace[0]["loss"]), float(trace[-1]["loss"])))
        else:  # the start of a restart is no result
            found = [b["loss"] for a, b in zip(trace, trace[1:]) if a["restart"] == b["restart"]]
            self.many.append((place, who["attack"], float(max(found))))


def strength_checks(attacked: pd.DataFrame, objectives: Objectives, declared: Declared | None) -> list[Check]:
    """Every check of attack strength that needs no computing.

    Args:
        attacked: records of attacked units with a result.
        objectives: of their unit files.
        declared: the study's attacks and defenses, where they are known.
    """
    return [
        _on_loss(objectives, declared),
        _on_dice(attacked, declared),
        _monotone(attacked),
        _noise(attacked, declared),
        _black_box(attacked, declared),
        _zero_gradient(attacked),
        _adaptive(declared),
    ]


# ------------------------------------------------------------------------------------------- iterative, one step
def _on_loss(objectives: Objectives, declared: Declared | None) -> Check:
    name = "iterative at least as strong as one step on the loss"
    one = objectives.one
    rows = [
        {"victim": p[0], "eps": p[1], "attack": title, "one": one[p][1] - one[p][0], "many": best - one[p][0]}
        for p, title, best in objectives.many if p in one
    ]  # fmt: skip
    if not rows:
        return Check(name, "NOT RUN", "needs ifgsm or pgd beside fgsm with the same loss and target")
    gains = pd.DataFrame(rows).groupby(["victim", "attack", "eps"])[["one", "many"]].mean()
    wrong = gains[gains["many"] < gains["one"] - 0.01 * gains["one"].abs()]
    ratio = (gains["many"] / gains["one"])[gains["one"] > 0]
    said = (
        f", smallest gain {ratio.min():.3f} of one step's ({_cell(ratio.idxmin())}), allowed .99" if len(ratio) else ""
    )
    detail = f"{len(wrong)} of {len(gains)} cells weaker, mean over subjects{said}, n={len(rows)} pairs"
    if wrong.empty:
        return Check(name, "PASS", detail)
    # the losses of a random victim are those of single passes
    noisy = {victim for victim, kind in (declared.kinds if declared else {}).items() if kind == "smoothing"}
    status = "WARN" if set(wrong.index.get_level_values("victim")) <= noisy else "FAIL"
    return Check(name, status, f"{detail}: the gradient does not lead uphill, or the steps are too few or too large")


def _on_dice(attacked: pd.DataFrame, declared: Declared | None) -> Check:
    name = "iterative at least as strong as one step on Dice"
    ones = [title for title, method in _titles(attacked).items() if method == "fgsm"]
    many = [title for title, method in _titles(attacked).items() if method in ("ifgsm", "pgd")]
    pairs = [pair for pair in product(many, ones) if _aim(declared, *pair)]
    reversed_, cells, n = _reversed(attacked, pairs)
    if not cells:
        return Check(name, "NOT RUN", "needs ifgsm or pgd beside fgsm with the same loss and target")
    losses = sorted({_loss(declared, title) for title in many})
    alone = f"; a single loss, {losses[0]}: no worst case over losses" if len(losses) == 1 else ""
    detail = f"{_said(reversed_, cells, n)}{alone}"
    if not reversed_:
        return Check(name, "PASS", detail)
    return Check(name, "WARN", f"{detail}; the surrogate loss is misaligned with Dice: attack other losses too")


def _aim(declared: Declared | None, first: str, second: str) -> bool:
    """Whether two attacks ascend the same loss towards the same target."""
    if declared is None or not {first, second} <= set(declared.attacks):
        return True
    a, b = (declared.attacks[title].options for title in (first, second))
    return _loss(declared, first) == _loss(declared, second) and a.get("target") == b.get("target")


def _loss(declared: Declared | None, title: str) -> str:
    known = declared.attacks.get(title) if declared else None
    if known is None:
        return "the default"
    return f"{known.name}'s own" if attack_class(known.name).fixed_loss else str(known.options.get("loss", "dice_ce"))


# ------------------------------------------------------------------------------------------- other orders
def _monotone(attacked: pd.DataFrame) -> Check:
    name = "Dice falls with eps"
    rises: dict[str, float] = {}
    steps = 0
    own = attacked[attacked["method"] != "noise"]
    if "truth_empty" in own:  # the Dice of an empty truth jumps to 1 where an attack wipes the prediction out
        own = own[own["truth_empty"].astype(str) != "True"]
    for place, part in own.groupby(["victim", "attack", "units", "norm", "region"], sort=False):
        # of the subjects that have every budget
        wide = part.pivot_table(index="subject", columns="eps", values="dice").dropna().mean()
        change = wide.sort_index().diff().iloc[1:].dropna()
        steps += len(change)
        rises |= {f"{_cell(place)} at {eps:g}": rise for eps, rise in change.items()}
    if not steps:
        return Check(name, "NOT RUN", "needs two budgets of an attack")
    wrong = sum(rise > MARGIN for rise in rises.values())
    worst = max(rises, key=lambda place: rises[place])
    detail = f"{wrong} of {steps} steps rise by more than {MARGIN:g}, largest rise {rises[worst]:.4f} ({worst})"
    return Check(name, "WARN" if wrong else "PASS", detail)


def _noise(attacked: pd.DataFrame, declared: Declared | None) -> Check:
    name = "attack stronger than noise of its size"
    noises = [title for title, method in _titles(attacked).items() if method == "noise"]
    found, cells, n = _reversed(attacked, list(product(_white_box(attacked, declared), noises)))
    if not cells:
        return Check(name, "NOT RUN", "needs noise and a white-box attack at one budget")
    more = "; an attack that noise of its size beats does not use the gradient" if found else ""
    return Check(name, "WARN" if found else "PASS", _said(found, cells, n) + more)


def _black_box(attacked: pd.DataFrame, declared: Declared | None) -> Check:
    """The single most telling sign of gradient masking."""
    name = "transfer and black box not stronger than white box"
    white = _white_box(attacked, declared)
    black = [
        title
        for title, method in _titles(attacked).items()
        if method != "noise" and method in ATTACKS and not ATTACKS[method].white_box and _untargeted(declared, title)
    ]
    # per subject the worst case over the white-box attacks
    keys = [*CELL, "subject"]
    worst = attacked[attacked["attack"].isin(white)].groupby(keys, as_index=False)["dice"].min()
    both = pd.concat([worst.assign(attack="white box"), attacked[attacked["attack"].isin(black)][[*worst, "attack"]]])
    found, cells, n = _reversed(both, [("white box", title) for title in black])
    if not cells:
        return Check(name, "NOT RUN", "needs a black-box or transfer attack and a white-box one at one budget")
    losses = sorted({_loss(declared, title) for title in white})
    over = f"worst case over {len(white)} white-box attacks, losses {', '.join(losses)}"
    over = f"a single white-box attack, loss {losses[0]}" if len(white) == 1 else over
    more = "; gradient masking is likely: add attacks with other losses, or adaptive ones" if found else ""
    return Check(name, "WARN" if found else "PASS", f"{_said(found, cells, n)}; {over}{more}")


def _titles(attacked: pd.DataFrame) -> dict[str, str]:
    """Title of every attack -> its method."""
    return {str(title): str(method) for title, method in zip(attacked["attack"], attacked["method"])}


def _white_box(attacked: pd.DataFrame, declared: Declared | None) -> list[str]:
    """Titles of untargeted attacks that follow the victim's own gradient."""
    own = {title: ATTACKS[method] for title, method in _titles(attacked).items() if method in ATTACKS}
    return [t for t, kind in own.items() if kind.white_box and kind.modes != "targeted" and _untargeted(declared, t)]


def _untargeted(declared: Declared | None, title: str) -> bool:
    known = declared.attacks.get(title) if declared else None
    return known is None or not (known.options.get("target") or known.options.get("control"))


def _reversed(records: pd.DataFrame, pairs: list[tuple[str, str]]) -> tuple[dict[str, float], int, int]:
    """Cells in which the first of a pair leaves more mean Dice than the second, by how much; all cells; subjects."""
    wrong: dict[str, float] = {}
    cells = most = 0
    dice = records.drop_duplicates([*CELL, "subject", "attack"]).set_index([*CELL, "subject", "attack"])["dice"]
    wide = dice.unstack("attack")
    for strong, weak in pairs:
        if not {strong, weak} <= set(wide.columns):
            continue
        both = wide[[strong, weak]].dropna()
        means = both.groupby(level=CELL).mean()
        cells += len(means)
        most = max(most, both.index.get_level_values("subject").nunique())
        excess = (means[strong] - means[weak])[lambda x: x > MARGIN]
        wrong |= {f"{strong} against {weak}, {_cell(place)}": value for place, value in excess.items()}
    return wrong, cells, most


def _said(wrong: Mapping[str, float], cells: int, n: int) -> str:
    worst = max(wrong, key=lambda place: wrong[place]) if wrong else None
    said = "" if worst is None else f", most by {wrong[worst]:.3f} ({worst})"
    return f"{len(wrong)} of {cells} cells reversed by more than {MARGIN:g} mean Dice{said}, n={n} subjects"


def _cell(place: Any) -> str:
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in place)


# ------------------------------------------------------------------------------------------- gradients, defenses
def _zero_gradient(attacked: pd.DataFrame) -> Check:
    name = "share of exactly zero gradients"
    known = attacked.dropna(subset=["zero_gradient"])
    if known.empty:
        return Check(name, "NOT RUN", "no gradient was taken")
    row = known.iloc[int(np.argmax(known["zero_gradient"].to_numpy(dtype=float)))]
    worst = float(row["zero_gradient"])
    n = len(known.drop_duplicates(["subject", "victim", "setting"]))
    detail = f"largest share of support voxels {worst:.4f} ({row['victim']}, {row['setting']}), allowed {ZERO_SHARE:g}"
    if worst <= ZERO_SHARE:
        return Check(name, "PASS", f"{detail}, n={n} units")
    more = "the gradient is masked, attack the logit margin (loss: margin) and without gradients"
    return Check(name, "WARN", f"{detail}, n={n} units: {more}")


def _adaptive(declared: Declared | None) -> Check:
    name = "an adaptive attack beside the plain one"
    if declared is None or not declared.any:
        return Check(name, "NOT RUN", "no victim of the study is declared as defended")
    defended = [victim for victim, kind in declared.kinds.items() if kind != "none"]
    if declared.lacking:
        return Check(name, "WARN", "; ".join(declared.notes()))
    return Check(name, "PASS", f"{len(defended)} of {len(defended)} defended victims: {', '.join(defended)}")


def finite(values: Any) -> bool:
    """Whether every number is finite; there may be none."""
    return bool(np.isfinite(np.asarray(values, dtype=float)).all())
