"""A genetic algorithm on the unit cube: tournament, blend crossover, self-limiting mutation, elitism."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np

from llmevo.proposers import Direction
from llmevo.proposers.operators import Operators, size_of
from llmevo.proposers.settled import Settled
from llmevo.space import Params, Space, Vector
from llmevo.strength import OneFifth, Strength
from llmevo.trial import Proposal, Trial, ranked

_POPULATION = 8
_TOURNAMENT = 3
_ATTEMPTS = 32  # at a child that is no duplicate, each with a wider mutation
_ENUMERABLE = 4096  # points; of a space this small the unseen ones are listed


@final
class GA:
    """Genetic algorithm whose parents are the best complete trials of the whole history.

    Parents win tournaments of three; they cross and mutate as `Operators` says, each gene with probability
    1/d. No point is proposed twice, neither in a batch nor against the history; of a finite space that is
    used up, fewer points come back, or none.

    Until there are `population` trials and two parents: the start point, then by turns a point around it
    and a point anywhere.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        population: How many of the best trials are parents, at least 2; None for 8.
        strength: Mutation strength by history; None for `OneFifth()`.

    Raises:
        ProposerError: `population` is out of its range.
    """

    def __init__(
        self,
        space: Space,
        direction: Direction,
        *,
        population: int | None = None,
        strength: Strength | None = None,
    ) -> None:
        self.space = space
        self.direction: Direction = direction
        self.population = size_of(population, _POPULATION, "ga")
        self.strength: Strength = OneFifth() if strength is None else strength
        self._operators = Operators(space)
        self._genes = list(space.genes.values())
        self._settled = Settled()  # with what is known of the settled trials:
        self._keys: set[str] = set()
        self._top: list[Trial] = []

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest up to `n` new points; fewer once a finite space is used up."""
        parents, seen = self._digested(trials)
        units = [self.space.to_unit(parent.params) for parent in parents]
        strength = self.strength(trials, self.direction)
        proposals: list[Proposal] = []
        attrs: dict[str, Any]
        for place in range(len(trials), len(trials) + n):
            if place < self.population or len(parents) < 2:
                point, attrs = self._first(place, seen, rng), {}
            else:
                point, attrs = self._child(parents, units, strength, seen, rng)
            if point is None:
                break
            seen.add(self.space.key(point))
            proposals.append(Proposal(point, "ga", attrs))
        return proposals

    def _digested(self, trials: Sequence[Trial]) -> tuple[list[Trial], set[str]]:
        """The parents, best first, and the keys of all points; only what is new is looked at."""
        goes_on, new, rest = self._settled.split(trials)
        if not goes_on:
            self._keys, self._top = set(), []
        self._keys.update(self.space.key(trial.params) for trial in new)
        self._top = self._best([*self._top, *new])
        keys = {self.space.key(trial.params) for trial in rest}
        return self._best([*self._top, *rest]), self._keys | keys

    def _best(self, trials: Sequence[Trial]) -> list[Trial]:
        return ranked(trials, self.direction)[: self.population]

    def _first(self, place: int, seen: set[str], rng: np.random.Generator) -> Params | None:
        """A point of the first generation."""
        start = self.space.start()
        if self.space.key(start) not in seen:
            return start
        return self._new((self._operators.first(place, rng) for _ in range(_ATTEMPTS)), seen, rng)

    def _child(
        self,
        parents: Sequence[Trial],
        units: Sequence[Vector],
        strength: float,
        seen: set[str],
        rng: np.random.Generator,
    ) -> tuple[Params | None, dict[str, Any]]:
        # Parents stand best first, so the smallest place wins a tournament. Two different ones cross.
        first = int(rng.integers(len(parents), size=_TOURNAMENT).min())
        others = [place for place in range(len(parents)) if place != first]
        second = others[int(rng.integers(len(others), size=_TOURNAMENT).min())]

        def attempts() -> Iterator[Vector]:
            for attempt in range(_ATTEMPTS):
                sigma = min(strength * 1.2**attempt, 0.5)
                yield self._operators.mutated(
                    self._operators.crossed(units[first], units[second], rng), sigma, rng
                )

        point = self._new(attempts(), seen, rng)
        return point, {
            "ga": {"parents": [parents[first].number, parents[second].number], "strength": strength}
        }

    def _new(self, candidates: Iterator[Vector], seen: set[str], rng: np.random.Generator) -> Params | None:
        """The first candidate that is not known, else any other unknown point, else None."""
        for unit in candidates:
            point = self.space.from_unit(unit)
            if self.space.key(point) not in seen:
                return point
        count = self.space.count
        if count is None or count > _ENUMERABLE:
            anywhere = (self.space.sample(rng) for _ in range(_ATTEMPTS))
            return next((point for point in anywhere if self.space.key(point) not in seen), None)
        points = {self.space.key(point): point for point in self._all()}
        unseen = [point for key, point in points.items() if key not in seen]
        return unseen[int(rng.integers(len(unseen)))] if unseen else None

    def _all(self) -> Iterator[Params]:
        """Every point of a finite space; the same one again where inactive genes differ."""
        cells = [(np.arange(gene.count or 0) + 0.5) / (gene.count or 1) for gene in self._genes]
        for unit in itertools.product(*cells):
            yield self.space.from_unit(unit)
