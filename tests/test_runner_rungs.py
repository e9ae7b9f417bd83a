"""Who goes on to more items: invariants of the elimination, and what it is made from."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo.genome import SearchSpec
from llmevo.pipeline import Outcome
from llmevo.runner.rungs import Rungs, Stage, cost
from llmevo.trial import Score, standing

SIZES = (4, 8, 16, 20)
LAST = len(SIZES) - 1
FACTS: dict[str, Any] = {
    "rungs": [{"a": 2, "b": 2}, {"a": 4, "b": 4}, {"a": 10, "b": 6}],
    "weights": {"a": 0.75, "b": 0.25},
    "signs": {"a": 1, "b": 1},
}


def answered(number: int, value: float | None, **metrics: dict[str, float]) -> Outcome:
    return Outcome(number, None if value is None else Score(value), metrics, error=None if value else "NaN")


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], dict[tuple[int, int], Outcome]]:
    """Trials with what each would score on every rung; some fail somewhere."""
    first = draw(st.integers(0, 50))
    numbers = list(range(first, first + draw(st.integers(1, 20))))
    values = st.none() | st.sampled_from([0.25, 0.5, 0.75]) | st.floats(0.1, 1)
    return numbers, {
        (number, rung): answered(number, draw(values)) for number in numbers for rung in range(len(SIZES))
    }


def climbed(rungs: Rungs, numbers: list[int], known: dict[tuple[int, int], Outcome]) -> list[Any]:
    """Every stage of a batch, each asked with no more than what was answered up to then."""
    told: dict[tuple[int, int], Outcome] = {}
    stages = [rungs.stage(numbers, told)]
    while stages[-1].missing:
        rung = LAST if stages[-1].rung is None else stages[-1].rung
        told |= {(number, rung): known[number, rung] for number in stages[-1].missing}
        stages.append(rungs.stage(numbers, told))
    return stages


@given(batches(), st.integers(2, 4), st.sampled_from(["maximize", "minimize"]))
def test_a_batch_is_halved(
    batch: tuple[list[int], dict[tuple[int, int], Outcome]], eta: int, direction: Any
) -> None:
    numbers, known = batch
    rungs = Rungs(SIZES, eta, direction=direction)
    stages = climbed(rungs, numbers, known)
    for before, after in pairwise([stage for stage in stages if stage.rung is not None]):
        entered, kept = before.alive, after.alive
        whole = [known[n, before.rung] for n in entered if known[n, before.rung].score is not None]
        assert set(kept) <= set(entered)
        assert len(kept) == min(math.ceil(len(entered) / eta), len(whole))
        assert after.out == before.out | dict.fromkeys(set(entered) - set(kept), before.rung)
        merits = {o.number: standing(o.score, direction) for o in whole if o.score is not None}
        for loser in merits.keys() - set(kept):  # whoever stays is better, or equal and earlier
            for winner in kept:
                assert (merits[winner], -winner) > (merits[loser], -loser)
    last = stages[-1]
    assert last.rung is None
    assert set(last.alive) | set(last.out) == set(numbers)
    assert not set(last.alive) & set(last.out)


@given(batches(), st.integers(2, 4))
def test_while_anybody_can_someone_answers_all_items(
    batch: tuple[list[int], dict[tuple[int, int], Outcome]], eta: int
) -> None:
    """Those that failed are replaced one by one: the latest to drop out first, of equals the best."""
    numbers, known = batch
    stages = climbed(Rungs(SIZES, eta), numbers, known)
    final = [stage for stage in stages if stage.rung is None]
    lost = final[0].out
    able = {n for n, rung in lost.items() if known[n, rung].score is not None}
    called = [stage.alive[0] for stage in final[1:-1]]
    assert len(set(called)) == len(called)
    assert set(called) <= able
    if final[-1].alive:
        assert all(known[n, LAST].score is not None for n in final[-1].alive)
    else:
        assert set(called) == able
        assert all(known[n, LAST].score is None for n in called)
    ranks = [(-lost[n], -known[n, lost[n]].score.value, n) for n in called]  # type: ignore[union-attr]
    assert ranks == sorted(ranks)
    best = sorted((-lost[n], -known[n, lost[n]].score.value, n) for n in able)  # type: ignore[union-attr]
    assert [n for *_, n in best[: len(called)]] == called


@given(batches())
def test_the_best_on_every_rung_answers_all_items(
    batch: tuple[list[int], dict[tuple[int, int], Outcome]],
) -> None:
    numbers, known = batch
    hero = numbers[len(numbers) // 2]
    known |= {(hero, rung): answered(hero, 2.0) for rung in range(len(SIZES))}
    last = climbed(Rungs(SIZES), numbers, known)[-1]
    assert hero in last.alive


@given(batches(), st.randoms(use_true_random=False))
def test_the_order_in_which_outcomes_come_changes_nothing(
    batch: tuple[list[int], dict[tuple[int, int], Outcome]], draw: Any
) -> None:
    """And neither does what is known beyond the stage at hand."""
    numbers, known = batch
    rungs = Rungs(SIZES)
    last = climbed(rungs, numbers, known)[-1]
    items = list(known.items())
    draw.shuffle(items)
    shuffled = draw.sample(numbers, len(numbers))
    assert rungs.stage(shuffled, dict(items)) == last


def test_a_trial_alone_answers_everything_at_once() -> None:
    stage = Rungs(SIZES).stage([7], {})
    assert (stage.rung, stage.alive, stage.missing) == (None, (7,), (7,))


@given(st.integers(0, LAST), st.lists(st.integers(0, 99), min_size=1, unique=True).map(sorted))
def test_rungs_run_to_and_fro(rung: int, numbers: list[int]) -> None:
    """So the last of a rung, whose weights are there, is the first of the next if it goes on."""
    stage = Stage(None if rung == LAST else rung, tuple(numbers), tuple(numbers))
    assert list(Rungs(SIZES).order(stage)) == sorted(numbers, reverse=rung % 2 == 1)
    shares = (0.1, 0.3, 0.6, 1.0)
    assert list(Rungs(shares, trains=True).order(stage)) == numbers


def test_a_batch_in_which_all_fail_is_over() -> None:
    known = {(number, 0): answered(number, None) for number in (1, 2, 3)}
    stage = Rungs(SIZES).stage([1, 2, 3], known)
    assert (stage.alive, stage.missing, stage.out) == ((), (), {1: 0, 2: 0, 3: 0})


def test_rungs_follow_from_facts_and_genome() -> None:
    search = SearchSpec.model_validate({"halving": {"eta": 3, "rank_by": "gold_margin"}})
    assert Rungs.of(FACTS, search, 6) == Rungs(
        (4, 8, 16), 3, "gold_margin", "maximize", {"a": 0.75, "b": 0.25}
    )
    for facts in ({}, {"rungs": []}, {"rungs": [{"a": 10}]}):
        assert Rungs.of(facts, search, 6) is None


def test_a_continuous_measure_ranks_where_every_task_has_it() -> None:
    search = SearchSpec.model_validate({"halving": {"rank_by": "gold_logprob"}})
    rungs = Rungs.of(FACTS, search, 6)
    assert rungs is not None

    def of(number: int, value: float, a: float, b: float) -> Outcome:
        return answered(number, value, a={"gold_logprob,none": a}, b={"gold_logprob,none": b})

    outcomes = [of(1, 0.5, -2.0, -1.0), of(2, 0.7, -3.0, -1.0), of(3, 0.6, -2.0, -1.5)]
    assert rungs.best_first(outcomes) == [1, 3, 2]
    assert replace(rungs, rank_by="score").best_first(outcomes) == [2, 3, 1]
    without = [replace(o, metrics={"a": o.metrics["a"]}) for o in outcomes]
    assert rungs.best_first(without) == [2, 3, 1]
    # Whoever wants the probability of the right choice small wants this ranking turned too.
    against = Rungs.of({**FACTS, "signs": {"a": -1, "b": -1}}, search, 6)
    assert against is not None
    assert against.best_first(outcomes) == [2, 3, 1]


def test_several_terms_of_a_task_share_its_weight() -> None:
    facts = {"rungs": [{"a": 2}, {"a": 4}], "weights": {"a/acc": 0.5, "a/acc_norm": 0.25}}
    rungs = Rungs.of(facts, SearchSpec(), 6)
    assert rungs is not None
    assert rungs.weights == {"a": 0.75}


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_less_is_better_under_minimize(direction: Any) -> None:
    rungs = Rungs(SIZES, direction=direction)
    outcomes = [answered(0, 0.3), answered(1, 0.1), answered(2, None), answered(3, 0.3)]
    assert rungs.best_first(outcomes) == ([0, 3, 1] if direction == "maximize" else [1, 0, 3])


def test_what_a_trial_took_is_the_sum_of_its_rungs() -> None:
    first = Outcome(1, seconds={"merge": 1.0, "evaluate": 2.0}, bytes={"merge": 8}, items={"scored": 4})
    second = Outcome(1, seconds={"evaluate": 3.0}, items={"scored": 4, "cached": 4})
    assert cost([first, second]) == {
        "merge": 1.0,
        "evaluate": 5.0,
        "bytes": {"merge": 8},
        "items": {"scored": 8, "cached": 4},
    }
    assert cost([Outcome(1, seconds={"merge": 1.0})]) == {"merge": 1.0}
