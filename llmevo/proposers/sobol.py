"""A scrambled Sobol sequence: points that cover the unit cube more evenly than independent ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np

from llmevo.errors import ProposerError
from llmevo.proposers import Direction
from llmevo.space import Space
from llmevo.trial import Proposal, Trial


@final
class Sobol:
    """Owen-scrambled Sobol points, by `scipy.stats.qmc.Sobol`.

    The scrambling's seed is drawn once and kept in `attrs`, so that the sequence goes on where the history
    stops. Points that are equal after rounding to discrete genes are proposed again; GA avoids that.

    Args:
        space: What to sample.
        direction: Accepted because every proposer takes it; not used.

    Raises:
        ProposerError: More genes than the 21,201 dimensions of the sequence.
    """

    def __init__(self, space: Space, direction: Direction) -> None:
        from scipy.stats import qmc

        if len(space) > qmc.Sobol.MAXDIM:
            raise ProposerError(
                f"`space` must have at most {qmc.Sobol.MAXDIM} genes for sobol, but got {len(space)}; "
                "use `random`."
            )
        self.space = space
        self._engine: Any = None
        self._place: tuple[int, int] | None = None  # seed and next index of the engine

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest the next `n` points of the sequence."""
        last = next((trial.attrs["sobol"] for trial in reversed(trials) if "sobol" in trial.attrs), None)
        if last is None:
            seed, index = int(rng.integers(2**32)), 0
        else:
            seed, index = last["seed"], last["index"] + 1
        if self._place != (seed, index):
            self._restart(seed, index)
        proposals = []
        for offset in range(n):
            # One at a time: the first draw of another size warns that it is not a power of two.
            point = self._engine.random(1)[0]
            attrs = {"sobol": {"seed": seed, "index": index + offset}}
            proposals.append(Proposal(self.space.from_unit(point), "sobol", attrs))
        self._place = (seed, index + n)
        return proposals

    def _restart(self, seed: int, index: int) -> None:
        from scipy.stats import qmc

        self._engine = qmc.Sobol(len(self.space), scramble=True, seed=np.random.default_rng(seed))
        if index:
            self._engine.fast_forward(index)
