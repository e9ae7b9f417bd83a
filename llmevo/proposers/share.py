"""How much of the budget a guest gets: less while it wins less than the base.

A pure function of the history. What was in force when a trial was proposed stands in `attrs["share"]`, so
that the schedule can be exact although the share changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from llmevo.proposers import Direction
from llmevo.strength import improvements
from llmevo.trial import State, Trial, standing

FLOOR = 0.1
_WINDOW = 10  # trials of the guest
_STEP = 0.7
_CALLS = 3
_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


def turns(trial: Trial) -> list[str]:
    """Origins of the guest's points that were turned away in favour of this trial."""
    return [str(item["origin"]) for item in trial.attrs.get("turned_away", ())]


def owed(trials: Sequence[Trial], warmup: int, share: float, count: int) -> int:
    """How many of the next `count` trials are the guest's turn.

    Of the trials proposed after the warm-up, the guest has the floor of the sum of their shares: Bresenham's
    line, whose slope is the share in force. A point that was turned away was a turn, and so was an outage:
    a debt that grows would let the guest take whole batches when it comes back.

    Args:
        trials: The history.
        warmup: Trials before the guest's first.
        share: In force now.
        count: At least 0.
    """
    due = 0.0
    taken = 0
    for place, trial in enumerate(trials):
        if "guest" not in trial.attrs:  # enqueued points belong to neither
            continue
        taken += bool(trial.attrs["guest"]) + len(turns(trial)) + ("outage" in trial.attrs)
        if place >= warmup:
            due += float(trial.attrs["share"])
    due += share * max(count - max(warmup - len(trials), 0), 0)
    return min(max(math.floor(due + _ROUNDING) - taken, 0), count)


def share_now(trials: Sequence[Trial], direction: Direction, start: float, floor: float = FLOOR) -> float:
    """The share in force for the next batch.

    After each finished batch with points of the guest, its last ten trials are compared with the base's
    trials of the same time. If they improved on the incumbent (above the noise) less often than the base's,
    or as often but rank lower on average, the share falls by 0.7; otherwise it rises by as much, up to
    `start`. If more than half of what the guest's last three calls gave repeated a known point, it is halved.

    Args:
        trials: The history; those without `attrs["guest"]` (enqueued) belong to neither side.
        direction: `maximize` or `minimize`.
        start: The share at first, and the highest; in [0, 1].
        floor: The lowest, unless `start` is lower.
    """
    floor = min(floor, start)
    wins = improvements(trials, direction)
    share = start
    guests: list[int] = []
    calls: list[list[bool]] = []
    for _, members in groupby(range(len(trials)), key=lambda place: trials[place].batch):
        batch = [(place, trials[place]) for place in members]
        given = [trial.origin for _, trial in batch if trial.attrs.get("guest")]
        given += [origin for _, trial in batch for origin in turns(trial)]
        if given:
            calls.append([origin.endswith("+mutated") for origin in given])
        mine = [place for place, trial in batch if trial.attrs.get("guest")]
        if not mine or any(trials[place].state is State.PENDING for place in mine):
            continue
        guests += mine
        window = guests[-_WINDOW:]
        base = [
            place
            for place in range(window[0] - _WINDOW if window[0] > _WINDOW else 0, batch[-1][0] + 1)
            if trials[place].attrs.get("guest") is False and trials[place].state is not State.PENDING
        ]
        if not base:
            continue
        behind = _behind(trials, wins, window, base, direction)
        share = max(share * _STEP, floor) if behind else min(share / _STEP, start)
    repeated = [mark for call in calls[-_CALLS:] for mark in call]
    many = len(calls) >= _CALLS and 2 * sum(repeated) > len(repeated)
    return max(share / 2, floor) if many else share


def _behind(
    trials: Sequence[Trial],
    wins: Sequence[bool],
    guest: Sequence[int],
    base: Sequence[int],
    direction: Direction,
) -> bool:
    """Whether the guest's trials win less often than the base's, or as often and rank lower."""
    first, second = (float(np.mean([wins[place] for place in who])) for who in (guest, base))
    if first != second:
        return first < second
    last = (-math.inf, -math.inf)
    ranks = [
        [last if (score := trials[place].score) is None else standing(score, direction) for place in who]
        for who in (guest, base)
    ]
    above = np.mean([(a > b) + (a == b) / 2 for a in ranks[0] for b in ranks[1]])
    return bool(above < 0.5)
