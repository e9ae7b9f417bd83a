"""The genetic algorithm's own rules; what it shares with other proposers is in test_conformance.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo import Categorical, Float, Int, Optimizer, ProposerError, Score, Space, State, Trial
from llmevo.proposers.ga import GA
from llmevo.proposers.operators import reflect
from llmevo.strength import TwoLevel

SPACE = Space({"a": Float(0, 1, init=0.25), "b": Int(1, 64, log=True), "c": Categorical("x", "y", "z")})


def told(space: Space, points: np.ndarray, values: list[float]) -> list[Trial]:
    return [
        Trial(i, space.from_unit(unit), "x", state=State.COMPLETE, batch=i, score=Score(value))
        for i, (unit, value) in enumerate(zip(points, values, strict=True))
    ]


def test_the_start_point_comes_first_unless_it_is_known() -> None:
    assert GA(SPACE, "maximize").propose(3, [], np.random.default_rng(0))[0].params == SPACE.start()
    known = [Trial(0, SPACE.start(), "enqueued")]
    found = GA(SPACE, "maximize").propose(3, known, np.random.default_rng(0))
    assert SPACE.start() not in [proposal.params for proposal in found]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_parents_are_the_best_of_all_history(direction: str) -> None:
    rng = np.random.default_rng(0)
    values = list(range(40))
    trials = told(SPACE, rng.random((40, 3)), [float(v) for v in values])
    best = set(range(35, 40)) if direction == "maximize" else set(range(5))
    used: dict[int, int] = {}
    for seed in range(60):
        for proposal in GA(SPACE, direction, population=5).propose(4, trials, np.random.default_rng(seed)):
            first, second = proposal.attrs["ga"]["parents"]
            assert first != second
            used[first] = used.get(first, 0) + 1
    assert set(used) <= best
    top = 39 if direction == "maximize" else 0
    assert max(used, key=lambda number: used[number]) == top  # the best wins most tournaments


def test_strength_sets_how_far_children_lie() -> None:
    space = Space({f"x{i}": Float(0, 1) for i in range(6)})
    trials = told(
        space, np.full((30, 6), 0.5) + np.random.default_rng(0).normal(0, 1e-3, (30, 6)), [0.0] * 30
    )

    def spread(strength: float) -> float:
        ga = GA(space, "maximize", strength=TwoLevel(strength, strength))
        steps = []
        for seed in range(80):
            for proposal in ga.propose(1, trials, np.random.default_rng(seed)):
                assert proposal.attrs["ga"]["strength"] == strength
                steps.append(np.abs(space.to_unit(proposal.params) - 0.5).max())
        return float(np.median(steps))

    assert 0.005 < spread(0.02) < 0.05
    assert 0.1 < spread(0.2) < 0.4


@given(st.lists(st.floats(-50, 50), min_size=1))
def test_reflection_stays_inside_and_leaves_inner_points(values: list[float]) -> None:
    unit = np.array(values)
    folded = reflect(unit)
    assert ((folded >= 0) & (folded <= 1)).all()
    inside = (unit >= 0) & (unit <= 1)
    assert (folded[inside] == unit[inside]).all()
    assert np.allclose(reflect(-unit), folded)


def test_no_point_twice_also_among_pending_ones() -> None:
    opt = Optimizer(SPACE, "ga", direction="maximize")
    for number in range(60):
        for trial in opt.ask(3):
            if number % 4:
                opt.tell(trial, float(SPACE.to_unit(trial.params)[0]))
    keys = [SPACE.key(trial.params) for trial in opt.trials]
    assert len(set(keys)) == len(keys) == 180


def test_refuses_a_population_of_one() -> None:
    with pytest.raises(ProposerError, match="population >= 2"):
        GA(SPACE, "maximize", population=1)
