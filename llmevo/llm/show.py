"""Pieces of a prompt: the parameter table, the rows of results, failures, and what the optimizer beside does.

Names, goals and error messages come from files and programs that somebody else may have written, so they are
quoted as JSON strings and cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from llmevo.llm.digest import Ranked, digits
from llmevo.llm.encode import LEVELS, domain, encode, level_key, names, text
from llmevo.space import Categorical, Space
from llmevo.strength import improvements
from llmevo.trial import Direction, State, Trial, trained_share

_BEST, _LAST, _FAILED = 8, 4, 3
_ROLES = ("refine the best", "combine two good results", "test one value that was not tried")
_RECORD = 10  # trials
_TURNED = 2
_RUNNING = 4


def quote(untrusted: str, longest: int = 120) -> str:
    """Somebody else's text as one JSON string of bounded length."""
    line = " ".join(untrusted.split())
    return json.dumps(line if len(line) <= longest else line[: longest - 1] + "…", ensure_ascii=False)


def table(space: Space, meanings: Mapping[str, str]) -> str:
    """One line for each parameter: its values, its condition, its meaning."""
    lines = []
    for name, shown in names(space).items():
        line = f"- {shown}: {domain(space.genes[name])}"
        condition = space.conditions.get(name)
        if condition is not None:
            values = ", ".join(json.dumps(value) for value in condition.values)
            line += f"; null unless {names(space)[condition.gene]} is {values}"
        if shown != name:
            line += f"; called {quote(name)}"
        meaning = meanings.get(name)
        lines.append(f"{line}; {quote(meaning, 200)}" if meaning else line)
    return "\n".join(lines)


def rows(
    space: Space, complete: Sequence[Trial], last: Sequence[Trial], *, tasks: bool, most: int = _BEST
) -> str:
    """The best distinct points and the last ones, from worst to best, one JSON object a line.

    A score that does not rest on all items says on how many.
    """
    chosen: list[tuple[int, Trial]] = []
    seen: set[str] = set()
    recent = {trial.number for trial in last[-_LAST:]}
    best = 0
    for place, trial in enumerate(complete):  # best first
        key = level_key(space, trial.params)
        if key in seen or not (best < most or trial.number in recent):
            continue
        seen.add(key)
        best += 1
        chosen.append((place + 1, trial))
    precision = digits([trial.value or 0.0 for _, trial in chosen])
    lines = []
    for place, trial in reversed(chosen):
        row = f'{{"rank":{place},"score":{trial.value:.{precision}g}'
        if trial.score is not None and trial.score.rung is not None:
            share = trained_share(trial)
            row += f',"items":{trial.score.count}' if share is None else f',"trained":{share:.2g}'
        if tasks and trial.score is not None and len(trial.score.items) > 1:
            means = {
                name[:40]: round(sum(xs) / len(xs), 4) for name, xs in trial.score.items.items() if len(xs)
            }
            row += f',"tasks":{json.dumps(means, separators=(",", ":"))}'
        lines.append(f'{row},"genome":{text(encode(space, trial.params))}}}')
    return "\n".join(lines)


def failures(space: Space, ranked: Ranked) -> str:
    """The last failed points, each with its reason."""
    if not ranked.failed:
        return ""
    lines = [
        f"- {text(encode(space, trial.params))}: {quote(trial.error or 'unknown')}"
        for trial in ranked.failed[-_FAILED:]
    ]
    return "\nThese failed:\n" + "\n".join(lines) + "\n"


def roles(n: int, *, mean: bool, turn: int) -> str:
    """What each proposal is for."""
    if mean:
        return "Proposal 1: the centre around which the next experiments will be drawn."
    # A batch of three or more starts with a refinement; with one proposal a call, the roles alternate.
    first = 0 if n >= len(_ROLES) else turn * n
    return "\n".join(f"Proposal {i + 1}: {_ROLES[(first + i) % len(_ROLES)]}." for i in range(min(n, 12)))


def record(trials: Sequence[Trial], direction: Direction) -> str:
    """How often the optimizer's and the model's last experiments improved on the best."""
    won = improvements(trials, direction)
    counts = []
    for guest in (False, True):
        mine = [
            hit
            for trial, hit in zip(trials, won, strict=True)
            if trial.attrs.get("guest") is guest and trial.state is not State.PENDING
        ][-_RECORD:]
        counts.append(f"{sum(mine)} of the last {len(mine)}")
    return f"Experiments that improved on the best: {counts[0]} of the optimizer, {counts[1]} of yours."


def around(space: Space, trials: Sequence[Trial]) -> str:
    """Where the optimizer's last points lie, for each numeric gene."""
    mine = [trial for trial in trials if trial.attrs.get("guest") is False and trial.value is not None]
    if len(mine) < 3:
        return ""
    mine = mine[-_RECORD:]
    units = LEVELS * np.array([space.to_unit(trial.params) for trial in mine])
    parts = []
    for index, (name, shown) in enumerate(names(space).items()):
        on = units[[space.is_active(name, trial.params) for trial in mine], index]
        if len(on) and not isinstance(space.genes[name], Categorical):
            parts.append(f"{shown} {on.mean():.0f}±{on.std():.0f}")
    return "In percent of each axis its last points lie at " + ", ".join(parts) + ".\n" if parts else ""


def running(space: Space, trials: Sequence[Trial]) -> str:
    """The optimizer's points that are not told yet."""
    pending = [t for t in trials if t.state is State.PENDING and t.attrs.get("guest") is False]
    lines = [text(encode(space, trial.params)) for trial in pending[:_RUNNING]]
    return "It will run these anyway:\n" + "\n".join(lines) + "\n" if lines else ""


def turned_away(space: Space, points: Sequence[Mapping[str, object]]) -> str:
    """The model's last points that were not worth an evaluation."""
    lines = [text(encode(space, point)) for point in points[-_TURNED:]]  # type: ignore[arg-type]
    if not lines:
        return ""
    said = "Not run, since whatever lay that far from the best did badly:"
    return said + "\n" + "\n".join(lines) + "\n"
