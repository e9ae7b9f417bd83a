"""`ask` and `tell`: the loop's two verbs, over any proposer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, final

import numpy as np

from llmevo.errors import ProposerError, TrialError
from llmevo.proposers import Direction, Proposer, make
from llmevo.space import Space, Value
from llmevo.trial import Proposal, Score, State, Trial, best

_FAILURES_IN_A_ROW = 20
_CONVERGED_TRIALS = 30
_CONVERGED_WIDTH = 1e-9


@dataclass(frozen=True, slots=True)
class _Enqueued:
    params: dict[str, Value]
    origin: str
    attrs: dict[str, Any]


@final
class Optimizer:
    """Hands out trials and takes their results, in any order.

    Its state is a function of (space, proposer, seed, trials): give `trials` of an earlier Optimizer and it
    continues as that one would have.

    Args:
        space: What may vary.
        proposer: A name from `proposers.PROPOSERS` (`cma`, `hybrid`, ...) or an object with `propose`.
        direction: `maximize` or `minimize`; there is no default, since a silent sign is the classic bug.
        seed: Everything random follows from it. At least 0.
        trials: The history to continue from, numbered 0, 1, 2, ...

    Raises:
        TrialError: `direction` or `seed` is not allowed, or `trials` has a gap.
        ProposerError: No proposer has that name.

    Example::

        opt = llmevo.Optimizer(space, proposer="cma", direction="maximize", seed=0)
        for _ in range(10):
            for trial in opt.ask(8):
                opt.tell(trial, f(**trial.params))
        print(opt.best)
    """

    def __init__(
        self,
        space: Space,
        proposer: str | Proposer = "cma",
        *,
        direction: Direction,
        seed: int = 0,
        trials: Iterable[Trial] = (),
    ) -> None:
        if direction not in ("maximize", "minimize"):
            raise TrialError(f"`direction` must be 'maximize' or 'minimize', but got {direction!r}.")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise TrialError(f"`seed` must be an int >= 0, but got {seed!r}.")
        self.space = space
        self.direction: Direction = direction
        self.seed = int(seed)
        self.proposer = make(proposer, space, direction) if isinstance(proposer, str) else proposer
        self._trials: list[Trial] = sorted(trials, key=lambda trial: trial.number)
        for number, trial in enumerate(self._trials):
            if trial.number != number:
                raise TrialError(f"`trials` must be numbered 0, 1, 2, ..., but {number} is missing.")
        self._best = best(self._trials, self.direction)
        self._queue: list[_Enqueued] = []
        self._exhausted = False

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial so far, by number."""
        return tuple(self._trials)

    @property
    def best(self) -> Trial | None:
        """The complete trial that stands highest (see `trial.ranked`), or None."""
        return self._best

    def enqueue(
        self,
        params: Mapping[str, object] | None,
        *,
        origin: str = "enqueued",
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """Put a known point before the proposer's.

        Args:
            params: A value for every gene; None for a reference outside the space, which is evaluated and
                recorded like any trial but which no proposer sees.
            origin: What the trial will say of where it came from.
            attrs: JSON notes for the trial.

        Raises:
            SpaceError: `params` is not a point of the space.
        """
        point = {} if params is None else self.space.validate(params)
        self._queue.append(_Enqueued(point, origin, dict(attrs or {})))

    def ask(self, n: int = 1) -> list[Trial]:
        """Hand out up to `n` new pending trials.

        Fewer come back, or none, while a proposer waits for pending trials (the generation barrier of
        CMA-ES) or when a finite space has been proposed completely.

        Args:
            n: How many are wanted; at least 1.

        Raises:
            TrialError: `n` is not a whole number >= 1.
            ProposerError: The proposer cannot go on, or gave more than `n` points.
        """
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
            raise TrialError(f"`n` must be an int >= 1, but got {n!r}.")
        batch = len(self._trials)
        taken, self._queue = self._queue[:n], self._queue[n:]
        fresh = [
            Trial(batch + index, item.params, item.origin, attrs=item.attrs, batch=batch)
            for index, item in enumerate(taken)
        ]
        if len(fresh) < n:
            try:
                proposals = self._propose(int(n) - len(fresh), [*self._trials, *fresh])
            except Exception:
                self._queue = taken + self._queue  # an enqueued point is not lost to an outage
                raise
            for proposal in proposals:
                fresh.append(
                    Trial(
                        batch + len(fresh),
                        self.space.validate(proposal.params),
                        proposal.origin,
                        attrs=proposal.attrs,
                        batch=batch,
                    )
                )
        self._trials.extend(fresh)
        return fresh

    def _propose(self, n: int, history: Sequence[Trial]) -> list[Proposal]:
        rng = np.random.default_rng([self.seed, len(history)])
        visible = [trial for trial in history if trial.params]
        proposals = self.proposer.propose(n, visible, rng)
        if len(proposals) > n:
            raise ProposerError(
                f"`propose` must return at most n={n} points, but {type(self.proposer).__name__} "
                f"returned {len(proposals)}."
            )
        waiting = any(trial.state is State.PENDING for trial in visible)
        self._exhausted = not proposals and not waiting
        return proposals

    def tell(
        self,
        trial: Trial | int,
        value: float | Sequence[float] | Score | None = None,
        *,
        error: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        cost: Mapping[str, Any] | None = None,
    ) -> Trial:
        """Record what a trial scored, or why it failed.

        Args:
            trial: The trial or its number.
            value: A number, per-item scores (their mean counts), or a Score. NaN and infinities are failures
                with that reason.
            error: Why the trial failed, instead of a value.
            metrics: Further metrics, for people.
            cost: Seconds and bytes by stage.

        Returns:
            The trial as it now stands. Telling the same result again changes nothing.

        Raises:
            TrialError: An unknown trial, both or neither of `value` and `error`, or a result that differs
                from the one already told.
        """
        number = trial.number if isinstance(trial, Trial) else int(trial)
        if not 0 <= number < len(self._trials):
            raise TrialError(
                f"`trial` must be one that `ask` gave out (0 to {len(self._trials) - 1}), but got {number}."
            )
        if (value is None) == (error is None):
            raise TrialError(
                f"exactly one of `value` and `error` must be given to tell trial {number}, but got "
                f"value={value!r}, error={error!r}."
            )
        known = self._trials[number]
        score, reason = (None, str(error)) if error is not None else _score(value)
        state = State.FAILED if score is None else State.COMPLETE
        told = replace(
            known,
            state=state,
            score=score,
            error=reason,
            metrics=dict(metrics or {}),
            cost=dict(cost or {}),
        )
        if known.state is State.PENDING:
            self._trials[number] = told
            self._best = best([told] if self._best is None else [self._best, told], self.direction)
        elif (known.value, known.error) != (told.value, told.error):
            raise TrialError(
                f"trial {number} was already told {known.error or known.value!r}, and now got "
                f"{told.error or told.value!r}; ask for a new trial to evaluate a point again."
            )
        return self._trials[number]

    def stop_reasons(self) -> dict[str, str]:
        """Why going on may be pointless: empty while there is no reason.

        Keys: `exhausted` (nothing is left to propose), `failing` (the last 20 trials all failed),
        `converged` (the last 30 complete trials are one point, to 1e-9 of every gene's axis).
        """
        reasons: dict[str, str] = {}
        if self._exhausted:
            reasons["exhausted"] = "the proposer has no new point to offer in this space"
        # From the end, and no further than needed: this is asked after every batch.
        finished = (trial for trial in reversed(self._trials) if trial.state is not State.PENDING)
        last = list(islice(finished, _FAILURES_IN_A_ROW))
        if len(last) == _FAILURES_IN_A_ROW and all(t.state is State.FAILED for t in last):
            reasons["failing"] = f"the last {len(last)} trials failed, the latest: {last[0].error}"
        if self._converged():
            reasons["converged"] = f"the last {_CONVERGED_TRIALS} trials are the same point"
        return reasons

    def _converged(self) -> bool:
        complete = (trial for trial in reversed(self._trials) if trial.score is not None and trial.params)
        low = high = None
        count = 0
        for trial in islice(complete, _CONVERGED_TRIALS):
            unit = self.space.to_unit(trial.params)
            low = unit if low is None else np.minimum(low, unit)
            high = unit if high is None else np.maximum(high, unit)
            if float((high - low).max()) >= _CONVERGED_WIDTH:
                return False
            count += 1
        return count == _CONVERGED_TRIALS


def _score(value: Any) -> tuple[Score | None, str | None]:
    """A Score, or the reason why `value` is none."""
    if isinstance(value, Score):
        return value, None
    if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str):
        items = [float(item) for item in value]
        if not items:
            return None, "no item was scored"
        bad = [item for item in items if not math.isfinite(item)]
        return (None, f"an item scored {bad[0]}") if bad else (Score.from_items(items), None)
    number = float(value)
    return (Score(number), None) if math.isfinite(number) else (None, f"the score is {number}")
