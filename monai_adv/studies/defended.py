"""Defenses in a study: what each one needs to be judged by, the defense x attack table, and the published claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from monai_adv.attacks import attack_class
from monai_adv.data.labels import REGIONS
from monai_adv.stats import holm, wilcoxon

KINDS = ("none", "noise", "adversarial_training", "distillation", "purification", "smoothing")
METHODS = {
    "plain": "none", "noise": "noise", "offline": "adversarial_training", "fgsm_at": "adversarial_training",
    "pgd_at": "adversarial_training", "free": "adversarial_training", "trades": "adversarial_training",
    "vafa_at": "adversarial_training", "synthesis": "adversarial_training", "distillation": "distillation",
}  # fmt: skip
NEEDED = {
    "noise": "a white-box attack of several steps",
    "adversarial_training": "a white-box attack of several steps",
    "distillation": "a white-box attack of several steps on the logit margin (loss: margin): its cross entropy has no "
    "gradient where the softmax saturates",
    "purification": "a white-box attack of several steps through the filter",
    "smoothing": "a white-box attack of several steps with the expectation over the noise (draws >= 2)",
}
TAG = " (NOT ADAPTIVE)"
WARNING = "NOT ADAPTIVE - an upper bound on robustness only"
MARGIN = ("margin",)
ENTROPY = ("ce",)


@dataclass(frozen=True)
class AttackInfo:
    """What a table has to know of an attack of the study.

    Attributes:
        name: of the method.
        options: as the study gives them.
        only: victims it is run on; all if None.
    """

    name: str
    options: Mapping[str, Any]
    only: tuple[str, ...] | None = None

    @property
    def iterative(self) -> bool:
        """Whether it takes several gradients of the victim itself."""
        kind = attack_class(self.name)
        if not kind.white_box or self.name == "fgsm" or self.options.get("control"):
            return False
        return int(self.options.get("steps", 2)) > 1

    @property
    def loss(self) -> str:
        """Name of the loss it ascends, as far as the study says."""
        return str(self.options.get("loss", "its own"))

    def adapts_to(self, kind: str) -> bool:
        """Whether the attack takes a defense of this kind into account."""
        if kind == "none":
            return True
        if not self.iterative:
            return False
        if kind == "distillation":
            return self.loss in MARGIN
        if kind == "smoothing":
            return int(self.options.get("draws", 1)) >= 2
        return True


@dataclass(frozen=True)
class Declared:
    """What a study says of its defenses.

    Attributes:
        kinds: victim -> one of :data:`KINDS`, in the order of the study.
        attacks: title -> attack.
    """

    kinds: dict[str, str]
    attacks: dict[str, AttackInfo]

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Declared:
        """From the ``study.json`` of a run folder."""
        study = stored.get("study", {})
        kinds = {v["name"]: "none" for v in study.get("victims", [])} | dict(stored.get("defenses", {}))
        fixed = ("name", "label", "only")
        attacks = {
            a.get("label") or a["name"]: AttackInfo(
                a["name"], {k: v for k, v in a.items() if k not in fixed}, tuple(a["only"]) if a.get("only") else None
            )
            for a in study.get("attacks", [])
        }
        return cls(kinds, attacks)

    @property
    def any(self) -> bool:
        """Whether the study has a defense at all."""
        return any(kind != "none" for kind in self.kinds.values())

    @property
    def lacking(self) -> dict[str, str]:
        """See :func:`not_adaptive`."""
        return not_adaptive(self.kinds, list(self.attacks.values()))

    def tagged(self, records: pd.DataFrame) -> pd.DataFrame:
        """Records whose victims say so in their names where no attack adapted to their defense."""
        lacking = self.lacking
        if not lacking:
            return records
        return records.assign(victim=[v + TAG if v in lacking else v for v in records["victim"]])

    def sorted(self, records: pd.DataFrame) -> pd.DataFrame:
        """Records with victims and attacks in the order of the study, the clean images first, regions as WT, TC, ET."""
        orders = {"victim": list(self.kinds), "attack": ["clean", *self.attacks], "region": list(REGIONS)}
        places = {
            column: records[column].map({name: i for i, name in enumerate(names)}).fillna(len(names))
            for column, names in orders.items()
        }
        by = ["victim", "attack", "subject", "eps", "region"]
        return records.loc[records.assign(**places).sort_values(by, kind="stable").index].reset_index(drop=True)

    def order(self) -> list[str]:
        """Names of the victims in tables: the first undefended one, then the others as the study lists them."""
        lacking = self.lacking
        plain = [victim for victim, kind in self.kinds.items() if kind == "none"][:1]
        names = plain + [victim for victim in self.kinds if victim not in plain]
        return [name + TAG if name in lacking else name for name in names]

    def notes(self) -> list[str]:
        """One line for each victim that no attack adapted to."""
        return [f"{victim}: {WARNING}; the study lacks {what}" for victim, what in self.lacking.items()]


def not_adaptive(kinds: Mapping[str, str], attacks: Sequence[AttackInfo]) -> dict[str, str]:
    """Victims whose defense no attack of the study adapts to, and what is missing.

    Args:
        kinds: victim -> one of :data:`KINDS`.
        attacks: the attacks of the study.

    Example:
        >>> not_adaptive({"plain": "none", "student": "distillation"}, [AttackInfo("ifgsm", {"loss": "ce"})])
        {'student': 'a white-box attack of several steps on the logit margin (loss: margin): its cross entropy has no \
gradient where the softmax saturates'}
    """
    return {
        victim: NEEDED[kind]
        for victim, kind in kinds.items()
        if kind != "none"
        and not any(attack.adapts_to(kind) for attack in attacks if attack.only is None or victim in attack.only)
    }


def defense_table(records: pd.DataFrame, kinds: Mapping[str, str], lacking: Mapping[str, str]) -> pd.DataFrame:
    """Mean Dice of every victim under every setting, region by region and over the regions.

    Args:
        records: tidy records of a study.
        kinds: victim -> kind of its defense, in the order of the study.
        lacking: victims without an adaptive attack, see :func:`not_adaptive`; their name says so.

    Returns:
        Columns region, victim, defense, n and one per setting; only subjects that every victim has under a setting.
    """
    scored = records[records["status"].eq("ok") & records["region"].notna()]
    order = list(dict.fromkeys(scored.sort_values("eps", kind="stable")["setting"]))
    rows = []
    for region in [*dict.fromkeys(scored["region"]), "mean"]:
        part = scored if region == "mean" else scored[scored["region"] == region]
        per_subject = part.groupby(["subject", "victim", "setting"], sort=False)["dice"].mean().unstack("victim")
        # an attack on some defenses only has no value for the others
        absent = per_subject.groupby(level="setting").transform("count") == 0
        complete = per_subject[(per_subject.notna() | absent).all(axis=1)]
        means = complete.groupby(level="setting").mean()
        subjects = complete.index.get_level_values("subject").nunique()
        for victim, kind in kinds.items():
            if victim not in means:
                continue
            row = {"region": region, "victim": victim + (TAG if victim in lacking else ""), "defense": kind}
            row |= {"n": subjects, **{s: means[victim].get(s, float("nan")) for s in order}}
            rows.append(row)
    return pd.DataFrame(rows)


def published_claims(
    records: pd.DataFrame, kinds: Mapping[str, str], attacks: Mapping[str, AttackInfo], alpha: float = 0.05
) -> pd.DataFrame:
    """Which claims of Liu et al. (arXiv 1908.00656) hold here, and what adaptive attacks do to them.

    Attacks lower Dice; distillation keeps more Dice than adversarial training under attacks on the plain cross entropy;
    every defense stays below the clean Dice. Each is tested over subjects (exact one-sided Wilcoxon signed-rank of the
    mean Dice over regions); the second is asked again, as a claim of its own, under attacks on the logit margin and
    under transfer. Every claim is a family of its own: Holm over the tests of that claim, whose number is in its rows.

    Args:
        records: tidy records of a study.
        kinds: victim -> kind of its defense; the first victim of kind "none" is the undefended one.
        attacks: title -> attack.
        alpha: level.

    Returns:
        Columns claim, victim, setting, n, mean_a, mean_b, hodges_lehmann (a - b), p, tests (of the claim: Holm's
        family), p_holm, verdict.
    """
    scored = records[records["status"].eq("ok") & records["region"].notna()]
    mean = scored.groupby(["subject", "victim", "attack", "setting"])["dice"].mean().reset_index()
    plain = [victim for victim, kind in kinds.items() if kind == "none"]
    rows: list[dict[str, Any]] = []
    if plain:
        base = plain[0]
        for title, setting in _settings(mean, base):
            if attacks[title].name != "noise":
                rows.append(_row(mean, "attacks lower Dice", (base, "clean"), (base, setting)))
        for victim, kind in kinds.items():
            if kind == "none":
                continue
            for title, setting in _settings(mean, victim):
                if attacks[title].name != "noise":
                    rows.append(_row(mean, "a defense stays below the clean Dice", (base, "clean"), (victim, setting)))
    students = [victim for victim, kind in kinds.items() if kind == "distillation"]
    trained = [victim for victim, kind in kinds.items() if kind == "adversarial_training"]
    for student in students:
        for other in trained:
            for title, setting in _settings(mean, student):
                under = _ground(attacks[title])
                if under is not None:
                    claim = f"distillation keeps more Dice than adversarial training, {under}"
                    rows.append(_row(mean, claim, (student, setting), (other, setting)))
    table = pd.DataFrame([row for row in rows if row["n"]])
    if not table.empty:
        claims = table.groupby("claim")
        table["tests"] = claims["p"].transform("count").astype(int)
        table["p_holm"] = claims["p"].transform(lambda p: holm(p.to_numpy()))
        best = claims["smallest"].transform(lambda p: holm(p.to_numpy()))  # whatever the data had been
        table["verdict"] = [_verdict(row, alpha, p <= alpha) for row, p in zip(table.to_dict("records"), best)]
        table = table.drop(columns=["smallest", "nonzero"])
    return table


def _settings(mean: pd.DataFrame, victim: str) -> list[tuple[str, str]]:
    """Attacks and settings a victim was put under, but clean."""
    own = mean[(mean["victim"] == victim) & (mean["setting"] != "clean")]
    return list(dict.fromkeys(zip(own["attack"], own["setting"])))


def _ground(attack: AttackInfo) -> str | None:
    """Under which kind of attack defenses are compared."""
    if attack.name == "transfer":
        return "transferred"
    if not attack_class(attack.name).white_box:
        return None
    if attack.loss in ENTROPY:
        return "plain cross entropy"
    return "logit margin" if attack.loss in MARGIN else None


def _row(mean: pd.DataFrame, claim: str, a: tuple[str, str], b: tuple[str, str]) -> dict[str, Any]:
    first, second = (
        mean[(mean["victim"] == victim) & (mean["setting"] == setting)].set_index("subject")["dice"]
        for victim, setting in (a, b)
    )
    both = pd.concat([first, second], axis=1, keys=["a", "b"]).dropna()
    row = {"claim": claim, "victim": b[0] if a[0] == b[0] else f"{a[0]} against {b[0]}", "setting": b[1]}
    if a[1] != b[1] and a[0] != b[0]:
        row["victim"] = b[0]
    x, y = both["a"].to_numpy(), both["b"].to_numpy()
    if not len(both):
        return {**row, "n": 0, "mean_a": np.nan, "mean_b": np.nan, "hodges_lehmann": np.nan, "p": np.nan}
    test = wilcoxon(x, y, alternative="greater")
    p, smallest = (test.pvalue, test.smallest_p) if len(both) >= 6 else (float("nan"), float("nan"))
    found = {"n": len(both), "mean_a": x.mean(), "mean_b": y.mean(), "hodges_lehmann": test.hodges_lehmann, "p": p}
    return {**row, **found, "smallest": smallest, "nonzero": test.n_nonzero}


def _verdict(row: Mapping[Any, Any], alpha: float, reachable: bool) -> str:
    if row["mean_a"] <= row["mean_b"]:
        return "does not hold"
    if row["p_holm"] <= alpha:
        return "holds"
    if np.isnan(row["p"]):
        return f"holds in the mean, n={row['n']} < 6: no p-value"
    if not reachable:
        pairs = "" if row["nonzero"] == row["n"] else " non-zero pairs"
        return f"holds in the mean, cannot reach significance with n={row['nonzero']}{pairs}"
    return "holds in the mean, not significant"
