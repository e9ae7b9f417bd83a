"""What a run's language model would take: calls, tokens and dollars, before any is asked."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np

from llmevo.errors import LLMError
from llmevo.genome import Genome, SearchSpec
from llmevo.llm import Reply, Request, Usage
from llmevo.llm.encode import names
from llmevo.llm.ledger import most
from llmevo.optimizer import Optimizer
from llmevo.recipe import Recipes
from llmevo.runner import opening

_BYTES = 3.5  # for a token, roughly, in prompts that are half numbers
_HISTORY = 24  # trials that fill every section of a prompt
_REASON = 120  # characters that a model says beside a point


@final
@dataclass(frozen=True, slots=True)
class Estimate:
    """What to expect.

    Args:
        calls: Answers asked for, at most; a hybrid whose share falls asks for fewer.
        prompt: Tokens read, roughly.
        completion: Tokens written, roughly; a model that reasons writes many times more.
        usd: Dollars for those; None without a price.
        most_usd: Dollars if every answer is as long as `llm.max_tokens` allows and has to be repaired once;
            None without a price.
    """

    calls: int
    prompt: int
    completion: int
    usd: float | None
    most_usd: float | None

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return asdict(self)

    def describe(self) -> str:
        """One line."""
        money = "dollars unknown (no llm.price)"
        if self.usd is not None and self.most_usd is not None:
            money = f"about ${self.usd:.4f}, at most ${self.most_usd:.4f}"
        return (
            f"up to {self.calls} calls, about {self.prompt} prompt and {self.completion} completion tokens, "
            f"{money}"
        )


@final
class _Listener:
    """A client that notes what it is asked and answers nothing."""

    small = False

    def __init__(self) -> None:
        self.request: Request | None = None

    def describe(self) -> str:
        """One line."""
        return "nobody"

    def complete(self, request: Request) -> Reply:
        """Note the request.

        Raises:
            LLMError: Always.
        """
        self.request = request
        raise LLMError("nobody is asked in a dry run")


def estimate(genome: Genome, recipes: Recipes, references: int, batch: int) -> Estimate | None:
    """The expected calls, tokens and dollars; None if no language model is asked.

    Args:
        genome: What would be searched.
        recipes: Its space.
        references: Trials before the proposer's first.
        batch: Trials per `ask`.
    """
    search = genome.search
    if not search.asks_model:
        return None
    turns = _turns(search, references, batch)
    request = _request(genome, recipes, max(turns, default=1))
    if request is None:
        return None
    calls = len(turns)
    size = sum(len(message["content"].encode()) for message in request.messages)
    answer = {"genome": dict.fromkeys(names(recipes.space).values(), 100), "why": "x" * _REASON}
    usage = Usage(
        round(calls * size / _BYTES), round(sum(turns) * len(json.dumps(answer)) / _BYTES), cached=0
    )
    price = opening.ledger(genome.llm).price
    upper = most(request, genome.llm.max_tokens)
    dearest = None if price is None else price.usd(upper)
    return Estimate(
        calls,
        usage.prompt or 0,
        usage.completion or 0,
        None if price is None else price.usd(usage),
        None if dearest is None else 2 * calls * dearest,
    )


def _turns(search: SearchSpec, references: int, batch: int) -> list[int]:
    """How many points each call is asked for."""
    begun = range(min(references, search.trials), search.trials, batch)
    sizes = [min(batch, search.trials - first) for first in begun]
    if search.proposer == "warmstart":
        return sizes[:1]
    if search.proposer != "hybrid":
        return sizes
    turns, known, given = [], references, 0
    for size in sizes:
        known += size
        due = math.floor(search.share * max(known - max(search.warmup, references), 0))
        turns.append(due - given)
        given = due
    return [turn for turn in turns if turn]


def _request(genome: Genome, recipes: Recipes, n: int) -> Request | None:
    """What the model would be asked in the middle of the search; the scores are made up."""
    listener = _Listener()
    alone = genome.model_copy(update={"search": genome.search.model_copy(update={"proposer": "llm"})})
    proposer = opening.proposer(alone, recipes, listener)
    history = Optimizer(recipes.space, "random", direction=genome.search.direction)
    for trial in history.ask(_HISTORY):
        history.tell(trial, 0.5 + trial.number / 1000)
    try:
        proposer.propose(n, history.trials, np.random.default_rng(0))
    except LLMError:
        return listener.request
    return None
