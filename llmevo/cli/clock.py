"""How long a sitting has taken, and how long it may still take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from llmevo.runner.observer import RunInfo
from llmevo.trial import State, Trial


def trial_seconds(trial: Trial) -> float:
    """Wall time of a trial, over all its stages."""
    return sum(value for value in trial.cost.values() if isinstance(value, float))


def done(trials: Sequence[Trial]) -> int:
    """How many trials are finished."""
    return sum(trial.state is not State.PENDING for trial in trials)


@final
@dataclass(slots=True)
class _Pace:
    """The mean of some numbers."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """One more."""
        self.join(_Pace(value, 1))

    def join(self, other: _Pace) -> None:
        """Others too."""
        self.total += other.total
        self.count += other.count

    @property
    def mean(self) -> float:
        """0 where there is none."""
        return self.total / self.count if self.count else 0.0


@final
class Clock:
    """Counts what is finished, and tells from its pace when trials, fresh seeds and held-out items will be.

    The pace is that of this sitting's trials, without the time that models took to load; of the proposers'
    batches alone as soon as one is finished, since references answer all items. A trial that was not trained
    says nothing of those that will be.

    Args:
        info: What is known when the run starts; None before it does.
    """

    def __init__(self, info: RunInfo | None = None) -> None:
        self._start = self._ticked = time.monotonic()
        self._all, self._whole, self._batch = _Pace(), _Pace(), _Pace()
        self._last = -1  # the batch of the latest trial, whose pace is `_batch`
        self._training, self._scoring = _Pace(), _Pace()  # of trials that went to their end
        self._tokens = _Pace()  # of a proposer's trials, earlier sittings' too
        self._reference = 0  # tokens of the default, until a proposer's trial says more
        self._kinds: set[str] = set()  # of references, the best of each of which is held out
        self._info = info
        self.budget = 0 if info is None else info.genome.search.trials
        self.done = 0
        for trial in () if info is None else info.trials:
            self._count(trial)

    def _count(self, trial: Trial) -> None:
        if self._info is None or trial.state is State.PENDING:
            return
        self.done += 1
        if trial.number >= self._info.references:
            self._tokens.add(trial.cost.get("tokens", 0))
        elif trial.state is State.COMPLETE:
            self._kinds.add(trial.origin.split(":")[0])
            self._reference = trial.cost.get("tokens", 0) or self._reference

    def tick(self, trial: Trial) -> None:
        """One more trial is finished."""
        self._count(trial)
        self._ticked = time.monotonic()
        if self._info is None:
            return
        trains, tokens = self._info.genome.train is not None, trial.cost.get("tokens", 0)
        if trial.score is not None and trial.score.rung is None:
            stages = [trial.cost.get(stage, 0.0) for stage in ("merge", "evaluate")]
            self._scoring.add(stages[0] + stages[1] * self._held_out)
            if tokens:
                self._training.add(trial.cost.get("train", 0.0) + sum(stages))
        if trains and not tokens and trial.number < self._info.references:
            return
        seconds = trial_seconds(trial)
        self._all.add(seconds)
        if trial.batch != self._last:
            self._whole.join(self._batch)
            self._last, self._batch = trial.batch, _Pace()
        if trial.number >= self._info.references:
            self._batch.add(seconds)

    @property
    def elapsed(self) -> float:
        """Seconds of this sitting."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float | None:
        """Seconds that the rest of the run will take; None before the first trial that says how long."""
        if self._info is None or not self._all.count:
            return None
        counted = self._whole if self._whole.count else self._all
        searching, workers = counted.mean * self._trials(), self._info.genome.run.workers
        # After the last trial nothing more is told, so the time itself counts down what is left.
        gone = 0.0 if searching else time.monotonic() - self._ticked
        return max((searching + self._finals()) / workers - gone, 0.0)

    def _trials(self) -> float:
        """How many trials are to come: of the budget in trials or in tokens, whichever ends first."""
        assert self._info is not None
        trials, tokens = max(self.budget - self.done, 0), self._info.genome.search.tokens
        references = max(self._info.references - self.done, 0)
        if tokens is None:
            return trials
        pace = self._tokens.mean or self._reference
        return min(trials, references + max(tokens - self._tokens.total, 0) / pace) if pace else trials

    @property
    def _held_out(self) -> float:
        """Held-out items for each item of the search; with data of one's own, as if its parts were alike."""
        assert self._info is not None
        share = self._info.genome.evaluate.holdout
        return share / (1 - share)

    def _finals(self) -> float:
        """Seconds for what follows the search: trainings with fresh seeds, and the held-out items."""
        assert self._info is not None
        genome = self._info.genome
        if genome.evaluate.holdout == 0:
            return 0.0
        finalists = min(genome.evaluate.finalists, max(self.budget - self._info.references, 0))
        seconds = (len(self._kinds) + finalists) * self._scoring.mean
        if genome.train is not None:
            again = genome.reruns * (finalists + 1)
            seconds += again * (self._training.mean + self._scoring.mean)
        return seconds
