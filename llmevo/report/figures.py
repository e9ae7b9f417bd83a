"""The report's figures, drawn by matplotlib; each series has a colour and a marker of its own.

What is best, or came out of the search, is drawn in ink in all of them, and what it is held against is muted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from llmevo.report import svg
from llmevo.report.words import number
from llmevo.trial import State, Trial

_SERIES: dict[str, tuple[str, str]] = {  # family of origins -> role, marker
    "cma": ("blue", "o"),
    "llm": ("vermillion", "^"),
    "ga": ("green", "s"),
    "population": ("green", "o"),
    "sobol": ("purple", "D"),
    "random": ("muted", "o"),
    "warm_start": ("sky", "P"),
    "enqueued": ("sky", "P"),
    "default": ("sky", "X"),
    "fallback": ("yellow", "v"),
}
REFERENCES = ("baseline", "parent", "uniform")
WIDTH = 9.6
_CELLS_IN_ROW = 3
_MAX_CELLS = 12
_FAR = 6.0  # times the range of the others; what is farther off is named at the edge and not drawn to scale
_WIDE = 20.0  # times the least value is the largest of a gene that is drawn on a logarithmic axis
_DOWN, _UP = "\N{DOWNWARDS ARROW}", "\N{UPWARDS ARROW}"


@final
@dataclass(frozen=True, slots=True)
class Estimate:
    """A labelled score with its interval.

    Args:
        label: What was scored.
        value: Its score.
        low: Lower end of the 95 % interval, or None.
        high: Upper end, or None.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None


def family(origin: str) -> str:
    """The origin without its particulars: `llm+mutated` is of the family `llm`, `parent:x` of `parent`."""
    return re.split(r"[:+]", origin, maxsplit=1)[0]


def series(name: str) -> tuple[str, str]:
    """Role and marker of a family of origins."""
    return _SERIES.get(name, ("yellow", "X"))


def far(value: float, others: Sequence[float]) -> bool:
    """Whether a value would flatten the others if it were drawn to their scale."""
    if len(set(others)) < 2:
        return False
    low, high = min(others), max(others)
    return value < low - _FAR * (high - low) or value > high + _FAR * (high - low)


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions near `values`, in their order, at least `gap` apart, so that labels do not collide."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    placed = [values[index] for index in order]
    for _ in range(100):
        moved = False
        for left in range(len(placed) - 1):
            lack = gap - (placed[left + 1] - placed[left])
            if lack > 1e-9 * max(1.0, abs(gap)):
                placed[left] -= lack / 2
                placed[left + 1] += lack / 2
                moved = True
        if not moved:
            break
    result = [0.0] * len(values)
    for index, value in zip(order, placed, strict=True):
        result[index] = value
    return result


def _best_so_far(trials: Sequence[Trial], maximize: bool) -> tuple[list[int], list[float]]:
    """The best score on all items after each trial that has one."""
    pick = max if maximize else min
    numbers: list[int] = []
    values: list[float] = []
    for trial in trials:
        if trial.score is not None and trial.score.rung is None:
            values.append(trial.score.value if not values else pick(values[-1], trial.score.value))
            numbers.append(trial.number)
    return numbers, values


def progress(trials: Sequence[Trial], references: Sequence[Estimate], maximize: bool) -> str:
    """Score over trials: a dot a trial, the best so far as a staircase, references as lines.

    Args:
        trials: The search's trials, by number; references among them are not drawn as dots.
        references: Lines with a label at their right end.
        maximize: The direction.
    """
    pyplot = svg.pyplot()
    shown = [trial for trial in trials if family(trial.origin) not in REFERENCES]
    with pyplot.rc_context(svg.style()):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 4.0))
        for name in dict.fromkeys(family(trial.origin) for trial in shown):
            points = [trial for trial in shown if family(trial.origin) == name and trial.score is not None]
            if points:
                _dots(axes, name, points)
        numbers, values = _best_so_far(shown, maximize)
        if values:
            axes.plot(
                [*numbers, trials[-1].number + 0.6],
                [*values, values[-1]],
                drawstyle="steps-post",
                color=svg.colour("ink"),
                linewidth=1.3,
                label="best so far",
                zorder=2.5,
            )
        first = shown[0].number if shown else 0
        last = trials[-1].number if trials else 1
        axes.set_xlim(first - 0.8, max(last, first + 1) + 0.8)
        values = [trial.value for trial in shown if trial.value is not None]
        _limits(axes, values + [line.value for line in references if not far(line.value, values)])
        _failures(axes, shown)
        _reference_lines(axes, references)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        axes.set_xlabel("trial")
        axes.set_ylabel("score on the search items")
        if shown:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=8, handletextpad=0.4)
        return svg.inline(figure, "progress")


def _dots(axes: Any, name: str, points: Sequence[Trial]) -> None:
    role, marker = series(name)
    numbers = [trial.number for trial in points]
    values = [trial.score.value for trial in points if trial.score is not None]
    # A dropout's error bar is long and says little; it would hide the others.
    errors = [
        (trial.score.stderr or 0.0) if trial.score.rung is None else 0.0
        for trial in points
        if trial.score is not None
    ]
    sizes = [_size(trial, 32, 10) for trial in points if trial.score is not None]
    if any(errors):
        axes.errorbar(
            numbers, values, errors, fmt="none", ecolor=svg.colour(role), elinewidth=0.8, alpha=0.3, zorder=2
        )
    axes.scatter(
        numbers,
        values,
        s=sizes,
        marker=marker,
        color=svg.colour(role),
        edgecolor=svg.colour("paper"),
        linewidth=0.6,
        label=name,
        zorder=3,
    )


def _size(trial: Trial, whole: float, few: float) -> float:
    """A mark's area: `few` for a score on fewer items than all."""
    return whole if trial.score is None or trial.score.rung is None else few


def _limits(axes: Any, values: Sequence[float]) -> None:
    """Make room for every value, and for error bars only as far as they do not flatten the rest."""
    if not values:
        return
    low, high = min(values), max(values)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 0.5
    axes.set_ylim(low - 1.6 * margin, high + margin)


def _failures(axes: Any, trials: Sequence[Trial]) -> None:
    failed = [trial.number for trial in trials if trial.state is State.FAILED]
    if failed:
        axes.scatter(
            failed,
            [0.025] * len(failed),
            transform=axes.get_xaxis_transform(),
            marker="x",
            s=20,
            linewidth=1.2,
            color=svg.colour("muted"),
            label="failed",
            zorder=3,
        )


def _reference_lines(axes: Any, references: Sequence[Estimate]) -> None:
    bottom, top = axes.get_ylim()
    ends = [min(max(reference.value, bottom), top) for reference in references]
    places = _spread(ends, 0.055 * (top - bottom))
    for reference, end, place in zip(references, ends, places, strict=True):
        label = short(reference.label, 26)
        if end == reference.value:
            axes.axhline(end, color=svg.colour("muted"), linewidth=0.9, dashes=(5, 3), zorder=1.5)
        else:  # it would flatten all others
            label += f" {number(reference.value)} {_DOWN if end == bottom else _UP}"
        axes.annotate(
            label,
            (1.0, end),
            (1.012, (place - bottom) / (top - bottom)),
            xycoords=axes.get_yaxis_transform(),
            textcoords="axes fraction",
            va="center",
            color=svg.colour("muted"),
            fontsize=8.5,
        )


def short(text: str, length: int) -> str:
    """The end of a long name, where the models of one family differ."""
    return text if len(text) <= length else "…" + text[1 - length :]


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rho of (x, y) pairs; 0 where one side is constant."""
    import numpy as np

    if len(pairs) < 3:
        return 0.0
    sides = np.array(pairs, dtype=float).T
    if np.ptp(sides, axis=1).min() == 0:
        return 0.0
    ranks = [np.array([(side < x).sum() + (side <= x).sum() for x in side]) for side in sides]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _heights(trials: Sequence[Trial], maximize: bool) -> list[float]:
    """Numbers in the order of the scores, those on fewer items behind all on more."""
    scores = [trial.score for trial in trials if trial.score is not None]
    rungs = [math.inf if score.rung is None else score.rung for score in scores]
    keys = [(rung if maximize else -rung, s.value) for rung, s in zip(rungs, scores, strict=True)]
    places = {key: float(place) for place, key in enumerate(sorted(set(keys)))}
    return [places[key] for key in keys]


def _genes(
    trials: Sequence[Trial], maximize: bool
) -> list[tuple[str, list[tuple[Any, float, Trial]], float]]:
    """Genes that vary, with (value, score, trial) of each trial; the most telling first."""
    found: list[tuple[str, list[tuple[Any, float, Trial]], float]] = []
    for name in dict.fromkeys(name for trial in trials for name in trial.params):
        points: list[tuple[Any, float, Trial]] = [
            (trial.params[name], trial.score.value, trial)
            for trial in trials
            if trial.score is not None and trial.params.get(name) is not None
        ]
        if len({str(value) for value, _, _ in points}) < 2:
            continue
        numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v, _, _ in points)
        heights = _heights([trial for *_, trial in points], maximize)
        pairs = [(value, height) for (value, *_), height in zip(points, heights, strict=True)]
        rho = _rank_correlation(pairs) if numeric else math.nan
        found.append((name, points, rho))
    return sorted(found, key=lambda gene: -abs(gene[2]) if gene[2] == gene[2] else -2.0)


def parameters(trials: Sequence[Trial], best: Trial | None, maximize: bool) -> tuple[str, int, int]:
    """Every gene's value against the score, as small multiples; the best trial ringed, dropouts small.

    Returns:
        The SVG, how many genes it shows, and how many vary. Genes whose value goes with the score (by rank)
        come first; choices come before numbers.
    """
    pyplot = svg.pyplot()
    genes = _genes(trials, maximize)
    shown = genes[:_MAX_CELLS]
    if not shown:
        return "", 0, 0
    columns = min(_CELLS_IN_ROW, len(shown))
    rows = math.ceil(len(shown) / columns)
    with pyplot.rc_context({**svg.style(), "font.size": 8.5}):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(WIDTH, 1.8 * rows + 0.3), sharey=True, squeeze=False
        )
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, (name, points, rho) in zip(grid.flat, shown, strict=False):
            _cell(axes, points, best)
            axes.set_title(short(name, 26), fontsize=8.5, loc="left")
            if not math.isnan(rho):
                text = f"r {rho:+.2f}".replace("-", "\N{MINUS SIGN}")
                axes.set_title(text, fontsize=8.5, loc="right", color=svg.colour("muted"))
            axes.grid(axis="y")
        figure.subplots_adjust(hspace=0.55, wspace=0.08)
        return svg.inline(figure, "parameters"), len(shown), len(genes)


def _cell(axes: Any, points: Sequence[tuple[Any, float, Trial]], best: Trial | None) -> None:
    values: list[Any] = [value for value, _, _ in points]
    if any(isinstance(value, (str, bool)) for value in values):
        choices = sorted({str(value) for value in values})
        values = [choices.index(str(value)) for value in values]
        axes.set_xticks(range(len(choices)), [short(choice, 12) for choice in choices])
        axes.set_xlim(-0.5, len(choices) - 0.5)
    elif min(values) > 0 and max(values) > _WIDE * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    else:
        axes.locator_params(axis="x", nbins=4)
    for name in dict.fromkeys(family(trial.origin) for _, _, trial in points):
        role, marker = series(name)
        xs = [x for x, (_, _, trial) in zip(values, points, strict=True) if family(trial.origin) == name]
        ys = [score for _, score, trial in points if family(trial.origin) == name]
        sizes = [_size(trial, 11, 4) for _, _, trial in points if family(trial.origin) == name]
        axes.scatter(xs, ys, s=sizes, marker=marker, color=svg.colour(role), alpha=0.75, linewidth=0)
    for x, (_, score, trial) in zip(values, points, strict=True):
        if best is not None and trial.number == best.number:
            axes.scatter(
                [x],
                [score],
                s=70,
                facecolor="none",
                edgecolor=svg.colour("ink"),
                linewidth=1.2,
                clip_on=False,
            )
    axes.locator_params(axis="y", nbins=4)
