"""The last part of a run: which trials are scored on the held-out items, and what that says.

The search chose the winner by its score on the search items, so that score flatters it. The held-out items
were not seen; the table gives each finalist's paired difference to the best parent on them, with a p-value
that allows for the number of finalists, and by how much the search had flattered each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from llmevo.errors import StatsError
from llmevo.llm.ledger import Price, Totals
from llmevo.llm.transcript import FOLDER, spent
from llmevo.proposers import Direction
from llmevo.runner.observer import Row, RunSummary
from llmevo.stats import Interval, holm, paired_difference, paired_p_value
from llmevo.store import HoldoutRow, Store
from llmevo.trial import Score, Trial, best, ranked

EVOLVED = "evolved"
DEFAULT = "default"
_ERROR_RATE = 0.05  # of all the finalists' intervals together (Bonferroni)
_OWN = ("llm", "llm+noise")  # what the model said, as it is or with the strategy's noise
_KINDS = ("baseline", "parent", "uniform", "warm_start", DEFAULT)


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
        complete; then `evolved`, `evolved:2`, ... A trial that dropped out on fewer items is no finalist
        where there is one that answered all.
    """
    chosen = []
    for kind in _KINDS:
        of_kind = [trial for trial in trials[:references] if trial.origin.split(":")[0] == kind]
        chosen += [(trial.origin, trial) for trial in ranked(of_kind, direction)[:1]]
    order = ranked(trials[references:], direction)
    whole = [trial for trial in order if trial.score is not None and trial.score.rung is None]
    for place, trial in enumerate((whole or order)[:finalists], start=1):
        chosen.append((EVOLVED if place == 1 else f"{EVOLVED}:{place}", trial))
    return chosen


def summarise(store: Store, ending: tuple[int, str] | None = None, elapsed: float = 0.0) -> RunSummary:
    """A run as its store has it, at any time of its life; also while another process drives it.

    Args:
        store: Opened, readonly or not.
        ending: Exit code and reason; None for what the last sitting left, if it came to its end.
        elapsed: Wall time of this sitting, in seconds.
    """
    trials = tuple(store.trials())
    if ending is None:
        last = next((e for e in reversed(store.events) if e["kind"] in ("started", "ended")), None)
        over = last is not None and last["kind"] == "ended"
        ending = (last["exit_code"], last["reason"]) if last and over else (3, "it is running, or was killed")
    exit_code, reason = ending
    search = store.genome.search
    references = trials[: store.meta("references", 0)]
    planned = plan(
        trials,
        references=len(references),
        direction=search.direction,
        finalists=store.genome.evaluate.finalists,
    )
    intended, proposed = attributed(trials)
    seconds: Counter[str] = Counter()
    for trial in trials:
        seconds.update({phase: value for phase, value in trial.cost.items() if isinstance(value, float)})
    weights = store.meta("pipeline", {}).get("weights", {})
    return RunSummary(
        run_dir=store.run_dir,
        exit_code=exit_code,
        reason=reason,
        resumable=exit_code != 0,
        best=best(trials, search.direction),
        evolved=next((trial for label, trial in planned if label == EVOLVED), None),
        trials=trials,
        references=references,
        table=tuple(table(weights, planned, store.holdout(), search.direction)) if exit_code == 0 else (),
        origins=dict(Counter(trial.origin for trial in trials)),
        seconds=dict(seconds),
        elapsed=elapsed,
        money=_money(store),
        intended=intended,
        proposed=proposed,
    )


def _money(store: Store) -> Totals | None:
    folder = store.run_dir / FOLDER
    spec = store.genome.llm.price
    price = None if spec is None else Price(**spec.model_dump())
    return spent(folder, price) if folder.is_dir() else None


def attributed(trials: Iterable[Trial]) -> tuple[int, int]:
    """How many trials a language model was to propose, and how many are its own.

    A stand-in during an outage, a fallback after a useless answer, a mutation of a point that the model
    repeated, and the base's point in place of one that was turned away were meant to be the model's, and are
    not. Points around the best trial in `mean` mode are part of the method and count for neither.
    """
    intended = proposed = 0
    for trial in trials:
        kind = trial.origin.split(":")[0]
        turned_away = trial.attrs.get("turned_away", [])
        intended += sum(str(note["origin"]).startswith(("llm", "fallback")) for note in turned_away)
        own = trial.origin in _OWN
        proposed += own
        intended += own or kind in ("outage", "fallback") or trial.origin == "llm+mutated"
    return intended, proposed


def table(
    weights: Mapping[str, float],
    planned: Sequence[tuple[str, Trial]],
    holdout: Sequence[HoldoutRow],
    direction: Direction,
) -> list[Row]:
    """The planned trials that were scored, each with its difference to the rival.

    That is the best parent, or with training the default hyperparameters: what one has without a search.

    Args:
        weights: Of the terms of the score, by their key in `Score.items`.
        planned: From `plan`.
        holdout: From `Store.holdout`.
        direction: Of the search's score.
    """
    scored = {row.number: row for row in holdout}
    finalists = sum(label.startswith(EVOLVED) for label, _ in planned)
    default = any(label == DEFAULT for label, _ in planned)
    rivals = [
        trial.number for label, trial in planned if (label == DEFAULT if default else _is_parent(label))
    ]
    rival = next((scored[number].score for number in rivals if number in scored), None)
    rows = []
    for label, trial in planned:
        row = scored.get(trial.number)
        if row is None:
            continue
        level = 1 - _ERROR_RATE / (finalists if label.startswith(EVOLVED) else 1)
        compared = label != DEFAULT and (default or not _is_parent(label))
        interval = _difference(row.score, rival, weights, level) if compared else None
        optimism = _optimism(trial.score, row.score, direction)
        rows.append(Row(label, trial, row.score, interval, row.error, optimism=optimism))
    return _tested(rows, rival, weights)


def _tested(rows: Sequence[Row], rival: Score | None, weights: Mapping[str, float]) -> list[Row]:
    """The rows with the finalists' p-values, which together err no more often than one would."""
    found = {
        place: paired_p_value(row.score.items, rival.items, weights=weights)
        for place, row in enumerate(rows)
        if row.label.startswith(EVOLVED) and row.score and rival and row.interval is not None
    }
    adjusted = dict(zip(found, holm(list(found.values())), strict=True))
    return [replace(row, p_value=adjusted.get(place)) for place, row in enumerate(rows)]


def _is_parent(label: str) -> bool:
    return label.startswith("parent:")


def _optimism(search: Score | None, held_out: Score | None, direction: Direction) -> float | None:
    if search is None or held_out is None:
        return None
    gap = search.value - held_out.value
    return gap if direction == "maximize" else -gap


def _difference(
    score: Score | None, parent: Score | None, weights: Mapping[str, float], level: float
) -> Interval | None:
    if score is None or parent is None:
        return None
    try:
        return paired_difference(score.items, parent.items, weights=weights, level=level)
    except StatsError:  # a score without items has no pairs
        return None
