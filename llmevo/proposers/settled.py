"""How much of a history is settled, so that what is known of it need not be worked out again.

A proposer's answer is a function of the history alone, but a history of ten thousand trials that has grown by
ten should cost what the ten cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from llmevo.trial import State, Trial


@final
class Settled:
    """The finished trials that a history begins with, as far as they were handed out.

    A trial is frozen and a finished one is final, so that what was derived from these trials holds for as
    long as the same ones stand at the same places.
    """

    def __init__(self) -> None:
        self._seen: list[Trial] = []

    def split(self, trials: Sequence[Trial]) -> tuple[bool, list[Trial], list[Trial]]:
        """What is new in a history.

        Args:
            trials: By number, pending ones included.

        Returns:
            Whether the history goes on from the one before (if not, all that was derived is void), the trials
            that are settled from now on, and the rest: from the first pending one.
        """
        # Comparing lists asks first whether the objects are the same: next to nothing for a history that
        # goes on, and every other history is noticed.
        goes_on = list(trials[: len(self._seen)]) == self._seen
        if not goes_on:
            self._seen = []
        rest = list(trials[len(self._seen) :])
        pending = (place for place, trial in enumerate(rest) if trial.state is State.PENDING)
        settled = next(pending, len(rest))
        self._seen += rest[:settled]
        return goes_on, rest[:settled], rest[settled:]
