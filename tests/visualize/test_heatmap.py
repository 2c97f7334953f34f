"""The heat map shows paired mean drops, in the order of the records, with their numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from monai_adv.visualize.heatmap import drop_heatmap, drop_table

Maker = Callable[..., pd.DataFrame]


def frame(records: Maker, **options: object) -> pd.DataFrame:
    made = records(**options)
    return made.assign(setting=made["attack"] + " " + made["eps"].astype(str))


def test_drops_are_paired_means(records: Maker) -> None:
    made = frame(records, victims=("b", "a"))
    lost = (made["subject"] == "s0") & (made["attack"] == "fgsm") & (made["victim"] == "a")
    table = drop_table(made[~lost])
    assert list(dict.fromkeys(table["victim"])) == ["b", "a"]
    assert list(table["region"][:3]) == ["WT", "ET", "mean"]
    row = table[(table["victim"] == "a") & (table["setting"] == "fgsm 0.1")].set_index("region")
    part = made[(made["victim"] == "a") & (made["subject"] != "s0") & (made["region"] == "WT")].set_index("subject")
    clean, attacked = (part.loc[part["setting"] == s, "dice"] for s in ("clean 0.0", "fgsm 0.1"))
    assert row.loc["WT", "drop"] == pytest.approx((clean - attacked).mean())  # without s0, whose pair is incomplete
    assert row["n"].tolist() == [7, 7, 7]
    assert row.loc["mean", "drop"] == pytest.approx(row.loc[["WT", "ET"], "drop"].mean())


def test_every_number_stands_in_its_cell(records: Maker) -> None:
    table = drop_table(frame(records, victims=("b", "a")))
    figure = drop_heatmap(table)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["b", "a"]
    for axes in panels:
        wide = table[table["victim"] == axes.get_title()].pivot(index="setting", columns="region", values="drop")
        regions = [t.get_text() for t in axes.get_xticklabels()]
        settings = [t.get_text() for t in panels[0].get_yticklabels()]  # shared
        assert regions == ["WT", "ET", "mean"]
        shown = {tuple(map(int, text.get_position())): text.get_text() for text in axes.texts}
        assert len(shown) == wide.size
        for (column, row), text in shown.items():
            assert float(text) == pytest.approx(wide.loc[settings[row], regions[column]], abs=6e-4)


def test_cells_without_a_value_are_empty_and_nothing_is_refused(records: Maker) -> None:
    table = drop_table(frame(records, attacks=("fgsm", "ifgsm"), victims=("a", "b")))
    part = table[(table["victim"] == "a") | (table["setting"] == "fgsm 0.1")]
    first, second = drop_heatmap(part).axes[:2]
    assert (len(first.texts), len(second.texts)) == (12, 3)
    with pytest.raises(ValueError, match="No attacked subject"):
        drop_heatmap(drop_table(frame(records).query("attack == 'clean'")))


def test_a_gain_is_shown_with_its_sign(records: Maker) -> None:
    made = frame(records, attacks=("fgsm",), budgets=(0.1,))
    made["dice"] = np.where(made["attack"] == "fgsm", 0.9, 0.8)
    assert {t.get_text() for t in drop_heatmap(drop_table(made)).axes[0].texts} == {"-0.100"}
