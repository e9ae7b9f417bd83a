"""From the genome's `search` to the proposer that runs: every mode, with its options."""

from __future__ import annotations

from typing import Any

import pytest
from random_json import RandomJSON

from llmevo.genome import Genome, parse
from llmevo.llm import Reply, Request
from llmevo.optimizer import Optimizer
from llmevo.recipe import Recipes
from llmevo.runner import opening

GENOME = """
genome:
  models: [some/base, some/expert-a, some/expert-b]
  base_model: some/base
  merge_method: ties
  num_layers: 8
tasks: [arc_easy, piqa]
search: {population: 5, trials: 40}
"""


class Client:
    """Random JSON that says what it is."""

    small = False

    def complete(self, request: Request) -> Reply:
        return RandomJSON().complete(request)

    def describe(self) -> str:
        return "random JSON"


def genome(**search: Any) -> Genome:
    return parse(GENOME, overrides=[f"search.{key}={value}" for key, value in search.items()])


@pytest.mark.parametrize(
    ("search", "asks", "origins"),
    [
        ({"proposer": "random"}, False, {"random"}),
        ({"proposer": "topk_mean"}, False, {"topk_mean"}),
        ({"proposer": "placebo"}, False, {"placebo"}),
        ({"proposer": "llm"}, True, {"start", "llm", "llm+noise"}),
        ({"proposer": "llm", "mode": "mean"}, True, {"start", "llm", "llm+incumbent", "llm+noise"}),
        ({"proposer": "warmstart", "base": "ga"}, True, {"start", "llm", "ga"}),
        ({"proposer": "hybrid", "adapt": "false", "screen": "false", "warmup": 5}, True, {"cma", "llm"}),
        ({"proposer": "hybrid", "guest": "placebo", "base": "ga"}, False, {"ga", "placebo"}),
    ],
)
def test_every_mode_runs_as_the_genome_says(search: dict[str, Any], asks: bool, origins: set[str]) -> None:
    spec = genome(**search)
    assert spec.search.asks_model == asks
    recipes = Recipes(spec, 8)
    proposer = opening.proposer(spec, recipes, Client() if asks else None)
    opt = Optimizer(recipes.space, proposer, direction="maximize", seed=0)
    while len(opt.trials) < 30:
        for trial in opt.ask(5):
            opt.tell(trial, -abs(0.6 - float(recipes.space.to_unit(trial.params).mean())))
    assert origins <= {trial.origin for trial in opt.trials}


def test_a_base_that_asks_a_model_needs_one() -> None:
    assert genome(proposer="hybrid", base="llm", guest="placebo").search.asks_model
    assert not genome(proposer="hybrid", base="ga", guest="topk_mean").search.asks_model


def test_the_options_of_a_hybrid_arrive() -> None:
    search = {"share": 0.2, "warmup": 4, "adapt": "false", "screen": "false", "on_outage": "base"}
    spec = genome(proposer="hybrid", **search)
    made: Any = opening.proposer(spec, Recipes(spec, 8), Client())
    got = (made.share, made.warmup, made.adapt, made.screen, made.on_outage)
    assert got == (0.2, 4, False, False, "base")
