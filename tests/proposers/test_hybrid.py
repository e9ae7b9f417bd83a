"""The hybrid's exact share and its rules when the base waits or the guest cannot go on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo import Float, Int, LLMError, Optimizer, Proposal, ProposerError, Score, Space, State, Trial
from llmevo.errors import (
    LLMAuthError,
    LLMBudgetError,
    LLMContentError,
    LLMQuotaError,
    LLMTransportError,
)
from llmevo.proposers.ga import GA
from llmevo.proposers.hybrid import Hybrid
from llmevo.proposers.random import Random
from llmevo.proposers.screen import Screen

SPACE = Space({f"x{i}": Float(0, 1) for i in range(3)})


def hybrid(base: object = "random", **options: object) -> Hybrid:
    return Hybrid(SPACE, "maximize", base=base, guest=GA(SPACE, "maximize"), **options)


@settings(max_examples=60, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.1, 0.29, 0.3, 1 / 3, 0.5, 0.7, 1.0]),
    warmup=st.integers(0, 15),
    batches=st.lists(st.integers(1, 7), min_size=1, max_size=25),
    base=st.sampled_from(["random", "cma"]),
)
def test_the_share_is_exact_at_every_moment(share: float, warmup: int, batches: list[int], base: str) -> None:
    proposer = hybrid(base, share=share, warmup=warmup, adapt=False, screen=False)
    opt = Optimizer(SPACE, proposer, direction="maximize")
    for batch in batches:
        for trial in opt.ask(batch):
            opt.tell(trial, trial.params["x0"])
        guests = sum(trial.attrs["guest"] for trial in opt.trials)
        assert guests == math.floor(share * max(len(opt.trials) - warmup, 0) + 1e-9)
    assert not any(trial.attrs["guest"] for trial in opt.trials[:warmup])
    assert all((trial.origin == "ga") == trial.attrs["guest"] for trial in opt.trials)


class _Foreign:
    """A guest that draws its points from a box of the cube, under an origin of its own."""

    def __init__(self, low: float, high: float, origin: str = "foreign") -> None:
        self.low, self.high, self.origin = low, high, origin

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        units = rng.uniform(self.low, self.high, (n, len(SPACE)))
        return [Proposal(SPACE.from_unit(unit), self.origin, {"drawn": True}) for unit in units]


def played(proposer: Hybrid, trials: int, batch: int = 5, target: float = 0.5) -> list[Trial]:
    """A run in which being near `target` on every axis is good."""
    opt = Optimizer(SPACE, proposer, direction="maximize", seed=2)
    while len(opt.trials) < trials:
        for trial in opt.ask(batch):
            opt.tell(trial, -float(np.sum((SPACE.to_unit(trial.params) - target) ** 2)))
    return list(opt.trials)


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(st.integers(1, 6), min_size=5, max_size=20), low=st.sampled_from([0.0, 0.4, 0.9]))
def test_turns_follow_the_line_of_the_share_in_force(batches: list[int], low: float) -> None:
    proposer = Hybrid(SPACE, "maximize", base="ga", guest=_Foreign(low, low + 0.1), share=0.5, warmup=4)
    opt = Optimizer(SPACE, proposer, direction="maximize")
    for batch in batches:
        for trial in opt.ask(batch):
            opt.tell(trial, -float(np.sum((SPACE.to_unit(trial.params) - 0.5) ** 2)))
        taken = sum(t.attrs["guest"] + len(t.attrs.get("turned_away", ())) for t in opt.trials)
        due = sum(trial.attrs["share"] for trial in opt.trials[4:])
        # A share that falls leaves the guest ahead of the new line by less than one turn.
        assert math.floor(due + 1e-9) <= taken <= math.floor(due + 1e-9) + 1


def test_a_hopeless_guest_falls_to_the_floor_and_is_turned_away() -> None:
    proposer = Hybrid(SPACE, "maximize", base="cma", guest=_Foreign(0.9, 1.0), share=0.5, warmup=10)
    trials = played(proposer, 120)
    assert trials[-1].attrs["share"] == pytest.approx(0.1)
    turned = [note for trial in trials for note in trial.attrs.get("turned_away", ())]
    evaluated = sum(trial.attrs["guest"] for trial in trials)
    assert evaluated <= 6
    assert len(turned) >= 5
    assert all(note["origin"] == "foreign" and note["attrs"] == {"drawn": True} for note in turned)
    assert all(note["why"]["far"] >= 2 and SPACE.validate(note["params"]) for note in turned)
    takers = {trial.origin for trial in trials if "turned_away" in trial.attrs}
    assert takers == {"cma"}, "the base takes the slot"


def test_a_guest_that_wins_keeps_its_share() -> None:
    trials = played(Hybrid(SPACE, "maximize", base="random", guest=_Foreign(0.45, 0.55), warmup=10), 60)
    assert {trial.attrs["share"] for trial in trials} == {0.3}
    assert not any("turned_away" in trial.attrs for trial in trials)


def test_the_share_recovers_with_the_guest() -> None:
    trials = played(Hybrid(SPACE, "maximize", base="cma", guest=_Foreign(0.9, 1.0), warmup=5), 60)
    assert trials[-1].attrs["share"] == pytest.approx(0.1)
    proposer = Hybrid(SPACE, "maximize", base="random", guest=_Foreign(0.499, 0.501), warmup=5)
    opt = Optimizer(SPACE, proposer, direction="maximize", trials=trials)
    while len(opt.trials) < 160:
        for trial in opt.ask(5):
            opt.tell(trial, -float(np.sum((SPACE.to_unit(trial.params) - 0.5) ** 2)))
    assert max(trial.attrs["share"] for trial in opt.trials[100:]) > 0.2


def test_many_copies_halve_the_share() -> None:
    options = {"base": "random", "share": 0.4, "warmup": 0, "screen": False}
    copies = played(Hybrid(SPACE, "maximize", guest=_Foreign(0.45, 0.55, "foreign+mutated"), **options), 45)
    assert {trial.attrs["share"] for trial in copies} == {0.4, 0.2}
    assert copies[-1].attrs["share"] == 0.2
    fresh = played(Hybrid(SPACE, "maximize", guest=_Foreign(0.45, 0.55), **options), 45)
    assert {trial.attrs["share"] for trial in fresh} == {0.4}


def test_a_first_far_jump_and_every_near_point_is_tried() -> None:
    trials = [
        Trial(n, {"x0": 0.5 + n / 100, "x1": 0.5, "x2": 0.5}, "base", State.COMPLETE, score=Score(-n / 1.0))
        for n in range(6)
    ]
    far, near = {"x0": 0.9, "x1": 0.1, "x2": 0.9}, {"x0": 0.5, "x1": 0.501, "x2": 0.5}
    assert Screen(SPACE, "maximize", trials).hopeless(far) is None, "nobody was there"
    for n, place in enumerate((0.05, 0.95), 6):
        point = {"x0": place, "x1": 0.95, "x2": 0.05}
        trials.append(Trial(n, point, "x", State.COMPLETE, {"guest": True}, score=Score(-50.0)))
    judge = Screen(SPACE, "maximize", trials)
    assert judge.hopeless(far) == {"distance": pytest.approx(0.69282), "far": 2, "best_rank": 7}
    assert judge.hopeless(near) is None
    assert judge.hopeless(trials[0].params) is None
    good = [*trials, Trial(8, {**far, "x0": 0.91}, "x", State.COMPLETE, score=Score(-0.5))]
    assert Screen(SPACE, "maximize", good).hopeless(far) is None, "somebody did well out there"


def test_the_base_comes_first_in_a_batch() -> None:
    opt = Optimizer(SPACE, hybrid(share=0.5, warmup=0), direction="maximize")
    assert [trial.origin for trial in opt.ask(6)] == ["random"] * 3 + ["ga"] * 3


def test_enqueued_points_count_as_warmup_but_not_towards_the_share() -> None:
    opt = Optimizer(SPACE, hybrid(share=0.5, warmup=10), direction="maximize")
    for value in np.linspace(0, 1, 30):
        opt.enqueue({name: float(value) for name in SPACE})
    opt.ask(30)
    assert [trial.origin for trial in opt.ask(4)] == ["random", "random", "ga", "ga"]


def test_the_guest_does_not_fill_the_place_of_a_base_that_waits() -> None:
    opt = Optimizer(SPACE, hybrid("cma", share=0.25, warmup=0), direction="maximize")
    for _ in range(30):
        opt.ask(4)
    guests = sum(trial.attrs["guest"] for trial in opt.trials)
    assert 0 < guests <= 0.25 * len(opt.trials)
    assert all(trial.state is State.PENDING for trial in opt.trials)
    for trial in opt.trials:
        opt.tell(trial, trial.params["x1"])
    assert opt.ask(4)


class _Down:
    def __init__(self, error: type[LLMError] = LLMTransportError) -> None:
        self.error = error

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        raise self.error("the endpoint answered 503 four times")


def test_a_guest_that_cannot_go_on_raises_and_nothing_is_lost() -> None:
    proposer = Hybrid(SPACE, "maximize", base="random", guest=_Down(), share=0.5, warmup=2)
    opt = Optimizer(SPACE, proposer, direction="maximize")
    opt.ask(2)
    with pytest.raises(LLMError, match="503"):
        opt.ask(4)
    assert len(opt.trials) == 2


@pytest.mark.parametrize("error", [LLMTransportError, LLMAuthError, LLMQuotaError, LLMBudgetError, LLMError])
def test_the_base_stands_in_for_an_outage_if_asked_to_and_says_so(error: type[LLMError]) -> None:
    proposer = Hybrid(SPACE, "maximize", guest=_Down(error), share=0.5, warmup=2, on_outage="base")
    trials = played(proposer, 22, batch=4)
    missing = [trial for trial in trials if "outage" in trial.attrs]
    assert len(missing) == (24 - 2) // 2, "the guest's turns, exactly"
    assert {(t.origin, t.attrs["outage"], t.attrs["guest"]) for t in missing} == {
        ("outage:cma", error.__name__, False)
    }
    assert {trial.origin for trial in trials if "outage" not in trial.attrs} == {"cma"}


def test_useless_answers_are_no_outage() -> None:
    proposer = Hybrid(SPACE, "maximize", guest=_Down(LLMContentError), warmup=0, on_outage="base")
    with pytest.raises(LLMContentError):
        played(proposer, 20)


def test_a_guest_with_nothing_new_does_not_end_the_search() -> None:
    space = Space({"a": Int(0, 3)})
    proposer = Hybrid(space, "maximize", base="random", guest=GA(space, "maximize"), share=1.0, warmup=0)
    opt = Optimizer(space, proposer, direction="maximize")
    for _ in range(10):
        for trial in opt.ask():
            opt.tell(trial, 1.0)
    assert [trial.origin for trial in opt.trials] == ["ga"] * 4 + ["random"] * 6
    assert opt.stop_reasons() == {}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"share": 1.5}, "share"),
        ({"warmup": -1}, "warmup"),
        ({"base": "hybrid"}, "base"),
        ({"base": "warmstart"}, "base"),
        ({"base": Random(SPACE, "maximize"), "base_options": {"population": 3}}, "base_options"),
        ({"temperature": 0.7}, "temperature"),
        ({"on_outage": "hide"}, "on_outage"),
    ],
)
def test_refuses_what_cannot_be_meant(options: dict[str, object], text: str) -> None:
    with pytest.raises(ProposerError, match=text):
        hybrid(**options)


def test_options_reach_a_base_given_by_name() -> None:
    assert hybrid("cma", base_options={"population": 17}).base._search.population_size == 17
