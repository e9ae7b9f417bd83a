"""Trials, proposals and scores: plain data, each with an exact way to JSON and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeAlias, final

from llmevo.errors import TrialError
from llmevo.space import Params

Direction: TypeAlias = Literal["maximize", "minimize"]

Split: TypeAlias = Literal["search", "holdout"]


class State(StrEnum):
    """Where a trial stands."""

    PENDING = "pending"
    COMPLETE = "complete"
    FAILED = "failed"


@final
@dataclass(frozen=True, slots=True)
class Score:
    """What a trial scored, with what each item scored.

    Args:
        value: The fitness: finite, in the direction that the optimizer was told.
        stderr: One standard error of `value`, or None if it is unknown.
        items: Per-item scores by task, in the run's stored item order.
        rung: Which of the run's cumulative prefixes of the items it rests on, or how much of a training; None
            for all.

    Raises:
        TrialError: `value` is not finite, `stderr` is negative or not finite, or `rung` is negative.
    """

    value: float
    stderr: float | None = None
    items: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rung: int | None = None

    def __post_init__(self) -> None:
        if self.rung is not None and self.rung < 0:
            raise TrialError(f"`rung` must be >= 0, or None for all items, but got {self.rung!r}.")
        if not math.isfinite(self.value):
            raise TrialError(f"`value` must be finite, but got {self.value!r}.")
        if self.stderr is not None and not (math.isfinite(self.stderr) and self.stderr >= 0):
            raise TrialError(f"`stderr` must be finite and >= 0, but got {self.stderr!r}.")

    @classmethod
    def from_items(cls, items: Sequence[float], task: str = "items") -> Score:
        """The mean of per-item scores, with the standard error of the mean.

        Raises:
            TrialError: No item, or a mean that is not finite.
        """
        if len(items) == 0:
            raise TrialError("`items` must not be empty: a mean of nothing is no score.")
        values = [float(item) for item in items]
        mean = math.fsum(values) / len(values)
        return cls(mean, standard_error(values), {task: values})

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` gives an equal Score back."""
        items = {task: list(values) for task, values in self.items.items()}
        return {"value": self.value, "stderr": self.stderr, "items": items, "rung": self.rung}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """The Score that `to_json` wrote; in runs older than rungs, every score rests on all items."""
        return cls(data["value"], data["stderr"], dict(data["items"]), data.get("rung"))

    @property
    def count(self) -> int:
        """How many items it rests on; several terms of one task (`task/metric`) share the task's items."""
        return sum({key.partition("/")[0]: len(values) for key, values in self.items.items()}.values())


def standing(score: Score, direction: Direction) -> tuple[float, float]:
    """What orders scores, as a key of which more is better: first the rung, then the value.

    A few items flatter whoever was lucky on them, so a score on fewer items never stands above one on more.
    """
    sign = 1.0 if direction == "maximize" else -1.0
    return math.inf if score.rung is None else score.rung, sign * score.value


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, `sqrt(s^2 / n)` with the n - 1 variance; None below two values."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def improvement(first: Score, second: Score, direction: Direction) -> tuple[float, float]:
    """By how much `first` is better than `second`, and the standard error of that; 0.0 while it is unknown.

    Scores on the same rung are compared by value. Scores on different rungs are compared item by item on what
    both answered, tasks weighing the same; without items in common nothing is known of their difference.
    """
    if first.rung == second.rung:
        sign = 1.0 if direction == "maximize" else -1.0
        return sign * (first.value - second.value), difference_error(first, second)
    gain = variance = 0.0
    for task in first.items.keys() & second.items.keys():
        gaps = [a - b for a, b in zip(first.items[task], second.items[task], strict=False)]
        if gaps:
            gain += math.fsum(gaps) / len(gaps)
            variance += (standard_error(gaps) or 0.0) ** 2
    return gain, math.sqrt(variance)


def difference_error(first: Score, second: Score) -> float:
    """Standard error of `first.value - second.value`; 0.0 while it is unknown.

    Two trials that answered the same items are compared item by item: what is hard for both cancels. The
    weights of the tasks are not known here, so the items give only the factor by which pairing shrinks the
    error that `stderr` states; for one task, and for tasks of equal weight, this is exact.
    """
    if first.stderr is None or second.stderr is None:
        return 0.0
    independent = math.hypot(first.stderr, second.stderr)
    if not first.items or {task: len(items) for task, items in first.items.items()} != {
        task: len(items) for task, items in second.items.items()
    }:
        return independent
    paired = apart = 0.0
    for task, items in first.items.items():
        others = second.items[task]
        paired += (standard_error([a - b for a, b in zip(items, others, strict=True)]) or 0.0) ** 2
        apart += (standard_error(items) or 0.0) ** 2 + (standard_error(others) or 0.0) ** 2
    return independent * math.sqrt(paired / apart) if apart > 0 else independent


@final
@dataclass(frozen=True, slots=True)
class Proposal:
    """A point that a proposer suggests.

    Args:
        params: A value for every gene, as `Space.validate` or `Space.from_unit` returns them.
        origin: Who made it: the proposer's name, or for instance `llm+mutated` or `fallback:timeout`.
        attrs: The proposer's own notes, as JSON; it finds them again in `Trial.attrs`.
    """

    params: Params
    origin: str
    attrs: dict[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated point; frozen, and replaced when something becomes known of it.

    Args:
        number: 0, 1, 2, ... in the order of `ask`.
        params: A value for every gene; empty for a reference outside the space (a parent, say), which
            proposers do not see.
        origin: Who proposed it.
        state: Pending until it is told.
        attrs: The proposer's JSON notes.
        batch: Number of the first trial that the same `ask` gave out.
        score: Present if and only if the trial is complete.
        error: One line; present if and only if the trial failed.
        metrics: Every metric by task, for people.
        cost: Seconds and bytes by stage.
    """

    number: int
    params: Params
    origin: str
    state: State = State.PENDING
    attrs: dict[str, Any] = field(default_factory=dict)
    batch: int = 0
    score: Score | None = None
    error: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """The score's value, or None while there is none."""
        return None if self.score is None else self.score.value

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` gives an equal Trial back."""
        return {
            "number": self.number,
            "params": dict(self.params),
            "origin": self.origin,
            "state": self.state.value,
            "attrs": self.attrs,
            "batch": self.batch,
            "score": None if self.score is None else self.score.to_json(),
            "error": self.error,
            "metrics": self.metrics,
            "cost": self.cost,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """The Trial that `to_json` wrote."""
        score = None if data["score"] is None else Score.from_json(data["score"])
        return cls(**{**data, "state": State(data["state"]), "score": score})


def trained_share(trial: Trial) -> float | None:
    """The share of its training that a trial has had; None if nothing was trained."""
    train = trial.metrics.get("train")
    return train["tokens"] / train["budget"] if train and "budget" in train else None


def ranked(trials: Iterable[Trial], direction: Direction) -> list[Trial]:
    """The complete trials, best first: by rung, then by value, of equals the earlier one.

    Everything that says which trial is better says it by this order.
    """
    scored = [(standing(trial.score, direction), trial) for trial in trials if trial.score is not None]
    scored.sort(key=lambda pair: (-pair[0][0], -pair[0][1], pair[1].number))
    return [trial for _, trial in scored]


def best(trials: Iterable[Trial], direction: Direction) -> Trial | None:
    """The first of `ranked`, or None."""
    scored = [(standing(trial.score, direction), -trial.number, trial) for trial in trials if trial.score]
    return max(scored, key=lambda entry: entry[:2])[2] if scored else None
