"""What every proposer must do, whatever it is.

To add one, put how it is built into `PROPOSERS`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from random_json import RandomJSON

from llmevo import Categorical, Condition, Float, Int, Optimizer, Space, State, Trial
from llmevo.llm import Reply, Request
from llmevo.proposers import Direction, Proposer, make
from llmevo.proposers.hybrid import Hybrid
from llmevo.proposers.llm import LLM

Build = Callable[[Space, Direction], Proposer]


class Reader:
    """A chat client that answers from the request alone: from its seed, and the genomes that its text shows.

    Most answers fulfil the schema and copy half of their values from the best genome shown; some are cut off,
    are prose, or stand in a fence.
    """

    def complete(self, request: Request) -> Reply:
        shown = re.findall(r'"genome":(\{[^{}]*\})', "\n".join(m["content"] for m in request.messages))
        genomes = [genome for genome in shown if "..." not in genome]
        seed = hashlib.sha256(f"{request.seed} {genomes}".encode()).digest()
        rng = np.random.default_rng(list(seed))
        best = json.loads(genomes[-1]) if genomes else {}
        text = json.dumps(self._instance(request.schema, best, rng))
        kind = rng.integers(8)
        if kind == 0:
            return Reply(text[: len(text) // 2], finish_reason="length", model="reader")
        if kind == 1:
            return Reply("I would try a larger weight.", model="reader")
        return Reply(f"```json\n{text}\n```" if kind == 2 else text, model="reader")

    def _instance(self, schema: Any, known: Any, rng: np.random.Generator) -> Any:
        if known is not None and not isinstance(known, dict) and rng.random() < 0.5:
            return known
        kind = schema["type"] if isinstance(schema["type"], str) else schema["type"][0]
        if "enum" in schema:
            return schema["enum"][int(rng.integers(len(schema["enum"])))]
        if kind == "object":
            known = known if isinstance(known, dict) else {}
            return {
                key: self._instance(
                    value, known if value["type"] in ("object", "array") else known.get(key), rng
                )
                for key, value in schema["properties"].items()
            }
        if kind == "array":
            return [self._instance(schema["items"], known, rng) for _ in range(schema["minItems"])]
        if kind == "integer":
            return int(rng.integers(schema["minimum"], schema["maximum"] + 1))
        if kind == "number":
            return float(rng.uniform(schema["minimum"], schema["maximum"]))
        return "a reason"


def _named(name: str, **options: object) -> Build:
    return lambda space, direction: make(name, space, direction, **options)


def _llm(space: Space, direction: Direction) -> Proposer:
    return make("llm", space, direction, client=Reader())


def _hybrid_llm(space: Space, direction: Direction) -> Proposer:
    return Hybrid(space, direction, base="cma", share=0.5, warmup=3, client=Reader())


def _hybrid(space: Space, direction: Direction) -> Proposer:
    return Hybrid(space, direction, base="cma", guest=make("ga", space, direction), share=0.4, warmup=4)


PROPOSERS: dict[str, Build] = {
    "random": _named("random"),
    "sobol": _named("sobol"),
    "ga": _named("ga", population=4),
    "population": _named("population", population=4),
    "cma": _named("cma"),
    "cma-small": _named("cma", population=3),
    "hybrid-ga": _hybrid,
    "hybrid-placebo": _named("hybrid", guest="placebo", share=0.5, warmup=3),
    "placebo": _named("placebo"),
    "topk_mean": _named("topk_mean"),
    "warmstart": lambda space, direction: make("warmstart", space, direction, client=Reader(), budget=35),
    "llm-mean": lambda space, direction: LLM(space, direction, client=Reader(), mode="mean"),
    "llm-faulty": lambda space, direction: LLM(space, direction, client=RandomJSON(faults=0.3)),
    "llm": _llm,
    "hybrid": _hybrid_llm,
}

SPACES: dict[str, Space] = {
    "floats": Space({f"x{i}": Float(-1, 3, init=0.5) for i in range(4)}),
    "one": Space({"x": Float(1e-6, 1e-2, log=True)}),
    "mixed": Space(
        {
            "lr": Float(1e-6, 1e-2, log=True, init=1e-4),
            "drop": Float(0, 0.3, step=0.05),
            "rank": Int(4, 128, log=True, init=16),
            "epochs": Int(1, 5),
            "even": Int(2, 20, step=2),
            "fixed": Float(0.5, 0.5),
            "target": Categorical("qv", "qkvo", "all"),
            "flag": Categorical(True, False),
            "size": Categorical(1, 2, 4, 8, ordered=True, init=4),
            "only": Categorical(None),
        }
    ),
    "conditional": Space(
        {
            "method": Categorical("linear", "ties", "slerp"),
            "density": Float(0.1, 1),
            "t": Float(0, 1),
            "norm": Categorical("off", "l1", "l2"),
            "weight": Float(0, 2),
        },
        {
            "density": Condition("method", ("ties",)),
            "t": Condition("method", ("slerp",)),
            "norm": Condition("method", ("linear", "ties")),
        },
    ),
    "choices": Space({"a": Categorical(*"abcd"), "b": Categorical(1, 2.5, "x"), "c": Categorical(True, 1)}),
    "ints": Space({"a": Int(0, 9), "b": Int(-3, 3), "big": Int(0, 10**6)}),
}

proposers = pytest.mark.parametrize("name", PROPOSERS)
spaces = pytest.mark.parametrize("kind", SPACES)


def score(space: Space, trial: Trial) -> float:
    """A smooth function with its best at 0.7 of every axis."""
    return 1.0 - float(np.mean((space.to_unit(trial.params) - 0.7) ** 2))


def tell(opt: Optimizer, trial: Trial, sign: float = 1.0) -> None:
    """Score a trial; some fail, some score NaN, as a function of the number alone."""
    if trial.number % 7 == 3:
        opt.tell(trial, error="out of memory")
    elif trial.number % 11 == 5:
        opt.tell(trial, math.nan)
    elif not trial.params:
        opt.tell(trial, sign * 0.5)
    else:
        opt.tell(trial, sign * score(opt.space, trial))


def step(opt: Optimizer, number: int, sign: float = 1.0) -> list[Trial]:
    """Ask for one to four trials and tell some of those that are pending, the youngest first.

    What is told follows from the step and the trials, so a resumed run can go on with the same steps.
    """
    asked = opt.ask(number % 4 + 1)
    pending = [trial for trial in opt.trials if trial.state is State.PENDING]
    for trial in reversed(pending):
        if (trial.number + number) % 3 or not asked:
            tell(opt, trial, sign)
    return asked


def build(name: str, kind: str, seed: int = 0, trials: list[Trial] | None = None) -> Optimizer:
    space = SPACES[kind]
    proposer = PROPOSERS[name](space, "maximize")
    return Optimizer(space, proposer, direction="maximize", seed=seed, trials=trials or ())


def through_json(trials: tuple[Trial, ...]) -> list[Trial]:
    return [Trial.from_json(json.loads(json.dumps(trial.to_json(), allow_nan=False))) for trial in trials]


@spaces
@proposers
def test_proposals_are_points_of_the_space_and_never_too_many(name: str, kind: str) -> None:
    space = SPACES[kind]
    proposer = PROPOSERS[name](space, "maximize")
    opt = Optimizer(space, proposer, direction="maximize")
    for number in range(25):
        n = number % 4 + 1
        found = proposer.propose(n, opt.trials, np.random.default_rng([0, len(opt.trials)]))
        assert len(found) <= n
        for proposal in found:
            assert space.validate(proposal.params) == proposal.params
            assert list(proposal.params) == space.names
            assert proposal.origin
            assert json.loads(json.dumps(proposal.attrs, allow_nan=False)) == proposal.attrs
        asked = step(opt, number)
        # What was just found is what the optimizer hands out: proposing is a function of the history.
        assert [trial.params for trial in asked] == [proposal.params for proposal in found]
    assert len(opt.trials) >= 25 or space.count is not None


@spaces
@proposers
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(name: str, kind: str) -> None:
    steps, whole = 18, build(name, kind)
    snapshots = []
    for number in range(steps):
        snapshots.append(whole.trials)
        step(whole, number)
    for number in range(1, steps, 4):
        resumed = build(name, kind, trials=through_json(snapshots[number]))
        for later in range(number, steps):
            step(resumed, later)
        assert resumed.trials == whole.trials


@proposers
def test_a_cache_does_not_survive_another_history(name: str) -> None:
    space = SPACES["mixed"]
    used, runs = PROPOSERS[name](space, "maximize"), []
    for seed in range(3):
        opt = build(name, "mixed", seed)
        for number in range(14):
            step(opt, number)
        runs.append(opt.trials)
    for trials in [*runs, runs[0][:9], runs[1], runs[1][:20]]:
        fresh = PROPOSERS[name](space, "maximize")
        expected = fresh.propose(2, trials, np.random.default_rng(5))
        assert used.propose(2, trials, np.random.default_rng(5)) == expected


@proposers
def test_another_seed_gives_other_points(name: str) -> None:
    points = []
    for seed in range(2):
        opt = build(name, "mixed", seed)
        for number in range(4):
            step(opt, number)
        points.append([trial.params for trial in opt.trials])
    assert points[0] != points[1]


@spaces
@proposers
def test_maximizing_mirrors_minimizing(name: str, kind: str) -> None:
    space = SPACES[kind]
    up = Optimizer(space, PROPOSERS[name](space, "maximize"), direction="maximize")
    down = Optimizer(space, PROPOSERS[name](space, "minimize"), direction="minimize")
    for number in range(20):
        step(up, number)
        step(down, number, sign=-1.0)
    assert [(t.params, t.origin, t.attrs) for t in up.trials] == [
        (t.params, t.origin, t.attrs) for t in down.trials
    ]


@pytest.mark.parametrize(
    ("name", "own", "guest"),
    [
        ("llm", {"start", "llm", "llm+noise", "fallback:no_json"}, set()),
        ("hybrid", {"cma"}, {"llm"}),
        ("hybrid-ga", {"cma"}, {"ga"}),
    ],
)
def test_every_origin_is_labelled(name: str, own: set[str], guest: set[str]) -> None:
    opt = build(name, "mixed")
    for number in range(60):
        step(opt, number)
    turned = [note["origin"] for trial in opt.trials for note in trial.attrs.get("turned_away", ())]
    guests = {trial.origin for trial in opt.trials if trial.attrs.get("guest")} | set(turned)
    assert guest <= guests
    assert not guests & own
    assert own <= {trial.origin for trial in opt.trials}


@proposers
def test_all_trials_failing_is_survived_and_reported(name: str) -> None:
    opt = build(name, "mixed")
    while len(opt.trials) < 40:
        asked = opt.ask(4)
        assert asked
        for trial in asked:
            opt.tell(trial, error="no room")
    assert "failing" in opt.stop_reasons()


@proposers
def test_nothing_is_told_for_a_long_time(name: str) -> None:
    opt = build(name, "mixed")
    for _ in range(10):
        opt.ask(3)
    assert opt.trials
    assert "exhausted" not in opt.stop_reasons()
    for trial in reversed(opt.trials):
        tell(opt, trial)
    assert opt.ask(2)


@proposers
def test_equal_scores_are_survived(name: str) -> None:
    opt = build(name, "mixed")
    while len(opt.trials) < 60:
        for trial in opt.ask(5):
            opt.tell(trial, 0.5)
    assert opt.best is not None
    assert opt.best.number == 0


@proposers
@pytest.mark.parametrize(
    "space",
    [
        Space({"a": Float(0.5, 0.5)}),
        Space({"a": Int(3, 3), "b": Categorical("x"), "c": Float(1, 1, log=True)}),
    ],
)
def test_a_space_of_one_point(name: str, space: Space) -> None:
    opt = Optimizer(space, PROPOSERS[name](space, "maximize"), direction="maximize")
    for _ in range(12):
        for trial in opt.ask(2):
            assert trial.params == space.start()
            opt.tell(trial, 1.0)
    assert opt.trials


TINY: dict[str, tuple[Space, int]] = {
    "product": (Space({"a": Categorical("x", "y"), "b": Int(0, 2), "c": Float(0, 1, step=0.5)}), 18),
    "conditional": (
        Space({"a": Categorical("x", "y"), "b": Int(0, 3)}, {"b": Condition("a", ("y",))}),
        5,
    ),
}


@pytest.mark.parametrize("tiny", TINY)
@proposers
def test_a_tiny_space_until_it_is_used_up(name: str, tiny: str) -> None:
    space, size = TINY[tiny]
    opt = Optimizer(space, PROPOSERS[name](space, "maximize"), direction="maximize")
    for _ in range(80):
        for trial in opt.ask(3):
            opt.tell(trial, score(space, trial))
        if opt.stop_reasons():
            break
    keys = [space.key(trial.params) for trial in opt.trials]
    assert len(set(keys)) <= size
    assert opt.best is not None
    if name == "ga":
        assert len(keys) == size == len(set(keys))
        assert "exhausted" in opt.stop_reasons()
    elif name != "cma-small":
        best = max(score(space, trial) for trial in opt.trials)
        assert opt.best.value == best


@proposers
def test_enqueued_points_come_first_and_do_no_harm(name: str) -> None:
    opt, rng = build(name, "conditional"), np.random.default_rng(1)
    points = [opt.space.sample(rng) for _ in range(13)]
    for point in points[:9]:
        opt.enqueue(point)
    opt.enqueue(None, origin="parent:a")
    for number in range(6):
        step(opt, number)
    for point in points[9:]:
        opt.enqueue(point)
    for number in range(6, 24):
        step(opt, number)
    assert [trial.params for trial in opt.trials[:9]] == points[:9]
    assert opt.trials[9].params == {}
    assert sum(trial.origin == "enqueued" for trial in opt.trials) == 13
    assert len(opt.trials) > 30


@proposers
def test_proposing_changes_neither_the_trials_nor_the_global_random_state(name: str) -> None:
    opt = build(name, "mixed")
    for number in range(12):
        step(opt, number)
    before = json.dumps([trial.to_json() for trial in opt.trials])
    np.random.seed(3)  # noqa: NPY002 - the legacy state is what must stay untouched
    numpy_state, python_state = str(np.random.get_state()), random.getstate()  # noqa: NPY002
    proposer = PROPOSERS[name](opt.space, "maximize")
    for seed in range(3):
        proposer.propose(3, opt.trials, np.random.default_rng(seed))
    assert json.dumps([trial.to_json() for trial in opt.trials]) == before
    assert str(np.random.get_state()) == numpy_state  # noqa: NPY002
    assert random.getstate() == python_state


@pytest.mark.parametrize("name", ["ga", "cma", "hybrid-ga"])
@pytest.mark.parametrize("kind", ["floats", "mixed"])
def test_what_learns_beats_what_does_not(name: str, kind: str) -> None:
    def median(who: str) -> float:
        values = []
        for seed in range(9):
            opt = build(who, kind, seed)
            while len(opt.trials) < 90:
                for trial in opt.ask(6):
                    opt.tell(trial, score(opt.space, trial))
            assert opt.best is not None
            values.append(1.0 - score(opt.space, opt.best))
        return float(np.median(values))

    assert median(name) < 0.7 * median("random")
