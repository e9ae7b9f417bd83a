"""A deterministic summary of a history: what a language model would otherwise have to compute from rows.

Models do better when a fixed program digests the history for them (https://arxiv.org/abs/2509.15561).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from llmevo.llm.encode import LEVELS, encode_value, names
from llmevo.space import Categorical, Int, Space
from llmevo.trial import Direction, State, Trial
from llmevo.trial import ranked as best_first

_ENOUGH = 8  # trials before a trend is worth a word
_TRENDS = 8
_COUPLINGS = 5
_FAILURES = 3
_CLEAR = 0.6


@final
@dataclass(frozen=True, slots=True)
class Ranked:
    """A history in order of merit.

    Args:
        complete: Complete trials, best first, as `trial.ranked` orders them.
        failed: Failed trials, by number.
        last: Complete trials, by number.
    """

    complete: list[Trial]
    failed: list[Trial]
    last: list[Trial]

    @property
    def best(self) -> Trial | None:
        """The incumbent, or None."""
        return self.complete[0] if self.complete else None


def rank(trials: Sequence[Trial], direction: Direction) -> Ranked:
    """Order a history by merit; pending trials are left out."""
    last = [trial for trial in trials if trial.state is State.COMPLETE]
    failed = [trial for trial in trials if trial.state is State.FAILED]
    return Ranked(best_first(last, direction), failed, last)


def digits(values: Sequence[float]) -> int:
    """Significant digits, 4 to 17, that keep distinct values distinct."""
    distinct = set(values)
    for count in range(4, 17):
        if len({f"{value:.{count}g}" for value in distinct}) == len(distinct):
            return count
    return 17


def digest(space: Space, ranked: Ranked, strength: float | None = None) -> list[str]:
    """Findings, one sentence each: incumbent, strength, stagnation, trends, couplings, failing regions.

    Args:
        space: What the trials are points of.
        ranked: The history.
        strength: The mutation strength in force, in the unit cube; None to say nothing of it.
    """
    lines = []
    if ranked.best is not None and ranked.best.score is not None:
        rung = ranked.best.score.rung
        alike = [t.score for t in ranked.complete if t.score is not None and t.score.rung == rung]
        values = [score.value for score in alike]
        shown = f"{ranked.best.score.value:.{digits(values[:_ENOUGH])}g}"
        since = sum(trial.number > ranked.best.number for trial in ranked.last)
        lines.append(f"Best score: {shown}, found {since} trials ago; the median is {np.median(values):.4g}.")
    if strength is not None:
        lines.append(f"New points are drawn {100 * strength:.2g} percent of an axis around their parents.")
    if len(ranked.complete) >= _ENOUGH:
        top = ranked.complete[: max(math.ceil(len(ranked.complete) / 4), 3)]
        lines += _trends(space, ranked.complete, top)
        lines += _couplings(space, ranked.complete)
    return lines + _failing(space, ranked)


def _levels(space: Space, trials: Sequence[Trial]) -> np.ndarray:
    """Coordinates in levels, shape (trials, genes)."""
    return LEVELS * np.array([space.to_unit(trial.params) for trial in trials])


def _trends(space: Space, complete: Sequence[Trial], top: Sequence[Trial]) -> list[str]:
    """Where the best quarter lies, for the genes in which it differs most from all."""
    everything, best = _levels(space, complete), _levels(space, top)
    shown = names(space)
    found = []
    for index, (name, gene) in enumerate(space.genes.items()):
        # A gene that is switched off has its start as coordinate, which says nothing.
        on, well = (
            levels[[space.is_active(name, trial.params) for trial in trials], index]
            for levels, trials in ((everything, complete), (best, top))
        )
        spread = float(on.std()) if len(well) >= 2 else 0.0
        if isinstance(gene, Categorical) or spread == 0:
            continue
        shift = float(well.mean() - on.mean()) / spread
        mean, deviation = well.mean(), well.std()
        word = "higher" if shift > 0 else "lower"
        found.append(
            (-abs(shift), f"{shown[name]}: best quarter at {mean:.0f}±{deviation:.0f}, {word} than all")
        )
    found.sort()
    clear = [sentence for shift, sentence in found if -shift >= 0.3][:_TRENDS]
    return ["In percent of each axis: " + "; ".join(clear) + "."] if clear else []


def _couplings(space: Space, complete: Sequence[Trial]) -> list[str]:
    """Strong correlations between numeric genes among the better half."""
    half = complete[: max(len(complete) // 2, _ENOUGH)]
    numeric = [
        index
        for index, (name, gene) in enumerate(space.genes.items())
        if not isinstance(gene, Categorical) and all(space.is_active(name, trial.params) for trial in half)
    ]
    levels = _levels(space, half)[:, numeric]
    varied = [column for column in range(len(numeric)) if levels[:, column].std() > 0]
    if len(varied) < 2:
        return []
    matrix = np.corrcoef(levels[:, varied], rowvar=False)
    shown = list(names(space).values())
    pairs = [
        (-abs(float(matrix[i, j])), i, j)
        for i in range(len(varied))
        for j in range(i)
        if abs(matrix[i, j]) >= _CLEAR
    ]
    lines = []
    for _, i, j in sorted(pairs)[:_COUPLINGS]:
        left, right = shown[numeric[varied[j]]], shown[numeric[varied[i]]]
        way = "together" if matrix[i, j] > 0 else "against each other"
        lines.append(f"Among the better half, {left} and {right} move {way} (r = {matrix[i, j]:.2f}).")
    return lines


def _failing(space: Space, ranked: Ranked) -> list[str]:
    """Choices, and ends of axes, with which every trial failed."""
    lines = []
    shown = names(space)
    for name, gene in space.genes.items():
        if not isinstance(gene, Categorical):
            lines += _failing_end(space, ranked, name)
            continue
        for choice in gene.choices:
            failed = sum(trial.params.get(name) == choice for trial in ranked.failed)
            worked = any(trial.params.get(name) == choice for trial in ranked.complete)
            if failed >= _FAILURES and not worked:
                lines.append(f"All {failed} trials with {shown[name]} = {json.dumps(choice)} failed.")
    return lines


def _failing_end(space: Space, ranked: Ranked, name: str) -> list[str]:
    """The end of a numeric gene's axis beyond which nothing worked and much failed."""
    gene, shown = space.genes[name], names(space)[name]
    failed, worked = (
        [value for trial in trials if isinstance(value := trial.params.get(name), (int, float))]
        for trials in (ranked.failed, ranked.complete)
    )
    if not worked:
        return []
    lines = []
    for sign, word in ((1, "above"), (-1, "below")):
        edge = max(sign * value for value in worked)
        beyond = [value for value in failed if sign * value > edge]
        if len(beyond) >= _FAILURES and len(beyond) == len(failed):
            limit = encode_value(gene, sign * edge if not isinstance(gene, Int) else int(sign * edge))
            lines.append(f"All {len(beyond)} failures have {shown} {word} {limit}, where nothing worked.")
    return lines
