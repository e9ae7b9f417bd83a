"""A run once more from its records: the same proposers, but recorded answers and recorded scores.

Neither a network nor a model is needed. What must come out is the same trials, byte for byte: their JSON
without `cost`, which holds seconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from llmevo.errors import StoreError
from llmevo.executors.recorded import RecordedExecutor
from llmevo.genome import Genome
from llmevo.llm.transcript import FOLDER, ReplayChat
from llmevo.pipeline import Outcome, Split
from llmevo.runner import Observer, run
from llmevo.store import Store
from llmevo.trial import State, Trial


@final
@dataclass(frozen=True, slots=True)
class Replay:
    """What came of playing a run again.

    Args:
        run_dir: The run.
        trials: How many trials it has.
        differences: One line for each trial that came out otherwise, or not at all.
        reason: Why the replay ended.
    """

    run_dir: Path
    trials: int
    differences: tuple[str, ...]
    reason: str

    @property
    def identical(self) -> bool:
        """Whether every trial came out as it was."""
        return not self.differences

    def describe(self) -> str:
        """One line."""
        if self.identical:
            return f"{self.run_dir}: all {self.trials} trials came out the same, byte for byte"
        return (
            f"{self.run_dir}: {len(self.differences)} of {self.trials} trials differ; "
            f"the replay ended because {self.reason}"
        )

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "run_dir": str(self.run_dir),
            "identical": self.identical,
            "trials": self.trials,
            "differences": list(self.differences),
            "reason": self.reason,
        }


def replay(run_dir: Path, out: Path, observer: Observer) -> Replay:
    """Play the run in `run_dir` again, in `out`.

    Args:
        run_dir: The run; it is only read.
        out: Where the second run is made.
        observer: Is shown what happens.

    Raises:
        StoreError: There is no run, it has no trial, its records are damaged, or there is a run in `out`.
    """
    if Store.exists(out):
        raise StoreError(f"`{out}` already has a run; choose another --out.")
    with Store.open(run_dir, readonly=True) as store:
        genome, text, known = _offline(store), store.genome_text, store.trials()
        budgets = [event.get("budget") for event in store.events if event["kind"] == "started"]
        executor = RecordedExecutor(_outcomes(store), store.meta("pipeline", {}))
    if not known:
        raise StoreError(f"`{run_dir}` has no trial to play again.")
    chat = ReplayChat(run_dir / FOLDER)
    made, reason = 0, ""
    # A sitting's budget decides the size of its last batch, so each is played with its own.
    for budget in [*dict.fromkeys(b for b in budgets if b is not None), genome.search.trials]:
        while made < min(budget, len(known)):
            sitting = _with(genome, budget)
            left = len(known) - made
            summary = run(sitting, text, out, observer=observer, executor=executor, chat=chat, limit=left)
            before, made, reason = made, len(summary.trials), summary.reason
            if made == before:  # an earlier sitting may have ended at a row of failures; this one is stuck
                break
    again: list[Trial] = []
    if Store.exists(out):
        with Store.open(out, readonly=True) as store:
            again = store.trials()
    return Replay(run_dir, len(known), tuple(_differences(known, again)), reason)


def _offline(store: Store) -> Genome:
    """The run's genome, with what was read from its models."""
    genome = store.genome
    spec = genome.genome.model_copy(update={"num_layers": store.meta("layers", genome.genome.num_layers)})
    return genome.model_copy(update={"genome": spec})


def _with(genome: Genome, budget: int) -> Genome:
    # A recorded outage that the base did not stand in for ended a sitting, and nothing came of it.
    search = genome.search.model_copy(update={"trials": budget, "on_outage": "base"})
    return genome.model_copy(update={"search": search})


def _outcomes(store: Store) -> dict[tuple[Split, int, int | None, int], Outcome]:
    """What the run's workers had answered."""
    found: dict[tuple[Split, int, int | None, int], Outcome] = {
        ("search", trial.number, None, 0): Outcome(
            trial.number, trial.score, trial.metrics, error=trial.error, tokens=trial.cost.get("tokens", 0)
        )
        for trial in store.trials()
        if trial.state is not State.PENDING
    }
    found |= {("search", number, rung, 0): outcome for (number, rung), outcome in store.rungs().items()}
    found |= {
        (split, number, None, rerun): outcome for (number, rerun, split), outcome in store.reruns().items()
    }
    for row in store.holdout():
        found["holdout", row.number, None, 0] = Outcome(row.number, row.score, row.metrics, error=row.error)
    return found


def _differences(known: Sequence[Trial], again: Sequence[Trial]) -> list[str]:
    lines = []
    for trial in known:
        if trial.number >= len(again):
            lines.append(f"trial {trial.number} was not proposed again")
            continue
        old, new = _plain(trial), _plain(again[trial.number])
        if trial.state is State.PENDING:  # it was never scored, so there is nothing to compare of that
            for key in ("state", "score", "error", "metrics"):
                new[key] = old[key]
        if json.dumps(old) != json.dumps(new):
            keys = ", ".join(key for key in old if json.dumps(old[key]) != json.dumps(new[key]))
            lines.append(f"trial {trial.number} differs in {keys}")
    return lines


def _plain(trial: Trial) -> dict[str, Any]:
    return {key: value for key, value in trial.to_json().items() if key != "cost"}
