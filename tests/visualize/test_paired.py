"""The paired plot: every subject's points, and brackets that say what the comparison says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from monai_adv.stats import Comparison, compare
from monai_adv.visualize import paired_plot, paired_table, verdict_text

Maker = Callable[..., pd.DataFrame]


def compared(frame: pd.DataFrame, **options: object) -> Comparison:
    return compare(frame, resamples=99, **options)  # type: ignore[arg-type]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def ticks(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_xticklabels()]


def test_points_lines_and_brackets(records: Maker) -> None:
    frame = records(subjects=12, budgets=(0.1,))
    comparison = compared(frame)
    figure = paired_plot(frame, comparison)
    assert [axes.get_title() for axes in figure.axes] == ["WT (n = 12)", "ET (n = 12)"]
    for axes, region in zip(figure.axes, ("WT", "ET")):
        assert ticks(axes) == ["clean", "noise", "ifgsm", "fgsm"]
        part = frame[frame["region"] == region]
        joined = [line for line in axes.lines if len(line.get_xdata()) == 4 and line.get_linewidth() == 0.6]
        wide = part.pivot(index="subject", columns="attack", values="dice")[["clean", "noise", "ifgsm", "fgsm"]]
        drawn = np.array([line.get_ydata() for line in joined])
        np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(wide.to_numpy(), axis=0))
        assert {tuple(row) for row in drawn} == {tuple(row) for row in wide.to_numpy()}  # joined by subject
        rows = comparison.table[comparison.table["region"] == region].set_index("attack")
        expected = [verdict_text(rows.loc[attack]) for attack in ("noise", "ifgsm", "fgsm")]
        assert texts(axes) == expected
        assert "*" in expected[1]
        assert all(0 <= tick < 1.0001 for tick in axes.get_yticks())
        levels = [text.get_position()[1] for text in axes.texts]
        assert levels == sorted(set(levels))  # one above the other
        assert levels[0] > 1.0
        assert levels[-1] < axes.get_ylim()[1]
    assert "against clean, Holm-adjusted p" in figure.get_supxlabel()


def test_medians_are_those_of_the_table(records: Maker) -> None:
    frame = records(budgets=(0.1,))
    comparison = compared(frame)
    axes = paired_plot(frame, comparison).axes[0]
    medians = {line.get_xdata().mean(): line.get_ydata()[0] for line in axes.lines if line.get_linewidth() == 2.2}
    rows = comparison.table[comparison.table["region"] == "WT"].set_index("attack")
    assert medians[0.0] == pytest.approx(rows["baseline_median"].iloc[0])
    for position, attack in enumerate(("noise", "ifgsm", "fgsm"), start=1):
        assert medians[float(position)] == pytest.approx(rows.loc[attack, "median"])


def test_a_half_violin_stands_right_of_every_box(records: Maker) -> None:
    frame = records(budgets=(0.1,))
    axes = paired_plot(frame, compared(frame)).axes[0]
    bodies = [b.get_paths()[0].vertices for b in axes.collections]
    assert len(bodies) == 4
    for position, (attack, body) in enumerate(zip(("clean", "noise", "ifgsm", "fgsm"), bodies)):
        values = frame[(frame["attack"] == attack) & (frame["region"] == "WT")]["dice"]
        assert body[:, 0].min() > position
        assert body[:, 0].max() < position + 0.6
        assert (body[:, 1].min(), body[:, 1].max()) == pytest.approx((values.min(), values.max()))
    few = records(subjects=3, budgets=(0.1,))
    assert not paired_plot(few, compared(few)).axes[0].collections  # no density of three values
    flat = frame.assign(dice=0.5)
    assert not paired_plot(flat, compared(flat)).axes[0].collections


def test_the_table_holds_what_is_drawn(records: Maker) -> None:
    frame = records()
    comparison = compared(frame, by=("attack", "eps"), family=("attack", "eps", "region"))
    other = frame[frame["attack"] == "fgsm"].assign(attack="not compared")
    table = paired_table(pd.concat([frame, other]), comparison, eps=0.05)
    assert set(table["eps"]) == {0.0, 0.05}
    assert len(table) == 2 * 4 * 8
    one = table[(table["attack"] == "fgsm") & (table["region"] == "ET") & (table["subject"] == "s3")]
    same = frame[(frame["attack"] == "fgsm") & (frame["region"] == "ET") & (frame["subject"] == "s3")]
    assert one["dice"].tolist() == same[same["eps"] == 0.05]["dice"].tolist()


def test_too_few_subjects_make_no_claim(records: Maker) -> None:
    frame = records(subjects=5, budgets=(0.1,))
    axes = paired_plot(frame, compared(frame)).axes[0]
    assert texts(axes) == ["n too small (5)"] * 3
    frame = records(subjects=7, budgets=(0.1,))  # 2^-6 x 6 tests > .05
    assert texts(paired_plot(frame, compared(frame)).axes[0]) == ["n too small (7)"] * 3


@pytest.mark.parametrize(("eps", "budget"), [(None, 0.1), (0.05, 0.05), (0.1, 0.1)])
def test_one_budget_of_several(records: Maker, eps: float | None, budget: float) -> None:
    frame = records(subjects=12)
    comparison = compared(frame, by=("attack", "eps"), family=("attack", "eps", "region"))
    figure = paired_plot(frame, comparison, eps=eps)
    axes = figure.axes[0]
    assert ticks(axes) == ["clean", "noise", "ifgsm", "fgsm"]
    assert figure.get_supxlabel().startswith(f"eps = {budget:g}; ")
    rows = comparison.table[(comparison.table["region"] == "WT") & (comparison.table["eps"] == budget)]
    assert texts(axes) == [verdict_text(rows.set_index("attack").loc[a]) for a in ("noise", "ifgsm", "fgsm")]
    medians = [line.get_ydata()[0] for line in axes.lines if line.get_linewidth() == 2.2]
    part = frame[(frame["region"] == "WT") & (frame["eps"] == budget)]
    assert medians[1:] == pytest.approx(
        [part[part["attack"] == a]["dice"].median() for a in ("noise", "ifgsm", "fgsm")]
    )


def test_victims_can_be_compared_too(records: Maker) -> None:
    frame = records(subjects=8, budgets=(0.1,), victims=("plain", "defended"))
    attacked = frame[frame["attack"] == "fgsm"]
    comparison = compared(attacked, by="victim", baseline="plain", family=("victim", "region"))
    axes = paired_plot(attacked, comparison).axes[0]
    assert ticks(axes) == ["plain", "defended"]
    assert len(texts(axes)) == 1


def test_a_full_baseline_and_many_panels(records: Maker) -> None:
    frame = records(subjects=8, victims=("plain", "defended"))
    comparison = compared(
        frame, by=("attack", "eps"), baseline=("clean", 0.0), family=("victim", "attack", "eps", "region")
    )
    figure = paired_plot(frame, comparison)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{victim} {region} (n = 8)" for victim in ("plain", "defended") for region in ("WT", "ET")
    ]
    assert all(len(texts(axes)) == 3 for axes in figure.axes)
    five = pd.concat([frame[frame["victim"] == "plain"].assign(victim=f"v{index}") for index in range(3)])
    comparison = compared(five, by=("attack", "eps"), family=("victim", "attack", "eps", "region"))
    figure = paired_plot(five, comparison)
    assert len(figure.axes) == 6
    assert len({round(axes.get_subplotspec().rowspan.start, 3) for axes in figure.axes}) == 2


def test_a_missing_value_breaks_the_line_and_is_counted(records: Maker) -> None:
    frame = records(subjects=8, budgets=(0.1,))
    frame.loc[(frame["subject"] == "s3") & (frame["attack"] == "fgsm"), "status"] = "failed"
    figure = paired_plot(frame, compared(frame))
    assert figure.axes[0].get_title() == "WT (n = 7 to 8)"


def test_distances_use_their_own_scale(records: Maker) -> None:
    frame = records(budgets=(0.1,))
    frame["hd95"] = 40 * (1 - frame["dice"])
    figure = paired_plot(frame, compared(frame, metric="hd95"))
    axes = figure.axes[0]
    assert axes.get_ylabel() == "HD95 (mm)"
    highest = frame["hd95"].max()
    assert min(text.get_position()[1] for text in axes.texts) > highest
    assert max(axes.get_yticks()) <= highest


@pytest.mark.parametrize(
    ("p", "verdict", "expected"),
    [
        (0.05, "significantly lower", "* p=0.05"),
        (0.01, "significantly lower", "** p=0.01"),
        (0.001, "significantly higher", "*** p=0.001"),
        (2e-9, "significantly lower", "*** p<0.0001"),
        (0.004, "not significant", "n.s. p=0.004"),  # a stricter alpha: no star
        (1.0, "identical", "identical"),
        (0.2, "cannot reach significance with n=7", "n too small (7)"),
        (float("nan"), "n=5 < 6: no p-value", "n too small (7)"),
    ],
)
def test_what_a_bracket_says(p: float, verdict: str, expected: str) -> None:
    assert verdict_text({"p_holm": p, "verdict": verdict, "n": 7}) == expected


def test_bad_requests_are_refused(records: Maker) -> None:
    frame = records()
    comparison = compared(frame, by=("attack", "eps"), family=("attack", "eps", "region"))
    with pytest.raises(ValueError, match=r"No record has eps 0\.3"):
        paired_plot(frame, comparison, eps=0.3)
    with pytest.raises(ValueError, match="'region'"):
        paired_plot(frame.drop(columns="region"), comparison)
    with pytest.raises(ValueError, match="No record has a value"):
        paired_plot(frame.assign(status="failed"), comparison)
