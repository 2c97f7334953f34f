"""The summary says what the records say, in one line per victim where there are many."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from monai_adv.stats import compare
from monai_adv.studies.analysis import Analysis
from monai_adv.studies.check import Check
from monai_adv.visualize.study_words import summary

Maker = Callable[..., pd.DataFrame]


def said(records: Maker, victims: tuple[str, ...], subjects: int = 12, checks: tuple[Check, ...] = ()) -> list[str]:
    frame = records(subjects=subjects, budgets=(0.1,), attacks=("fgsm", "ifgsm"), victims=victims)
    frame = frame.assign(setting=frame["attack"])
    compared = {v: compare(frame[frame["victim"] == v], resamples=99) for v in victims}
    return summary(frame, Analysis(compared, None, pd.DataFrame()), checks, ["s9: no label"])


def test_few_victims_are_told_region_by_region(records: Maker) -> None:
    lines = said(records, ("b", "a"))
    frame = records(subjects=12, budgets=(0.1,), attacks=("fgsm", "ifgsm"), victims=("b", "a"))
    means = frame.groupby(["victim", "attack", "region"])["dice"].mean()
    wt = f"WT from {means['b', 'clean', 'WT']:.3f} to {means['b', 'ifgsm', 'WT']:.3f} (ifgsm)"
    assert lines[0].startswith(f"b, 12 subjects: mean Dice fell at most as follows: {wt}; ET from")
    assert "4 of 4 comparisons with clean are significant at 0.05" in lines[0]
    assert lines[1].startswith("a, 12 subjects")
    assert lines[2] == "Not scored: s9: no label"
    assert "vulnerability" in lines[3]
    assert "Too few subjects" in said(records, ("a",), subjects=4)[0]


def test_many_victims_have_a_line_each(records: Maker) -> None:
    checks = (Check("a", "WARN", "0.1", "v1"), Check("a", "WARN", "0.2", "v1"), Check("b", "PASS", ""))
    lines = said(records, ("v2", "v1", "v0"), checks=checks)
    assert lines[0].startswith("3 victims, 12 subjects.")
    assert [line.split(":")[0] for line in lines[1:4]] == ["v2", "v1", "v0"]
    frame = records(subjects=12, budgets=(0.1,), attacks=("fgsm", "ifgsm"), victims=("v2", "v1", "v0"))
    means = frame[frame["victim"] == "v2"].groupby("attack")["dice"].mean()
    assert lines[1] == f"v2: {means['clean']:.3f} to {means['ifgsm']:.3f} (ifgsm); 4 of 4 significant."
    assert lines[4] == "Automatic checks: WARN: a (v1). Their numbers stand below."
