"""What is kept of a history is a shortcut: it says what a fresh look at the whole of it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo import Categorical, Float, Optimizer, Score, Space, State, Trial
from llmevo.proposers.nearby import Memory
from llmevo.proposers.screen import Screen
from llmevo.proposers.settled import Settled
from llmevo.proposers.share import Share, Turns
from llmevo.trial import best, ranked

SPACE = Space({"x": Float(0, 1), "y": Float(0, 1, step=0.25), "z": Categorical("a", "b")})
_POINTS = [SPACE.from_unit(np.random.default_rng(n).random(3)) for n in range(12)]


def _share(kept: Share | None, trials: Sequence[Trial]) -> tuple[Share, Any]:
    kept = kept or Share("minimize", 0.5)
    return kept, kept.now(trials)


def _turns(kept: Turns | None, trials: Sequence[Trial]) -> tuple[Turns, Any]:
    kept = kept or Turns(warmup=4)
    return kept, [kept.owed(trials, 0.3, count) for count in range(6)]


def _screen(kept: Screen | None, trials: Sequence[Trial]) -> tuple[Screen, Any]:
    kept = kept or Screen(SPACE, "minimize")
    kept.look(trials)
    return kept, [kept.hopeless(point) for point in _POINTS]


def _memory(kept: Memory | None, trials: Sequence[Trial]) -> tuple[Memory, Any]:
    kept = kept or Memory(SPACE, "minimize", 3)
    known, found = kept.recall(trials)
    copied = [known.copied(point) for point in _POINTS]
    return kept, (copied, [known.add(point) for point in _POINTS], known.complete, found)


KEEPERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "share": _share,
    "turns": _turns,
    "screen": _screen,
    "memory": _memory,
}


@st.composite
def steps(draw: st.DrawFn) -> list[list[Trial]]:
    """A history as it grows: batches are asked, trials told in any order, and once it may be another one."""
    trials: list[Trial] = []
    seen: list[list[Trial]] = []
    for _ in range(draw(st.integers(1, 12))):
        batch = len(trials)
        for _ in range(draw(st.integers(1, 4))):
            attrs: dict[str, Any] = {}
            if draw(st.integers(0, 4)):
                attrs = {"guest": draw(st.booleans()), "share": draw(st.sampled_from([0.1, 0.3, 0.5]))}
            if draw(st.integers(0, 5)) == 0:
                attrs["turned_away"] = [{"origin": draw(st.sampled_from(["llm", "llm+mutated"]))}]
            point = _POINTS[draw(st.integers(0, len(_POINTS) - 1))]
            trials.append(Trial(len(trials), point, "llm", attrs=attrs, batch=batch))
        waiting = [place for place, trial in enumerate(trials) if trial.state is State.PENDING]
        for place in draw(st.permutations(waiting))[: draw(st.integers(0, len(waiting)))]:
            if draw(st.integers(0, 6)) == 0:
                trials[place] = replace(trials[place], state=State.FAILED, error="NaN")
                continue
            items = [float(draw(st.booleans())) for _ in range(4)]
            score = replace(Score.from_items(items), rung=draw(st.sampled_from([None, None, 0, 1])))
            trials[place] = replace(trials[place], state=State.COMPLETE, score=score)
        seen.append(list(trials))
        if draw(st.integers(0, 10)) == 0:
            trials = trials[: draw(st.integers(0, len(trials)))]
    return seen


@pytest.mark.parametrize("keeper", KEEPERS)
@settings(max_examples=60, deadline=None)
@given(history=steps())
def test_what_is_kept_changes_nothing(keeper: str, history: list[list[Trial]]) -> None:
    kept = None
    for trials in history:
        kept, found = KEEPERS[keeper](kept, trials)
        assert found == KEEPERS[keeper](None, trials)[1]


def test_finished_trials_are_handed_out_once_and_again_when_the_history_is_another() -> None:
    settled = Settled()
    done = [Trial(n, {"x": 0.0}, "x", State.COMPLETE, score=Score(float(n))) for n in range(4)]
    open_ = Trial(2, {"x": 0.0}, "x")
    assert settled.split([*done[:2], open_, done[3]]) == (True, done[:2], [open_, done[3]])
    assert settled.split(done) == (True, done[2:], [])
    assert settled.split(done) == (True, [], [])
    other = [replace(done[0], score=Score(9.0)), *done[1:]]
    assert settled.split(other) == (False, other, [])
    assert settled.split(other[:2]) == (False, other[:2], [])


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.sampled_from([None, 0.0, 1.0, 2.0]), min_size=1, max_size=20), seed=st.integers(0, 99)
)
def test_the_best_is_that_of_the_whole_history(values: list[float | None], seed: int) -> None:
    opt = Optimizer(SPACE, "random", direction="maximize", seed=seed)
    trials = opt.ask(len(values))
    for place in np.random.default_rng(seed).permutation(len(values)):
        value = values[place]
        opt.tell(trials[place], value, error="it broke" if value is None else None)
        assert opt.best == best(opt.trials, "maximize")
        assert opt.best == next(iter(ranked(opt.trials, "maximize")), None)
    again = Optimizer(SPACE, "random", direction="maximize", seed=seed, trials=opt.trials)
    assert again.best == opt.best


@pytest.mark.parametrize(("apart", "failed"), [(0, 0), (1, 0), (0, 20), (0, 3)])
def test_stop_reasons_look_at_the_end_of_the_history(apart: int, failed: int) -> None:
    point, other = _POINTS[0], _POINTS[1]
    points = [other] * 5 + [point] * (30 - apart) + [other] * apart
    trials = [
        Trial(n, p, "x", State.COMPLETE, score=Score(1.0)) for n, p in enumerate([*points, *points[5:]])
    ]
    trials += [Trial(len(trials) + n, point, "x", State.FAILED, error=f"failure {n}") for n in range(failed)]
    trials.append(Trial(len(trials), other, "x"))
    reasons = Optimizer(SPACE, "random", direction="maximize", trials=trials).stop_reasons()
    assert ("converged" in reasons) == (apart == 0)
    assert ("failing" in reasons) == (failed == 20)
    assert failed != 20 or reasons["failing"].endswith("failure 19")
