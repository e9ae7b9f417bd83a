"""Successive halving inside a batch: who is worth more, as a function of what was found so far.

All trials of a batch answer the first few items; the better ones answer more, and the best all of them. The
items stand in one stored order, so that trials are compared on the same ones and a survivor extends what it
has answered. Where trials are trained, a rung is a share of the training: the loss on the validation examples
ranks it, and a survivor goes on from its own state. Jamieson and Talwalkar, AISTATS 2016,
http://proceedings.mlr.press/v51/jamieson16.html.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, final

from llmevo.genome import SearchSpec
from llmevo.pipeline import Outcome
from llmevo.trial import Direction, standing


@final
@dataclass(frozen=True, slots=True)
class Stage:
    """Where a batch stands.

    Args:
        rung: The one that the trials in `alive` are on now; None for the last.
        alive: Numbers of the trials that are still in, ascending.
        missing: Those of them without an outcome on this rung; none once the batch is over.
        out: For each trial that is not in any more, the rung at which it failed or dropped out. One that
            dropped out may come in again while the batch is not over.
    """

    rung: int | None
    alive: tuple[int, ...]
    missing: tuple[int, ...]
    out: Mapping[int, int] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Rungs:
    """The rungs of a run.

    Args:
        sizes: Items up to and with each rung, over all tasks, ascending, the last one all of them; or shares
            of a training, the last one 1.
        eta: One in `eta` trials of a rung reaches the next.
        rank_by: `score`, or a measure of multiple-choice tasks that ranks the rungs below the last.
        direction: Of the score.
        weights: Of the measure, by task; negative where the score falls as the measure grows.
        trains: Whether the sizes are shares of a training.
    """

    sizes: tuple[float, ...]
    eta: int = 2
    rank_by: str = "score"
    direction: Direction = "maximize"
    weights: Mapping[str, float] = field(default_factory=dict)
    trains: bool = False

    @classmethod
    def of(cls, facts: Mapping[str, Any], search: SearchSpec, batch: int) -> Rungs | None:
        """The rungs that a pipeline's facts describe; None where every trial answers all items.

        Args:
            facts: From `Pipeline.describe`.
            search: How rungs were asked for.
            batch: Trials per `ask`; rungs of a training that nobody asked for need `2 * eta`, so that more
                than one trial reaches the second.
        """
        shares: Sequence[float] = facts.get("shares") or ()
        if shares:
            halving = search.halving
            few = halving.enabled is None and batch < 2 * halving.tokens.eta
            sizes = (*shares, 1.0)
            return None if few else cls(sizes, halving.tokens.eta, direction=search.direction, trains=True)
        prefixes: Sequence[Mapping[str, int]] = facts.get("rungs") or ()
        if len(prefixes) < 2:
            return None
        tasks, better = prefixes[-1], 1.0 if search.direction == "maximize" else -1.0
        weights: dict[str, float] = {}
        for key, weight in facts.get("weights", {}).items():
            task = key if key in tasks else key.rpartition("/")[0]
            sign = better * facts.get("signs", {}).get(key, better)
            weights[task] = weights.get(task, 0.0) + sign * weight
        sizes = tuple(sum(prefix.values()) for prefix in prefixes)
        return cls(sizes, search.halving.eta, search.halving.rank_by, search.direction, weights)

    def reached(self, rung: int) -> str:
        """How far a rung goes: `60 items`, `10 % of the tokens`."""
        size = self.sizes[rung]
        return f"{100 * size:g} % of the tokens" if self.trains else f"{size:g} items"

    def describe(self) -> str:
        """The rungs: `60, 120, 240 of 480 items, after each of which one trial in 2 goes on`."""
        *few, whole = self.sizes
        shown = ", ".join(f"{100 * size:g}" if self.trains else f"{size:g}" for size in few)
        text = f"{shown} % of the tokens" if self.trains else f"{shown} of {whole:g} items"
        text += f", after each of which one trial in {self.eta} goes on"
        return f"{text}, by the loss on the validation examples" if self.trains else text

    def stage(self, numbers: Sequence[int], outcomes: Mapping[tuple[int, int], Outcome]) -> Stage:
        """Where a batch stands, given what its trials scored.

        Of those that enter a rung, the best `ceil(1 / eta)` of them go on, failed ones behind all others. One
        that is alone answers the rest at once. So the best of a batch always reaches the last rung. If all of
        those have failed, the best of the latest that dropped out goes on in their place, and so on.

        Args:
            numbers: The trials of the batch.
            outcomes: By (number, rung); those on all items by the last rung's index.
        """
        last = len(self.sizes) - 1
        alive = tuple(sorted(numbers))
        out: dict[int, int] = {}
        waiting: list[int] = []  # dropped out without having failed; the next to be called is the last
        for rung in range(last):
            if len(alive) < 2:
                break
            missing = tuple(number for number in alive if (number, rung) not in outcomes)
            if missing:
                return Stage(rung, alive, missing, out)
            best = self.best_first([outcomes[number, rung] for number in alive])
            kept = best[: math.ceil(len(alive) / self.eta)]
            waiting += reversed(best[len(kept) :])
            out |= {number: rung for number in alive if number not in kept}
            alive = tuple(sorted(kept))
        while True:
            missing = tuple(number for number in alive if (number, last) not in outcomes)
            if missing:
                return Stage(None, alive, missing, out)
            whole = tuple(number for number in alive if outcomes[number, last].score is not None)
            out |= {number: last for number in alive if number not in whole}
            if whole or not waiting:
                return Stage(None, whole, (), out)
            alive = (waiting.pop(),)
            del out[alive[0]]

    def order(self, stage: Stage) -> tuple[int, ...]:
        """The trials that a stage lacks, in the order in which they are to run.

        On every second rung the latest are first: the last one's merged weights are in the model still, and
        are not merged again if it goes on. Trainings, of which several may be one job, are always in order.
        """
        turned = not self.trains and (len(self.sizes) - 1 if stage.rung is None else stage.rung) % 2
        return stage.missing[::-1] if turned else stage.missing

    def best_first(self, outcomes: Sequence[Outcome]) -> list[int]:
        """Numbers of the trials that did not fail on a rung, best first, the earlier of equals first."""
        merits = {o.number: standing(o.score, self.direction)[1] for o in outcomes if o.score is not None}
        if self.rank_by != "score":
            measured = {o.number: self._measure(o) for o in outcomes if o.score is not None}
            # A task that does not measure it (generation) would count for nothing: then the score ranks.
            known = {number: value for number, value in measured.items() if value is not None}
            merits = known if len(known) == len(merits) else merits
        return sorted(merits, key=lambda number: (-merits[number], number))

    def _measure(self, outcome: Outcome) -> float | None:
        """The weighted mean of `rank_by` over the tasks; None if one of them lacks it."""
        values = [
            (weight, outcome.metrics.get(task, {}).get(f"{self.rank_by},none"))
            for task, weight in self.weights.items()
        ]
        if not values or any(value is None for _, value in values):
            return None
        return math.fsum(weight * value for weight, value in values if value is not None)


def cost(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a trial's outcomes took together.

    Seconds by stage, and `bytes` and `items` where they count; of a training its `tokens`, and for each of
    its `rungs` the seconds and the tokens that it added.
    """
    total: dict[str, Any] = {}
    seconds, sizes, items = ([getattr(o, kind) for o in outcomes] for kind in ("seconds", "bytes", "items"))
    total |= _summed(seconds)
    total |= {"bytes": _summed(sizes)} if any(sizes) else {}
    total |= {"items": _summed(items)} if any(items) else {}
    tokens = [0, *(o.tokens for o in outcomes)]
    if any(tokens):
        total["tokens"] = tokens[-1]
        added = [later - earlier for earlier, later in pairwise(tokens)]
        total["rungs"] = [{**s, "tokens": count} for s, count in zip(seconds, added, strict=True)]
    return total


def _summed(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for count in counts for key in count)
    return {key: sum(count.get(key, 0) for count in counts) for key in keys}
