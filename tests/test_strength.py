"""Mutation strength: pure functions of the history that move only on gains above the noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo import ProposerError, Score, State, Trial
from llmevo.strength import OneFifth, Strength, Successes, TwoLevel

Outcome = float | Score | None | State
RULES: list[Strength] = [TwoLevel(), OneFifth()]
rules = pytest.mark.parametrize("rule", RULES)


def history(batches: Sequence[Sequence[Outcome]]) -> list[Trial]:
    """One trial for each outcome: a value, a Score, None for a failure, or State.PENDING."""
    trials: list[Trial] = []
    for batch in batches:
        first = len(trials)
        for outcome in batch:
            score = Score(outcome) if isinstance(outcome, (int, float)) else outcome
            if outcome is None:
                state = State.FAILED
            else:
                state = State.PENDING if outcome is State.PENDING else State.COMPLETE
            trials.append(
                Trial(
                    len(trials),
                    {"x": 0.0},
                    "ga",
                    state=state,
                    batch=first,
                    score=score if isinstance(score, Score) else None,
                    error="no" if state is State.FAILED else None,
                )
            )
    return trials


outcomes = st.one_of(
    st.floats(-10, 10),
    st.none(),
    st.just(State.PENDING),
    st.builds(Score, st.floats(-10, 10), st.floats(0, 3)),
)
batches = st.lists(st.lists(outcomes, min_size=1, max_size=4), max_size=15)


@given(batches)
def test_rules_are_pure_bounded_and_symmetric(drawn: list[list[Outcome]]) -> None:
    trials = history(drawn)
    mirrored = [
        trial
        if trial.score is None
        else Trial.from_json(
            {**trial.to_json(), "score": {**trial.score.to_json(), "value": -trial.score.value}}
        )
        for trial in trials
    ]
    again = [Trial.from_json(json.loads(json.dumps(trial.to_json()))) for trial in trials]
    for rule in RULES:
        strength = rule(trials, "maximize")
        assert 0.01 <= strength <= 0.3
        assert rule(again, "maximize") == strength
        assert rule(mirrored, "minimize") == strength


@given(batches)
def test_what_is_pending_says_nothing(drawn: list[list[Outcome]]) -> None:
    trials = history(drawn)
    finished = [trial for trial in trials if trial.state is not State.PENDING]
    for rule in RULES:
        assert rule(trials, "maximize") == rule(finished, "maximize")


def test_two_level() -> None:
    rule = TwoLevel(0.05, 0.2)
    assert rule([], "maximize") == 0.2
    assert rule(history([[1.0]]), "maximize") == 0.2  # nothing can have improved yet
    assert rule(history([[1.0], [0.5, 1.1]]), "maximize") == 0.05
    assert rule(history([[1.0], [0.5, 1.1]]), "minimize") == 0.05
    assert rule(history([[1.0], [1.1], [1.1]]), "maximize") == 0.2
    assert rule(history([[1.0], [1.1], [None]]), "maximize") == 0.2
    assert rule(history([[1.0], [1.1], [State.PENDING]]), "maximize") == 0.05


def test_one_fifth_with_one_trial_a_batch_is_the_classic_rule() -> None:
    rule = OneFifth()
    assert rule([], "maximize") == 0.2
    assert rule(history([[1.0], [2.0]]), "maximize") == pytest.approx(0.3)
    assert rule(history([[1.0], [0.0]]), "maximize") == pytest.approx(0.2 * 1.5**-0.25)
    assert rule(history([[1.0], *([[0.0]] * 4), [2.0]]), "maximize") == pytest.approx(0.2)
    assert rule(history([[1.0], *([[0.0]] * 99)]), "maximize") == 0.01


def test_a_fifth_of_successes_leaves_the_strength() -> None:
    assert OneFifth()(history([[1.0], [0.0, 0.0, 2.0, 0.0, 0.0]]), "maximize") == pytest.approx(0.2)
    assert Successes().rates(history([[1.0], [2.0, None, 3.0, 0.0]]), "maximize") == [0.5]


def test_a_batch_is_measured_against_what_was_known_before_it() -> None:
    rates = Successes().rates(history([[1.0, 5.0], [6.0, 5.5, 4.0], [5.9, 7.0]]), "maximize")
    assert rates == [pytest.approx(2 / 3), 0.5]


@rules
def test_a_gain_within_the_noise_is_none(rule: Strength) -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    first = Score.from_items((hard < 0.5).astype(float).tolist())
    # Ten other items right and eight wrong: +1 pp, one standard error of the paired difference is 2.1 pp.
    flipped = (hard < 0.5).astype(float)
    wrong, right = np.flatnonzero(flipped == 0), np.flatnonzero(flipped == 1)
    flipped[wrong[:10]] = 1.0
    flipped[right[:8]] = 0.0
    noisy = Score.from_items(flipped.tolist())
    # Ten right and none wrong: +5 pp with an error of 1.5 pp, though the error of each score is 3.5 pp.
    clear = (hard < 0.5).astype(float)
    clear[wrong[:10]] = 1.0
    gained = Score.from_items(clear.tolist())
    assert noisy.value > first.value
    assert Successes().rates(history([[first], [noisy]]), "maximize") == [0.0]
    assert Successes().rates(history([[first], [gained]]), "maximize") == [1.0]
    assert rule(history([[first], [noisy]]), "maximize") != rule(history([[first], [gained]]), "maximize")


def test_gains_within_the_noise_add_up() -> None:
    steps = [[Score(value, 0.2)] for value in (1.0, 1.2, 1.4)]
    assert Successes().rates(history(steps), "maximize") == [0.0, 1.0]


def test_z_sets_how_clear_a_gain_must_be() -> None:
    trials = history([[Score(1.0, 0.3)], [Score(1.7, 0.4)]])
    assert TwoLevel(z=1.0)(trials, "maximize") == 0.05
    assert TwoLevel(z=2.0)(trials, "maximize") == 0.2
    assert OneFifth(z=2.0)(trials, "maximize") < 0.2 < OneFifth(z=1.0)(trials, "maximize")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TwoLevel(improve=0), "improve"),
        (lambda: TwoLevel(stagnate=1.1), "stagnate"),
        (lambda: OneFifth(start=0.5), "low <= start <= high"),
        (lambda: OneFifth(factor=1.0), "factor > 1"),
        (lambda: OneFifth(low=-1), "low"),
    ],
)
def test_refuses_what_cannot_be_a_strength(make: object, text: str) -> None:
    with pytest.raises(ProposerError, match=text):
        make()  # type: ignore[operator]


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.one_of(st.none(), st.floats(-5, 5)), min_size=1, max_size=4), min_size=1, max_size=12
    ),
    cuts=st.lists(st.integers(0, 60), max_size=12),
    pending=st.sets(st.integers(0, 47), max_size=6),
)
def test_what_is_kept_between_calls_changes_nothing(
    steps: list[list[float | None]], cuts: list[int], pending: set[int]
) -> None:
    whole = history(steps)
    kept = Successes()
    for cut in [*cuts, len(whole)]:  # forwards, backwards, in the middle of a batch
        part = [
            replace(trial, state=State.PENDING, score=None, error=None) if trial.number in pending else trial
            for trial in whole[:cut]
        ]
        for trials in (part, whole[:cut]):
            for direction in ("maximize", "minimize"):
                assert kept.rates(trials, direction) == Successes().rates(trials, direction)
