"""The last part of a run: which trials are scored on the held-out items, and what that says.

The search chose the winner by its score on the search items, so that score flatters it. The held-out items
were not seen; the table gives each finalist's paired difference to the best parent on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmevo.errors import StatsError
from llmevo.genome import Genome
from llmevo.observer import Row
from llmevo.proposers import Direction
from llmevo.stats import Interval, paired_difference
from llmevo.store import HoldoutRow
from llmevo.trial import Score, Trial

EVOLVED = "evolved"
_ERROR_RATE = 0.05  # of all the finalists' intervals together (Bonferroni)
_KINDS = ("baseline", "parent", "uniform", "warm_start")


def ranked(trials: Iterable[Trial], direction: Direction) -> list[Trial]:
    """The complete trials, best first, the earlier of equals first."""
    sign = -1.0 if direction == "maximize" else 1.0
    scored = [(sign * trial.score.value, trial.number, trial) for trial in trials if trial.score is not None]
    return [trial for *_, trial in sorted(scored, key=lambda item: item[:2])]


def plan(
    trials: Sequence[Trial], *, references: int, direction: Direction, finalists: int
) -> list[tuple[str, Trial]]:
    """The trials to score on the held-out items, with their labels.

    Args:
        trials: The whole run, by number.
        references: How many of the first trials no proposer made.
        direction: Of the search's score.
        finalists: How many of the proposers' best trials take part.

    Returns:
        The baseline, the best parent, the uniform merge and the best warm start, as far as each is there and
        complete; then `evolved`, `evolved:2`, ...
    """
    chosen = []
    for kind in _KINDS:
        of_kind = [trial for trial in trials[:references] if trial.origin.split(":")[0] == kind]
        chosen += [(trial.origin, trial) for trial in ranked(of_kind, direction)[:1]]
    for place, trial in enumerate(ranked(trials[references:], direction)[:finalists], start=1):
        chosen.append((EVOLVED if place == 1 else f"{EVOLVED}:{place}", trial))
    return chosen


def table(genome: Genome, planned: Sequence[tuple[str, Trial]], holdout: Sequence[HoldoutRow]) -> list[Row]:
    """The planned trials that were scored, each with its difference to the best parent.

    Args:
        genome: For the tasks' weights.
        planned: From `plan`.
        holdout: From `Store.holdout`.
    """
    scored = {row.number: row for row in holdout}
    rivals = sum(label.startswith(EVOLVED) for label, _ in planned)
    weights = {task.name: task.weight for task in genome.tasks}
    parent = next(
        (scored[t.number].score for label, t in planned if _is_parent(label) and t.number in scored), None
    )
    rows = []
    for label, trial in planned:
        row = scored.get(trial.number)
        if row is None:
            continue
        level = 1 - _ERROR_RATE / (rivals if label.startswith(EVOLVED) else 1)
        interval = None if _is_parent(label) else _difference(row.score, parent, weights, level)
        rows.append(Row(label, trial, row.score, interval, row.error))
    return rows


def _is_parent(label: str) -> bool:
    return label.startswith("parent:")


def _difference(
    score: Score | None, parent: Score | None, weights: dict[str, float], level: float
) -> Interval | None:
    if score is None or parent is None:
        return None
    try:
        return paired_difference(score.items, parent.items, weights=weights, level=level)
    except StatsError:  # a metric without per-item scores has no pairs
        return None
