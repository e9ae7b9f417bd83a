"""The controls without a model (`placebo`, `topk_mean`) and the model that is asked once (`warmstart`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from random_json import RandomJSON

from llmevo import Categorical, Float, Optimizer, Proposal, ProposerError, Space, Trial
from llmevo.llm import Reply, Request
from llmevo.proposers import make
from llmevo.proposers.placebo import Placebo
from llmevo.proposers.topk_mean import TopKMean
from llmevo.proposers.warmstart import Warmstart
from llmevo.strength import TwoLevel

SPACE = Space({"x": Float(0, 1), "y": Float(0, 1), "kind": Categorical("a", "b", "c")})


class Counting:
    """RandomJSON that counts its calls."""

    def __init__(self, faults: float = 0.0) -> None:
        self.inner = RandomJSON(faults)
        self.asked: list[int] = []

    def complete(self, request: Request) -> Reply:
        assert request.schema is not None
        self.asked.append(request.schema["properties"]["proposals"]["minItems"])
        return self.inner.complete(request)


def play(proposer: Any, trials: int, batch: int, history: Sequence[Trial] = ()) -> Optimizer:
    opt = Optimizer(SPACE, proposer, direction="maximize", seed=4, trials=history)
    while len(opt.trials) < trials:
        for trial in opt.ask(batch):
            opt.tell(trial, -float(np.sum((SPACE.to_unit(trial.params)[:2] - 0.8) ** 2)))
    return opt


def test_placebo_stays_at_the_incumbent_with_the_current_strength() -> None:
    opt = play(Placebo(SPACE, "maximize", strength=TwoLevel(1e-3, 2e-3)), 13, 4)
    assert opt.trials[0].params == SPACE.start()
    for trial in opt.trials[4:]:
        earlier = [t for t in opt.trials if t.batch < trial.batch]
        best = max(earlier, key=lambda t: t.value or -np.inf)
        moved = np.abs(SPACE.to_unit(trial.params)[:2] - SPACE.to_unit(best.params)[:2])
        assert 0 < moved.max() < 0.02
        assert trial.attrs["strength"] in (1e-3, 2e-3)


def test_topk_mean_proposes_the_mean_and_then_points_around_it() -> None:
    points = [(0.1, 0.3, "c"), (0.2, 0.3, "a"), (0.3, 0.9, "a"), (0.4, 0.5, "c"), (0.9, 0.9, "b")]
    opt = Optimizer(SPACE, TopKMean(SPACE, "maximize", strength=TwoLevel(1e-3, 2e-3)), direction="maximize")
    for x, y, kind in points:
        opt.enqueue({"x": x, "y": y, "kind": kind})
    for trial in opt.ask(5):
        opt.tell(trial, -trial.number)
    first, second = opt.ask(2)
    assert first.params == pytest.approx({"x": 0.25, "y": 0.5, "kind": "c"}), "equal counts: the better one's"
    assert second.params["x"] == pytest.approx(0.25, abs=0.02)
    assert second.params != first.params
    with pytest.raises(ProposerError, match="`k >= 1`"):
        TopKMean(SPACE, "maximize", k=0)


@pytest.mark.parametrize(("budget", "size"), [(None, 8), (100, 8), (20, 4), (3, 1)])
@pytest.mark.parametrize("batch", [1, 3, 10])
def test_warmstart_asks_once_and_for_no_more_than_a_fifth(budget: int | None, size: int, batch: int) -> None:
    client = Counting()
    opt = play(Warmstart(SPACE, "maximize", client=client, budget=budget), 24, batch)
    assert len(client.asked) == (size > 1), "a design of one point is the start, which needs no model"
    guests = [trial for trial in opt.trials if trial.attrs.get("guest")]
    assert [trial.number for trial in guests] == list(range(size))
    assert [trial.origin for trial in guests] == ["start"] + ["llm"] * (size - 1)
    assert {trial.origin for trial in opt.trials[size:]} == {"cma"}


def test_a_resumed_warmstart_pays_for_no_second_call() -> None:
    whole = play(Warmstart(SPACE, "maximize", client=Counting()), 20, 3)
    for cut in sorted({trial.batch for trial in whole.trials} - {0}):
        kept = [Trial.from_json(json.loads(json.dumps(t.to_json()))) for t in whole.trials[:cut]]
        client = Counting()
        assert play(Warmstart(SPACE, "maximize", client=client), 20, 3, kept).trials == whole.trials
        assert client.asked == []


def test_a_useless_warmstart_is_labelled_and_the_base_goes_on() -> None:
    client = Counting(faults=1.0)
    opt = play(Warmstart(SPACE, "maximize", client=client), 20, 4)
    assert len(client.asked) == 2, "the answer and one repair"
    assert [trial.origin for trial in opt.trials[:4]] == ["fallback:no_json"] * 4
    assert {trial.origin for trial in opt.trials[4:]} == {"cma"}
    assert not any(trial.attrs.get("guest") for trial in opt.trials)


class _Near:
    """Knows about where the best point is."""

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        units = np.append(0.8 + rng.normal(0, 0.05, (n, 2)), np.full((n, 1), 0.5), axis=1)
        return [Proposal(SPACE.from_unit(unit), "near") for unit in units]


def test_the_base_learns_from_a_good_warmstart() -> None:
    warm = play(Warmstart(SPACE, "maximize", guest=_Near()), 40, 7)
    cold = play("cma", 40, 7)
    regrets = [-np.mean([trial.value for trial in opt.trials[14:35]]) for opt in (warm, cold)]
    assert regrets[0] < 0.7 * regrets[1]


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("warmstart", {"budget": 0}, "budget"),
        ("warmstart", {"base": "hybrid"}, "base"),
        ("warmstart", {"guest": _Near(), "mode": "mean"}, "mode"),
        ("llm", {"mode": "median"}, "mode"),
    ],
)
def test_refuses_what_cannot_be_meant(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ProposerError, match=f"`{text}`|{text}"):
        make(name, SPACE, "maximize", **options)


def test_mean_mode_asks_for_one_genome_and_draws_around_it() -> None:
    client = Counting()
    strength = TwoLevel(1e-3, 1e-3)
    opt = play(make("llm", SPACE, "maximize", client=client, mode="mean", strength=strength), 17, 4)
    assert set(client.asked) == {1}
    batch = opt.trials[4:8]
    assert [trial.origin for trial in batch] == ["llm", "llm+incumbent", "llm+noise", "llm+noise"]
    mean, jittered, *others = (SPACE.to_unit(trial.params)[:2] for trial in batch)
    best = max(opt.trials[:4], key=lambda t: t.value or -np.inf)
    assert 0 < np.abs(jittered - SPACE.to_unit(best.params)[:2]).max() < 0.02
    for other in others:
        assert 0 < np.abs(other - mean).max() < 0.02
