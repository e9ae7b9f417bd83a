"""Points near other points, and none twice: what proposers without a distribution of their own draw from."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import final

import numpy as np

from llmevo.llm.blocks import View, Whole
from llmevo.llm.encode import level_key
from llmevo.proposers import Direction
from llmevo.proposers.operators import reflect
from llmevo.proposers.settled import Settled
from llmevo.space import Categorical, Params, Space
from llmevo.trial import Trial, ranked

_ATTEMPTS = 32  # at a point that is not known, each with wider noise
_WIDEST = 0.5


@final
class Known:
    """The points of a history and of the batch in the making, to which new ones are added.

    Args:
        space: What they are points of.
        trials: The history, or what of it is not in `before`.
        before: Keys and level keys of other known points; see `Memory`. They are not changed.
    """

    def __init__(
        self, space: Space, trials: Sequence[Trial], before: tuple[Set[str], Set[str]] = (frozenset(),) * 2
    ) -> None:
        self._space = space
        self._old_keys, self._old_levels = before
        self._keys = {space.key(trial.params) for trial in trials} - self._old_keys
        self._levels = {level_key(space, trial.params) for trial in trials}

    @property
    def complete(self) -> bool:
        """Whether a finite space surely has no other point."""
        known = len(self._keys) + len(self._old_keys)
        return self._space.count is not None and known >= self._space.count

    def copied(self, point: Params) -> bool:
        """Whether a model that sees levels could not tell `point` from a known one."""
        key = level_key(self._space, point)
        return key in self._levels or key in self._old_levels

    def add(self, point: Params) -> bool:
        """Add `point`; false if it was known."""
        key = self._space.key(point)
        if key in self._keys or key in self._old_keys:
            return False
        self._keys.add(key)
        self._levels.add(level_key(self._space, point))
        return True

    def near(
        self, point: Params, sigma: float, rng: np.random.Generator, view: View | None = None
    ) -> Params | None:
        """A new point around `point`, added; None if none was found anywhere.

        Args:
            point: The centre; a point of the view's space if there is a view.
            sigma: Standard deviation in the unit cube; grows with each attempt that hits a known point.
            rng: Source of chance.
            view: Where the noise is added; None for the space itself.
        """
        seen = Whole(self._space) if view is None else view
        for attempt in range(_ATTEMPTS):
            candidate = seen.up(noisy(seen.space, point, min(sigma * 1.2**attempt, _WIDEST), rng))
            if self.add(candidate):
                return candidate
        return self.anywhere(rng)

    def anywhere(self, rng: np.random.Generator) -> Params | None:
        """A new point of the whole space, added; None if none was found."""
        for _ in range(max(_ATTEMPTS, 8 * min(self._space.count or 0, 1000))):
            candidate = self._space.sample(rng)
            if self.add(candidate):
                return candidate
        return None


@final
class Memory:
    """The known points and the best trials of a history that goes on: each trial is looked at once.

    Args:
        space: What they are points of.
        direction: `maximize` or `minimize`.
        best: How many of the best trials are wanted.
    """

    def __init__(self, space: Space, direction: Direction, best: int = 1) -> None:
        self._space, self._direction, self._count = space, direction, best
        self._settled = Settled()
        self._keys: set[str] = set()
        self._levels: set[str] = set()
        self._best: list[Trial] = []

    def recall(self, trials: Sequence[Trial]) -> tuple[Known, list[Trial]]:
        """The points of `trials`, to which a batch may be added, and the best of them, best first.

        The answer is valid until the next call.
        """
        goes_on, new, rest = self._settled.split(trials)
        if not goes_on:
            self._keys, self._levels, self._best = set(), set(), []
        self._keys.update(self._space.key(trial.params) for trial in new)
        self._levels.update(level_key(self._space, trial.params) for trial in new)
        self._best = ranked([*self._best, *new], self._direction)[: self._count]
        known = Known(self._space, rest, (self._keys, self._levels))
        return known, ranked([*self._best, *rest], self._direction)[: self._count]


def noisy(space: Space, point: Params, sigma: float, rng: np.random.Generator) -> Params:
    """Normal steps on numbers, reflected at the bounds; choices redrawn with the probability `sigma`."""
    unit = space.to_unit(point)
    steps = rng.normal(0.0, sigma, len(unit))
    draws = rng.random((2, len(unit)))
    moved = reflect(unit + steps)
    for index, gene in enumerate(space.genes.values()):
        if isinstance(gene, Categorical) and not gene.ordered:
            moved[index] = draws[1, index] if draws[0, index] < sigma else unit[index]
    return space.from_unit(moved)
