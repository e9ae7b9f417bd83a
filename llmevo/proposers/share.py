"""How much of the budget a guest gets: less while it wins less than the base.

A function of the history. What was in force when a trial was proposed stands in `attrs["share"]`, so that the
schedule can be exact although the share changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import final

import numpy as np

from llmevo.proposers import Direction
from llmevo.proposers.settled import Settled
from llmevo.strength import improved
from llmevo.trial import Score, State, Trial, standing

FLOOR = 0.1
_WINDOW = 10  # trials of the guest
_STEP = 0.7
_CALLS = 3
_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


def turns(trial: Trial) -> list[str]:
    """Origins of the guest's points that were turned away in favour of this trial."""
    return [str(item["origin"]) for item in trial.attrs.get("turned_away", ())]


@final
class Turns:
    """Whose turn it is.

    Of the trials proposed after the warm-up, the guest has the floor of the sum of their shares: Bresenham's
    line, whose slope is the share in force. A point that was turned away was a turn, and so was an outage: a
    debt that grows would let the guest take whole batches when it comes back. Trials that are finished are
    counted once.

    Args:
        warmup: Trials before the guest's first.
    """

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self._settled = Settled()
        self._counted = (0, 0.0, 0)

    def owed(self, trials: Sequence[Trial], share: float, count: int) -> int:
        """How many of the next `count` trials are the guest's turn.

        Args:
            trials: The history.
            share: In force now.
            count: At least 0.
        """
        goes_on, new, rest = self._settled.split(trials)
        self._counted = self._count(self._counted if goes_on else (0, 0.0, 0), new)
        _, due, taken = self._count(self._counted, rest)
        due += share * max(count - max(self._warmup - len(trials), 0), 0)
        return min(max(math.floor(due + _ROUNDING) - taken, 0), count)

    def _count(self, before: tuple[int, float, int], trials: Sequence[Trial]) -> tuple[int, float, int]:
        """Trials, what the guest was due and what it had, after `trials`."""
        place, due, taken = before
        for trial in trials:
            if "guest" in trial.attrs:  # enqueued points belong to neither
                taken += bool(trial.attrs["guest"]) + len(turns(trial)) + ("outage" in trial.attrs)
                if place >= self._warmup:
                    due += float(trial.attrs["share"])
            place += 1
        return place, due, taken


@final
@dataclass(frozen=True, slots=True)
class _State:
    """What the share depends on after some batches.

    Args:
        share: In force, but for copies.
        incumbent: What a trial has to beat.
        guests: Places of the guest's last finished trials.
        calls: For each of the guest's last calls, which of its points repeated a known one.
    """

    share: float
    incumbent: Score | None = None
    guests: tuple[int, ...] = ()
    calls: tuple[tuple[bool, ...], ...] = ()


@final
class Share:
    """The share in force for the next batch.

    After each finished batch with points of the guest, its last ten trials are compared with the base's
    trials of the same time. If they improved on the incumbent (above the noise) less often than the base's,
    or as often but rank lower on average, the share falls by 0.7; otherwise it rises by as much, up to
    `start`. If more than half of what the guest's last three calls gave repeated a known point, it is halved.

    The share is a function of the history; batches that are finished are looked at once.

    Args:
        direction: `maximize` or `minimize`.
        start: The share at first, and the highest; in [0, 1].
        floor: The lowest, unless `start` is lower.
    """

    def __init__(self, direction: Direction, start: float, floor: float = FLOOR) -> None:
        self._direction: Direction = direction
        self._start, self._floor = start, min(floor, start)
        self._forget()

    def _forget(self) -> None:
        self._seen: list[Trial] = []  # whole batches, with what is known after them:
        self._wins: list[bool] = []
        self._state = _State(self._start)

    def now(self, trials: Sequence[Trial]) -> float:
        """The share after a history; trials without `attrs["guest"]` (enqueued) belong to neither side."""
        if list(trials[: len(self._seen)]) != self._seen:
            self._forget()
        state, place, settled = self._state, len(self._seen), True
        for _, group in groupby(trials[place:], key=lambda trial: trial.batch):
            batch = list(group)
            state = self._after(state, trials, place, batch)
            place += len(batch)
            # The last batch may be a part of one, and a pending trial may yet be told.
            settled = settled and place < len(trials)
            settled = settled and all(trial.state is not State.PENDING for trial in batch)
            if settled:
                self._seen += batch
                self._state = state
        del self._wins[len(self._seen) :]
        repeated = [mark for call in state.calls for mark in call]
        many = len(state.calls) >= _CALLS and 2 * sum(repeated) > len(repeated)
        return max(state.share / 2, self._floor) if many else state.share

    def _after(self, state: _State, trials: Sequence[Trial], start: int, batch: Sequence[Trial]) -> _State:
        """The state after the batch that begins at place `start`; its wins are noted."""
        won, incumbent = improved(batch, state.incumbent, self._direction)
        self._wins += won
        state = replace(state, incumbent=incumbent)
        given = [trial.origin for trial in batch if trial.attrs.get("guest")]
        given += [origin for trial in batch for origin in turns(trial)]
        if given:
            call = tuple(origin.endswith("+mutated") for origin in given)
            state = replace(state, calls=(*state.calls, call)[-_CALLS:])
        mine = [place for place, trial in enumerate(batch, start) if trial.attrs.get("guest")]
        if not mine or any(trials[place].state is State.PENDING for place in mine):
            return state
        window = (*state.guests, *mine)[-_WINDOW:]
        state = replace(state, guests=window)
        base = [
            place
            for place in range(max(window[0] - _WINDOW, 0), start + len(batch))
            if trials[place].attrs.get("guest") is False and trials[place].state is not State.PENDING
        ]
        if not base:
            return state
        behind = self._behind(trials, window, base)
        share = max(state.share * _STEP, self._floor) if behind else min(state.share / _STEP, self._start)
        return replace(state, share=share)

    def _behind(self, trials: Sequence[Trial], guest: Sequence[int], base: Sequence[int]) -> bool:
        """Whether the guest's trials win less often than the base's, or as often and rank lower."""
        first, second = (float(np.mean([self._wins[place] for place in who])) for who in (guest, base))
        if first != second:
            return first < second
        last = (-math.inf, -math.inf)
        ranks = [
            [
                last if (score := trials[place].score) is None else standing(score, self._direction)
                for place in who
            ]
            for who in (guest, base)
        ]
        above = np.mean([(a > b) + (a == b) / 2 for a in ranks[0] for b in ranks[1]])
        return bool(above < 0.5)
