"""A genetic algorithm on the unit cube: tournament, blend crossover, self-limiting mutation, elitism."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np

from llmevo.errors import ProposerError
from llmevo.proposers import Direction
from llmevo.proposers.settled import Settled
from llmevo.space import Categorical, Gene, Params, Space, Vector
from llmevo.strength import OneFifth, Strength
from llmevo.trial import Proposal, Trial, ranked

_POPULATION = 8
_TOURNAMENT = 3
_BLEND = 0.5  # BLX-0.5: neither narrows nor widens a population on average
_ATTEMPTS = 32  # at a child that is no duplicate, each with a wider mutation
_ENUMERABLE = 4096  # points; of a space this small the unseen ones are listed


@final
class GA:
    """Genetic algorithm whose parents are the best complete trials of the whole history.

    Parents win tournaments of three. Numbers cross by BLX-0.5 (Eshelman and Schaffer, FOGA 1993), choices
    uniformly. Each gene mutates with probability 1/d, and at least one does: a number by a normal step
    of the current strength, reflected at the bounds and of at least one value on a grid, a choice to
    another one. No point is proposed twice, neither in a batch nor against the history; of a finite space
    that is used up, fewer points come back, or none.

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
        if population is not None and population < 2:
            raise ProposerError(f"`population >= 2` must hold for ga, but got {population!r}.")
        self.space = space
        self.direction: Direction = direction
        self.population = population or _POPULATION
        self.strength: Strength = OneFifth() if strength is None else strength
        self._genes = list(space.genes.values())
        self._free = [index for index, gene in enumerate(self._genes) if gene.count != 1]
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
        spread = OneFifth().start

        def near() -> Vector:
            return self._mutated(self.space.start_unit(), spread, rng, rate=1.0)

        def anywhere() -> Vector:
            return rng.random(len(self._genes))

        draw = near if place % 2 else anywhere
        return self._new((draw() for _ in range(_ATTEMPTS)), seen, rng)

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
                yield self._mutated(self._crossed(units[first], units[second], rng), sigma, rng)

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

    def _crossed(self, first: Vector, second: Vector, rng: np.random.Generator) -> Vector:
        blend = rng.uniform(-_BLEND, 1 + _BLEND, len(first))
        either = rng.random(len(first)) < 0.5
        child = reflect(first + blend * (second - first))
        for index, gene in enumerate(self._genes):
            if _is_choice(gene):
                child[index] = first[index] if either[index] else second[index]
        return child

    def _mutated(
        self, unit: Vector, strength: float, rng: np.random.Generator, rate: float | None = None
    ) -> Vector:
        child = unit.copy()
        if not self._free:
            return child
        chosen = rng.random(len(self._free)) < (1 / len(self._free) if rate is None else rate)
        if rate is None:
            chosen[rng.integers(len(self._free))] = True
        steps = rng.normal(0.0, strength, len(self._free))
        for index, hit, step in zip(self._free, chosen.tolist(), steps.tolist(), strict=True):
            if not hit:
                continue
            gene = self._genes[index]
            if _is_choice(gene):
                if rate is None or rng.random() < strength:
                    child[index] = self._other_choice(gene, child[index], rng)
                continue
            if gene.count is not None and abs(step) < 1 / gene.count:
                step = float(np.copysign(1 / gene.count, step))
            child[index] += step
        return reflect(child)

    @staticmethod
    def _other_choice(gene: Gene, unit: float, rng: np.random.Generator) -> float:
        count = gene.count or 1
        place = (min(int(unit * count), count - 1) + int(rng.integers(1, count))) % count
        return (place + 0.5) / count


def _is_choice(gene: Gene) -> bool:
    return isinstance(gene, Categorical) and not gene.ordered


def reflect(unit: Vector) -> Vector:
    """Fold coordinates back into [0, 1] as if the bounds were mirrors; clipping would pile points up."""
    folded = np.abs(unit) % 2.0
    return np.where(folded > 1.0, 2.0 - folded, folded)
