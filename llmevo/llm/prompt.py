"""Prompts: what a language model is told, in a fixed order, from the templates in `prompts/`.

Templates are `string.Template` files; their placeholders are checked when they are loaded. A user's folder
replaces them file by file. The files: `system` (who the model is), `warmstart` and `propose` (the task,
before and after the first result), `contract` (the form of the answer), `repair` (what is added after a
useless answer), `hybrid_state` (what a numerical optimizer beside the model does), `block`, `handles` (what
of a large space is shown), `compact` (all of it in few words, for small models), and `cards/*`: what is known
of a method, its ranges and couplings.

The order is fixed: goal, direction, noise and budget; models, tasks, method and its card; the parameters; the
findings; the optimizer beside; the results from worst to best; failures; the task and the form of the answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from llmevo.errors import GenomeError
from llmevo.llm import Message
from llmevo.llm.blocks import View
from llmevo.llm.digest import Ranked, digest, rank
from llmevo.llm.encode import domain, names
from llmevo.llm.show import (
    around,
    failures,
    quote,
    record,
    roles,
    rows,
    running,
    table,
    turned_away,
)
from llmevo.resources import read
from llmevo.space import Space
from llmevo.trial import Direction, Trial, trained_share

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
            "focus",
            "state",
        }
        | {"contract"}
    ),
    "hybrid_state": frozenset({"base", "share", "record", "around", "running", "turned"}),
    "block": frozenset({"shown", "total"}),
    "handles": frozenset({"shown", "total"}),
    "compact": frozenset({"direction", "table", "history", "n", "contract"}),
    "contract": frozenset({"n", "keys", "why"}),
    "repair": frozenset({"problem"}),
    "cards/lora": frozenset(),
    "cards/merge_linear": frozenset(),
    "cards/merge_slerp": frozenset(),
    "cards/merge_task_vectors": frozenset(),
}
_COMPACT_BEST = 5
_BLANK = re.compile(r"\n\s*\n\s*\n+")
_AVERAGES = ("linear", "multislerp", "nuslerp", "karcher", "model_stock")


def cards(methods: Sequence[str]) -> list[str]:
    """The cards that say what is known of these merge methods."""
    found = {
        "merge_slerp" if m == "slerp" else "merge_linear" if m in _AVERAGES else "merge_task_vectors"
        for m in methods
    }
    return sorted(found)


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
        cards: Which of `cards/` apply: `lora`, `merge_linear`, `merge_slerp`, `merge_task_vectors`.
    """

    goal: str = ""
    tasks: Sequence[str] = ()
    models: Sequence[str] = ()
    method: str = ""
    meanings: Mapping[str, str] = field(default_factory=dict)
    noise: float | None = None
    budget: int | None = None
    cards: Sequence[str] = ()


@final
@dataclass(frozen=True, slots=True)
class Aim:
    """What one call is about.

    Args:
        view: What of the space is shown; None for all.
        strength: The mutation strength in force; None to say nothing of it.
        mean: Whether the proposal is the centre of a batch.
        turn: Number of the call: small batches get their roles in turn.
    """

    view: View | None = None
    strength: float | None = None
    mean: bool = False
    turn: int = 0


@final
class Prompts:
    """The templates, loaded and checked.

    Args:
        folder: A folder whose files of the same name replace ours; None for ours alone.

    Raises:
        GenomeError: A template has an unknown placeholder, or lacks one that the answer depends on; or the
            folder is not there, or has a file that replaces nothing.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._templates: dict[str, string.Template] = {}
        self.hashes: dict[str, str] = {}
        own = {} if folder is None else _own(Path(folder))
        for name, allowed in PLACEHOLDERS.items():
            source = own[name] if name in own else read("prompts", f"{name}.md")
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
        return _BLANK.sub("\n\n", self._templates[name].substitute(values).strip())

    def repair(self, problem: str) -> str:
        """What is added to the task when the first answer was useless."""
        return self._render("repair", problem=problem)

    def messages(
        self,
        space: Space,
        direction: Direction,
        trials: Sequence[Trial],
        ranked: Ranked,
        n: int,
        *,
        context: Context,
        compact: bool,
        aim: Aim | None = None,
    ) -> tuple[Message, ...]:
        """A fresh conversation that asks for `n` proposals.

        Args:
            space: The whole space.
            direction: `maximize` or `minimize`.
            trials: The history.
            ranked: The same, ranked.
            n: Number of proposals.
            context: What else is known.
            compact: In few words, for small models.
            aim: What this call is about; None for the whole space.
        """
        aim = Aim() if aim is None else aim
        view = aim.view
        whole = space
        if view is not None and view.kind != "all":
            space = view.space
            trials = [replace(trial, params=view.down(trial.params)) for trial in trials]
            ranked = rank(trials, direction)
        keys = ",".join(f"{json.dumps(key)}:..." for key in names(space).values())
        why = "" if compact else ',"why":"..."'
        contract = self._render("contract", n=n, keys=keys, why=why)
        if compact:
            return ({"role": "user", "content": self._compact(space, direction, ranked, n, contract)},)
        body = self._full(
            space, direction, trials, ranked, context, aim, n=n, total=len(whole), contract=contract
        )
        return ({"role": "system", "content": self._render("system")}, {"role": "user", "content": body})

    def _full(
        self,
        space: Space,
        direction: Direction,
        trials: Sequence[Trial],
        ranked: Ranked,
        context: Context,
        aim: Aim,
        *,
        n: int,
        total: int,
        contract: str,
    ) -> str:
        """The task in full, for what of the space is shown."""
        view = aim.view
        meanings = {**context.meanings, **(view.meanings if view is not None else {})}
        values: dict[str, object] = {
            "goal": quote(context.goal or "the best score", 300),
            "direction": direction,
            "noise": _noise(ranked, context),
            "budget": _budget(trials, context),
            "background": self._background(context),
            "table": table(space, meanings),
            "failures": failures(space, ranked),
            "n": n,
            "contract": contract,
        }
        if ranked.best is None:
            return self._render("warmstart", **values)
        kind = "all" if view is None else view.kind
        return self._render(
            "propose",
            **values,
            focus="" if kind == "all" else self._render(kind, shown=len(space), total=total),
            digest="\n".join(digest(space, ranked, aim.strength)),
            state=self._state(space, direction, trials, view),
            history=rows(space, ranked.complete, ranked.last, tasks=True),
            roles=roles(n, mean=aim.mean, turn=aim.turn),
        )

    def _compact(self, space: Space, direction: Direction, ranked: Ranked, n: int, contract: str) -> str:
        """The task in few words."""
        return self._render(
            "compact",
            direction=direction,
            table="\n".join(f"{shown}: {domain(space.genes[key])}" for key, shown in names(space).items()),
            history=rows(space, ranked.complete[:_COMPACT_BEST], (), tasks=False),
            n=n,
            contract=contract,
        )

    def _state(self, space: Space, direction: Direction, trials: Sequence[Trial], view: View | None) -> str:
        """What the optimizer beside does; empty if there is none."""
        own = [trial for trial in trials if trial.attrs.get("guest") is False]
        if not own:
            return ""
        turned = [note["params"] for trial in trials for note in trial.attrs.get("turned_away", ())]
        share = float(own[-1].attrs.get("share", 0.0))
        return self._render(
            "hybrid_state",
            base=own[-1].origin.rpartition(":")[2],
            share=f"{1 - share:.0%}",
            record=record(trials, direction),
            around=around(space, trials),
            running=running(space, trials),
            turned=turned_away(space, turned if view is None else [view.down(point) for point in turned]),
        )

    def _background(self, context: Context) -> str:
        lines = []
        for label, items in (("Models", context.models), ("Tasks", context.tasks)):
            if items:
                lines.append(f"{label}: " + ", ".join(quote(item) for item in items[:20]))
        if context.method:
            lines.append(f"Method: {quote(context.method)}")
        for card in context.cards:
            if f"cards/{card}" not in self._templates:
                known = sorted(name[6:] for name in self._templates if name.startswith("cards/"))
                raise GenomeError(f"`cards` may name {', '.join(known)}, but got {card!r}.")
            lines.append(self._render(f"cards/{card}"))
        return "\n".join(lines)


def _own(folder: Path) -> dict[str, str]:
    """The templates in a user's folder, by name."""
    if not folder.is_dir():
        raise GenomeError(f"`prompts` must be a folder, but {str(folder)!r} is none; correct the path.")
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.md")}
    found.pop("README", None)
    strange = sorted(set(found) - set(PLACEHOLDERS))
    if strange:
        raise GenomeError(
            f"`prompts`: {folder / (strange[0] + '.md')} replaces nothing; the prompts are "
            f"{', '.join(PLACEHOLDERS)}; rename or remove it."
        )
    return {name: path.read_text("utf-8") for name, path in found.items()}


def _noise(ranked: Ranked, context: Context) -> str:
    score = ranked.best.score if ranked.best is not None else None
    noise = context.noise if context.noise is not None else (score.stderr if score is not None else None)
    text = f"One standard error of a score is {noise:.2g}: smaller differences mean little. " if noise else ""
    early = [trial for trial in ranked.complete if trial.score is not None and trial.score.rung is not None]
    if early and trained_share(early[0]) is not None:
        text += 'A result with "trained" dropped out after that share of its training and ranks behind '
        text += "those after more. "
    elif early:
        text += 'A result with "items" dropped out after that many items and ranks behind those on more. '
    return text


def _budget(trials: Sequence[Trial], context: Context) -> str:
    if context.budget is None:
        return ""
    return f"Experiments left: {max(context.budget - len(trials), 0)} of {context.budget}."
