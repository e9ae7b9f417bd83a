"""ask and tell: any order, late, twice, failures as data, and an exact continuation from the trials."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo import (
    Categorical,
    Float,
    Int,
    Optimizer,
    Proposal,
    ProposerError,
    Score,
    Space,
    SpaceError,
    State,
    Trial,
    TrialError,
)

SPACE = Space({"x": Float(0, 1), "n": Int(1, 9), "c": Categorical("a", "b")})


def optimizer(proposer: object = "random", **options: object) -> Optimizer:
    return Optimizer(SPACE, proposer, **{"direction": "maximize", **options})  # type: ignore[arg-type]


actions = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 5)),
        st.tuples(st.just("tell"), st.integers(0, 99)),
        st.tuples(st.just("again"), st.integers(0, 99)),
        st.tuples(st.just("enqueue"), st.integers(1, 9)),
    ),
    max_size=40,
)


def act(opt: Optimizer, name: str, number: int) -> None:
    """One step of a session; which trial is meant follows from the optimizer's own trials."""
    pending = [trial for trial in opt.trials if trial.state is State.PENDING]
    done = [trial for trial in opt.trials if trial.state is not State.PENDING]
    if name == "ask":
        opt.ask(number)
    elif name == "enqueue":
        opt.enqueue({"x": number / 10, "n": number, "c": "b"})
    elif name == "tell" and pending:
        trial = pending[number % len(pending)]
        outcome: dict[str, object] = {"value": trial.params["x"]}
        if number % 5 == 0:
            outcome = {"error": "worker died"}
        elif number % 7 == 0:
            outcome = {"value": math.nan}
        elif number % 3 == 0:
            outcome = {"value": [0.0, 1.0, trial.params["x"]]}
        opt.tell(trial if number % 2 else trial.number, **outcome)  # type: ignore[arg-type]
    elif name == "again" and done:
        trial, before = done[number % len(done)], opt.trials
        value = trial.score.value if trial.score is not None else None
        assert opt.tell(trial, value, error=trial.error) == trial
        assert opt.trials == before
        with pytest.raises(TrialError, match="was already told"):
            opt.tell(trial, 77.0)
        assert opt.trials == before


@settings(max_examples=60, deadline=None)
@given(actions, st.sampled_from(["random", "ga", "cma"]))
def test_any_order_of_asking_and_telling(session: list[tuple[str, int]], proposer: str) -> None:
    opt = optimizer(proposer)
    for name, number in session:
        act(opt, name, number)
        assert [trial.number for trial in opt.trials] == list(range(len(opt.trials)))
        for trial in opt.trials:
            assert SPACE.validate(trial.params) == trial.params
            assert (trial.score is not None) == (trial.state is State.COMPLETE)
            assert (trial.error is not None) == (trial.state is State.FAILED)
            assert trial.batch <= trial.number
        values = [trial.value for trial in opt.trials if trial.value is not None]
        assert (opt.best.value if opt.best else None) == (max(values) if values else None)


@settings(max_examples=40, deadline=None)
@given(actions, st.integers(0, 40), st.sampled_from(["random", "ga", "cma"]))
def test_continuing_from_the_trials(session: list[tuple[str, int]], cut: int, proposer: str) -> None:
    session = [step for step in session if step[0] != "enqueue"]  # the queue is the caller's to put back
    whole = optimizer(proposer, seed=3)
    for name, number in session[:cut]:
        act(whole, name, number)
    text = json.dumps([trial.to_json() for trial in whole.trials])
    resumed = optimizer(proposer, seed=3, trials=[Trial.from_json(data) for data in json.loads(text)][::-1])
    for name, number in session[cut:]:
        act(whole, name, number)
        act(resumed, name, number)
    assert resumed.trials == whole.trials


def test_what_each_result_becomes() -> None:
    opt = optimizer()
    trials = opt.ask(8)
    opt.tell(trials[7], 0.71, metrics={"acc": 0.71}, cost={"merge": 1.5})
    opt.tell(1, [1, 0, 1, 1])
    opt.tell(trials[2], np.array([0.5, 1.0]))
    opt.tell(trials[3], Score(0.2, 0.05))
    opt.tell(trials[4], error="out of memory")
    opt.tell(trials[5], math.nan)
    opt.tell(trials[6], [1.0, math.inf])
    opt.tell(trials[0], [])
    got = opt.trials
    assert (got[7].value, got[7].metrics, got[7].cost) == (0.71, {"acc": 0.71}, {"merge": 1.5})
    assert got[1].score == Score(0.75, 0.25, {"items": [1.0, 0.0, 1.0, 1.0]})
    assert got[2].value == 0.75
    assert got[3].score == Score(0.2, 0.05)
    assert [got[number].error for number in (4, 5, 6, 0)] == [
        "out of memory",
        "the score is nan",
        "an item scored inf",
        "no item was scored",
    ]
    assert opt.best == got[1]


@pytest.mark.parametrize(("direction", "best"), [("maximize", 1), ("minimize", 2)])
def test_the_best_is_the_earliest_of_equals(direction: str, best: int) -> None:
    opt = optimizer(direction=direction)
    for trial, value in zip(opt.ask(5), (0.5, 0.9, 0.1, 0.9, 0.1), strict=True):
        opt.tell(trial, value)
    assert opt.best is not None
    assert opt.best.number == best


def test_a_reference_outside_the_space_is_recorded_but_not_proposed_from() -> None:
    class Watcher:
        seen: Sequence[Trial] = ()

        def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
            self.seen = trials
            return [Proposal(SPACE.sample(rng), "watcher")]

    watcher = Watcher()
    opt = optimizer(watcher)
    opt.enqueue(None, origin="parent:base", attrs={"model": "base"})
    opt.enqueue({"x": 0.5, "n": 2, "c": "b"}, origin="warm_start:0")
    trials = opt.ask(3)
    assert [(trial.origin, trial.params == {}) for trial in trials] == [
        ("parent:base", True),
        ("warm_start:0", False),
        ("watcher", False),
    ]
    assert [trial.origin for trial in watcher.seen] == ["warm_start:0"]
    opt.tell(trials[0], 99.0)
    assert opt.best is not None
    assert opt.best.origin == "parent:base"


def test_an_enqueued_point_survives_a_proposer_that_raises() -> None:
    class Down:
        def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
            raise ProposerError("out of quota")

    opt = optimizer(Down())
    opt.enqueue({"x": 0.5, "n": 2, "c": "b"})
    with pytest.raises(ProposerError, match="quota"):
        opt.ask(2)
    assert opt.trials == ()
    assert [trial.params["x"] for trial in opt.ask(1)] == [0.5]


def test_a_proposer_that_breaks_the_rules_is_named() -> None:
    class Eager:
        def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
            return [Proposal(SPACE.sample(rng), "eager") for _ in range(n + 1)]

    class Wild:
        def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
            return [Proposal({"x": 2.0, "n": 1, "c": "a"}, "wild")]

    with pytest.raises(ProposerError, match="Eager returned 2"):
        optimizer(Eager()).ask()
    with pytest.raises(SpaceError, match="0 <= x <= 1"):
        optimizer(Wild()).ask()


def test_reasons_to_stop() -> None:
    opt = optimizer()
    assert opt.stop_reasons() == {}
    for trial in opt.ask(20):
        opt.tell(trial, error="CUDA error")
    assert "CUDA error" in opt.stop_reasons()["failing"]
    opt.tell(opt.ask()[0], 1.0)
    assert opt.stop_reasons() == {}
    for _ in range(30):
        opt.enqueue({"x": 0.25, "n": 2, "c": "a"})
    for trial in opt.ask(30):
        opt.tell(trial, 0.5)
    assert set(opt.stop_reasons()) == {"converged"}


def test_exhausted_only_once_nothing_is_pending() -> None:
    space = Space({"c": Categorical("a", "b")})
    opt = Optimizer(space, "ga", direction="maximize")
    trials = opt.ask(5)
    assert len(trials) == 2
    assert opt.ask() == []
    assert opt.stop_reasons() == {}
    for trial in trials:
        opt.tell(trial, 1.0)
    assert opt.ask() == []
    assert set(opt.stop_reasons()) == {"exhausted"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"direction": "max"}, "`direction` must be"),
        ({"seed": -1}, "`seed` must be"),
        ({"seed": True}, "`seed` must be"),
        ({"trials": [Trial(1, SPACE.start(), "x")]}, "0 is missing"),
    ],
)
def test_construction_is_checked(options: dict[str, object], text: str) -> None:
    with pytest.raises(TrialError, match=text):
        optimizer(**options)


def test_an_unknown_proposer_names_the_nearest() -> None:
    with pytest.raises(ProposerError, match="Did you mean 'sobol'"):
        optimizer("sobel")


def test_asking_and_telling_are_checked() -> None:
    opt = optimizer()
    for n in (0, -1, 1.5, True):
        with pytest.raises(TrialError, match="`n` must be"):
            opt.ask(n)  # type: ignore[arg-type]
    trial = opt.ask()[0]
    with pytest.raises(TrialError, match="0 to 0"):
        opt.tell(1, 0.5)
    for arguments in ({}, {"value": 1.0, "error": "no"}):
        with pytest.raises(TrialError, match="exactly one"):
            opt.tell(trial, **arguments)  # type: ignore[arg-type]
    with pytest.raises(SpaceError, match="`X` is not a gene"):
        opt.enqueue({"X": 0.5, "n": 1, "c": "a"})


def test_importing_the_core_imports_numpy_and_nothing_heavier() -> None:
    code = "import sys, llmevo; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["scipy", "cmaes", "torch", "transformers", "pydantic", "yaml", "openai", "typer", "rich"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
