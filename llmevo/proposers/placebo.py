"""The incumbent with noise: the control that every hybrid with a language model must beat.

It does what the `llm` proposer does with the model taken out. As guest of a hybrid it alone already improves
CMA-ES at small budgets, so that a gain over bare CMA-ES proves nothing of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from llmevo.proposers import Direction
from llmevo.proposers.nearby import Memory
from llmevo.space import Space
from llmevo.strength import OneFifth, Strength
from llmevo.trial import Proposal, Trial


@final
class Placebo:
    """Draws new points around the best trial; before there is one, the start and then points around it.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        strength: Standard deviation of the noise by history; None for `OneFifth()`.
    """

    def __init__(self, space: Space, direction: Direction, *, strength: Strength | None = None) -> None:
        self.space = space
        self.direction: Direction = direction
        self._strength = strength or OneFifth()
        self._memory = Memory(space, direction)

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest up to `n` new points; fewer if a finite space has no more."""
        known, best = self._memory.recall(trials)
        centre = best[0].params if best else self.space.start()
        sigma = self._strength(trials, self.direction)
        made: list[Proposal] = []
        for _ in range(n):
            if known.complete:
                break
            if not best and known.add(centre):
                made.append(Proposal(centre, "placebo"))
                continue
            point = known.near(centre, sigma, rng)
            if point is not None:
                made.append(Proposal(point, "placebo", {"strength": sigma}))
        return made
