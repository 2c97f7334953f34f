"""compare() on frames made by hand, its errors, its exports, and the summary of empty regions."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from monai_adv.stats import compare, friedman, holm, summarise, wilcoxon, write_csv

N = 12
DROPS = {("clean", 0.0): 0.0, ("noise", 0.1): 0.001, ("fgsm", 0.1): 0.1, ("ifgsm", 0.1): 0.4}


def records(n=N, drops=DROPS, regions=("WT", "TC"), seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        for region in regions:
            clean = rng.uniform(0.8, 0.95)
            for (attack, eps), drop in drops.items():
                sign = -1 if attack == "noise" and i % 2 else 1
                rows.append(
                    {
                        "subject": f"S{i:02d}",
                        "victim": "unet",
                        "attack": attack,
                        "eps": eps,
                        "setting": f"{attack} {eps:g}",
                        "region": region,
                        "dice": clean - sign * drop * rng.uniform(0.5, 1.5),
                        "hd95": 3 + 100 * drop + rng.uniform(),
                        "truth_empty": False,
                        "prediction_voxels": 100,
                        "status": "ok",
                        "seconds": rng.uniform(),
                    }
                )
    return pd.DataFrame(rows)


def quick(frame, **options):
    return compare(frame, **{"resamples": 200, **options})


def pick(comparison, attack, region="WT"):
    table = comparison.table
    return table[(table.attack == attack) & (table.region == region)].iloc[0]


def values(frame, attack, region="WT", column="dice"):
    part = frame[(frame.attack == attack) & (frame.region == region)]
    return part.sort_values("subject")[column].to_numpy()


def test_every_row_is_the_single_comparison_and_holm_is_over_attacks_times_regions():
    frame = records()
    result = quick(frame)
    assert list(zip(result.table.region, result.table.attack)) == [
        (r, a) for r in ("WT", "TC") for a in ("noise", "fgsm", "ifgsm")
    ]
    assert result.tests == 6
    for _, row in result.table.iterrows():
        ours, clean = values(frame, row.attack, row.region), values(frame, "clean", row.region)
        single = wilcoxon(ours, clean)
        assert row.p == single.pvalue
        assert (row.hodges_lehmann, row.hl_low, row.hl_high) == (single.hodges_lehmann, *single.confidence_interval)
        assert row.rank_biserial == single.rank_biserial
        assert row.mean_difference == pytest.approx((ours - clean).mean(), abs=1e-9)
        assert row.mean_low <= row.mean_difference <= row.mean_high
        assert (row["median"], row.baseline_median) == (np.median(ours), np.median(clean))
        assert (row.q25, row.q75) == (np.quantile(ours, 0.25), np.quantile(ours, 0.75))
        assert (row.n, row.missing, row.zeros, row.method) == (N, 0, 0, "exact")
    np.testing.assert_array_equal(result.table.p_holm, holm(result.table.p))
    assert pick(result, "fgsm").p_holm == 6 * 2 / 2**N
    assert pick(result, "fgsm").verdict == "significantly lower"
    assert pick(result, "noise").verdict == "not significant"


def test_a_single_stratum_and_list_of_dicts():
    frame = records(regions=("WT",))
    one = quick(frame, family=("attack",))
    assert one.tests == 3
    assert "region" not in one.table
    assert list(one.critical_differences) == ["all"]
    pd.testing.assert_frame_equal(one.table, quick(frame.to_dict("records"), family=("attack",)).table)
    assert "Friedman: chi2(3)" in one.to_markdown()


def test_a_setting_called_like_a_column_of_the_table_is_refused():
    frame = records().rename(columns={"attack": "method"})
    with pytest.raises(ValueError, match="'method' of its own: rename"):
        quick(frame, by="method", family=("method", "region"))


def test_a_notebook_shows_the_table():
    result = quick(records(regions=("WT",)), family=("attack",))
    assert result._repr_markdown_() == result.to_markdown()


def test_order_of_rows_does_not_matter_and_the_seed_does():
    frame = records()
    shuffled = frame.sample(frac=1, random_state=1)
    keys = ["region", "attack"]
    first = quick(frame).table.sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(first, quick(shuffled).table.sort_values(keys, ignore_index=True))
    assert not first.mean_low.equals(quick(frame, seed=1).table.sort_values(keys, ignore_index=True).mean_low)


def test_settings_of_two_columns():
    frame = records(drops={**DROPS, ("fgsm", 0.05): 0.05})
    result = quick(frame, by=("attack", "eps"))
    assert result.tests == 8
    assert list(result.table.columns[:3]) == ["region", "attack", "eps"]
    assert result.table.loc[result.table.attack == "fgsm", "eps"].unique().tolist() == [0.1, 0.05]
    pd.testing.assert_frame_equal(result.table, quick(frame, by=("attack", "eps"), baseline=("clean", 0.0)).table)
    by_label = quick(frame, by="setting", baseline="clean 0", family=("setting", "region"))
    np.testing.assert_array_equal(by_label.table.p_holm, result.table.p_holm)


def test_a_defense_within_every_attack():
    plain = records()
    defended = plain.assign(victim="defended", dice=plain.dice + np.where(plain.attack == "ifgsm", 0.2, -0.01))
    result = quick(pd.concat([plain, defended]), by="victim", baseline="unet")
    assert list(result.table.columns[:3]) == ["attack", "region", "victim"]
    assert result.tests == 8
    assert result.friedman.empty
    verdicts = result.table.set_index(["attack", "region"]).verdict
    assert verdicts["ifgsm", "WT"] == "significantly higher"
    assert verdicts["clean", "TC"] == "significantly lower"


def test_more_than_two_settings_have_friedman_ranks_and_groups():
    frame = records()
    result = quick(frame)
    wide = frame[frame.region == "TC"].pivot(index="subject", columns="attack", values="dice")
    row = result.friedman.set_index("region").loc["TC"]
    assert row.p == friedman(wide).pvalue
    assert (row.n, row.settings, row.kendall_w) == (N, 4, friedman(wide).kendall_w)
    np.testing.assert_array_equal(result.friedman.p_holm, holm(result.friedman.p))
    ranks = result.ranks.set_index(["region", "attack"])
    assert ranks.loc[("WT", "ifgsm"), "rank"] == 4
    assert ranks.loc[("WT", "ifgsm"), "same_share"] == 1
    assert [set(g) for g in result.critical_differences["WT"].groups] == [{"clean", "noise"}]
    worst_first = quick(frame, metric="hd95").ranks.set_index(["region", "attack"])
    assert worst_first.loc[("WT", "ifgsm"), "rank"] == 4


def test_missing_and_failed_units_are_dropped_pairwise_counted_and_printed():
    frame = records()
    frame.loc[(frame.subject == "S03") & (frame.attack == "fgsm") & (frame.region == "WT"), "dice"] = np.nan
    failed = (frame.subject == "S05") & (frame.attack == "clean")
    frame.loc[failed, "status"] = "invalid_nonfinite"
    frame.loc[failed, "dice"] = 0.0
    result = quick(frame)
    assert [pick(result, a).missing for a in ("noise", "fgsm", "ifgsm")] == [1, 2, 1]
    keep = ~np.isin(np.arange(N), [3, 5])
    assert pick(result, "fgsm").p == wilcoxon(values(frame, "fgsm")[keep], values(frame, "clean")[keep]).pvalue
    assert pick(result, "fgsm").n == 10
    assert "7 pair(s) were dropped" in result.to_markdown()
    assert "missing" in result.to_markdown().splitlines()[0]


def test_a_unit_that_failed_before_it_had_regions_counts_in_every_region():
    frame = records()
    gone = (frame.subject == "S05") & (frame.attack == "fgsm")
    one = frame[gone].iloc[:1].assign(region=None, dice=np.nan, status="oom")
    result = quick(pd.concat([frame[~gone], one]))
    assert pick(result, "fgsm", "WT").missing == pick(result, "fgsm", "TC").missing == 1
    both = pd.concat([frame, frame[~gone].assign(victim="defended"), one.assign(victim="defended")])
    by_victim = quick(both, by="victim", baseline="unet")  # attack and region are strata, only the region is unknown
    assert by_victim.table.set_index(["attack", "region"]).missing.to_dict() == {
        (a, r): int(a == "fgsm") for a, _ in DROPS for r in ("WT", "TC")
    }
    with pytest.raises(ValueError, match=r"region is empty in rows that have a dice \(subject S05\)"):
        quick(pd.concat([frame[~gone], one.assign(dice=0.5, status="ok")]))


def test_few_subjects_make_no_claim():
    result = quick(records(n=5))
    assert result.table.p.isna().all()
    assert result.table.p_holm.isna().all()
    assert result.friedman.p.isna().all()
    assert result.tests == 0
    assert set(result.table.verdict) == {"n=5 < 6: no p-value"}
    assert set(result.table.method) == {"none (n < 6)"}
    assert pick(result, "ifgsm").rank_biserial == -1
    assert pick(result, "ifgsm").hodges_lehmann < -0.2
    assert pick(result, "ifgsm").mean_high < 0


@pytest.mark.parametrize(("n", "reachable"), [(6, False), (7, False), (8, True)])
def test_what_cannot_become_significant_is_not_called_insignificant(n, reachable):
    result = quick(records(n=n))  # six tests: 2^(1-n) <= .05 / 6 from n = 8 on
    expected = "significantly lower" if reachable else f"cannot reach significance with n={n}"
    assert pick(result, "ifgsm").verdict == expected
    alone = quick(records(n=n, drops={("clean", 0.0): 0.0, ("fgsm", 0.1): 0.1}, regions=("WT",)))
    assert pick(alone, "fgsm").verdict == "significantly lower"


def test_attainability_is_that_of_holm_not_of_bonferroni():
    # Seven WT subjects cannot pass alpha / 6 = .0083, but once the three TC tests are rejected alpha / 3 is enough.
    frame = records()
    frame = frame[(frame.region == "TC") | (frame.subject < "S07")]
    frame.loc[frame.attack == "noise", "dice"] -= 0.05
    verdicts = set(quick(frame).table.verdict)
    assert verdicts == {"significantly lower"}


def test_zeros_count_against_attainability():
    frame = records()
    for region in ("WT", "TC"):
        at = (frame.attack == "noise") & (frame.region == region)
        clean = (frame.attack == "clean") & (frame.region == region)
        frame.loc[at, "dice"] = frame.loc[clean, "dice"].to_numpy() - np.r_[0.1, 0.2, 0.3, np.zeros(N - 3)]
        frame.loc[(frame.attack == "fgsm") & (frame.region == region), "dice"] = frame.loc[clean, "dice"].to_numpy()
    result = quick(frame)
    assert pick(result, "noise").verdict == "cannot reach significance with n=3 non-zero pairs"
    assert pick(result, "noise").zeros == N - 3
    assert pick(result, "fgsm").verdict == "identical"
    assert (pick(result, "fgsm").p, pick(result, "fgsm").mean_method) == (
        1,
        "all differences are equal: percentile interval",
    )
    assert "percentile intervals" in result.to_markdown()


def test_one_sided():
    frame = records()
    less, greater = quick(frame, alternative="less"), quick(frame, alternative="greater")
    assert pick(less, "fgsm").p == 1 / 2**N
    assert pick(greater, "fgsm").p == 1
    assert pick(less, "fgsm").hl_low == -np.inf
    assert "[-∞, " in less.to_markdown()


def test_hd95_is_not_averaged_and_empty_predictions_are_counted():
    frame = records()
    lost = (frame.attack == "ifgsm") & frame.subject.isin(["S01", "S02"]) & (frame.region == "WT")
    frame.loc[lost, ["hd95", "prediction_voxels"]] = [373.13, 0]
    result = quick(frame, metric="hd95")
    row = pick(result, "ifgsm")
    assert (row.prediction_empty, row.baseline_prediction_empty) == (2, 0)
    assert np.isnan(row.mean_difference)
    assert row.verdict == "significantly higher"
    assert "must not be averaged" in result.to_markdown()
    assert "mean difference" not in result.to_markdown().splitlines()[0]
    assert "mean difference" in quick(frame).to_markdown().splitlines()[0]


def message(frame, **options):
    with pytest.raises(ValueError) as error:
        quick(frame, **options)
    return str(error.value)


def test_error_names_the_subjects_that_do_not_match():
    frame = records()
    lacking = message(frame[~((frame.subject == "S04") & (frame.attack == "fgsm"))])
    assert "WT: 'fgsm' lacks S04." in lacking
    extra = message(frame[~(frame.subject.isin(["S02", "S04"]) & (frame.attack == "clean") & (frame.region == "TC"))])
    assert "TC: 'clean' lacks S02, S04." in extra
    renamed = frame.assign(subject=frame.subject.where(frame.attack != "noise", frame.subject.str.lower()))
    assert "'noise' lacks S00, S01" in message(renamed)
    assert "and 2 more; 'clean' lacks s00" in message(renamed)


def test_error_says_which_column_varies_and_what_to_do():
    frame = records(drops={**DROPS, ("fgsm", 0.05): 0.05})
    text = message(frame)
    assert "differ in: eps, setting." in text
    assert "by=('attack', 'eps')" in text
    assert "seconds" not in text
    two = pd.concat([records(), records(seed=1).assign(victim="other")])
    text = message(two)
    assert "differ in: victim." in text
    assert "family=('attack', 'victim', 'region')" in text
    assert len(quick(two, family=("attack", "victim", "region")).table) == 12
    both = message(pd.concat([frame, frame.assign(victim="other")]))
    assert "by=('attack', 'eps') and family=('attack', 'eps', 'victim', 'region')" in both
    assert "counted twice" in message(pd.concat([records(), records().iloc[:1].assign(dice=0.1)]))


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (lambda f: f, {"by": "model"}, "no column 'model'; they have: subject, victim"),
        (lambda f: f, {"baseline": "Clean"}, "'Clean' is no value of attack; the records have: clean, noise"),
        (lambda f: f.iloc[:0], {}, "no records"),
        (lambda f: f[f.attack == "clean"], {}, "hold only the baseline"),
        (lambda f: f.assign(dice="high"), {}, "must hold numbers"),
        (lambda f: f.assign(hd95=np.inf), {"metric": "hd95"}, "infinite for subject(s) S00, S01"),
        (lambda f: f.assign(eps=np.nan), {"by": ("attack", "eps")}, "'eps' is empty in 96 row(s)"),
        (lambda f: f.assign(score=f.dice), {"metric": "score"}, "higher_is_better=True or False"),
        (lambda f: f, {"family": ("attack", "eps", "region")}, "no baseline 'clean' in the stratum eps=0.1"),
        (lambda f: f, {"alpha": 5}, "alpha=5"),
        (lambda f: f, {"zero_method": "x"}, "zero_method='x'"),
        (lambda f: f, {"by": ("victim", "attack"), "baseline": "unet"}, "means 4 settings; give one as a tuple"),
    ],
)
def test_errors(change, options, expected):
    assert expected in message(change(records()), **options)


def test_unknown_metric_with_a_stated_direction():
    frame = records()
    frame["score"] = -frame.dice
    ranks = quick(frame, metric="score", higher_is_better=False).ranks.set_index(["region", "attack"])
    assert ranks.loc[("TC", "ifgsm"), "rank"] == 4


def with_empty_truth(score):
    frame = records()
    empty = frame.subject.isin(["S00", "S01"]) & (frame.region == "TC")
    frame.loc[empty, "truth_empty"] = True
    frame.loc[empty, "dice"] = score
    frame.loc[empty & (frame.attack != "clean"), "dice"] = 0.0 if np.isfinite(score) else np.nan
    return frame, empty


def test_empty_truth_in_a_comparison():
    frame, empty = with_empty_truth(1.0)
    result = quick(frame)
    assert pick(result, "fgsm", "TC").truth_empty == 2
    assert pick(result, "fgsm", "WT").truth_empty == 0
    assert "BraTS convention" in result.to_markdown()
    dropped, _ = with_empty_truth(np.nan)
    assert pick(quick(dropped), "fgsm", "TC").missing == 2
    assert "count as missing" in quick(dropped).to_markdown()
    frame.loc[empty & (frame.attack == "clean"), "dice"] = np.nan
    assert "two empty-region conventions are mixed" in message(frame)
    with pytest.raises(ValueError, match="mixed"):
        summarise(frame, ["region", "attack"])


def test_summary_gives_the_mean_with_and_without_empty_truth():
    frame, _ = with_empty_truth(1.0)
    frame.loc[frame.attack == "ifgsm", "prediction_voxels"] = 0
    frame.loc[(frame.attack == "clean") & (frame.subject == "S11"), "status"] = "failed"
    table = summarise(frame).set_index(["attack", "region"])
    row = table.loc[("clean", "TC")]
    dice = values(frame, "clean", "TC")[:-1]
    assert (row.n, row.missing, row.truth_empty, row.prediction_empty) == (11, 1, 2, 0)
    assert row.empty_truth_rule == "scored"
    assert row["mean"] == pytest.approx(dice.mean())
    assert row.mean_nonempty == pytest.approx(dice[2:].mean())
    assert row["median"] == np.median(dice)
    assert row.median_nonempty == np.median(dice[2:])
    assert table.loc[("ifgsm", "WT"), "prediction_empty"] == N
    assert table.loc[("ifgsm", "WT"), "empty_truth_rule"] == "none"
    distances = summarise(frame, ["region"], "hd95")
    assert "mean" not in distances
    assert distances["median"].notna().all()
    assert distances.set_index("region").loc["WT", "prediction_empty"] == N
    bare = summarise(
        [{"subject": "a", "group": "g", "dice": 0.5}, {"subject": "b", "group": "g", "dice": 0.7}], "group"
    )
    assert bare.loc[0, "mean"] == pytest.approx(0.6)
    assert bare.loc[0, ["truth_empty", "mean_nonempty"]].isna().all()


def test_summary_reads_flags_from_text():
    frame, _ = with_empty_truth(1.0)
    as_text = frame.assign(truth_empty=frame.truth_empty.astype(str))
    pd.testing.assert_frame_equal(summarise(frame), summarise(as_text))


@pytest.fixture(scope="module")
def hostile():
    """Names that a spreadsheet would run, or that break a table."""
    names = {"fgsm": "=1+1", "noise": "a|b_<c>", "ifgsm": "[red] 50% & $x$"}
    return quick(records().replace({"attack": names}))


def test_csv_is_complete_and_safe(tmp_path, hostile):
    path = hostile.to_csv(tmp_path / "table.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {r["attack"] for r in rows} == {"'=1+1", "a|b_<c>", "[red] 50% & $x$"}
    assert list(rows[0]) == list(hostile.table.columns)
    for column in hostile.table.select_dtypes("number"):
        assert [float(r[column]) for r in rows] == hostile.table[column].tolist()
    assert rows[1]["mean_difference"].startswith("-")


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_csv_quotes_every_kind_of_formula_and_no_number(tmp_path, start):
    frame = pd.DataFrame({"name": [f"{start}cmd", f"a{start}b"], f"{start}column": [-1.5, 2.0]})
    write_csv(frame, tmp_path / "t.csv")
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    assert text.splitlines() == [f"name,'{start}column", f"'{start}cmd,-1.5", f"a{start}b,2.0"]
    assert frame.loc[0, "name"] == f"{start}cmd"


def test_markdown_is_one_rectangular_table(hostile):
    text = hostile.to_markdown()
    assert str(hostile) == text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6
    counts = {line.replace("\\|", "").count("|") for line in lines}
    assert len(counts) == 1
    assert "a\\|b_&lt;c>" in text
    assert "| 0.00293 " in text  # p Holm = 6 * 2 / 2^12
    assert "Holm over 6 tests (attack x region)" in text


def test_latex_is_booktabs_and_escaped(hostile):
    text = hostile.to_latex()
    for command in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"):
        assert text.count(command) == 1
    assert r"a\textbar{}b\_\textless{}c\textgreater{}" in text
    assert r"[red] 50\% \& \$x\$" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    columns = text[text.index("tabular}{") + 9 :].split("}")[0]
    assert {line.replace(r"\&", "").count("&") for line in body if line} == {len(columns) - 1}
    assert "$-$1.00" in text
    from monai_adv.stats.tables import latex_escape

    assert latex_escape("[a] -∞ p-value -0.5 \\") == r"{}[a] $-$$\infty$ p-value $-$0.5 \textbackslash{}"


def test_rich_table_shows_cells_as_they_are(hostile):
    from rich.console import Console

    console = Console(width=300, record=True, file=io.StringIO())
    console.print(hostile.to_rich())
    text = console.export_text()
    cells = [line for line in text.splitlines() if line.startswith("│")]
    assert sum("[red] 50% & $x$" in line for line in cells) == 2
    assert "significantly lower" in text
    assert "Holm over 6 tests" in text


def test_import_is_light_and_of_nothing_else_in_the_package():
    code = (
        "import sys, json, monai_adv.stats;"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('torch', 'monai', 'rich', 'matplotlib', 'itk')"
        " or m.startswith('monai_adv.') and not m.startswith('monai_adv.stats')]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []


def test_a_path_is_no_table() -> None:
    with pytest.raises(ValueError, match=r"'records.csv' is a path: give its rows, e.g. pandas.read_csv"):
        compare("records.csv")  # type: ignore[arg-type]
