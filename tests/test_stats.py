"""Intervals and tests against closed forms, published figures and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from llmevo.errors import StatsError
from llmevo.stats import (
    Spread,
    holm,
    mcnemar,
    paired_difference,
    paired_over_seeds,
    paired_p_value,
    pooled_spread,
    wilson,
)

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


@settings(deadline=None)
@given(BITS)
def test_mcnemar_is_the_exact_binomial_test(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    wins, losses = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
    expected = reference.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(a, b) == pytest.approx(expected)
    assert mcnemar(a, b) == mcnemar(b, a)


@settings(deadline=None)
@given(st.integers(1, 500), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_is_scipys(count: int, share: float, level: float) -> None:
    successes = round(share * count)
    interval = wilson(successes, count, level)
    expected = reference.binomtest(successes, count).proportion_ci(level, method="wilson")
    assert interval.low == pytest.approx(expected.low, abs=1e-9)
    assert interval.high == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert all(adjusted[i] <= adjusted[j] for i, j in itertools.pairwise(order))


def test_holm_on_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from(["bca", "percentile", "normal"]))
def test_the_interval_holds_the_estimate_and_turns_with_the_models(data: st.DataObject, method: str) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    sizes = data.draw(st.lists(st.integers(5, 60), min_size=1, max_size=3))
    a = {f"t{i}": rng.normal(0.2, 1, n).tolist() for i, n in enumerate(sizes)}
    b = {f"t{i}": rng.normal(0, 1, n).tolist() for i, n in enumerate(sizes)}
    weights = {"t0": 2.0}
    interval = paired_difference(a, b, weights=weights, method=method, resamples=400)  # type: ignore[arg-type]
    assert interval.estimate == pytest.approx(
        sum(weights.get(t, 1.0) * (np.mean(a[t]) - np.mean(b[t])) for t in a)
    )
    assert interval.low < interval.estimate < interval.high
    assert interval == paired_difference(a, b, weights=weights, method=method, resamples=400)  # type: ignore[arg-type]
    turned = paired_difference(b, a, weights=weights, method=method, resamples=400)  # type: ignore[arg-type]
    assert turned.estimate == pytest.approx(-interval.estimate)
    assert (turned.high - turned.low) == pytest.approx(interval.high - interval.low, rel=0.3)


def test_bca_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.exponential(1.5, 40), rng.exponential(1.0, 40)
    ours = paired_difference({"t": a}, {"t": b}, resamples=20000)
    theirs = reference.bootstrap(
        (a - b,), np.mean, n_resamples=20000, method="BCa", rng=rng
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.high, abs=0.03)


@pytest.mark.parametrize("method", ["bca", "percentile", "normal"])
def test_intervals_cover_the_truth(method: str) -> None:
    """Two tasks of 0/1 items with correlated answers, 60 and 120 items, true difference 0.05 + 0.5 * 0.10."""
    rng = np.random.default_rng(7)
    runs, covered = 600, 0
    for _ in range(runs):
        a, b = {}, {}
        for task, count, gain in (("one", 60, 0.05), ("two", 120, 0.10)):
            base = rng.random(count) < 0.6
            flip = rng.random(count)
            # P(better) - P(worse) = gain: right answers are lost at rate 0.1, wrong ones found as needed.
            found = (gain + 0.1 * 0.6) / 0.4
            b[task] = base.astype(float)
            a[task] = np.where(base, flip > 0.1, flip < found).astype(float)
        interval = paired_difference(a, b, weights={"two": 0.5}, method=method, resamples=500)  # type: ignore[arg-type]
        covered += interval.low <= 0.10 <= interval.high
    # 0.95 less three standard errors of the simulation, less a point for finite samples.
    assert covered / runs > 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs) - 0.01
    assert covered < runs


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 1, 200)
    a, b = hard + rng.normal(0.1, 0.2, 200), hard + rng.normal(0, 0.2, 200)
    paired = paired_difference({"t": a}, {"t": b})
    unpaired = paired_difference({"t": a}, {"t": rng.permutation(b)})
    assert paired.excludes_zero
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_equal_models_have_a_point_at_zero() -> None:
    interval = paired_difference({"t": [1, 0, 1]}, {"t": [1, 0, 1]})
    assert (interval.low, interval.high, interval.excludes_zero) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ({"x": [1.0]}, {"y": [1.0]}, {}, "same tasks"),
        ({"x": [1.0]}, {"x": [1.0, 2.0]}, {}, "same items of 'x'"),
        ({"x": []}, {"x": []}, {}, "at least one"),
        ({}, {}, {}, "same tasks"),
        ({"x": [math.nan]}, {"x": [1.0]}, {}, "must be finite"),
        ({"x": [1.0]}, {"x": [1.0]}, {"level": 1.0}, "`0 < level < 1`"),
        ({"x": [1.0]}, {"x": [1.0]}, {"resamples": 10}, "`resamples >= 100`"),
    ],
)
def test_what_cannot_be_compared_is_refused(a: dict, b: dict, options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(StatsError, match=message):
        paired_difference(a, b, **options)
    with pytest.raises(StatsError, match="only 0 and 1"):
        mcnemar([0.5], [1.0])
    with pytest.raises(StatsError, match="successes <= count"):
        wilson(3, 2)
    with pytest.raises(StatsError, match="must lie in"):
        holm([1.5])


def test_right_and_wrong_answers_are_tested_exactly() -> None:
    rng = np.random.default_rng(0)
    a, b = ({t: (rng.random(60) < 0.6).astype(float).tolist() for t in "xy"} for _ in range(2))
    exact = mcnemar(a["x"] + a["y"], b["x"] + b["y"])
    assert paired_p_value(a, b) == paired_p_value(a, b, weights={"x": 0.5, "y": 0.5}) == exact
    # Items that are better when right are negated where fewer right answers are wanted.
    negated = [{t: [-v for v in values] for t, values in side.items()} for side in (a, b)]
    assert paired_p_value(*negated) == exact
    assert paired_p_value(a, b, weights={"x": 0.9, "y": 0.1}) != exact
    assert paired_p_value(a, a) == 1.0


@pytest.mark.parametrize("shift", [0.0, 0.35])
def test_the_bootstraps_p_value_is_about_students(shift: float) -> None:
    rng = np.random.default_rng(1)
    gaps = rng.normal(shift, 1.0, 200)
    base = rng.normal(0.0, 3.0, 200)
    got = paired_p_value({"t": (base + gaps).tolist()}, {"t": base.tolist()})
    expected = reference.ttest_1samp(gaps, 0.0).pvalue
    assert got == pytest.approx(expected, abs=0.02)


def test_the_bootstraps_p_value_keeps_its_level() -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(300):
        gaps = rng.exponential(1.0, 80) - 1.0  # skewed, and no difference
        zeros = {"t": [0.0] * 80}
        found.append(paired_p_value({"t": gaps.tolist()}, zeros, resamples=400) <= 0.05)
    assert 0.02 <= np.mean(found) <= 0.10


def test_p_values_refuse_what_cannot_be_compared() -> None:
    with pytest.raises(StatsError, match="same items"):
        paired_p_value({"t": [1.0]}, {"t": [1.0, 0.0]})
    with pytest.raises(StatsError, match="resamples"):
        paired_p_value({"t": [1.0]}, {"t": [0.0]}, resamples=1)


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(2, 6), st.integers(1, 30))
def test_seeds_alone_are_a_two_sample_t_test(seed: int, few: int, many: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0, 1, few).tolist(), rng.normal(1, 2, many).tolist()
    spread = pooled_spread([first, second])
    assert spread is not None
    items = [{"t": [float(np.mean(values))] * count} for values in (first, second)]
    interval, p_value = paired_over_seeds(*items, (len(first), len(second)), spread)
    theirs = reference.ttest_ind(first, second)
    low, high = theirs.confidence_interval(0.95)
    assert p_value == pytest.approx(max(theirs.pvalue, 2.0 ** (1 - count)), abs=1e-9)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_items_alone_are_a_paired_t_test_and_both_are_wider_than_each() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0.3, 1, 40)
    b = rng.normal(0, 1, 40)
    alone, p_value = paired_over_seeds({"t": a.tolist()}, {"t": b.tolist()}, (2, 2), Spread(0.0, 4))
    theirs = reference.ttest_rel(a, b)
    assert p_value == pytest.approx(theirs.pvalue)
    assert tuple(theirs.confidence_interval(0.95)) == pytest.approx((alone.low, alone.high))
    both, p_both = paired_over_seeds({"t": a.tolist()}, {"t": b.tolist()}, (2, 2), Spread(0.2, 4))
    assert both.low < alone.low < alone.high < both.high
    assert p_both > p_value
    # A model that no seed changes adds nothing.
    one, _ = paired_over_seeds({"t": a.tolist()}, {"t": b.tolist()}, (2, 0), Spread(0.2, 4))
    assert alone.low > one.low > both.low
    assert pooled_spread([[1.0], [2.0]]) is None
    assert paired_over_seeds({"t": [1.0]}, {"t": [1.0]}, (2, 2), Spread(0.0, 1))[1] == 1.0


def test_an_interval_over_seeds_and_items_holds_its_level() -> None:
    """Two equal settings, thirty items, two seeds each, four more settings to pool over."""
    rng = np.random.default_rng(1)
    covered, runs = 0, 400
    for _ in range(runs):
        items = rng.normal(0, 0.3, 30)
        seeds = rng.normal(0, 0.1, (6, 2))
        scores = items + seeds[:, :, None] + rng.normal(0, 0.05, (6, 2, 30))
        spread = pooled_spread(scores.mean(axis=2).tolist())
        assert spread is not None
        a, b = scores[0].mean(axis=0), scores[1].mean(axis=0)
        interval, _ = paired_over_seeds({"t": a.tolist()}, {"t": b.tolist()}, (2, 2), spread)
        covered += interval.low <= 0 <= interval.high
    assert 0.92 <= covered / runs <= 0.99


@given(
    st.lists(st.floats(0.9, 1.1), min_size=1, max_size=8).filter(lambda gaps: len(set(gaps)) == len(gaps)),
    st.floats(0, 0.01),
)
def test_a_few_items_that_agree_prove_nothing(gaps: list[float], deviation: float) -> None:
    zeros = {"t": [0.0] * len(gaps)}
    least = 2.0 ** (1 - len(gaps))
    assert paired_p_value({"t": gaps}, zeros, resamples=200) >= least
    assert paired_over_seeds({"t": gaps}, zeros, (2, 2), Spread(deviation, 4))[1] >= least
