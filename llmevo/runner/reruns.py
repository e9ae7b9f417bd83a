"""Trainings done again with other seeds: who is best when luck is averaged out, and how much luck there was.

The search picks its best from many trials with one seed each, so it picks seeds too. The finalists and the
default are trained again with fresh seeds; the mean over a trial's seeds decides between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from llmevo.pipeline import Outcome, Split
from llmevo.stats import Spread, pooled_spread
from llmevo.trial import Direction, Score, Trial, best, standard_error, standing

Outcomes: TypeAlias = Mapping[tuple[int, int, Split], Outcome]
"""What trainings with other seeds came to, by (trial, re-run from 1, split)."""


def scores_of(number: int, outcomes: Outcomes, split: Split) -> list[Score | None]:
    """What each re-run of a trial scored; None for one that failed."""
    return [outcomes[key].score for key in sorted(outcomes) if key[0] == number and key[2] == split]


def best_first(trials: Sequence[Trial], outcomes: Outcomes, direction: Direction) -> list[Trial]:
    """Complete trials by the mean over their seeds, those that failed with one behind all others."""
    return sorted(trials, key=lambda trial: _place(trial, outcomes, direction))


def _place(trial: Trial, outcomes: Outcomes, direction: Direction) -> tuple[float, float, float, int]:
    assert trial.score is not None
    again = scores_of(trial.number, outcomes, "search")
    known = [score for score in again if score is not None]
    rung, value = standing(averaged([trial.score, *known]), direction)
    return -rung, len(again) - len(known), -value, trial.number


def best_of(
    trials: Sequence[Trial], planned: Sequence[tuple[str, Trial]], outcomes: Outcomes, direction: Direction
) -> Trial | None:
    """The best trial of a run.

    Once trials were trained again it is one of those that are compared on the held-out items: who was not has
    a score with one lucky seed.

    Args:
        trials: The whole run.
        planned: From `finals.plan`.
        outcomes: Of the re-runs.
        direction: Of the score.
    """
    compared = {trial.number for _, trial in planned}
    if not any(number in compared for number, _, _ in outcomes):
        return best(trials, direction)
    return best_first([trial for _, trial in planned], outcomes, direction)[0]


def averaged(scores: Sequence[Score], weights: Mapping[str, float] | None = None) -> Score:
    """The mean over seeds, item by item; its standard error is that of the items.

    Args:
        scores: On the same items; at least one.
        weights: Of the terms of the score; None leaves the standard error of several scores unknown.
    """
    if len(scores) == 1:
        return scores[0]
    items = {}
    for task in scores[0].items:
        columns = zip(*(score.items[task] for score in scores), strict=True)
        items[task] = [math.fsum(values) / len(scores) for values in columns]
    value = math.fsum(score.value for score in scores) / len(scores)
    errors = {task: standard_error(values) for task, values in items.items()}
    if weights is None or any(error is None for error in errors.values()):
        return Score(value, None, items, scores[0].rung)
    error = math.hypot(*(weights.get(task, 1.0) * (error or 0.0) for task, error in errors.items()))
    return Score(value, error, items, scores[0].rung)


def spread(rows: Mapping[int, Score], outcomes: Outcomes) -> Spread | None:
    """How far seeds move the score on the held-out items, pooled over the trials that have several.

    Args:
        rows: The score with the search's own seed, by trial.
        outcomes: Of the re-runs.

    Returns:
        None where no trial has two.
    """
    groups = []
    for number, score in rows.items():
        again = [s.value for s in scores_of(number, outcomes, "holdout") if s is not None]
        groups.append([score.value, *again])
    return pooled_spread(groups)
