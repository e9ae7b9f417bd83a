"""The hybrid's exact share and its rules when the base waits or the guest cannot go on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo import Float, Int, LLMError, Optimizer, Proposal, ProposerError, Space, State, Trial
from llmevo.proposers.ga import GA
from llmevo.proposers.hybrid import Hybrid
from llmevo.proposers.random import Random

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
    opt = Optimizer(SPACE, hybrid(base, share=share, warmup=warmup), direction="maximize")
    for batch in batches:
        for trial in opt.ask(batch):
            opt.tell(trial, trial.params["x0"])
        guests = sum(trial.attrs["guest"] for trial in opt.trials)
        assert guests == math.floor(share * max(len(opt.trials) - warmup, 0) + 1e-9)
    assert not any(trial.attrs["guest"] for trial in opt.trials[:warmup])
    assert all((trial.origin == "ga") == trial.attrs["guest"] for trial in opt.trials)


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
    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        raise LLMError("the endpoint answered 503 four times")


def test_a_guest_that_cannot_go_on_raises_and_nothing_is_lost() -> None:
    proposer = Hybrid(SPACE, "maximize", base="random", guest=_Down(), share=0.5, warmup=2)
    opt = Optimizer(SPACE, proposer, direction="maximize")
    opt.ask(2)
    with pytest.raises(LLMError, match="503"):
        opt.ask(4)
    assert len(opt.trials) == 2


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
        ({"base": Random(SPACE, "maximize"), "base_options": {"population": 3}}, "base_options"),
        ({"temperature": 0.7}, "temperature"),
    ],
)
def test_refuses_what_cannot_be_meant(options: dict[str, object], text: str) -> None:
    with pytest.raises(ProposerError, match=text):
        hybrid(**options)


def test_options_reach_a_base_given_by_name() -> None:
    assert hybrid("cma", base_options={"population": 17}).base._search.population_size == 17
