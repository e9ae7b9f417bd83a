"""Trials, scores and proposals: exact JSON, and the error of a difference."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo import Score, State, Trial, TrialError
from llmevo.trial import best, difference_error, improvement, ranked, standard_error, standing

finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
notes = st.dictionaries(st.text(max_size=5), json_values, max_size=3)
scores = st.builds(
    Score,
    finite,
    st.none() | st.floats(0, 1e9),
    st.dictionaries(st.text(max_size=5), st.lists(finite, max_size=5), max_size=3),
    st.none() | st.integers(0, 4),
)
params = st.dictionaries(
    st.text(min_size=1, max_size=5), st.none() | st.booleans() | st.integers() | finite | st.text(max_size=4)
)


@st.composite
def trials(draw: st.DrawFn) -> Trial:
    state = draw(st.sampled_from(State))
    return Trial(
        draw(st.integers(0, 10**6)),
        draw(params),
        draw(st.text(max_size=9)),
        state=state,
        attrs=draw(notes),
        batch=draw(st.integers(0, 10**6)),
        score=draw(scores) if state is State.COMPLETE else None,
        error=draw(st.text(max_size=9)) if state is State.FAILED else None,
        metrics=draw(notes),
        cost=draw(notes),
    )


@given(trials())
def test_json_gives_an_equal_trial_back(trial: Trial) -> None:
    text = json.dumps(trial.to_json(), allow_nan=False)
    again = Trial.from_json(json.loads(text))
    assert again == trial
    assert json.dumps(again.to_json()) == text
    assert type(again.state) is State


def test_trials_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Trial(0, {}, "x").number = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((math.nan,), "value"), ((math.inf,), "value"), ((1.0, -0.1), "stderr"), ((1.0, math.nan), "stderr")],
)
def test_a_score_is_finite(arguments: tuple[float, ...], text: str) -> None:
    with pytest.raises(TrialError, match=text):
        Score(*arguments)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_score_from_items_is_their_mean_and_its_error(items: list[float]) -> None:
    score = Score.from_items(items)
    assert score.value == pytest.approx(np.mean(items), abs=1e-6)
    assert score.items == {"items": items}
    if len(items) == 1:
        assert score.stderr is None
    else:
        assert score.stderr == pytest.approx(np.std(items, ddof=1) / math.sqrt(len(items)), abs=1e-6)


def test_no_item_is_no_score() -> None:
    with pytest.raises(TrialError, match="must not be empty"):
        Score.from_items([])


pairs = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30)


@given(pairs)
def test_one_task_is_compared_item_by_item(items: list[tuple[float, float]]) -> None:
    first, second = zip(*items, strict=True)
    error = difference_error(Score.from_items(first), Score.from_items(second))
    assert error == pytest.approx(standard_error([a - b for a, b in items]), abs=1e-9)


@given(pairs, st.floats(0.1, 100))
def test_the_scale_of_the_value_does_not_matter(items: list[tuple[float, float]], factor: float) -> None:
    first, second = (Score.from_items(values) for values in zip(*items, strict=True))
    scaled = [
        Score(score.value * factor, (score.stderr or 0.0) * factor, score.items) for score in (first, second)
    ]
    assert difference_error(*scaled) == pytest.approx(factor * difference_error(first, second), abs=1e-9)


def test_the_error_of_a_difference() -> None:
    same = Score.from_items([0, 1, 0, 1, 1, 0])
    shifted = Score.from_items([0.1, 1.1, 0.1, 1.1, 1.1, 0.1])
    other = Score.from_items([1, 0, 1, 0])
    assert difference_error(same, same) == 0.0
    assert difference_error(same, shifted) == pytest.approx(0.0, abs=1e-9)  # what is hard for both cancels
    assert same.stderr is not None
    assert other.stderr is not None
    assert difference_error(same, other) == math.hypot(same.stderr, other.stderr)  # other items: independent
    assert difference_error(Score(1.0, 0.3), Score(2.0, 0.4)) == pytest.approx(0.5)
    assert difference_error(Score(1.0), Score(2.0, 0.4)) == 0.0  # unknown


def test_equal_tasks_are_paired_task_by_task() -> None:
    rng = np.random.default_rng(0)
    hard = {"a": rng.random(40), "b": rng.random(60)}

    def score(noise: float) -> Score:
        items = {task: (base + rng.normal(0, noise, len(base))).tolist() for task, base in hard.items()}
        errors = [(standard_error(values) or 0.0) / 2 for values in items.values()]
        return Score(float(np.mean([np.mean(v) for v in items.values()])), math.hypot(*errors), items)

    first, second = score(0.01), score(0.01)
    exact = math.hypot(
        *(
            (standard_error([a - b for a, b in zip(first.items[t], second.items[t], strict=True)]) or 0.0) / 2
            for t in hard
        )
    )
    assert difference_error(first, second) == pytest.approx(exact)


def test_a_score_of_before_there_were_rungs_rests_on_all_items() -> None:
    old = {"value": 0.5, "stderr": None, "items": {"t": [0.0, 1.0]}}
    assert Score.from_json(old) == Score(0.5, None, {"t": [0.0, 1.0]}, rung=None)
    with pytest.raises(TrialError, match="rung"):
        Score(0.5, rung=-1)


def test_terms_of_one_task_share_its_items() -> None:
    assert Score(0.5, items={"t/acc": [1, 0], "t/acc_norm": [1, 1], "u": [0]}).count == 3


@given(st.lists(st.tuples(st.none() | st.integers(0, 3), st.sampled_from([0.0, 0.25, 1.0]) | finite)))
def test_trials_are_ordered_by_rung_then_score_then_number(entries: list[tuple[int | None, float]]) -> None:
    history = [
        Trial(number, {"x": 0.0}, "o", State.COMPLETE, score=Score(value, rung=rung))
        for number, (rung, value) in enumerate(entries)
    ]
    history.append(Trial(len(history), {"x": 0.0}, "o", State.FAILED, error="e"))
    for direction, sign in (("maximize", 1.0), ("minimize", -1.0)):
        order = ranked(history[::-1], direction)  # type: ignore[arg-type]
        keys = [
            (math.inf if t.score.rung is None else t.score.rung, sign * t.score.value, -t.number)
            for t in order
            if t.score is not None
        ]
        assert keys == sorted(keys, reverse=True)
        assert len(set(keys)) == len(entries)  # total: no two trials are equal
        assert best(history, direction) is (order[0] if order else None)  # type: ignore[arg-type]


def test_a_lucky_score_on_few_items_stands_below_one_on_all() -> None:
    few, all_items = Score(0.9, rung=0), Score(0.5)
    assert standing(few, "maximize") < standing(all_items, "maximize")
    assert standing(Score(0.1, rung=0), "minimize") < standing(all_items, "minimize")
    assert standing(few, "maximize") < standing(Score(0.2, rung=1), "maximize")


def test_scores_on_different_rungs_are_compared_on_the_items_of_both() -> None:
    whole = Score(0.5, 0.1, {"t": [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]})
    few = Score(0.75, 0.2, {"t": [1.0, 1.0, 0.0, 1.0]}, rung=0)
    gain, error = improvement(few, whole, "maximize")
    assert gain == pytest.approx(0.25)
    assert error == pytest.approx(0.25)  # of the differences 0, 1, 0, 0
    assert improvement(whole, few, "maximize")[0] == pytest.approx(-0.25)
    assert improvement(Score(0.9, rung=0), whole, "maximize") == (0.0, 0.0)  # nothing in common
    other = Score(0.75, 0.1, {"t": [1.0, 1.0, 1.0, 1.0, 0.0, 0.5]})
    assert improvement(other, whole, "minimize") == (-0.25, difference_error(other, whole))
