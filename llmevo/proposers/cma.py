"""CMA-ES on the unit cube, in the three forms of the `cmaes` library.

Its state is rebuilt from the history: every proposal keeps its raw sample in `attrs["cma"]`, generations are
consecutive runs of such trials, and telling a generation uses no random numbers. So replaying the
generations gives the same distribution bit for bit, also after a round trip through JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from cmaes import CMA as FullCMA
from cmaes import CatCMAwM, SepCMA

from llmevo.errors import ProposerError
from llmevo.proposers import Direction
from llmevo.space import Categorical, Gene, Int, Space, Vector
from llmevo.trial import Proposal, State, Trial, ranked

_FULL_COVARIANCE = 100  # genes; above, the diagonal alone is adapted
_GRID = 256  # values; a finer integer is searched as a continuum and rounded
_WIDEST = 0.5  # of the cube's side: a guest far outside a narrow distribution can blow it up
_COLLAPSED = 1e-14  # a step below this changes no coordinate


@dataclass(frozen=True, slots=True)
class _Axes:
    """Which coordinates of the unit cube vary, by kind; those of one-value genes do not."""

    real: list[int]
    grid: list[int]
    choice: list[int]
    grids: list[list[float]]
    counts: list[int]

    @classmethod
    def of(cls, space: Space) -> _Axes:
        axes = cls([], [], [], [], [])
        for index, gene in enumerate(space.genes.values()):
            count = gene.count
            if count == 1:
                continue
            if count is None or (count > _GRID and not isinstance(gene, Categorical)):
                axes.real.append(index)
            elif (isinstance(gene, Categorical) and not gene.ordered) or count == 2:
                # Two values are categorical for CatCMAwM, as its documentation asks.
                axes.choice.append(index)
                axes.counts.append(count)
            else:
                axes.grid.append(index)
                axes.grids.append(_units(gene))
        return axes

    @property
    def numeric(self) -> list[int]:
        return self.real + self.grid

    @property
    def mixed(self) -> bool:
        return bool(self.grid or self.choice)

    def __len__(self) -> int:
        return len(self.real) + len(self.grid) + len(self.choice)


def _units(gene: Gene) -> list[float]:
    """The coordinates of every value of a discrete gene."""
    count = gene.count or 0
    if isinstance(gene, Int) and gene.log:
        return [gene.to_unit(gene.low + index) for index in range(count)]
    return [(index + 0.5) / count for index in range(count)]


@final
class CMA:
    """CMA-ES with full covariance to 100 genes, diagonal above, and with margins for mixed spaces.

    Continuous spaces: `cmaes.CMA` (Hansen, https://arxiv.org/abs/1604.00772) or `SepCMA` (Ros and Hansen,
    PPSN 2008). Spaces with an Int, a step or a Categorical: `CatCMAwM`
    (https://arxiv.org/abs/2504.07884), integers and ordered choices on a grid. The numeric genes start at
    their `init`; choices start uniform, since the first one may stand there only for want of an `init`.

    A generation waits for all its trials: `propose` returns fewer points, or none, at its end. Only ranks
    are told. A failed trial ranks behind all others, and a generation in which every trial failed says
    nothing and is skipped. Trials with `attrs["guest"]` (see `Hybrid`) count into the generation in which
    they stand; other foreign trials are not used. A distribution that has shrunk to a point, has
    grown beyond the cube, or was broken by rounding starts anew at the best point of its last generation.

    Args:
        space: What may vary.
        direction: `maximize` or `minimize`.
        population: Trials per generation, at least 2; None for 4 + floor(3 ln d).
        sigma0: First standard deviation, in the unit cube; in (0, 1].

    Raises:
        ProposerError: An argument is out of its range.
    """

    def __init__(
        self,
        space: Space,
        direction: Direction,
        *,
        population: int | None = None,
        sigma0: float = 1 / 6,
    ) -> None:
        if population is not None and population < 2:
            raise ProposerError(f"`population >= 2` must hold for cma, but got {population!r}.")
        if not 0 < sigma0 <= 1:
            raise ProposerError(f"`0 < sigma0 <= 1` must hold for cma, but got {sigma0!r}.")
        self.space = space
        self.direction: Direction = direction
        self.sigma0 = sigma0
        self._population = population
        self._axes = _Axes.of(space)
        self._start = space.start_unit()
        self._seen: list[Trial] = []  # the history up to the last generation that was told
        self._told = 0
        self._search: Any = self._begin(self._start) if len(self._axes) else None

    def propose(self, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> list[Proposal]:
        """Suggest up to `n` points of the current generation; fewer at its end, none while it is pending."""
        if self._search is None:
            return [] if trials else [Proposal(self.space.start(), "cma")]
        current = self._replay(trials)
        size = self._search.population_size
        if len(current) >= size:
            return []
        self._search.reseed_rng(int(rng.integers(2**32)))
        return [self._sample() for _ in range(min(n, size - len(current)))]

    def _replay(self, trials: Sequence[Trial]) -> list[Trial]:
        """Tell what is finished; return the members of the generation that is not."""
        # Comparing lists asks first whether the objects are the same, so this costs next to nothing while
        # the history goes on, and notices every other history.
        if list(trials[: len(self._seen)]) != self._seen:
            self._seen, self._told = [], 0
            self._search = self._begin(self._start)
        members: list[Trial] = []
        end = len(self._seen)
        for place in range(end, len(trials)):
            trial = trials[place]
            if not (trial.attrs.get("guest") or "cma" in trial.attrs):
                continue
            members.append(trial)
            if len(members) == self._search.population_size:
                if any(member.state is State.PENDING for member in members):
                    continue
                self._tell(members)
                members, end = [], place + 1
        self._seen += trials[len(self._seen) : end]
        return members

    def _begin(self, unit: Vector) -> Any:
        axes = self._axes
        mean = unit[axes.numeric]
        with np.errstate(all="ignore"):  # a population of two divides by a weight of zero, and copes
            if axes.mixed:
                return CatCMAwM(
                    x_space=[[0.0, 1.0]] * len(axes.real) or None,
                    z_space=axes.grids or None,
                    c_space=axes.counts or None,
                    population_size=self._population,
                    mean=mean,
                    sigma=self.sigma0,
                    cov=np.eye(len(mean)),
                    seed=0,
                )
            method = FullCMA if len(mean) <= _FULL_COVARIANCE else SepCMA
            return method(
                mean=mean,
                sigma=self.sigma0,
                bounds=np.array([[0.0, 1.0]] * len(mean)),
                n_max_resampling=1,  # then clip: more costs seconds in many dimensions and gains nothing
                seed=0,
                population_size=self._population,
            )

    def _sample(self) -> Proposal:
        axes = self._axes
        unit = self._start.copy()
        note: dict[str, Any] = {"generation": self._told}
        with np.errstate(all="ignore"):
            drawn = self._search.ask()
        if axes.mixed:
            if axes.real:
                unit[axes.real] = drawn.x
            if axes.grid:
                unit[axes.grid] = drawn.z
            if axes.numeric:
                note["raw"] = drawn._v_raw.tolist()
            if axes.choice:
                chosen = drawn.c.argmax(axis=1)
                unit[axes.choice] = (chosen + 0.5) / np.array(axes.counts)
                note["choice"] = chosen.tolist()
        else:
            unit[axes.real] = drawn
            note["raw"] = drawn.tolist()
        return Proposal(self.space.from_unit(unit), "cma", {"cma": note})

    def _tell(self, members: Sequence[Trial]) -> None:
        self._told += 1
        best_first = ranked(members, self.direction)
        if not best_first:
            return
        in_order = best_first + [member for member in members if member.score is None]
        # Ranks, not values: CMA-ES looks at nothing else, and CatCMAwM scales its penalty for leaving the
        # cube by the spread of the values, which is not defined when half of them are equal.
        told = [(self._solution(trial), float(rank)) for rank, trial in enumerate(in_order)]
        if not self._update(told):
            self._search = self._begin(self.space.to_unit(best_first[0].params))

    def _update(self, told: list[tuple[Any, float]]) -> bool:
        """Tell one generation; whether a distribution that can be sampled from came out."""
        search, numeric = self._search, bool(self._axes.numeric)
        try:
            with np.errstate(all="ignore"):
                search.tell(told)
        except np.linalg.LinAlgError:
            return False
        sound = not self._axes.choice or bool(np.isfinite(search._q).all())
        if numeric:
            variances = search._C if search._C.ndim == 1 else search._C.diagonal()
            widest = search._sigma * float(np.sqrt(np.abs(variances).max()))
            finite = np.isfinite(search._mean).all() and np.isfinite(search._C).all()
            kept = search._sigma > _COLLAPSED and widest < max(_WIDEST, 2 * self.sigma0)
            sound = sound and bool(finite and kept)
        return sound

    def _solution(self, trial: Trial) -> Any:
        axes = self._axes
        raw, onehot = self._coordinates(trial)
        return CatCMAwM.Solution(c=onehot, _v_raw=raw) if axes.mixed else raw

    def _coordinates(self, trial: Trial) -> tuple[Vector | None, Vector | None]:
        """The numeric coordinates and the one-hot rows that the distribution is told for a trial."""
        axes = self._axes
        note = trial.attrs.get("cma")
        if note is not None and not trial.attrs.get("guest"):
            raw = np.array(note.get("raw", []), dtype=float)
            chosen = np.array(note.get("choice", []), dtype=int)
            active = np.full(len(self.space), True)
        else:
            unit = self.space.to_unit(trial.params)
            raw = unit[axes.numeric]
            chosen = (unit[axes.choice] * axes.counts).astype(int)
            active = np.array([self.space.is_active(name, trial.params) for name in self.space])
        # A foreign point says nothing of its inactive genes: the distribution's own mean moves nothing.
        if axes.numeric:
            raw = np.where(active[axes.numeric], raw, self._search._mean)
        if not axes.choice:
            return raw, None
        onehot = np.zeros((len(axes.counts), max(axes.counts)))
        onehot[range(len(axes.counts)), chosen] = 1.0
        onehot = np.where(active[axes.choice][:, None], onehot, self._search._q)
        return (raw if axes.numeric else None), onehot
