"""A population's generations: how good its individuals are, and how different their weights.

How far two adapters are apart is `llmevo.proposers.population.distance`: between their changes of the
weights, over the size of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any, final

from llmevo.proposers.population import SKETCH, Survivors, distance
from llmevo.report import svg
from llmevo.trial import Direction, Trial

_SHAPE = (9.6, 3.4)  # inches
_NEW, _ALIVE = ("green", "o"), ("purple", "D")  # role and marker
_UNRELATED = math.sqrt(2)  # how far changes are apart that have nothing in common


@final
@dataclass(frozen=True, slots=True)
class Generation:
    """One batch of a population.

    Args:
        number: 0 for what the run began with, the default settings.
        new: Its individuals that were trained to the end, by number.
        best: The best score of any individual so far.
        mean: The mean score of its own.
        alive: The mean score of those that survive it.
        apart: The mean distance between its own individuals; None for fewer than two.
        alive_apart: That between those that survive it.
    """

    number: int
    new: tuple[Trial, ...]
    best: float
    mean: float
    alive: float
    apart: float | None
    alive_apart: float | None


def generations(
    trials: Sequence[Trial], direction: Direction, population: int | None = None
) -> list[Generation]:
    """The generations of a population's run; none of a run of another kind.

    One all of whose individuals failed is left out.

    Args:
        trials: By number; those without params are no individuals.
        direction: `maximize` or `minimize`.
        population: How many survive; None for the proposer's own number.
    """
    trials = [trial for trial in trials if trial.params]
    if not any(SKETCH in trial.metrics for trial in trials):
        return []
    pick = max if direction == "maximize" else min
    survivors, known = Survivors(direction, population), list[Trial]()
    found: list[Generation] = []
    # The default settings, which are asked with the other references, are generation 0.
    first = 0 if trials[0].origin == "default" else 1
    for number, (_, batch) in enumerate(groupby(trials, key=lambda trial: trial.batch), first):
        members = list(batch)
        known += members
        new = [trial for trial in members if trial.score is not None and trial.score.rung is None]
        if not new:
            continue
        values, alive = _values(new), survivors(known)
        before = [found[-1].best] if found else []
        best, mean = pick([*before, *values]), math.fsum(values) / len(values)
        whole = _values(alive)
        found.append(
            Generation(
                number, tuple(new), best, mean, math.fsum(whole) / len(whole), _apart(new), _apart(alive)
            )
        )
    return found


def _values(trials: Sequence[Trial]) -> list[float]:
    return [trial.score.value for trial in trials if trial.score is not None]


def _apart(trials: Sequence[Trial]) -> float | None:
    """The mean distance of two of them, where their sketches are known."""
    known = [distance(first, second) for first, second in combinations(trials, 2)]
    finite = [value for value in known if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def draw(found: Sequence[Generation]) -> str:
    """Two drawings side by side over the generations: the scores, and how far apart the weights are."""
    pyplot = svg.pyplot()
    with pyplot.rc_context(svg.style()):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=_SHAPE, width_ratios=(1.15, 1))
        places = [generation.number for generation in found]
        for generation in found:
            values = _values(generation.new)
            left.scatter(
                [generation.number] * len(values), values, s=14, color=svg.colour(_NEW[0]), alpha=0.4, lw=0
            )
        _line(left, _NEW, "the new ones, mean", places, [g.mean for g in found])
        _line(left, _ALIVE, "the survivors, mean", places, [g.alive for g in found])
        best = [generation.best for generation in found]
        left.plot(places, best, drawstyle="steps-post", color=svg.colour("ink"), lw=1.3, label="best so far")
        left.set_ylabel("score on the search items")
        _line(right, _NEW, None, places, [g.apart for g in found])
        _line(right, _ALIVE, None, places, [g.alive_apart for g in found])
        right.axhline(_UNRELATED, color=svg.colour("muted"), linewidth=0.9, dashes=(5, 3))
        right.annotate(
            "unrelated", (1, _UNRELATED), xycoords=right.get_yaxis_transform(), ha="right", va="bottom"
        ).set(color=svg.colour("muted"), fontsize=8.5)
        right.set_ylim(0, 1.12 * max([_UNRELATED, *(g.apart or 0.0 for g in found)]))
        right.set_ylabel("mean distance of two adapters")
        for axes in (left, right):
            axes.set_xlim(places[0] - 0.3, max(places[-1], places[0] + 1) + 0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y")
            axes.set_xlabel("generation")
        left.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, handletextpad=0.4)
        figure.subplots_adjust(wspace=0.22)
        return svg.inline(figure, "generations")


def _line(
    axes: Any,
    look: tuple[str, str],
    label: str | None,
    places: Sequence[int],
    values: Sequence[float | None],
) -> None:
    known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    xs, ys = [place for place, _ in known], [value for _, value in known]
    role, marker = look
    axes.plot(xs, ys, color=svg.colour(role), marker=marker, markersize=5, linewidth=1.6, label=label)
