"""Mutation strength: how far a new point may lie from its parents, as a standard deviation in the unit cube.

A rule is a pure function of the history, so that a resumed run mutates as the uninterrupted one would. The
trials of one `ask` are one step. An improvement counts only above the noise, and only then is the bar raised:
otherwise one lucky evaluation would set it for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol, final

from llmevo.errors import ProposerError
from llmevo.trial import Direction, Score, State, Trial, improvement, standing


class Strength(Protocol):
    """A rule for the mutation strength."""

    def __call__(self, trials: Sequence[Trial], direction: Direction) -> float:
        """The strength for the next proposals.

        Args:
            trials: The history in order of number; pending trials do not count yet.
            direction: `maximize` or `minimize`.
        """
        ...


@final
class Successes:
    """For each batch after the first scored one, the share of its trials that beat the incumbent.

    A trial beats it by more than `z` standard errors of the difference. A failed trial does not; a batch
    without a finished trial is left out. The best of those that beat it is the next incumbent. A trial that
    dropped out on fewer items counts by the items that it answered, but is never the incumbent of one that
    answered more: it beats it on what both answered, and how it would have gone on is unknown.

    The rates are a function of the history alone. What is kept from the last call is a shortcut: batches that
    are finished and stand at the same place with the same trials are not compared again.

    Args:
        z: Standard errors that an improvement must exceed.
    """

    def __init__(self, z: float = 1.0) -> None:
        self._z = z
        self._forget("maximize")

    def _forget(self, direction: Direction) -> None:
        self._direction = direction
        self._seen: list[Trial] = []
        self._rates: list[float] = []
        self._incumbent: Score | None = None

    def rates(self, trials: Sequence[Trial], direction: Direction) -> list[float]:
        """The shares, in [0, 1], oldest first."""
        # Comparing lists asks first whether the objects are the same: next to nothing for a history that
        # goes on, and every other history is noticed.
        if direction != self._direction or list(trials[: len(self._seen)]) != self._seen:
            self._forget(direction)
        rates, incumbent = list(self._rates), self._incumbent
        batches = [
            list(group) for _, group in groupby(trials[len(self._seen) :], key=lambda trial: trial.batch)
        ]
        settled = True
        for place, batch in enumerate(batches):
            rate, incumbent = self._step(batch, incumbent)
            rates += [] if rate is None else [rate]
            # The last batch may be a part of one, and a pending trial may yet be told.
            settled = settled and place < len(batches) - 1
            settled = settled and all(trial.state is not State.PENDING for trial in batch)
            if settled:
                self._seen += batch
                self._rates, self._incumbent = list(rates), incumbent
        return rates

    def _step(self, batch: Sequence[Trial], incumbent: Score | None) -> tuple[float | None, Score | None]:
        """The rate of one batch, or None, and the incumbent after it."""
        finished = [trial for trial in batch if trial.state is not State.PENDING]
        scores = [trial.score for trial in finished if trial.score is not None]
        if incumbent is None:
            return None, _highest(scores, None, self._direction)
        if not finished:
            return None, incumbent
        better = [score for score in scores if _beats(score, incumbent, self._direction, self._z)]
        return len(better) / len(finished), _highest(better, incumbent, self._direction)


def improvements(trials: Sequence[Trial], direction: Direction) -> list[bool]:
    """For each trial, whether it beat the incumbent of its batch's beginning by more than the noise."""
    won: list[bool] = []
    incumbent: Score | None = None
    for _, group in groupby(trials, key=lambda trial: trial.batch):
        better, incumbent = improved(list(group), incumbent, direction)
        won += better
    return won


def improved(
    batch: Sequence[Trial], incumbent: Score | None, direction: Direction
) -> tuple[list[bool], Score | None]:
    """For each trial of one batch, whether it beat the incumbent; and the incumbent after the batch."""
    scores = [trial.score for trial in batch]
    if incumbent is None:
        found = [score for score in scores if score is not None]
        return [False] * len(scores), _highest(found, None, direction)
    better = [score is not None and _beats(score, incumbent, direction, 1.0) for score in scores]
    found = [score for score, hit in zip(scores, better, strict=True) if hit and score is not None]
    return better, _highest(found, incumbent, direction)


def _beats(score: Score, incumbent: Score, direction: Direction, z: float) -> bool:
    gain, error = improvement(score, incumbent, direction)
    return gain > 0 and gain > z * error


def _highest(scores: Sequence[Score], incumbent: Score | None, direction: Direction) -> Score | None:
    """The next incumbent: the best of `scores`, unless the present one rests on more items."""
    found = max(scores, key=lambda score: standing(score, direction), default=None)
    if found is None or incumbent is None:
        return found or incumbent
    return found if standing(found, direction) > standing(incumbent, direction) else incumbent


def _check(rule: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ProposerError(f"`0 < {name} <= 1` must hold for {rule}, but got {value!r}.")


@final
@dataclass(frozen=True, slots=True)
class TwoLevel:
    """One strength after an improvement and another otherwise: the rule of LLM-Evo-Merge.

    There they are `--sigma-low` and `--sigma-high`. Before anything can have improved, `stagnate` holds.

    Args:
        improve: Strength after a batch that improved; in (0, 1].
        stagnate: Strength after a batch that did not; in (0, 1].
        z: Standard errors that an improvement must exceed.

    Raises:
        ProposerError: An argument is out of its range.
    """

    improve: float = 0.05
    stagnate: float = 0.2
    z: float = 1.0
    _successes: Successes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_successes", Successes(self.z))
        _check("TwoLevel", improve=self.improve, stagnate=self.stagnate)

    def __call__(self, trials: Sequence[Trial], direction: Direction) -> float:
        """`improve` if the last finished batch improved, else `stagnate`."""
        *_, last = 0.0, *self._successes.rates(trials, direction)
        return self.improve if last > 0 else self.stagnate


@final
@dataclass(frozen=True, slots=True)
class OneFifth:
    """The 1/5 success rule: wider while more than a fifth of the trials improve, narrower otherwise.

    Each batch multiplies the strength by `factor ** ((rate - 1/5) / (1 - 1/5))`, kept within [low, high].
    With one trial a batch that is `factor` on success and `factor ** (-1/4)` otherwise. Rule: Rechenberg,
    Evolutionsstrategie, 1973; form for batches: Kern et al., Natural Computing 3, 2004,
    https://doi.org/10.1023/B:NACO.0000023416.59689.4e.

    Args:
        start: Strength before the first step.
        factor: Growth of a step in which every trial improves; above 1.
        low: Smallest strength.
        high: Largest strength.
        z: Standard errors that an improvement must exceed.

    Raises:
        ProposerError: An argument is out of its range.
    """

    start: float = 0.2
    factor: float = 1.5
    low: float = 0.01
    high: float = 0.3
    z: float = 1.0
    _successes: Successes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_successes", Successes(self.z))
        _check("OneFifth", start=self.start, low=self.low, high=self.high)
        if not self.low <= self.start <= self.high:
            raise ProposerError(
                f"`low <= start <= high` must hold for OneFifth, but got low={self.low}, "
                f"start={self.start}, high={self.high}."
            )
        if not self.factor > 1:
            raise ProposerError(f"`factor > 1` must hold for OneFifth, but got {self.factor!r}.")

    def __call__(self, trials: Sequence[Trial], direction: Direction) -> float:
        """The strength after all finished batches."""
        strength = self.start
        for rate in self._successes.rates(trials, direction):
            strength = min(max(strength * self.factor ** ((rate - 0.2) / 0.8), self.low), self.high)
        return strength
