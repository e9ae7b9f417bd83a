"""Mutation strength: how far a new point may lie from its parents, as a standard deviation in the unit cube.

A rule is a pure function of the history, so that a resumed run mutates as the uninterrupted one would. The
trials of one `ask` are one step. An improvement counts only above the noise, and only then is the bar raised:
otherwise one lucky evaluation would set it for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, final

from llmevo.errors import ProposerError
from llmevo.trial import Direction, Score, State, Trial, difference_error


class Strength(Protocol):
    """A rule for the mutation strength."""

    def __call__(self, trials: Sequence[Trial], direction: Direction) -> float:
        """The strength for the next proposals.

        Args:
            trials: The history in order of number; pending trials do not count yet.
            direction: `maximize` or `minimize`.
        """
        ...


def success_rates(trials: Sequence[Trial], direction: Direction, z: float = 1.0) -> Iterator[float]:
    """For each batch after the first scored one, the share of its trials that beat the incumbent.

    A trial beats it by more than `z` standard errors of the difference. A failed trial does not; a batch
    without a finished trial is left out. The best of those that beat it is the next incumbent.
    """
    sign = 1.0 if direction == "maximize" else -1.0
    incumbent: Score | None = None
    for _, group in groupby(trials, key=lambda trial: trial.batch):
        finished = [trial for trial in group if trial.state is not State.PENDING]
        scores = [trial.score for trial in finished if trial.score is not None]
        if incumbent is None:
            incumbent = max(scores, key=lambda score: sign * score.value, default=None)
            continue
        if not finished:
            continue
        better = [score for score in scores if _beats(score, incumbent, sign, z)]
        yield len(better) / len(finished)
        incumbent = max(better, key=lambda score: sign * score.value, default=incumbent)


def _beats(score: Score, incumbent: Score, sign: float, z: float) -> bool:
    gain = sign * (score.value - incumbent.value)
    return gain > 0 and gain > z * difference_error(score, incumbent)


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

    def __post_init__(self) -> None:
        _check("TwoLevel", improve=self.improve, stagnate=self.stagnate)

    def __call__(self, trials: Sequence[Trial], direction: Direction) -> float:
        """`improve` if the last finished batch improved, else `stagnate`."""
        *_, last = 0.0, *success_rates(trials, direction, self.z)
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

    def __post_init__(self) -> None:
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
        for rate in success_rates(trials, direction, self.z):
            strength = min(max(strength * self.factor ** ((rate - 0.2) / 0.8), self.low), self.high)
        return strength
