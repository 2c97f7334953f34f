"""Holm's procedure: golden values, its definition, ties at the edge, missing tests."""

from __future__ import annotations

import numpy as np
import pytest

from monai_adv.stats import holm, rejected


def step_down(p, alpha):
    """Rejections by the procedure's own words: go up the sorted p-values, stop at the first that is too large."""
    out = np.zeros(len(p), dtype=bool)
    for step, index in enumerate(np.argsort(p)):
        if p[index] > alpha / (len(p) - step):
            break
        out[index] = True
    return out


def test_golden_d():
    adjusted = holm([0.50, 0.01, 0.001, 0.69, 0.02, 0.05, 0.0025])
    np.testing.assert_allclose(adjusted, [1, 0.05, 0.007, 1, 0.08, 0.15, 0.015], rtol=1e-12)
    assert rejected(adjusted).tolist() == [False, True, True, False, False, False, True]


@pytest.mark.parametrize("m", [1, 2, 5, 20])
def test_equals_the_step_down_procedure(m):
    rng = np.random.default_rng(m)
    decided = 0
    for _ in range(20):
        p = rng.random(m) ** 3
        for alpha in (0.01, 0.05, 0.3):
            np.testing.assert_array_equal(rejected(holm(p), alpha), step_down(p, alpha))
            decided += step_down(p, alpha).sum()
    assert decided > 0


@pytest.mark.parametrize("m", range(1, 60))
def test_a_tie_at_the_edge_is_rejected(m):
    p = np.full(m, 0.9)
    p[0] = 0.05 / m
    assert rejected(holm(p))[0]
    p[0] *= 1 + 1e-6
    assert not rejected(holm(p))[0]


def test_missing_tests_pass_through_and_do_not_count():
    adjusted = holm([0.02, np.nan, 0.03, np.nan])
    np.testing.assert_allclose(adjusted, [0.04, np.nan, 0.04, np.nan])
    assert not rejected(adjusted)[1]
    assert holm([]).shape == (0,)
    assert np.isnan(holm([np.nan])).all()


def test_keeps_shape_and_input():
    p = np.array([[0.01, 0.5], [0.02, 0.04]])
    before = p.copy()
    assert holm(p).shape == (2, 2)
    np.testing.assert_array_equal(p, before)


@pytest.mark.parametrize("bad", [-0.1, 1.5])
def test_refuses_what_is_no_probability(bad):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.1, bad])


@pytest.mark.parametrize("tests", [1, 2, 3, 9, 36, 100])
def test_pairs_needed_is_the_fewest_with_which_a_test_can_pass(tests: int) -> None:
    from monai_adv.stats import pairs_needed, wilcoxon

    needed = pairs_needed(tests)
    smallest = [wilcoxon(np.arange(1.0, n + 1), np.zeros(n)).pvalue for n in (needed - 1, needed)]
    others = [1.0] * (tests - 1)
    assert [bool(holm([p, *others])[0] <= 0.05) for p in smallest] == [False, True]
