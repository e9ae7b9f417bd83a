"""The report's drawings of the models that were scored on the held-out items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmevo.report import svg
from llmevo.report.figures import WIDTH, Estimate, far, series, short
from llmevo.report.words import number

_LEFT, _RIGHT = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"


def intervals(scores: Sequence[Estimate], differences: Sequence[Estimate], against: str, winner: str) -> str:
    """Held-out scores beside their paired differences to one of them, each with its 95 % interval.

    Args:
        scores: One row each, from top to bottom.
        differences: By the same labels; rows without one stay empty.
        against: Label of what the differences are to.
        winner: Label of the row to bring out.
    """
    pyplot = svg.pyplot()
    rows = {estimate.label: len(scores) - 1 - index for index, estimate in enumerate(scores)}
    with pyplot.rc_context(svg.style()):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(WIDTH, 0.36 * len(scores) + 0.9), sharey=True, width_ratios=(1.15, 1)
        )
        for axes, estimates, always in ((left, scores, ()), (right, differences, (0.0,))):
            near = _limited(axes, estimates, always)
            for estimate in estimates:
                if estimate not in near:
                    _beyond(axes, estimate.value, rows[estimate.label])
                    continue
                role = "ink" if estimate.label == winner else "muted"
                row = rows[estimate.label]
                if estimate.low is not None and estimate.high is not None:
                    axes.plot([estimate.low, estimate.high], [row, row], color=svg.colour(role), linewidth=2)
                axes.scatter([estimate.value], [row], s=36, color=svg.colour(role), zorder=3)
            axes.grid(axis="x")
            axes.locator_params(axis="x", nbins=6)
        left.set_yticks(list(rows.values()), [short(label, 34) for label in rows])
        left.tick_params(axis="y", labelcolor=svg.colour("ink"))
        left.set_ylim(-0.6, len(scores) - 0.4)
        left.set_xlabel("score on held-out items")
        right.axvline(0, color=svg.colour("ink"), linewidth=1)
        right.set_xlabel(f"paired difference to {short(against, 28)}")
        figure.subplots_adjust(wspace=0.08)
        return svg.inline(figure, "holdout")


def _limited(axes: Any, estimates: Sequence[Estimate], always: Sequence[float]) -> list[Estimate]:
    """Those that fit on one axis; if some do not, the axis ends at those that do, and at what it always has.

    The untrained model may be so far off that what was trained could not be told apart beside it.
    """
    near = sorted(estimates, key=lambda estimate: estimate.value)
    while len(near) + len(always) > 2 and far(near[0].value, [*_ends(near[1:]), *always]):
        del near[0]
    while len(near) + len(always) > 2 and far(near[-1].value, [*_ends(near[:-1]), *always]):
        del near[-1]
    if len(near) < len(estimates):
        ends = [*_ends(near), *always]
        margin = 0.15 * (max(ends) - min(ends))
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
    return near


def _ends(estimates: Sequence[Estimate]) -> list[float]:
    return [end for e in estimates for end in (e.low, e.value, e.high) if end is not None]


def _beyond(axes: Any, value: float, row: int) -> None:
    """Name a value that is beyond an end of the axis."""
    left, right = axes.get_xlim()
    below = value < left
    text = f"{_LEFT} {number(value)}" if below else f"{number(value)} {_RIGHT}"
    axes.annotate(
        text,
        (left if below else right, row),
        ha="left" if below else "right",
        va="center",
        color=svg.colour("muted"),
        # It may lie on the line at zero.
        bbox={"facecolor": svg.colour("paper"), "edgecolor": "none", "pad": 1.0},
        zorder=4,
    )


def tasks(scores: Mapping[str, Mapping[str, float]], evolved: str, uniform: str, name: str = "tasks") -> str:
    """What each model scored on each task: a row a task, a dot a model.

    Args:
        scores: `{model: {task: score}}`.
        evolved: The model to bring out.
        uniform: The uniform merge's name.
        name: Of the drawing; ids in the SVG start with it.
    """
    pyplot = svg.pyplot()
    names = list(dict.fromkeys(task for by_task in scores.values() for task in by_task))
    with pyplot.rc_context(svg.style()):
        figure, axes = pyplot.subplots(figsize=(WIDTH, 0.42 * len(names) + 1.0))
        for row, task in enumerate(reversed(names)):
            values = [by_task[task] for by_task in scores.values() if task in by_task]
            axes.plot([min(values), max(values)], [row, row], color=svg.colour("grid"), linewidth=3, zorder=1)
        roles = iter(("blue", "green", "purple", "yellow", "vermillion"))
        markers = iter("osDvP")
        for model, by_task in scores.items():
            rows = [row for row, task in enumerate(reversed(names)) if task in by_task]
            values = [by_task[task] for task in reversed(names) if task in by_task]
            if model == evolved:
                role, marker, size = "ink", "^", 70
            elif model == uniform:
                role, marker, size = "muted", "|", 110
            elif model == "baseline":
                role, marker, size = "muted", "o", 34
            elif model == "default":
                (role, marker), size = series(model), 34
            else:
                role, marker, size = next(roles, "muted"), next(markers, "o"), 34
            axes.scatter(
                values, rows, s=size, marker=marker, color=svg.colour(role), label=short(model, 30), zorder=3
            )
        axes.set_yticks(range(len(names)), [short(name, 34) for name in reversed(names)])
        axes.tick_params(axis="y", labelcolor=svg.colour("ink"))
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(axis="x")
        axes.set_xlabel("score")
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=min(4, len(scores)), handletextpad=0.3
        )
        return svg.inline(figure, name)
