"""Dice curves: means, bands, the control and the clean level are where the records say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from monai_adv.visualize import curve_table, dice_curves
from monai_adv.visualize.style import CONTROL, attack_styles

Maker = Callable[..., pd.DataFrame]


def lines(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.lines}


def test_lines_are_means_per_region(records: Maker) -> None:
    frame = records()
    figure = dice_curves(frame)
    assert [axes.get_title() for axes in figure.axes] == ["WT (n = 8)", "ET (n = 8)"]
    for axes, region in zip(figure.axes, ("WT", "ET")):
        drawn = lines(axes)
        assert list(drawn) == ["clean", "noise", "ifgsm", "fgsm"]  # controls before the attacks
        part = frame[frame["region"] == region]
        clean = part.loc[part["attack"] == "clean", "dice"].mean()
        np.testing.assert_allclose(drawn["clean"].get_ydata(), clean)
        for attack in ("noise", "ifgsm", "fgsm"):
            means = part[part["attack"] == attack].groupby("eps")["dice"].mean()
            np.testing.assert_allclose(drawn[attack].get_xdata(), [0.0, 0.05, 0.1])
            np.testing.assert_allclose(drawn[attack].get_ydata(), [clean, *means])
        assert drawn["noise"].get_linestyle() == "--"
        assert to_hex(drawn["noise"].get_color()) == CONTROL
        assert drawn["ifgsm"].get_linestyle() == "-"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clean", "noise", "ifgsm", "fgsm"]
    assert figure.get_supxlabel() == "budget eps (standard deviations of the support)"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "0.05", "0.1"]


def band(axes: Axes, index: int) -> np.ndarray:
    return axes.collections[index].get_paths()[0].vertices[:, 1]


def test_bands_are_bootstrap_intervals_of_the_mean(records: Maker) -> None:
    frame = records(subjects=30, budgets=(0.1,), attacks=("fgsm",))
    values = frame[(frame["attack"] == "fgsm") & (frame["region"] == "WT")]["dice"].to_numpy()
    edges = band(dice_curves(frame).axes[0], 0)
    # for the mean of 30 values the percentile bootstrap is close to the normal interval
    half = 1.96 * values.std() / np.sqrt(values.size)
    at_budget = edges[np.abs(edges - values.mean()) < 2 * half]
    assert at_budget.min() == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert at_budget.max() == pytest.approx(values.mean() + half, abs=0.15 * half)
    narrower = band(dice_curves(frame, confidence=0.5).axes[0], 0)
    assert np.ptp(narrower) < np.ptp(edges)
    np.testing.assert_array_equal(band(dice_curves(frame).axes[0], 0), edges)  # seeded
    assert not np.array_equal(band(dice_curves(frame, seed=1).axes[0], 0), edges)


def test_the_table_holds_what_is_drawn(records: Maker) -> None:
    frame = records(victims=("b", "a"))
    table = curve_table(frame)
    assert list(dict.fromkeys(table["victim"])) == ["b", "a"]
    row = table[(table["victim"] == "a") & (table["region"] == "ET") & (table["attack"] == "fgsm")].set_index("eps")
    axes = dice_curves(frame).axes[3]
    np.testing.assert_allclose(lines(axes)["fgsm"].get_ydata()[1:], row.loc[[0.05, 0.1], "mean"])
    assert (row["low"] < row["mean"]).all()
    assert (row["mean"] < row["high"]).all()
    assert (table["n"] == 8).all()


def test_failed_units_are_left_out_and_counted(records: Maker) -> None:
    frame = records(attacks=("fgsm",))
    bad = (frame["subject"] == "s0") & (frame["attack"] == "fgsm") & (frame["eps"] == 0.1)
    frame.loc[bad, "dice"] = 0.0
    frame.loc[bad, "status"] = "invalid_nonfinite"
    axes = dice_curves(frame).axes[0]
    assert axes.get_title() == "WT (n = 7 to 8)"
    kept = frame[(frame["status"] == "ok") & (frame["region"] == "WT") & (frame["attack"] == "fgsm")]
    assert lines(axes)["fgsm"].get_ydata()[-1] == pytest.approx(kept[kept["eps"] == 0.1]["dice"].mean())


def test_repeats_of_a_subject_are_averaged_first(records: Maker) -> None:
    frame = records(attacks=("fgsm",))
    again = frame[frame["subject"] == "s0"].assign(seed=1)
    double = lines(dice_curves(pd.concat([frame, again])).axes[0])["fgsm"].get_ydata()
    np.testing.assert_allclose(double, lines(dice_curves(frame).axes[0])["fgsm"].get_ydata())


def test_each_victim_has_a_row(records: Maker) -> None:
    figure = dice_curves(records(victims=("plain", "trained")))
    assert [axes.get_title() for axes in figure.axes] == [
        "plain: WT (n = 8)",
        "plain: ET (n = 8)",
        "trained: WT (n = 8)",
        "trained: ET (n = 8)",
    ]


def test_wide_budgets_get_a_logarithmic_axis(records: Maker) -> None:
    axes = dice_curves(records(budgets=(0.01, 0.1, 1.0))).axes[0]
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(lines(axes)["fgsm"].get_xdata(), [0.01, 0.1, 1.0])
    assert dice_curves(records()).axes[0].get_xscale() == "linear"


def test_an_attack_in_two_norms_has_two_lines(records: Maker) -> None:
    frame = records(attacks=("fgsm",))
    other = frame[frame["attack"] == "fgsm"].assign(norm="l2", dice=0.5)
    drawn = lines(dice_curves(pd.concat([frame, other])).axes[0])
    assert list(drawn) == ["clean", "fgsm (linf)", "fgsm (l2)"]


def test_one_subject_and_no_clean_rows(records: Maker) -> None:
    frame = records(subjects=1)
    drawn = lines(dice_curves(frame[frame["attack"] != "clean"]).axes[0])
    np.testing.assert_allclose(drawn["fgsm"].get_xdata(), [0.05, 0.1])


def test_bad_records_are_refused(records: Maker) -> None:
    frame = records()
    mixed = frame.assign(units=np.where(frame["eps"] == 0.1, "range", "std"))
    with pytest.raises(ValueError, match="several units"):
        dice_curves(mixed)
    with pytest.raises(ValueError, match="'dice'"):
        dice_curves(frame.drop(columns="dice"))
    with pytest.raises(ValueError, match="No record has"):
        dice_curves(frame.assign(status="failed"))


def test_many_attacks_all_look_different() -> None:
    styles = attack_styles([f"attack{index}" for index in range(20)])
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == 20
