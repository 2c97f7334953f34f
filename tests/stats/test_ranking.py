"""Friedman's test, stability of ranks and critical differences; the bootstrap of the mean."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from monai_adv.stats import (
    bootstrap_mean_difference,
    critical_difference,
    friedman,
    holm,
    rank_stability,
    wilcoxon,
)


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.8, 0.95, 14)
    return pd.DataFrame(
        {
            "fgsm": base - rng.uniform(0.1, 0.3, 14),
            "clean": base,
            "noise": base + rng.normal(0, 0.002, 14),
            "pgd": base - rng.uniform(0.5, 0.7, 14),
        },
        index=[f"S{i}" for i in range(14)],
    )


def test_friedman_by_hand():
    # ranks 1 2 3 | 1 2 3 | 1 3 2 | 2 1 3: sums 5, 8, 11; 12/(4*3*4) * (25+64+121) - 3*4*4 = 4.5
    result = friedman([[0.1, 0.2, 0.3], [0.1, 0.5, 0.6], [0.2, 0.9, 0.8], [0.5, 0.4, 0.6]])
    assert result.statistic == pytest.approx(4.5)
    assert result.pvalue == pytest.approx(math.exp(-4.5 / 2))  # chi-square with two degrees of freedom
    assert result.kendall_w == pytest.approx(4.5 / 8)
    assert result.mean_ranks.tolist() == [1.25, 2.0, 2.75]
    assert (result.n, result.settings, result.missing) == (4, 3, 0)


def test_friedman_drops_and_counts_missing_subjects(table):
    whole = friedman(table.drop(index="S3"))
    table.loc["S3", "noise"] = np.nan
    result = friedman(table)
    assert (result.n, result.missing) == (13, 1)
    assert (result.statistic, result.pvalue) == (whole.statistic, whole.pvalue)
    assert result.pvalue == stats.friedmanchisquare(*table.dropna().to_numpy().T).pvalue


def test_friedman_ties_are_restored_by_rounding():
    rows = [[0.1 + 0.2, 0.3, 0.5]] * 6
    assert friedman(rows).mean_ranks.tolist() == [1.5, 1.5, 3]


def test_friedman_edges():
    same = friedman(np.full((8, 3), 0.7))
    assert (same.method, same.pvalue, same.statistic) == ("identical", 1.0, 0.0)
    few = friedman([[0.1, 0.2, 0.3]])
    assert few.method == "too few"
    assert math.isnan(few.pvalue)
    with pytest.raises(ValueError, match="three or more settings, got 2"):
        friedman([[0.1, 0.2]])
    with pytest.raises(ValueError, match="subjects x settings"):
        friedman([0.1, 0.2])
    with pytest.raises(ValueError, match="listed twice in the table: a"):
        friedman(pd.DataFrame([[1, 2, 3], [1, 2, 3]], index=["a", "a"]))
    with pytest.raises(ValueError, match="infinite"):
        friedman([[0.1, np.inf, 0.3]])


def test_rank_stability(table):
    ranks = rank_stability(table, seed=1)
    assert ranks.loc[["fgsm", "pgd"], "rank"].tolist() == [3, 4]
    assert ranks.loc["pgd", ["rank_low", "rank_high", "first_share", "same_share"]].tolist() == [4, 4, 0, 1]
    assert ranks.loc[["clean", "noise"], "first_share"].sum() >= 1
    assert ranks.loc["clean", "first_share"] < 1
    assert ranks.loc[["clean", "noise"], "rank_low"].tolist() == [1, 1]
    assert ranks.loc[["clean", "noise"], "rank_high"].max() == 2
    pd.testing.assert_frame_equal(ranks, rank_stability(table, seed=1))
    assert not ranks["same_share"].equals(rank_stability(table, seed=2)["same_share"])
    turned = rank_stability(table, seed=1, higher_is_better=False)
    assert turned.loc["pgd", "rank"] == 1


def test_rank_stability_is_the_bootstrap_it_says():
    # Two subjects that disagree: a leads if the first is drawn twice (1/4), ties share first place (1/2).
    ranks = rank_stability(pd.DataFrame({"a": [0.9, 0.1], "b": [0.5, 0.5]}), resamples=20000)
    assert ranks["rank"].tolist() == [1, 1]
    assert ranks["mean_rank"].tolist() == [1.5, 1.5]
    assert ranks["first_share"].tolist() == pytest.approx([0.75, 0.75], abs=0.015)
    assert ranks["rank_high"].tolist() == [2, 2]


def test_rank_stability_edges():
    assert rank_stability(pd.DataFrame({"a": [np.nan], "b": [1.0]})).isna().to_numpy().all()
    with pytest.raises(ValueError, match="resamples=0"):
        rank_stability([[1, 2]], resamples=0)


def test_critical_difference(table):
    summary = critical_difference(table)
    assert list(summary.mean_ranks.index)[2:] == ["fgsm", "pgd"]
    assert [set(g) for g in summary.groups] == [{"clean", "noise"}]
    assert summary.n == 14
    assert summary.note == ""
    names = list(table)
    raw = {
        (a, b): wilcoxon(table[a].to_numpy(), table[b].to_numpy()).pvalue
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    for (a, b), adjusted in zip(raw, holm(list(raw.values()))):
        assert summary.pvalues.loc[a, b] == summary.pvalues.loc[b, a] == adjusted
    assert np.isnan(np.diag(summary.pvalues)).all()


def test_critical_difference_groups_are_cliques_not_runs():
    # b lies between a and c by mean rank; a and c are alike, b differs from both by a hair, always the same way.
    rng = np.random.default_rng(4)
    a = rng.normal(0, 1, 40)
    frame = pd.DataFrame({"a": a, "b": a - 1e-3, "c": a + rng.normal(-0.3, 1, 40)})
    summary = critical_difference(frame)
    assert ("a", "b") not in summary.groups
    assert all(len(g) == 2 for g in summary.groups)
    assert {frozenset(g) for g in summary.groups} == {frozenset("ac"), frozenset("bc")}


def test_critical_difference_with_few_subjects(table):
    few = critical_difference(table.iloc[:5])
    assert few.groups == ()
    assert few.pvalues.isna().to_numpy().all()
    assert "n=5 < 6" in few.note
    seven = critical_difference(table.iloc[:7])
    assert seven.note == "cannot reach significance with n=7 and 6 pairs"  # 2^-6 > .05 / 6
    assert [len(g) for g in seven.groups] == [4]
    assert critical_difference(table.iloc[:8]).note == ""  # 2^-7 <= .05 / 6


def test_bootstrap_is_scipys_bca():
    d = np.round(np.random.default_rng(0).exponential(0.2, 15), 6)
    result = bootstrap_mean_difference(d, seed=4, resamples=999)
    expected = stats.bootstrap(
        (d,), np.mean, n_resamples=999, method="BCa", random_state=np.random.default_rng(4)
    ).confidence_interval
    assert result.confidence_interval == (expected.low, expected.high)
    assert (result.method, result.note, result.n) == ("BCa", "", 15)
    assert result.mean_difference == pytest.approx(d.mean())
    low, high = result.confidence_interval
    assert low < result.mean_difference < high


def test_bootstrap_is_seeded_and_leaves_the_global_state():
    d = [0.1, 0.3, 0.2, 0.7, 0.5, np.nan]
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = bootstrap_mean_difference(d, seed=1, resamples=500)
    assert first == bootstrap_mean_difference(d, seed=1, resamples=500)
    assert first != bootstrap_mean_difference(d, seed=2, resamples=500)
    assert first.missing == 1
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_bootstrap_of_degenerate_samples():
    constant = bootstrap_mean_difference(np.full(8, 0.25), resamples=200)
    assert constant.confidence_interval == (0.25, 0.25)
    assert constant.method == "percentile"
    assert "all differences are equal" in constant.note
    one = bootstrap_mean_difference([0.25])
    assert one.method == "none"
    assert np.isnan(one.confidence_interval).all()
    assert math.isnan(bootstrap_mean_difference([np.nan]).mean_difference)
    one_sided = bootstrap_mean_difference([0.1, 0.3, 0.2, 0.7], resamples=200, alternative="greater")
    assert one_sided.confidence_interval[1] == math.inf
