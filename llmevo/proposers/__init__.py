"""Proposers: from a history of trials to new points.

A proposer sees the history and nothing else. What it needs across calls it derives from the history, or
writes as JSON into `Proposal.attrs`; it may keep a cache, which must be rebuilt when the history it is
given is not a continuation of the last one. So a resumed run continues as the uninterrupted one would.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np

from llmevo.errors import ProposerError
from llmevo.space import Space
from llmevo.trial import Direction as Direction
from llmevo.trial import Proposal, Trial

# Modules are imported when a proposer is made: sobol needs scipy and llm needs openai.
PROPOSERS: dict[str, tuple[str, str]] = {
    "random": ("llmevo.proposers.random", "Random"),
    "sobol": ("llmevo.proposers.sobol", "Sobol"),
    "ga": ("llmevo.proposers.ga", "GA"),
    "population": ("llmevo.proposers.population", "Population"),
    "cma": ("llmevo.proposers.cma", "CMA"),
    "llm": ("llmevo.proposers.llm", "LLM"),
    "hybrid": ("llmevo.proposers.hybrid", "Hybrid"),
    "warmstart": ("llmevo.proposers.warmstart", "Warmstart"),
    "placebo": ("llmevo.proposers.placebo", "Placebo"),
    "topk_mean": ("llmevo.proposers.topk_mean", "TopKMean"),
}


class Proposer(Protocol):
    """What suggests points. Constructed as `Class(space, direction, **options)`."""

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest up to `n` points; fewer, or none, if it waits for pending trials.

        Args:
            n: At least 1.
            trials: Every trial with params so far, by number, pending and failed ones included.
            rng: The only source of chance; a function of the seed and the number of trials.
        """
        ...


def make(name: str, space: Space, direction: Direction, **options: Any) -> Proposer:
    """The proposer called `name`, for `space`.

    Raises:
        ProposerError: No proposer has that name.
    """
    if name not in PROPOSERS:
        near = difflib.get_close_matches(name, PROPOSERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ProposerError(f"`proposer` must be one of {', '.join(PROPOSERS)}, but got {name!r}.{hint}")
    module, attribute = PROPOSERS[name]
    return cast(Proposer, getattr(import_module(module), attribute)(space, direction, **options))
