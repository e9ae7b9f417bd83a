"""Numbers per item: their mean is the metric, their spread its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

metrics = pytest.importorskip("lm_eval.api.metrics")

from llmevo.evaluate.measures import gold, per_item, sign  # noqa: E402

LIKELIHOODS = st.lists(st.tuples(st.floats(-50, -0.1), st.integers(1, 40)), min_size=2, max_size=30)


@settings(deadline=None)
@given(LIKELIHOODS, st.sampled_from([metrics.bits_per_byte, metrics.weighted_perplexity]))
def test_the_closed_form_is_the_jackknife(
    values: list[tuple[float, int]], aggregation: Callable[[Sequence[Any]], float]
) -> None:
    count, whole = len(values), aggregation(values)
    without = np.array([aggregation(values[:i] + values[i + 1 :]) for i in range(count)])
    pseudo = count * whole - (count - 1) * without
    items = np.array(per_item(values, aggregation))
    # A perplexity of e**38 among the items leaves the mean the last digits of a float: nothing can be exact.
    assert items.mean() == pytest.approx(whole, rel=1e-6, abs=1e-12 * np.abs(items).max())
    assert items - items.mean() == pytest.approx(
        pseudo - pseudo.mean(), rel=1e-6, abs=1e-6 * np.abs(pseudo).max()
    )


def test_means_keep_their_items() -> None:
    assert per_item([1, 0, True, 0.5], metrics.mean) == [1.0, 0.0, 1.0, 0.5]


def test_a_mean_in_disguise_has_the_means_standard_error() -> None:
    rng = np.random.default_rng(0)
    values = [(int(rng.integers(4)), rng.dirichlet(np.ones(4))) for _ in range(50)]
    single = [metrics.brier_score([value]) for value in values]
    assert per_item(values, metrics.brier_score) == pytest.approx(single)


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(deadline=None, max_examples=15)  # scikit-learn takes milliseconds for each item left out
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=12))
def test_correlations_have_finite_items(values: list[tuple[int, int]]) -> None:
    items = per_item(values, metrics.matthews_corrcoef)
    assert len(items) == len(values)
    assert all(map(math.isfinite, items))
    assert np.mean(items) == pytest.approx(metrics.matthews_corrcoef(values), abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(-200, 0), min_size=2, max_size=6), st.data())
def test_gold_is_a_log_probability_and_a_margin(likelihoods: list[float], data: st.DataObject) -> None:
    right = data.draw(st.integers(0, len(likelihoods) - 1))
    values = gold(likelihoods, [right])
    assert values["gold_logprob"] <= 0
    assert (values["gold_margin"] > 0) == (likelihoods[right] > max(np.delete(likelihoods, right)))
    each = [gold(likelihoods, [i])["gold_logprob"] for i in range(len(likelihoods))]
    assert math.fsum(map(math.exp, each)) == pytest.approx(1.0)
    assert gold(likelihoods, range(len(likelihoods)))["gold_logprob"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("weight", "higher", "direction", "expected"),
    [
        (1, True, "maximize", 1),
        (1, False, "maximize", -1),
        (1, True, "minimize", -1),
        (1, False, "minimize", 1),
        (-1, True, "maximize", -1),
        (-1, False, "maximize", -1),
        (-1, True, "minimize", -1),
        (-1, False, "minimize", -1),
    ],
)
def test_a_metrics_own_direction_is_honoured(
    weight: float, higher: bool, direction: str, expected: int
) -> None:
    assert sign(weight, higher, direction) == expected
