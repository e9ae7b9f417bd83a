"""A population of weights: individuals are trained adapters with their hyperparameters.

A child starts from its parents' adapters, crossed and mutated, and is then trained with hyperparameters that
were crossed and mutated too. The proposer never sees a weight: it writes into `attrs` whose children a trial
is, and reads from the metrics a sketch of what each adapter changes. After ELN (Evolved LoRA networks,
AIRRC/ELN-Llama-1B-base), with elites that stay as they are, products crossed instead of factors, and a
diversity that does not depend on how a product is factored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, final

import numpy as np
import numpy.typing as npt

from llmevo.proposers import Direction
from llmevo.proposers.operators import Operators, size_of
from llmevo.space import Space
from llmevo.strength import Strength, TwoLevel
from llmevo.trial import Proposal, State, Trial, improvement, ranked

ATTRS = "population"
"""Key of a child's notes: `parents` (numbers), `share` of the first, `strength`, `seed`, `generation`."""

SKETCH = "sketch"
"""Key of the metrics under which a trial's sketch is: a mapping to numbers, in order."""

_POPULATION = 6
_TOURNAMENT = 3
_NEAR = 0.1  # of the size of two changes; nearer ones are one individual


@final
class Population:
    """Proposes children of the surviving individuals; see `Survivors` for who survives.

    Each parent wins a tournament of three: the better one wins, and where two differ by no more than one
    standard error of their paired difference, the one that is farther from the others. The child's weights
    are `share` of the better parent's change, at least half, and the rest of the other's. Hyperparameters
    cross and mutate as those of `ga`. One strength is that of both mutations: a standard deviation in the
    unit cube for hyperparameters, and a share of the factors' size for weights.

    Until there are `population` trials and two survivors: the start point, then by turns a point around it
    and a point anywhere, all of them with fresh weights.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        population: How many survive, at least 2; None for 6.
        strength: Mutation strength by history; None for `TwoLevel()`: 0.05 after an improvement, else 0.2.

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
        self.strength: Strength = TwoLevel() if strength is None else strength
        self._survivors = Survivors(direction, population)
        self._operators = Operators(space)

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest `n` children, or first individuals."""
        survivors = self._survivors(trials)
        strength = self.strength(trials, self.direction)
        proposals = []
        for place in range(len(trials), len(trials) + n):
            if place < self._survivors.size or len(survivors) < 2:
                proposals.append(self._first(place, rng))
            else:
                proposals.append(self._child(survivors, strength, rng))
        return proposals

    def _first(self, place: int, rng: np.random.Generator) -> Proposal:
        if place == 0:
            return Proposal(self.space.start(), ATTRS)
        return Proposal(self.space.from_unit(self._operators.first(place, rng)), ATTRS)

    def _child(self, survivors: Sequence[Trial], strength: float, rng: np.random.Generator) -> Proposal:
        novelty = [novel(trial, survivors) for trial in survivors]
        first = self._winner(survivors, novelty, list(range(len(survivors))), rng)
        others = [place for place in range(len(survivors)) if place != first]
        # The better parent first: it gives the larger share, or its training would be diluted.
        places = sorted((first, self._winner(survivors, novelty, others, rng)))
        parents = [survivors[place] for place in places]
        units = [self.space.to_unit(parent.params) for parent in parents]
        child = self._operators.mutated(self._operators.crossed(units[0], units[1], rng), strength, rng)
        notes = {
            "parents": [parent.number for parent in parents],
            "share": float(rng.uniform(0.5, 1.0)),
            "strength": strength,
            "seed": int(rng.integers(1 << 31)),
            "generation": 1 + max(generation(parent) for parent in parents),
        }
        return Proposal(self.space.from_unit(child), ATTRS, {ATTRS: notes})

    def _winner(
        self,
        survivors: Sequence[Trial],
        novelty: Sequence[float],
        places: Sequence[int],
        rng: np.random.Generator,
    ) -> int:
        # Survivors stand best first, so the smallest place is the best of a tournament.
        drawn = sorted({places[int(index)] for index in rng.integers(len(places), size=_TOURNAMENT)})
        champion = drawn[0]
        for place in drawn[1:]:
            if novelty[place] > novelty[champion] and self._tied(survivors[drawn[0]], survivors[place]):
                champion = place
        return champion

    def _tied(self, better: Trial, worse: Trial) -> bool:
        assert better.score is not None
        assert worse.score is not None
        gain, error = improvement(better.score, worse.score, self.direction)
        return gain <= error


@final
class Survivors:
    """Who can still be a parent: a function of the history, batch by batch.

    After each batch the best of the survivors and the batch survive, best first. One whose change is nearly
    that of a better survivor gives its place to the next (clearing: Petrowski, ICEC 1996), unless there is
    nobody else. The best of all always survives, and nobody comes back. Trials that failed, or dropped out
    before the end of their training, do not survive.

    Args:
        direction: `maximize` or `minimize`.
        size: How many survive, at least 2; None for 6.

    Raises:
        ProposerError: `size` is out of its range.
    """

    def __init__(self, direction: Direction, size: int | None = None) -> None:
        self.size = size_of(size, _POPULATION, ATTRS)
        self._direction: Direction = direction
        self._seen: list[Trial] = []  # a shortcut: finished batches, and who survived them
        self._known: list[Trial] = []

    def __call__(self, trials: Sequence[Trial]) -> list[Trial]:
        """The survivors of a history, best first.

        Args:
            trials: By number, pending ones included; those without params are passed over.
        """
        trials = [trial for trial in trials if trial.params]
        if trials[: len(self._seen)] != self._seen:
            self._seen, self._known = [], []
        survivors, settled = self._known, True
        batches = [list(group) for _, group in groupby(trials[len(self._seen) :], key=lambda t: t.batch)]
        for place, batch in enumerate(batches):
            survivors = self._after(survivors, batch)
            # The last batch may be a part of one, and a pending trial may yet be told.
            settled = settled and place < len(batches) - 1
            settled = settled and all(trial.state is not State.PENDING for trial in batch)
            if settled:
                self._seen, self._known = self._seen + batch, survivors
        return survivors

    def _after(self, survivors: Sequence[Trial], batch: Sequence[Trial]) -> list[Trial]:
        whole = [trial for trial in batch if trial.score is not None and trial.score.rung is None]
        chosen: list[Trial] = []
        near: list[Trial] = []
        for trial in ranked([*survivors, *whole], self._direction):
            same = any(distance(trial, other) < _NEAR for other in chosen)
            (near if same else chosen).append(trial)
        return ranked([*chosen, *near][: self.size], self._direction)


def generation(trial: Trial) -> int:
    """How many trainings a trial's weights went through before its own."""
    return int(notes(trial).get("generation", 0))


def notes(trial: Trial) -> Mapping[str, Any]:
    """What this proposer wrote of a trial; empty for one with fresh weights."""
    found: Mapping[str, Any] = trial.attrs.get(ATTRS, {})
    return found


def distance(first: Trial, second: Trial) -> float:
    """How far two adapters' changes are apart, over their root mean square size, as their sketches say.

    0 for equal ones, about 1.4 for unrelated ones, at most 2; infinite where one has no sketch.
    """
    a, b = _sketch(first), _sketch(second)
    if a is None or b is None or a.shape != b.shape:
        return math.inf
    size = math.sqrt((float(a @ a) + float(b @ b)) / 2)
    return float(np.linalg.norm(a - b)) / size if size > 0 else 0.0


def novel(trial: Trial, others: Sequence[Trial]) -> float:
    """The mean distance to the others whose sketches are known; 0 where there is none."""
    known = [distance(trial, other) for other in others if other.number != trial.number]
    finite = [value for value in known if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else 0.0


def _sketch(trial: Trial) -> npt.NDArray[np.float64] | None:
    known = trial.metrics.get(SKETCH)
    return np.array(list(known.values())) if known else None
