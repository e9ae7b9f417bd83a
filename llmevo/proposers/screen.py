"""A cheap test that turns a hopeless point away before it costs an evaluation.

A point is hopeless if the history holds evidence against its distance: of the points at least about as far
from the best one, several were evaluated, and none was as good as the ordinary recent trial. So a first far
jump is always tried, a point near the best always passes, and a proposer whose jumps never land is stopped
after a few. In many dimensions almost every random point is far, so this is where the test bites; where far
points do well, as on functions with many valleys, it lets them pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import numpy as np
import numpy.typing as npt

from llmevo.proposers import Direction
from llmevo.proposers.settled import Settled
from llmevo.space import Categorical, Params, Space, Vector
from llmevo.trial import State, Trial, standing

_EVIDENCE = 2  # far points that must have been evaluated
_AS_FAR = 0.8  # of the new point's distance
_RECENT = 10  # trials that make the ordinary one


@final
class _Rows:
    """A matrix that grows by rows, in place most of the time."""

    def __init__(self) -> None:
        self._data: npt.NDArray[np.float64] | None = None
        self.count = 0

    def add(self, row: Sequence[float] | Vector) -> None:
        if self._data is None:
            self._data = np.empty((16, len(row)))
        elif self.count == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self.count] = row
        self.count += 1

    @property
    def rows(self) -> npt.NDArray[np.float64]:
        """Shape (count, width)."""
        return np.empty((0, 0)) if self._data is None else self._data[: self.count]


@final
class Screen:
    """Judges points by a history: a function of it. Trials that are finished are placed once.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        trials: The first history; pending trials do not count.
    """

    def __init__(self, space: Space, direction: Direction, trials: Sequence[Trial] = ()) -> None:
        self._space = space
        self._direction: Direction = direction
        self._settled = Settled()
        self._forget()
        self.look(trials)

    def _forget(self) -> None:
        self._kept = 0  # rows of settled trials; after them stand those of other finished ones
        self._places, self._keys, self._distances = _Rows(), _Rows(), _Rows()
        self._rungs: set[float] = set()
        self._best: Vector = np.empty(0)

    def look(self, trials: Sequence[Trial]) -> None:
        """Judge by this history from now on."""
        goes_on, new, rest = self._settled.split(trials)
        if not goes_on:
            self._forget()
        self._places.count = self._keys.count = self._kept
        self._distances.count = min(self._distances.count, self._kept)
        for trial in new:
            self._add(trial)
        self._kept = self._places.count
        for trial in rest:
            if trial.state is not State.PENDING:
                self._add(trial)
        self._merits = self._ordered()
        self._ready = False
        if not self._keys.count:
            return
        own = np.flatnonzero((self._keys.rows[:, 2] == 0) & (self._merits > -math.inf))
        self._ready = len(own) >= _EVIDENCE
        if self._ready:
            self._ordinary = float(np.median(self._merits[own[-_RECENT:]]))
            self._measure(self._places.rows[int(np.argmax(self._merits))])

    def _add(self, trial: Trial) -> None:
        last = (-math.inf, -math.inf)
        rung, value = last if trial.score is None else standing(trial.score, self._direction)
        self._keys.add([rung, value, float(bool(trial.attrs.get("guest")))])
        self._places.add(self._place(trial.params))
        if trial.score is not None:
            self._rungs.add(rung)

    def _measure(self, best: Vector) -> None:
        """The distances of all rows to `best`; those that are known already are kept."""
        if not np.array_equal(best, self._best):
            self._best, self._distances = best.copy(), _Rows()
        for distance in np.linalg.norm(self._places.rows[self._distances.count :] - self._best, axis=1):
            self._distances.add([distance])

    def _ordered(self) -> Vector:
        """Numbers that order the rows as `standing` does: signed values, a lower rung's moved below."""
        if not self._keys.count:
            return np.empty(0)
        rungs, values, _ = self._keys.rows.T
        merits = np.full(len(values), -math.inf)
        floor = math.inf
        for rung in sorted(self._rungs, reverse=True):
            here = rungs == rung
            if not here.any():  # it was only that of a row which did not stay
                continue
            down = 0.0 if floor == math.inf else float(values[here].max()) - floor + 1.0
            merits[here] = values[here] - down
            floor = float(values[here].min()) - down
        return merits

    def hopeless(self, params: Params) -> dict[str, float] | None:
        """Why `params` is not worth an evaluation, as numbers for `attrs`; None if it may be.

        Returns:
            `distance` to the best point, `far`: how many evaluated points lie about as far, `best_rank`: of
            all finished trials, the place of the best one of them.
        """
        if not self._ready:
            return None
        distance = float(np.linalg.norm(self._place(params) - self._best))
        far = self._distances.rows[:, 0] >= _AS_FAR * distance
        if distance == 0 or int(far.sum()) < _EVIDENCE:
            return None
        best = float(self._merits[far].max())
        if best >= self._ordinary:
            return None
        rank = 1 + int((self._merits > best).sum())
        return {"distance": round(distance, 6), "far": int(far.sum()), "best_rank": rank}

    def _place(self, params: Params) -> Vector:
        """Coordinates in which distances count: numbers by the unit cube, choices equal or not."""
        unit = self._space.to_unit(params)
        parts: list[float] = []
        for coordinate, (name, gene) in zip(unit.tolist(), self._space.genes.items(), strict=True):
            if isinstance(gene, Categorical) and not gene.ordered:
                active = self._space.is_active(name, params)
                hit = gene.index(params[name]) if active else -1
                parts += [0.5 * (index == hit) for index in range(len(gene.choices))]
            else:
                parts.append(coordinate)
        return np.array(parts)
