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

from llmevo.proposers import Direction
from llmevo.space import Categorical, Params, Space, Vector
from llmevo.trial import State, Trial, standing

_EVIDENCE = 2  # far points that must have been evaluated
_AS_FAR = 0.8  # of the new point's distance
_RECENT = 10  # trials that make the ordinary one


@final
class Screen:
    """Judges points by a history: a pure function of it.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        trials: The history; pending trials do not count.
    """

    def __init__(self, space: Space, direction: Direction, trials: Sequence[Trial]) -> None:
        self._space = space
        finished = [trial for trial in trials if trial.state is not State.PENDING]
        values = _merits(finished, direction)
        own = [
            value
            for trial, value in zip(finished, values, strict=True)
            if not trial.attrs.get("guest") and value > -math.inf
        ]
        self._ready = len(own) >= _EVIDENCE
        if not self._ready:
            return
        self._ordinary = float(np.median(own[-_RECENT:]))
        self._values = np.array(values)
        self._best = self._place(finished[int(np.argmax(self._values))].params)
        places = np.array([self._place(trial.params) for trial in finished])
        self._distances = np.linalg.norm(places - self._best, axis=1)

    def hopeless(self, params: Params) -> dict[str, float] | None:
        """Why `params` is not worth an evaluation, as numbers for `attrs`; None if it may be.

        Returns:
            `distance` to the best point, `far`: how many evaluated points lie about as far, `best_rank`: of
            all finished trials, the place of the best one of them.
        """
        if not self._ready:
            return None
        distance = float(np.linalg.norm(self._place(params) - self._best))
        far = self._distances >= _AS_FAR * distance
        if distance == 0 or int(far.sum()) < _EVIDENCE:
            return None
        best = float(self._values[far].max())
        if best >= self._ordinary:
            return None
        rank = 1 + int((self._values > best).sum())
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


def _merits(trials: Sequence[Trial], direction: Direction) -> list[float]:
    """Numbers that order trials as `standing` does: signed values, those of a lower rung moved below."""
    keys = [None if trial.score is None else standing(trial.score, direction) for trial in trials]
    moved = {}
    floor = math.inf
    for rung in sorted({key[0] for key in keys if key is not None}, reverse=True):
        values = [key[1] for key in keys if key is not None and key[0] == rung]
        down = 0.0 if floor == math.inf else max(values) - floor + 1.0
        moved[rung] = down
        floor = min(values) - down
    return [-math.inf if key is None else key[1] - moved[key[0]] for key in keys]
