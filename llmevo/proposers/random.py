"""Independent uniform samples of the unit cube: the control that every search must beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

from llmevo.proposers import Direction
from llmevo.space import Space
from llmevo.trial import Proposal, Trial


@final
class Random:
    """Uniform random search; it looks at nothing.

    Args:
        space: What to sample.
        direction: Accepted because every proposer takes it; not used.
    """

    def __init__(self, space: Space, direction: Direction) -> None:
        self.space = space

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest `n` points drawn uniformly."""
        return [Proposal(self.space.sample(rng), "random") for _ in range(n)]
