"""Dropouts of a halved batch stand below everybody who answered more, whatever they scored on a few items."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmevo import Categorical, Float, Optimizer, Score, Space, Trial
from llmevo.llm.digest import digest, rank
from llmevo.llm.prompt import Context, Prompts
from llmevo.strength import Successes, improvements

SPACE = Space({**{f"x{i}": Float(0, 1) for i in range(3)}, "c": Categorical("a", "b", "d")})
BATCH = 8
FAR = 1000.0


def level(trial: Trial) -> float:
    return -float(np.sum((SPACE.to_unit(trial.params) - 0.7) ** 2))


def search(proposer: str, told: Any, **options: Any) -> list[Trial]:
    """A search whose batches are halved: `told` makes the score of (value, place in the batch)."""
    from llmevo.proposers import make

    opt = Optimizer(SPACE, make(proposer, SPACE, "maximize", **options), direction="maximize", seed=3)
    while len(opt.trials) < 5 * BATCH:
        asked = opt.ask(BATCH)
        order = sorted(asked, key=level, reverse=True)
        for trial in asked:
            opt.tell(trial, told(level(trial), order.index(trial)))
    return list(opt.trials)


def halved(value: float, place: int) -> Score:
    """The best two answer all items; the others drop out with a score that luck made enormous."""
    return Score(value) if place < 2 else Score(FAR + value, rung=0 if place > 3 else 1)


def lowered(value: float, place: int) -> Score:
    """The same order in plain scores."""
    return Score(value - FAR * (0 if place < 2 else 2 if place > 3 else 1))


@pytest.mark.parametrize(
    ("proposer", "options"),
    [
        ("cma", {}),
        ("ga", {}),
        ("topk_mean", {}),
        ("placebo", {}),
        ("hybrid", {"base": "ga", "guest": "placebo", "share": 0.5}),
        ("hybrid", {"base": "cma", "guest": "topk_mean", "share": 0.5, "adapt": False}),
    ],
)
def test_proposers_see_the_rung_before_the_score(proposer: str, options: dict[str, Any]) -> None:
    with_rungs = search(proposer, halved, **options)
    plain = search(proposer, lowered, **options)
    assert [trial.params for trial in with_rungs] == [trial.params for trial in plain]
    # And the score is not what they look at: in its order, another search would have been made.
    naive = search(proposer, lambda value, place: replace(halved(value, place), rung=None), **options)
    assert [trial.params for trial in naive] != [trial.params for trial in plain]


def items(share: float, count: int) -> list[float]:
    return [float(k < share * count) for k in range(count)]


def of_items(number: int, batch: int, values: list[float], rung: int | None) -> Trial:
    score = replace(Score.from_items(values, "t"), rung=rung)
    trial = Trial(number, {"x": 0.0}, "ga", batch=batch)
    return replace(trial, state=trial.state.COMPLETE, score=score)


def test_a_dropout_succeeds_by_its_own_items_and_is_never_the_incumbent() -> None:
    whole = [0.0, 0.0, 1.0, 0.0] * 10
    history = [
        of_items(0, 0, whole, None),
        of_items(1, 1, [1.0] * 8, 0),  # better on what both answered
        of_items(2, 1, [0.0] * 8, 0),
        of_items(3, 3, [0.0, 0.0, 1.0, 1.0] * 10, None),  # better than the incumbent, which is still 0
        of_items(4, 3, whole, None),
    ]
    assert improvements(history, "maximize") == [False, True, False, True, False]
    assert Successes().rates(history, "maximize") == [0.5, 0.5]


def test_prompts_show_full_scores_first_and_say_what_a_score_rests_on() -> None:
    rng = np.random.default_rng(0)
    history = []
    for number in range(12):
        rung = None if number % 4 == 0 else 0
        values = [float(v) for v in rng.random(40 if rung is None else 10) < (0.5 if rung is None else 0.9)]
        score = replace(Score.from_items(values, "t"), rung=rung)
        trial = Trial(number, SPACE.sample(rng), "cma", batch=number - number % 4)
        history.append(replace(trial, state=trial.state.COMPLETE, score=score))
    ranked = rank(history, "maximize")
    assert [t.score.rung for t in ranked.complete if t.score] == [None] * 3 + [0] * 9
    body = Prompts().messages(SPACE, "maximize", history, ranked, 2, context=Context(), compact=False)[-1][
        "content"
    ]
    rows = [line for line in body.splitlines() if line.startswith('{"rank"')]
    assert [('"items":10' in row) for row in rows] == [True] * (len(rows) - 3) + [False] * 3
    assert 'A result with "items" dropped out' in body
    whole = [t.value for t in history if t.score and t.score.rung is None]
    assert f"the median is {np.median(whole):.4g}." in digest(SPACE, ranked)[0]  # type: ignore[arg-type]
