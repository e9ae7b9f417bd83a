"""Prompts: what a language model is told, in a fixed order, from the templates in `prompts/`.

Templates are `string.Template` files; their placeholders are checked when they are loaded. Names, goals and
error messages come from files and programs that somebody else may have written, so they are quoted as JSON
strings and cut.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from llmevo.errors import GenomeError
from llmevo.llm import Message
from llmevo.llm.digest import Ranked, digest, digits
from llmevo.llm.encode import domain, encode, level_key, names, text
from llmevo.resources import read
from llmevo.space import Space
from llmevo.trial import Trial

PLACEHOLDERS: dict[str, frozenset[str]] = {
    "system": frozenset(),
    "warmstart": frozenset(
        {"goal", "direction", "noise", "budget", "background", "table", "failures", "n", "contract"}
    ),
    "propose": frozenset(
        {
            "goal",
            "direction",
            "noise",
            "budget",
            "background",
            "table",
            "digest",
            "history",
            "failures",
            "n",
            "roles",
        }
        | {"contract"}
    ),
    "compact": frozenset({"direction", "table", "history", "n", "contract"}),
    "contract": frozenset({"n", "keys", "why"}),
    "repair": frozenset({"problem"}),
}
_BEST, _LAST, _FAILED = 8, 4, 3
_COMPACT_BEST = 5
_ROLES = ("refine the best", "combine two good results", "test one value that was not tried")


@final
@dataclass(frozen=True, slots=True)
class Context:
    """What the runner knows of a search beyond its space.

    Args:
        goal: What the score measures, in a sentence.
        tasks: Names of the tasks behind the score.
        models: Names of the models that are merged or trained.
        method: The merge method or training method.
        meanings: What a gene does, by gene name.
        noise: One standard error of a score; None to take the incumbent's own.
        budget: Trials of the whole search; None if unknown.
    """

    goal: str = ""
    tasks: Sequence[str] = ()
    models: Sequence[str] = ()
    method: str = ""
    meanings: Mapping[str, str] = field(default_factory=dict)
    noise: float | None = None
    budget: int | None = None


def quote(untrusted: str, longest: int = 120) -> str:
    """Somebody else's text as one JSON string of bounded length."""
    line = " ".join(untrusted.split())
    return json.dumps(line if len(line) <= longest else line[: longest - 1] + "…", ensure_ascii=False)


@final
class Prompts:
    """The templates, loaded and checked.

    Args:
        folder: A folder whose files of the same name replace ours; None for ours alone.

    Raises:
        GenomeError: A template has an unknown placeholder, or lacks one that the answer depends on.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._templates: dict[str, string.Template] = {}
        self.hashes: dict[str, str] = {}
        for name, allowed in PLACEHOLDERS.items():
            own = None if folder is None else Path(folder) / f"{name}.md"
            source = (
                own.read_text("utf-8") if own is not None and own.is_file() else read("prompts", f"{name}.md")
            )
            template = string.Template(source)
            used = set(template.get_identifiers()) if template.is_valid() else None
            if used is None or not used <= allowed or ("contract" in allowed and "contract" not in used):
                raise GenomeError(
                    f"the prompt `{name}.md` may use the placeholders {sorted(allowed)} and must use "
                    f"$contract if that is one of them (write $$ for a dollar sign), but it uses "
                    f"{sorted(used or ())}."
                )
            self._templates[name] = template
            self.hashes[name] = hashlib.sha256(source.encode()).hexdigest()

    @property
    def digest(self) -> str:
        """One short hash of all templates, to tell runs with other prompts apart."""
        return hashlib.sha256("".join(self.hashes.values()).encode()).hexdigest()[:12]

    def _render(self, name: str, **values: object) -> str:
        return self._templates[name].substitute(values).strip()

    def repair(self, problem: str) -> str:
        """What is added to the task when the first answer was useless."""
        return self._render("repair", problem=problem)

    def messages(
        self,
        space: Space,
        direction: str,
        trials: Sequence[Trial],
        ranked: Ranked,
        n: int,
        *,
        context: Context,
        compact: bool,
    ) -> tuple[Message, ...]:
        """A fresh conversation that asks for `n` proposals."""
        keys = ",".join(f"{json.dumps(key)}:..." for key in names(space).values())
        why = "" if compact else ',"why":"..."'
        contract = self._render("contract", n=n, keys=keys, why=why)
        if compact:
            rows = _rows(space, ranked.complete[:_COMPACT_BEST], (), tasks=False)
            table = "\n".join(f"{shown}: {domain(space.genes[name])}" for name, shown in names(space).items())
            body = self._render(
                "compact", direction=direction, table=table, history=rows, n=n, contract=contract
            )
            return ({"role": "user", "content": body},)
        values: dict[str, object] = {
            "goal": quote(context.goal or "the best score", 300),
            "direction": direction,
            "noise": _noise(ranked, context),
            "budget": _budget(trials, context),
            "background": _background(context),
            "table": _table(space, context),
            "failures": _failures(space, ranked),
            "n": n,
            "contract": contract,
        }
        if ranked.best is None:
            body = self._render("warmstart", **values)
        else:
            values["digest"] = "\n".join(digest(space, ranked))
            values["history"] = _rows(space, ranked.complete, ranked.last[-_LAST:], tasks=True)
            values["roles"] = _roles(n)
            body = self._render("propose", **values)
        return ({"role": "system", "content": self._render("system")}, {"role": "user", "content": body})


def _noise(ranked: Ranked, context: Context) -> str:
    score = ranked.best.score if ranked.best is not None else None
    noise = context.noise if context.noise is not None else (score.stderr if score is not None else None)
    return f"One standard error of a score is {noise:.2g}: smaller differences mean little. " if noise else ""


def _budget(trials: Sequence[Trial], context: Context) -> str:
    if context.budget is None:
        return ""
    return f"Experiments left: {max(context.budget - len(trials), 0)} of {context.budget}."


def _background(context: Context) -> str:
    lines = []
    for label, items in (("Models", context.models), ("Tasks", context.tasks)):
        if items:
            lines.append(f"{label}: " + ", ".join(quote(item) for item in items[:20]))
    if context.method:
        lines.append(f"Method: {quote(context.method)}")
    return "\n".join(lines)


def _table(space: Space, context: Context) -> str:
    lines = []
    for name, shown in names(space).items():
        line = f"- {shown}: {domain(space.genes[name])}"
        condition = space.conditions.get(name)
        if condition is not None:
            values = ", ".join(json.dumps(value) for value in condition.values)
            line += f"; null unless {names(space)[condition.gene]} is {values}"
        if shown != name:
            line += f"; called {quote(name)}"
        meaning = context.meanings.get(name)
        lines.append(f"{line}; {quote(meaning, 200)}" if meaning else line)
    return "\n".join(lines)


def _rows(space: Space, complete: Sequence[Trial], last: Sequence[Trial], *, tasks: bool) -> str:
    """The best distinct points and the last ones, from worst to best, one JSON object a line."""
    chosen: list[tuple[int, Trial]] = []
    seen: set[str] = set()
    recent = {trial.number for trial in last}
    best = 0
    for place, trial in enumerate(complete):  # best first
        key = level_key(space, trial.params)
        if key in seen or not (best < _BEST or trial.number in recent):
            continue
        seen.add(key)
        best += 1
        chosen.append((place + 1, trial))
    precision = digits([trial.value or 0.0 for _, trial in chosen])
    lines = []
    for place, trial in reversed(chosen):
        row = f'{{"rank":{place},"score":{trial.value:.{precision}g}'
        if tasks and trial.score is not None and len(trial.score.items) > 1:
            means = {
                name[:40]: round(sum(xs) / len(xs), 4) for name, xs in trial.score.items.items() if len(xs)
            }
            row += f',"tasks":{json.dumps(means, separators=(",", ":"))}'
        lines.append(f'{row},"genome":{text(encode(space, trial.params))}}}')
    return "\n".join(lines)


def _failures(space: Space, ranked: Ranked) -> str:
    if not ranked.failed:
        return ""
    lines = [
        f"- {text(encode(space, trial.params))}: {quote(trial.error or 'unknown')}"
        for trial in ranked.failed[-_FAILED:]
    ]
    return "\nThese failed:\n" + "\n".join(lines) + "\n"


def _roles(n: int) -> str:
    return "\n".join(f"Proposal {i + 1}: {_ROLES[i % len(_ROLES)]}." for i in range(min(n, 12)))
