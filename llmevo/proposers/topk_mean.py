"""The mean of the best trials, with noise: LLM-Evo-Merge with the language model taken out.

There the model is shown the four best genomes and answers with a mean around which the next population is
drawn. The plain average of the same four needs no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import final

import numpy as np

from llmevo.errors import ProposerError
from llmevo.proposers import Direction
from llmevo.proposers.nearby import Memory
from llmevo.space import Categorical, Params, Space
from llmevo.strength import OneFifth, Strength
from llmevo.trial import Proposal, Trial

_FIRST = 0.2  # noise around the start, before there are k trials


@final
class TopKMean:
    """Draws new points around the mean of the best `k` trials; the mean itself is the first of a batch.

    Numbers are averaged in the unit cube, a choice is the one that most of them have (of equals that of the
    better trial). Until `k` trials are complete: the start, then by turns a point around it and a point
    anywhere.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        k: How many trials make the mean, at least 1.
        strength: Standard deviation of the noise by history; None for `OneFifth()`.

    Raises:
        ProposerError: `k` is out of its range.
    """

    def __init__(
        self, space: Space, direction: Direction, *, k: int = 4, strength: Strength | None = None
    ) -> None:
        if k < 1:
            raise ProposerError(f"`k >= 1` must hold for topk_mean, but got {k!r}.")
        self.space = space
        self.direction: Direction = direction
        self.k = k
        self._strength = strength or OneFifth()
        self._memory = Memory(space, direction, k)

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest up to `n` new points; fewer if a finite space has no more."""
        known, best = self._memory.recall(trials)
        made: list[Proposal] = []
        if len(best) < self.k:
            start = self.space.start()
            for place in range(len(trials), len(trials) + n):
                if known.complete:
                    break
                if known.add(start):
                    made.append(Proposal(start, "topk_mean"))
                    continue
                point = known.near(start, _FIRST, rng) if place % 2 else known.anywhere(rng)
                if point is not None:
                    made.append(Proposal(point, "topk_mean"))
            return made
        mean = self.mean([trial.params for trial in best])
        sigma = self._strength(trials, self.direction)
        for place in range(n):
            if known.complete:
                break
            if place == 0 and known.add(mean):
                made.append(Proposal(mean, "topk_mean", {"strength": 0.0}))
                continue
            point = known.near(mean, sigma, rng)
            if point is not None:
                made.append(Proposal(point, "topk_mean", {"strength": sigma}))
        return made

    def mean(self, points: Sequence[Params]) -> Params:
        """The mean of points, best first."""
        units = np.array([self.space.to_unit(point) for point in points])
        mean = units.mean(axis=0)
        for index, gene in enumerate(self.space.genes.values()):
            if isinstance(gene, Categorical) and not gene.ordered:
                mean[index] = Counter(units[:, index].tolist()).most_common(1)[0][0]
        return self.space.from_unit(mean)
