"""The loop: ask, submit, commit, tell; begun, continued and ended so that nothing acknowledged is lost.

A batch is asked when every trial of the last one is finished, and its size follows from the genome alone. So
no `ask` sees a history that depends on timing: a run that was killed and continued ends with the trials of
an uninterrupted one, and so does a run with another number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from llmevo.errors import LLMContentError, ProposerError
from llmevo.executors import Executor
from llmevo.genome import Genome, yamltext
from llmevo.llm.transcript import Recorder, Transcript
from llmevo.optimizer import Optimizer
from llmevo.pipeline import Outcome
from llmevo.proposers.population import Survivors
from llmevo.recipe import Recipes, num_layers
from llmevo.rundir import write_atomic
from llmevo.runner import adapters, closing, finals, opening, reruns
from llmevo.runner import facts as describe
from llmevo.runner.facts import TRUNCATED, truncated
from llmevo.runner.finals import summarise as summarise
from llmevo.runner.observer import Observer as Observer
from llmevo.runner.observer import Row as Row
from llmevo.runner.observer import RunInfo as RunInfo
from llmevo.runner.observer import RunSummary as RunSummary
from llmevo.runner.rungs import Rungs, cost
from llmevo.runner.signals import Interrupted, Stop
from llmevo.runner.workers import LIMIT, Halt, Workers
from llmevo.runner.workers import job_of as job_of
from llmevo.store import Store
from llmevo.trial import State, Trial

_PATIENCE = 20  # failures in a row that end a sitting; the count of Optimizer.stop_reasons


def run(
    genome: Genome,
    genome_text: str,
    run_dir: str | Path,
    *,
    observer: Observer,
    executor: Executor | None = None,
    chat: Recorder | None = None,
    fresh: bool = False,
    limit: int | None = None,
) -> RunSummary:
    """Begin a run, or continue the one that lies in `run_dir`, to its end.

    Args:
        genome: What is searched, overrides included.
        genome_text: The file it came from, kept verbatim.
        run_dir: Where the run lies.
        observer: Is shown what happens.
        executor: Where jobs run; None for local processes as `genome.run` says. One that is given is left
            open, except after a second signal.
        chat: The proposer's language model; None for the one that `genome.llm` names, with its calls on
            record in the run directory. One that is given records nothing.
        fresh: Move a run that lies there aside and begin anew.
        limit: Stop, resumably, after so many trials of this sitting.

    Returns:
        How it ended. Failed trials, signals and an endpoint that does not serve are said there.

    Raises:
        GenomeError: The run there has another genome, or the models or tasks cannot be loaded.
        StoreError: The directory cannot be used; RunLockedError if another process drives the run.
    """
    start = time.perf_counter()
    store, moved = opening.open_store(Path(run_dir), genome, genome_text, fresh)
    with store, Stop(observer.note) as stop:
        if moved is not None:
            observer.note(f"the earlier run was moved to {moved}")
        workers = Workers(genome, store, executor, stop, limit)
        try:
            if len(store.trials()) < genome.search.trials:
                workers.start()  # their models load while this process reads the genome
            ending = _Sitting(genome, store, observer, workers, stop, chat).go()
        except BaseException:
            workers.release(cancel=True)
            raise
        workers.release(cancel=stop.cancelled)
        summary = finals.summarise(store, ending, time.perf_counter() - start)
        store.log("ended", exit_code=summary.exit_code, reason=summary.reason, elapsed=summary.elapsed)
        observer.ended(summary)
    return summary


@final
class _Sitting:
    """One process's share of a run."""

    def __init__(
        self,
        genome: Genome,
        store: Store,
        observer: Observer,
        workers: Workers,
        stop: Stop,
        chat: Recorder | None,
    ) -> None:
        self.genome = genome
        self.store = store
        self.observer = observer
        self.stop = stop
        self._workers = workers
        self._failed_in_a_row = 0
        self._described = False
        self._survivors = Survivors(genome.search.direction, genome.search.population)
        self._cut: set[str] = set()  # tasks of which it was said that answers are cut off
        layers = num_layers(genome)
        store.set_meta("layers", layers)  # a replay has no models to ask
        self.recipes = Recipes(genome, layers)
        self.references = opening.references(genome, self.recipes)
        self.batch = opening.batch(genome.search, self.recipes.space)
        given = chat if genome.search.asks_model else None
        self._chat = given or opening.client(genome, store.run_dir)
        history = store.trials()
        self._pending = {trial.number: trial for trial in history if trial.state is State.PENDING}
        self.optimizer = Optimizer(
            self.recipes.space,
            opening.proposer(genome, self.recipes, self._chat),
            direction=genome.search.direction,
            seed=genome.search.seed,
            trials=history,
        )
        # References are the first trials, in this order, so what the history lacks is its continuation.
        for reference in self.references[len(history) :]:
            outside = reference.params is None
            attrs = {"recipe": reference.recipe} if outside else {}
            self.optimizer.enqueue(reference.params, origin=reference.origin, attrs=attrs)

    def go(self) -> tuple[int, str]:
        """Search, then score the finalists; return the exit code and the reason."""
        history = self.optimizer.trials
        self.store.set_meta("references", len(self.references))
        counts = {"trials": len(history), "pending": len(self._pending), "budget": self.genome.search.trials}
        self.store.log("started", **counts, **opening.environment())
        self.observer.started(
            RunInfo(
                self.store.run_dir,
                self.genome,
                self.recipes.space,
                history,
                len(self.references),
                self.batch,
            )
        )
        if self._chat is not None:
            self.observer.note(f"language model: {self._chat.describe()}")
            self.store.set_meta("llm", self._chat.describe())
        if self.optimizer.best is not None:
            self._save_best(self._best(self.optimizer.best))  # the last sitting may have died just before
        try:
            if self.genome.search.trials > len(history) and not self._workers.spent:
                self._workers.facts()  # what does not fit is said before a trial is on record or paid for
            self._find_mode()
            reason = self._search()
            if self.optimizer.best is None:
                return 1, f"no trial was completed; {self._last_error()}"
            trials, count = self.optimizer.trials, len(self.references)
            closing.score(self.genome, self.store, self.observer, self._workers, trials, count)
            self._save_best(self._best(self.optimizer.best))
        except Halt as halt:
            return halt.exit_code, halt.reason
        except Interrupted:
            return self.stop.exit_code, self.stop.reason
        return 0, reason

    def _find_mode(self) -> None:
        """Ask the endpoint what it can do before the first trial, where there is anything left to ask it."""
        left = self.genome.search.trials > len(self.optimizer.trials)
        if not isinstance(self._chat, Transcript) or not left or self._workers.spent:
            return
        self._chat.asking(len(self.optimizer.trials))
        try:
            with self.stop.interruptible():
                found = opening.settle_mode(self._chat, self.genome.llm, self.store.run_dir)
        except ProposerError as error:
            if self.genome.search.on_outage == "base":
                self.observer.note(f"the language model does not serve now: {error}")
                return
            raise Halt(3, f"the proposer cannot begin: {error}") from error
        if found is not None:
            self.observer.note(found)
            self.store.log("mode", found=found)

    def _last_error(self) -> str:
        failed = [trial.error for trial in self.optimizer.trials if trial.error]
        return f"the latest failed with: {failed[-1]}" if failed else "none failed either"

    def _search(self) -> str:
        """Batch after batch, first what an earlier sitting left over; return why there is no next one."""
        while True:
            if self._pending:
                self._evaluate()
            reason = self._why_done()
            if reason is not None:
                return reason
            self._ask()
            if not self._pending:
                return "; ".join(self.optimizer.stop_reasons().values()) or "nothing is left to propose"

    def _why_done(self) -> str | None:
        total, budget = len(self.optimizer.trials), self.genome.search.trials
        if total >= budget:
            return f"all {budget} trials are done"
        trained = describe.tokens(self.optimizer.trials[len(self.references) :])
        if self.genome.search.tokens is not None and trained >= self.genome.search.tokens:
            return f"the trials were trained on {trained} tokens"
        if self._workers.spent:
            raise Halt(3, LIMIT)
        reasons = self.optimizer.stop_reasons()
        failing = reasons.pop("failing", None)
        # Only failures of this sitting count: whoever continues has perhaps mended the cause.
        if failing is not None and self._failed_in_a_row >= _PATIENCE:
            raise Halt(1 if self.optimizer.best is None else 3, failing)
        return "; ".join(reasons.values()) or None

    def _batch(self) -> int:
        """Trials of the next batch: as many as always, or as the budget of tokens has room for."""
        budget, trials = self.genome.search.tokens, self.optimizer.trials
        if budget is None:
            return self.batch
        return min(describe.affordable(trials, len(self.references), budget) or self.batch, self.batch)

    def _ask(self) -> None:
        """Ask for a batch and record it. The references, where there are any, are a batch of their own."""
        total = len(self.optimizer.trials)
        first = max(len(self.references) - total, 0)
        n = min(first or self._batch(), self.genome.search.trials - total)
        start = time.perf_counter()
        if self._chat is not None:
            self._chat.asking(total)
        try:
            with self.stop.interruptible():
                asked = self.optimizer.ask(n)
        except ProposerError as error:
            if self._chat is not None and isinstance(error, LLMContentError):
                self._chat.rejected()
            raise Halt(3, f"the proposer cannot go on: {error}") from error
        seconds = time.perf_counter() - start
        if not asked:
            return
        share = seconds / len(asked)
        trials = [replace(trial, cost={"propose": share}) for trial in asked]
        start = time.perf_counter()
        self.store.begin(trials)
        share = (time.perf_counter() - start) / len(trials)
        if self._chat is not None:
            self._chat.decided(trials)
        self._pending = {
            trial.number: replace(trial, cost={**trial.cost, "store": share}) for trial in trials
        }
        self.observer.asked(trials, seconds)

    def _evaluate(self) -> None:
        """Bring every pending trial to its end: references on all items at once, a batch by its rungs."""
        facts = self._workers.facts()
        rungs = Rungs.of(facts, self.genome.search, self.batch)
        if not self._described:
            self._described = True
            for line in describe.lines(facts, rungs):
                self.observer.note(line)
        whole = [t for t in self._pending.values() if rungs is None or t.number < len(self.references)]
        self._workers.drive([job_of(self.genome, t) for t in whole], lambda outcome: self._finish([outcome]))
        if rungs is not None and self._pending:
            # A batch is asked when the one before is finished, so it is all that follows its first trial.
            first = max(self.optimizer.trials[min(self._pending)].batch, len(self.references))
            self._halve(rungs, range(first, len(self.optimizer.trials)))

    def _halve(self, rungs: Rungs, numbers: Sequence[int]) -> None:
        """Rung by rung; what an earlier sitting stored is not asked again.

        Who drops out is committed when the batch is over: until then he may have to take the place of others.
        """
        last = len(rungs.sizes) - 1
        outcomes = self.store.rungs(numbers[0])
        failed = {number for (number, _), outcome in outcomes.items() if outcome.score is None}
        for trial in self.optimizer.trials[numbers[0] :]:
            whole = trial.score is not None and trial.score.rung is None
            if whole or (trial.state is State.FAILED and trial.number not in failed):
                outcomes[trial.number, last] = Outcome(trial.number, trial.score, error=trial.error)

        def told(number: int) -> list[Outcome]:
            return [outcomes[key] for key in sorted(outcomes) if key[0] == number]

        while True:
            stage = rungs.stage(numbers, outcomes)
            rung = last if stage.rung is None else stage.rung
            jobs = [
                job_of(self.genome, self._pending[number], rung=stage.rung)
                for number in rungs.order(stage)
                if number in self._pending
            ]
            for number in sorted(stage.out.keys() & self._pending.keys()):
                if not jobs or told(number)[-1].score is None:
                    self._finish(told(number), stage.out[number])
            if not jobs:
                return

            def arrived(outcome: Outcome, rung: int = rung) -> None:
                if rung != last:
                    self.store.save_rung(rung, outcome)
                outcomes[outcome.number, rung] = outcome
                if rung == last:
                    self._finish(told(outcome.number))

            self._workers.drive(jobs, arrived)
            over = rungs.stage(numbers, outcomes)
            if rung != last:
                self.observer.sifted(rungs.reached(rung), stage.alive, over.alive)
            elif over.missing:
                self.observer.note(f"trial {over.alive[0]} goes on in the place of those that failed")

    def _finish(self, outcomes: Sequence[Outcome], rung: int | None = None) -> None:
        """Commit, then tell, then show. The last outcome, on `rung`, is the trial's; all are its cost."""
        outcome = outcomes[-1]
        trial = self._pending.pop(outcome.number)
        error = None
        if outcome.score is None:
            error = outcome.error or "the pipeline gave neither a score nor an error"
            if outcome.stage and not error.startswith(f"{outcome.stage}:"):
                error = f"{outcome.stage}: {error}"
        told = self.store.commit(
            replace(
                trial,
                state=State.COMPLETE if error is None else State.FAILED,
                score=None if outcome.score is None else replace(outcome.score, rung=rung),
                error=error,
                metrics=dict(outcome.metrics),
                cost={**trial.cost, **cost(outcomes)},
            )
        )
        self._failed_in_a_row = 0 if error is None else self._failed_in_a_row + 1
        self.optimizer.tell(told.number, told.score, error=told.error, metrics=told.metrics, cost=told.cost)
        best = self.optimizer.best
        if best is not None and best.number == told.number:
            self._save_best(best)
        self._prune()
        self.observer.finished(told, best)
        halved = told.cost.get("items", {}).get("halved")
        if halved:
            self.observer.note(
                f"trial {told.number}: out of memory; batches were halved {halved} times and stay so"
            )
        for task, share in truncated(told.metrics).items():
            if share > TRUNCATED and task not in self._cut:
                self._cut.add(task)
                self.observer.note(
                    f"{task}: {share:.0%} of trial {told.number}'s answers were cut off at the longest "
                    "allowed length (max_gen_toks) before they had ended"
                )

    def _prune(self) -> None:
        """Delete adapters that nobody can want any more."""
        search, trials = self.genome.search, self.optimizer.trials
        breeds = search.proposer == "population"
        # Until a batch is over, its trials' parents are wanted, and who survives is not known.
        if self.genome.train is None or (breeds and self._pending):
            return
        adapters.prune(
            self.store.run_dir,
            trials,
            len(self.references),
            search.direction,
            self.genome.evaluate.finalists,
            self._survivors(trials) if breeds else (),
        )

    def recipe(self, trial: Trial) -> dict[str, Any]:
        """The mergekit configuration of a trial."""
        recipe: dict[str, Any] = trial.attrs.get("recipe") or self.recipes.recipe(trial.params)
        return recipe

    def _best(self, leading: Trial) -> Trial:
        """The best trial, `leading` unless trainings with other seeds have shown another."""
        trials, again = self.optimizer.trials, self.store.reruns()
        planned = finals.planned(self.genome, trials, len(self.references), again)
        return reruns.best_of(trials, planned, again, self.genome.search.direction) or leading

    def _save_best(self, best: Trial) -> None:
        text = yamltext.dump(self.recipe(best))
        write_atomic(self.store.run_dir / "best" / "recipe.yaml", text)
        if self.genome.train is not None:
            adapters.publish(self.store.run_dir, best.number, self.genome.alone)
