"""Who survives, who mates, and what is written of a child; the weights themselves are the train stage's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmevo import Float, Optimizer, Space, Trial
from llmevo.errors import ProposerError
from llmevo.proposers import population
from llmevo.proposers.population import ATTRS, SKETCH, Population, Survivors
from llmevo.trial import Score, State

SPACE = Space({"x": Float(0, 1, init=0.5), "y": Float(0, 1)})


def trial(number: int, value: float | None, place: tuple[float, float] = (0.0, 0.0), **more: Any) -> Trial:
    """A finished individual whose sketch is two numbers; None for a failure."""
    given = {"batch": number // 3 * 3, "params": SPACE.start(), "origin": ATTRS, **more}
    if value is None:
        return Trial(number, state=State.FAILED, error="diverged", **given)
    sketch = {SKETCH: {str(i): x for i, x in enumerate(place)}}
    score = given.pop("score", Score(value))
    return Trial(number, state=State.COMPLETE, score=score, metrics=sketch, **given)


def test_the_best_survive_unchanged_and_nobody_comes_back() -> None:
    opt = Optimizer(SPACE, "population", direction="maximize", seed=1)
    rng, gone = np.random.default_rng(0), set[int]()
    survivors, best = Survivors("maximize", 6), -np.inf
    for _ in range(15):
        for asked in opt.ask(6):
            value = float(rng.normal())
            place = rng.normal(size=4).round(1)
            sketch = {SKETCH: {str(i): float(x) for i, x in enumerate(place)}}
            opt.tell(asked, value, metrics=sketch) if rng.random() < 0.9 else opt.tell(asked, error="x")
        alive = survivors(opt.trials)
        numbers = {one.number for one in alive}
        assert len(alive) == len(numbers) == min(6, sum(one.score is not None for one in opt.trials))
        assert alive == Survivors("maximize", 6)(opt.trials)
        assert [one.value for one in alive] == sorted((one.value for one in alive), reverse=True)
        # An elite is the trial that it was, so that the best ever never declines.
        assert alive[0].value >= best
        assert alive[0] == opt.best
        best = alive[0].value
        assert not numbers & gone
        gone |= {one.number for one in opt.trials} - numbers
        children = [one for one in opt.trials if one.attrs]
        for child in children:
            assert all(parent < child.batch for parent in child.attrs[ATTRS]["parents"])
    assert children
    assert max(population.generation(child) for child in children) > 3


def test_one_that_is_nearly_a_better_one_gives_its_place_away() -> None:
    near = [trial(0, 1.0, (1, 0)), trial(1, 0.9, (1.02, 0.02)), trial(2, 0.5, (0, 1))]
    alone = Survivors("maximize", 2)
    assert [one.number for one in alone(near)] == [0, 2]
    # By value alone it would be in; and it is, where there is nobody else.
    assert [one.number for one in Survivors("maximize", 3)(near)] == [0, 1, 2]
    far = [near[0], trial(1, 0.9, (0.5, 0.5)), near[2]]
    assert [one.number for one in Survivors("maximize", 2)(far)] == [0, 1]
    assert [one.number for one in Survivors("minimize", 2)(far)] == [2, 1]
    without = [Trial(0, SPACE.start(), ATTRS, State.COMPLETE, score=Score(v)) for v in (1.0, 1.0)]
    assert population.distance(*without) == float("inf")
    assert population.distance(near[0], near[0]) == 0
    assert population.distance(near[0], near[2]) == pytest.approx(2**0.5)


def test_failures_dropouts_and_pending_trials_have_no_children() -> None:
    few = Score(5.0, rung=0)
    history = [
        trial(0, 0.1, (1, 0)),
        trial(1, None),
        trial(2, 9.0, (0, 1), score=few),
        Trial(3, SPACE.start(), ATTRS, batch=3),
        trial(4, 0.2, (0, 2)),
        Trial(5, {}, "baseline", State.COMPLETE, batch=3, score=Score(99.0)),
    ]
    assert [one.number for one in Survivors("maximize", 4)(history)] == [4, 0]
    fresh = Population(SPACE, "maximize", population=4)
    assert not any(found.attrs for found in fresh.propose(6, history[:1], np.random.default_rng(0)))


def test_of_two_that_are_equal_but_for_the_noise_the_stranger_has_the_children() -> None:
    rng = np.random.default_rng(3)

    def noisy(value: float) -> Score:
        return Score.from_items((value + rng.normal(0, 1, 50)).tolist())

    crowd = [trial(n, 0, (1, 0.2 * n), batch=0, score=noisy(0.0)) for n in range(5)]
    stranger = trial(5, 0, (-3, 0), batch=0, score=noisy(0.0))
    plain = trial(5, 0, (1, 0.45), batch=0, score=stranger.score)

    def children(last: Trial) -> int:
        proposer = Population(SPACE, "maximize", population=6)
        proposals = proposer.propose(200, [*crowd, last], np.random.default_rng(0))
        return sum(5 in proposal.attrs[ATTRS]["parents"] for proposal in proposals)

    assert children(stranger) > 1.3 * children(plain)


def test_the_strength_falls_with_success_and_grows_without() -> None:
    def last(values: list[float]) -> float:
        history = [trial(n, value, (n % 7, n % 5)) for n, value in enumerate(values)]
        child = Population(SPACE, "maximize", population=3).propose(1, history, np.random.default_rng(0))
        return float(child[0].attrs[ATTRS]["strength"])

    assert last([0.0, 0.1, 0.2]) == 0.2
    assert last([0.0, 0.1, 0.2, 0.3, 0, 0]) == 0.05
    assert last([0.0, 0.1, 0.2, 0.3, 0, 0, 0.1, 0, 0]) == 0.2


def test_a_population_of_one_is_refused() -> None:
    with pytest.raises(ProposerError, match="population >= 2"):
        Population(SPACE, "maximize", population=1)


def test_the_better_parent_gives_the_larger_share() -> None:
    history = [trial(n, -abs(n - 3), (n, 1.0)) for n in range(6)]
    worth = {one.number: one.value for one in history}
    proposals = Population(SPACE, "maximize", population=6).propose(50, history, np.random.default_rng(1))
    for notes in (proposal.attrs[ATTRS] for proposal in proposals):
        first, second = notes["parents"]
        assert worth[first] >= worth[second]
        assert 0.5 <= notes["share"] <= 1
    assert len({tuple(proposal.attrs[ATTRS]["parents"]) for proposal in proposals}) > 5
