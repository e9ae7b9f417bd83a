"""The benchmark of halving counts what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmevo.genome.sections import HalvingSpec

_BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def halving() -> Any:
    sys.path.insert(0, str(_BENCHMARKS))
    try:
        import halving
    finally:
        sys.path.remove(str(_BENCHMARKS))
    return halving


def test_simulated_candidates_have_the_figures_that_are_stated(halving: Any) -> None:
    rng = np.random.default_rng(0)
    runs = [halving.simulated(16, rng) for _ in range(40)]
    truth = np.concatenate([run.truth for run in runs])
    assert truth.std() == pytest.approx(halving.SPREAD, rel=0.1)
    assert truth.mean() == pytest.approx(halving.ACCURACY, abs=0.01)
    phi, differ, gap = [], [], []
    for run in runs:
        answers = run.correct[:, 0]
        phi.append(np.corrcoef(answers)[np.triu_indices(16, 1)].mean())
        differ.append(np.mean([np.abs(answers[0] - other).mean() for other in answers[1:]]))
        gap.append((answers.mean(axis=1) - run.truth).mean())
    assert np.mean(phi) == pytest.approx(halving.CORRELATION, abs=0.02)
    assert np.mean(differ) == pytest.approx(0.16, abs=0.01)
    assert np.mean(gap) == pytest.approx(0.0, abs=0.01)


def test_strategies_count_what_they_ask(halving: Any) -> None:
    run = halving.simulated(8, np.random.default_rng(1))
    scores = run.correct.mean(axis=(1, 2))
    everything = HalvingSpec(enabled=False)
    assert halving.halving(everything)(run) == (int(np.argmax(scores)), scores.max(), 8 * 1000)
    # Eight answer 60, four 120, two 240, and the last one, alone, everything.
    winner, score, asked = halving.halving(HalvingSpec(enabled=True, first=60, eta=2))(run)
    assert asked == 8 * 60 + 4 * 60 + 2 * 120 + 760
    assert score == pytest.approx(scores[winner])
    assert halving.subset(100)(run)[2] == 800


def test_the_winner_of_a_run_is_the_best_of_its_batches(halving: Any) -> None:
    rng = np.random.default_rng(2)
    runs = [halving.simulated(12, rng) for _ in range(5)]
    rows = halving.compare("simulated", 3, 4, iter(runs), halving.strategies(["gold_margin"]))
    whole = rows[0]
    assert (whole.strategy, whole.cost) == ("all items", 1.0)
    picks = [run.truth[int(np.argmax(run.correct.mean(axis=(1, 2))))] for run in runs]
    assert whole.regret == pytest.approx(
        np.mean([100 * (r.truth.max() - p) for r, p in zip(runs, picks, strict=True)])
    )
    assert all(0 < row.cost < 1 and row.regret >= 0 for row in rows[1:])
