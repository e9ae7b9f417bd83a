"""Crossover and mutation in the unit cube."""

from __future__ import annotations

from typing import final

import numpy as np

from llmevo.errors import ProposerError
from llmevo.space import Categorical, Gene, Space, Vector

_SPREAD = 0.2  # of a first generation around the start point, in the unit cube
_BLEND = 0.5  # BLX-0.5: neither narrows nor widens a population on average


@final
class Operators:
    """Crossover and mutation of the points of a space.

    Numbers cross by BLX-0.5 (Eshelman and Schaffer, FOGA 1993), choices uniformly. A number mutates by a
    normal step, reflected at the bounds and of at least one value on a grid, a choice to another one.

    Args:
        space: What may vary.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        self._genes = list(space.genes.values())
        self._free = [index for index, gene in enumerate(self._genes) if gene.count != 1]

    def first(self, place: int, rng: np.random.Generator) -> Vector:
        """A point of a first generation: at odd places one around the start point, at even ones any."""
        if place % 2:
            return self.mutated(self._space.start_unit(), _SPREAD, rng, rate=1.0)
        return rng.random(len(self._genes))

    def crossed(self, first: Vector, second: Vector, rng: np.random.Generator) -> Vector:
        """A child of two points, coordinates of shape (len(space),) in [0, 1]."""
        blend = rng.uniform(-_BLEND, 1 + _BLEND, len(first))
        either = rng.random(len(first)) < 0.5
        child = reflect(first + blend * (second - first))
        for index, gene in enumerate(self._genes):
            if _is_choice(gene):
                child[index] = first[index] if either[index] else second[index]
        return child

    def mutated(
        self, unit: Vector, strength: float, rng: np.random.Generator, rate: float | None = None
    ) -> Vector:
        """A point near another one.

        Args:
            unit: Its coordinates.
            strength: Standard deviation of a number's step in the unit cube.
            rng: Source of chance.
            rate: How likely each gene changes, numbers always by a step and choices with probability
                `strength`. None for 1/d, at least one gene, and every choice that is hit.
        """
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


def size_of(population: int | None, usual: int, proposer: str) -> int:
    """How many parents there are: `population`, or as many as usual for None.

    Raises:
        ProposerError: There are fewer than two.
    """
    if population is not None and population < 2:
        raise ProposerError(f"`population >= 2` must hold for {proposer}, but got {population!r}.")
    return usual if population is None else population


def _is_choice(gene: Gene) -> bool:
    return isinstance(gene, Categorical) and not gene.ordered


def reflect(unit: Vector) -> Vector:
    """Fold coordinates back into [0, 1] as if the bounds were mirrors; clipping would pile points up."""
    folded = np.abs(unit) % 2.0
    return np.where(folded > 1.0, 2.0 - folded, folded)
