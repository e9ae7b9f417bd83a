"""What a display says is left: trials by trials or by tokens, and what follows the search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmevo.cli.clock import Clock
from llmevo.genome import Genome
from llmevo.runner import facts
from llmevo.runner.observer import RunInfo
from llmevo.space import Float, Space
from llmevo.trial import Score, State, Trial

MERGE = {
    "genome": {"models": ["a", "b"], "base_model": "c", "num_layers": 2},
    "tasks": ["t"],
    "search": {"trials": 10},
    "evaluate": {"holdout": 0.5, "finalists": 2},
}
TRAIN = {
    "genome": {"models": ["a"], "num_layers": 2},
    "train": {"data": "d.jsonl", "learning_rate": {"float": [1e-4, 1e-3]}},
    "tasks": ["validation_loss"],
    "search": {"trials": 500, "tokens": 1000},
    "evaluate": {"holdout": 0.5, "finalists": 2, "reruns": 2},
}


def clock(genome: dict[str, Any], references: int, trials: tuple[Trial, ...] = ()) -> Clock:
    info = RunInfo(
        Path("run"), Genome.model_validate(genome), Space({"x": Float(0, 1)}), trials, references, 4
    )
    return Clock(info)


def trial(number: int, origin: str, batch: int = 0, rung: int | None = None, **cost: Any) -> Trial:
    score = Score(0.5, rung=rung)
    return Trial(number, {}, origin, State.COMPLETE, score=score, cost=cost, batch=batch)


def test_what_is_left_of_a_merge_has_the_held_out_items_in_it() -> None:
    found = clock(MERGE, 2)
    assert found.left is None
    found.tick(trial(0, "baseline", merge=1.0, evaluate=3.0))
    # Nine trials; then the baseline and two finalists on as many items again.
    assert found.left == pytest.approx(9 * 4 + 3 * 4)
    found.tick(trial(1, "parent:a", merge=1.0, evaluate=3.0))
    assert found.left == pytest.approx(8 * 4 + 4 * 4)
    for number in range(2, 9):  # halving makes most of them short, which says nothing of the end
        found.tick(trial(number, "cma", batch=number, rung=0, merge=0.5, evaluate=0.5))
    assert found.left == pytest.approx(1 + 4 * 4)
    found.tick(trial(9, "cma", batch=9, rung=0, merge=0.5, evaluate=0.5))
    # Now nothing is told any more, and time counts down.
    first = found.left
    assert first is not None
    second = found.left
    assert second is not None
    assert second < first <= 16


def test_what_is_left_of_a_training_ends_at_its_tokens() -> None:
    found = clock(TRAIN, 2)
    found.tick(trial(0, "baseline", evaluate=1.0))
    assert found.left is None, "an untrained model says nothing of a training"
    found.tick(trial(1, "default", train=9.0, evaluate=1.0, tokens=100))
    finals = 4 * 1.0 + 2 * 3 * (10 + 1)
    assert found.left == pytest.approx(10 * 10 + finals)
    found.tick(trial(2, "random", batch=2, train=4.0, evaluate=1.0, tokens=50))
    assert found.left == pytest.approx((1000 - 50) / 50 * 7.5 + 4 + 6 * (7.5 + 1))
    assert clock({**TRAIN, "search": {"trials": 5}}, 2).budget == 5


def test_an_earlier_sitting_has_spent_its_tokens() -> None:
    known = (
        trial(0, "baseline", evaluate=1.0),
        trial(1, "default", train=9.0, evaluate=1.0, tokens=100),
        trial(2, "random", batch=2, train=9.0, evaluate=1.0, tokens=100),
    )
    found = clock({**TRAIN, "evaluate": {"holdout": 0}}, 2, known)
    assert (found.done, found.left) == (3, None)
    found.tick(trial(3, "random", batch=3, train=9.0, evaluate=1.0, tokens=100))
    assert found.left == pytest.approx(8 * 10)


def test_how_many_trainings_a_budget_of_tokens_has_room_for() -> None:
    references = [trial(0, "baseline"), trial(1, "default", tokens=100)]
    assert facts.affordable(references[:1], 2, 1000) is None
    assert facts.affordable(references, 2, 1000) == 10
    assert facts.affordable(references, 2, 1001) == 11
    own = [*references, trial(2, "ga", tokens=30), trial(3, "ga", tokens=60), trial(4, "ga")]
    assert facts.affordable(own, 2, 179) == 2  # 89 left, 45 a trial
    assert facts.affordable(own, 2, 181) == 3
