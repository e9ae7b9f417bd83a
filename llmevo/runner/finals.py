"""The last part of a run: which trials are scored on the held-out items, and what that says.

The search chose the winner by its score on the search items, so that score flatters it. The held-out items
were not seen; the table gives each finalist's paired difference to the best parent on them, with a p-value
that allows for the number of finalists, and by how much the search had flattered each row. Trainings are
compared by their means over seeds, and the intervals allow for other seeds too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from llmevo.errors import StatsError
from llmevo.genome import Genome
from llmevo.llm.ledger import Price, Totals
from llmevo.llm.transcript import FOLDER, spent
from llmevo.proposers import Direction
from llmevo.runner.observer import Row, RunSummary
from llmevo.runner.reruns import Outcomes, averaged, best_first, best_of, scores_of, spread
from llmevo.stats import Interval, Spread, holm, paired_difference, paired_over_seeds, paired_p_value
from llmevo.store import HoldoutRow, Store
from llmevo.trial import Score, Trial, ranked

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


def is_trained_again(label: str) -> bool:
    """Whether the trial with this label is one of those that are trained with several seeds."""
    return label == DEFAULT or label.startswith(EVOLVED)


def planned(
    genome: Genome, trials: Sequence[Trial], references: int, outcomes: Outcomes
) -> list[tuple[str, Trial]]:
    """`plan` as a genome has it, the finalists in the order of their means over seeds.

    Args:
        genome: What was searched.
        trials: The whole run, by number.
        references: How many of the first trials no proposer made.
        outcomes: Of the re-runs.
    """
    direction, finalists = genome.search.direction, genome.evaluate.finalists
    chosen = plan(trials, references=references, direction=direction, finalists=finalists)
    kept = [pair for pair in chosen if not pair[0].startswith(EVOLVED)]
    labels = [label for label, _ in chosen if label.startswith(EVOLVED)]
    evolved = [trial for label, trial in chosen if label.startswith(EVOLVED)]
    return [*kept, *zip(labels, best_first(evolved, outcomes, direction), strict=True)]


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
    search, over = store.genome.search, exit_code == 0
    references = trials[: store.meta("references", 0)]
    again = store.reruns()
    chosen = planned(store.genome, trials, len(references), again)
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
        best=best_of(trials, chosen, again, search.direction),
        evolved=next((trial for label, trial in chosen if label == EVOLVED), None),
        trials=trials,
        references=references,
        table=tuple(table(weights, chosen, store.holdout(), search.direction, again)) if over else (),
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
    outcomes: Outcomes,
) -> list[Row]:
    """The planned trials that were scored, each with its difference to the rival.

    That is the best parent, or with training the default hyperparameters: what one has without a search.

    Args:
        weights: Of the terms of the score, by their key in `Score.items`.
        planned: From `plan`.
        holdout: From `Store.holdout`.
        direction: Of the search's score.
        outcomes: Of the re-runs; a row is the mean over the trainings of its trial.
    """
    scored = {row.number: row for row in holdout}
    finalists = sum(label.startswith(EVOLVED) for label, _ in planned)
    default = any(label == DEFAULT for label, _ in planned)
    noise = spread({row.number: row.score for row in holdout if row.score is not None}, outcomes)
    rows = [
        _row(label, trial, scored[trial.number], weights, direction, outcomes, noise)
        for label, trial in planned
        if trial.number in scored
    ]
    rivals = (row for row in rows if (row.label == DEFAULT if default else _is_parent(row.label)))
    rival = next(rivals, None)
    found = []
    for row in rows:
        level = 1 - _ERROR_RATE / (finalists if row.label.startswith(EVOLVED) else 1)
        compared = row.label != DEFAULT and (default or not _is_parent(row.label))
        interval = difference(row, rival, weights, level) if compared and rival is not None else None
        found.append(replace(row, interval=interval))
    return _tested(found, rival, weights)


def _row(
    label: str,
    trial: Trial,
    held_out: HoldoutRow,
    weights: Mapping[str, float],
    direction: Direction,
    outcomes: Outcomes,
    noise: Spread | None,
) -> Row:
    """A row without its comparison: the mean over the trainings of a trial, where it was trained."""
    score, trained = held_out.score, "train" in trial.metrics
    again = [s for s in scores_of(trial.number, outcomes, "holdout") if s is not None]
    seeds = 1 + len(again) if trained and score is not None else 0
    if again and score is not None:
        score = averaged([score, *again], weights)
    if score is not None and seeds and noise is not None and score.stderr is not None:
        score = replace(score, stderr=math.hypot(score.stderr, noise.deviation / math.sqrt(seeds)))
    optimism = _optimism(trial.score, score, direction)
    return Row(label, trial, score, None, held_out.error, optimism=optimism, seeds=seeds, spread=noise)


def _tested(rows: Sequence[Row], rival: Row | None, weights: Mapping[str, float]) -> list[Row]:
    """The rows with the finalists' p-values, which together err no more often than one would."""
    found = {
        place: _p_value(row, rival, weights)
        for place, row in enumerate(rows)
        if row.label.startswith(EVOLVED) and rival is not None and row.interval is not None
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


def difference(row: Row, other: Row, weights: Mapping[str, float], level: float = 0.95) -> Interval | None:
    """The paired difference of two rows, allowing for other items and, where seeds are known, other seeds.

    None where a score is missing or has no items.
    """
    if row.score is None or other.score is None:
        return None
    try:
        if row.spread is not None:
            seeds = row.seeds, other.seeds
            items, others = row.score.items, other.score.items
            return paired_over_seeds(items, others, seeds, row.spread, weights=weights, level=level)[0]
        return paired_difference(row.score.items, other.score.items, weights=weights, level=level)
    except StatsError:  # a score without items has no pairs
        return None


def _p_value(row: Row, rival: Row, weights: Mapping[str, float]) -> float:
    assert row.score is not None
    assert rival.score is not None
    items, others = row.score.items, rival.score.items
    if row.spread is not None:
        return paired_over_seeds(items, others, (row.seeds, rival.seeds), row.spread, weights=weights)[1]
    return paired_p_value(items, others, weights=weights)
