"""The loop: ask, submit, commit, tell; begun, continued and ended so that nothing acknowledged is lost.

A batch is asked when every trial of the last one is finished, and its size follows from the genome alone. So
no `ask` sees a history that depends on timing: a run that was killed and continued ends with the trials of
an uninterrupted one, and so does a run with another number of workers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from llmevo.errors import LLMContentError, ProposerError
from llmevo.executors import Executor
from llmevo.executors.local import LocalExecutor
from llmevo.genome import Genome, yamltext
from llmevo.llm.transcript import Recorder, Transcript
from llmevo.optimizer import Optimizer
from llmevo.pipeline import Job, Outcome, Split
from llmevo.recipe import Recipes, num_layers
from llmevo.rundir import write_atomic
from llmevo.runner import finals, opening
from llmevo.runner.finals import summarise as summarise
from llmevo.runner.observer import Observer as Observer
from llmevo.runner.observer import Row as Row
from llmevo.runner.observer import RunInfo as RunInfo
from llmevo.runner.observer import RunSummary as RunSummary
from llmevo.runner.signals import Interrupted, Stop
from llmevo.store import Store
from llmevo.trial import State, Trial

_POLL = 0.2  # seconds between looks at whether a second signal came
_LIMIT = "the limit of this sitting is reached"
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
        workers = _Workers(genome, store, executor)
        try:
            if len(store.trials()) < genome.search.trials:
                workers.start()  # their models load while this process reads the genome
            ending = _Sitting(genome, store, observer, workers, stop, chat, limit).go()
        except BaseException:
            workers.release(cancel=True)
            raise
        workers.release(cancel=stop.cancelled)
        summary = finals.summarise(store, ending, time.perf_counter() - start)
        store.log("ended", exit_code=summary.exit_code, reason=summary.reason, elapsed=summary.elapsed)
        observer.ended(summary)
    return summary


def job_of(genome: Genome, trial: Trial, split: Split = "search") -> Job:
    """The job that evaluates a trial.

    All trials of a run share one seed: equal recipes give equal weights, DARE and DELLA masks are common
    random numbers across the search, and `mergekit-yaml --random-seed` finds the evaluated model again.
    """
    return Job(trial.number, trial.params, genome.search.seed, split, trial.attrs.get("recipe"))


class _Halt(Exception):
    """The sitting ends before the run does."""

    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code
        self.reason = reason


@final
class _Workers:
    """The executor: the one given, or local processes that are started when there is something to do."""

    def __init__(self, genome: Genome, store: Store, given: Executor | None) -> None:
        self._genome = genome
        self._store = store
        self._executor = given
        self._owned = given is None
        self._checked = False

    def start(self) -> Executor:
        """The executor, perhaps still loading."""
        if self._executor is None:
            spec = self._genome.run
            log = self._store.run_dir / "workers.log"
            genome = opening.settled(self._genome, self._store)
            self._executor = LocalExecutor(genome, spec.workers, spec.timeout, log=log)
        return self._executor

    def ready(self, stop: Stop) -> Executor:
        """The executor with its first pipeline loaded, and the items that the run was scored on.

        Raises:
            GenomeError: The models or tasks cannot be loaded.
            StoreError: The items are others.
            Interrupted: A signal came.
        """
        executor = self.start()
        if not self._checked:
            with stop.interruptible():
                facts = executor.describe()
            opening.check_facts(self._store, facts)
            self._checked = True
        return executor

    def release(self, cancel: bool) -> None:
        """End the processes that were started here; those that are still loading are not waited for."""
        if self._owned and self._executor is not None:
            self._executor.shutdown(cancel=cancel or not self._checked)


@final
class _Sitting:
    """One process's share of a run."""

    def __init__(
        self,
        genome: Genome,
        store: Store,
        observer: Observer,
        workers: _Workers,
        stop: Stop,
        chat: Recorder | None,
        limit: int | None,
    ) -> None:
        self.genome = genome
        self.store = store
        self.observer = observer
        self.stop = stop
        self._workers = workers
        self._left = limit
        self._failed_in_a_row = 0
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
            self._save_best(self.optimizer.best)  # the last sitting may have died just before
        try:
            self._find_mode()
            reason = self._search()
            if self.optimizer.best is None:
                return 1, f"no trial was completed; {self._last_error()}"
            self._score_finalists()
        except _Halt as halt:
            return halt.exit_code, halt.reason
        except Interrupted:
            return self.stop.exit_code, self._stopped()
        return 0, reason

    def _find_mode(self) -> None:
        """Ask the endpoint what it can do before the first trial, where there is anything left to ask it."""
        left = self.genome.search.trials > len(self.optimizer.trials)
        if not isinstance(self._chat, Transcript) or not left or self._left == 0:
            return
        self._chat.asking(len(self.optimizer.trials))
        try:
            with self.stop.interruptible():
                found = opening.settle_mode(self._chat, self.genome.llm, self.store.run_dir)
        except ProposerError as error:
            if self.genome.search.on_outage == "base":
                self.observer.note(f"the language model does not serve now: {error}")
                return
            raise _Halt(3, f"the proposer cannot begin: {error}") from error
        if found is not None:
            self.observer.note(found)
            self.store.log("mode", found=found)

    def _stopped(self) -> str:
        assert self.stop.signal is not None
        return f"stopped by {self.stop.signal.name}"

    def _last_error(self) -> str:
        failed = [trial.error for trial in self.optimizer.trials if trial.error]
        return f"the latest failed with: {failed[-1]}" if failed else "none failed either"

    def _search(self) -> str:
        """Batch after batch, first what an earlier sitting left over; return why there is no next one."""
        while True:
            if self._pending:
                jobs = [job_of(self.genome, trial) for trial in self._pending.values()]
                self._drive(jobs, self._arrived)
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
        if self._left == 0:
            raise _Halt(3, _LIMIT)
        reasons = self.optimizer.stop_reasons()
        failing = reasons.pop("failing", None)
        # Only failures of this sitting count: whoever continues has perhaps mended the cause.
        if failing is not None and self._failed_in_a_row >= _PATIENCE:
            raise _Halt(1 if self.optimizer.best is None else 3, failing)
        return "; ".join(reasons.values()) or None

    def _ask(self) -> None:
        """Ask for a batch and record it. The references, where there are any, are a batch of their own."""
        total = len(self.optimizer.trials)
        first = max(len(self.references) - total, 0)
        n = min(first or self.batch, self.genome.search.trials - total)
        start = time.perf_counter()
        if self._chat is not None:
            self._chat.asking(total)
        try:
            with self.stop.interruptible():
                asked = self.optimizer.ask(n)
        except ProposerError as error:
            if self._chat is not None and isinstance(error, LLMContentError):
                self._chat.rejected()
            raise _Halt(3, f"the proposer cannot go on: {error}") from error
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

    def _arrived(self, outcome: Outcome) -> None:
        """Commit, then tell, then show."""
        trial = self._pending.pop(outcome.number)
        cost: dict[str, Any] = {**trial.cost, **outcome.seconds}
        if outcome.bytes:
            cost["bytes"] = dict(outcome.bytes)
        error = None
        if outcome.score is None:
            error = outcome.error or "the pipeline gave neither a score nor an error"
            if outcome.stage and not error.startswith(f"{outcome.stage}:"):
                error = f"{outcome.stage}: {error}"
        state = State.COMPLETE if error is None else State.FAILED
        told = self.store.commit(
            replace(
                trial, state=state, score=outcome.score, error=error, metrics=dict(outcome.metrics), cost=cost
            )
        )
        self._failed_in_a_row = 0 if error is None else self._failed_in_a_row + 1
        self.optimizer.tell(told.number, told.score, error=told.error, metrics=told.metrics, cost=told.cost)
        best = self.optimizer.best
        if best is not None and best.number == told.number:
            self._save_best(best)
        self.observer.finished(told, best)

    def recipe(self, trial: Trial) -> dict[str, Any]:
        """The mergekit configuration of a trial."""
        recipe: dict[str, Any] = trial.attrs.get("recipe") or self.recipes.recipe(trial.params)
        return recipe

    def _save_best(self, best: Trial) -> None:
        text = yamltext.dump(self.recipe(best))
        write_atomic(self.store.run_dir / "best" / "recipe.yaml", text)

    def _drive(self, jobs: Iterable[Job], arrived: Callable[[Outcome], None]) -> None:
        """Run jobs, one a worker at a time, so that a signal leaves the rest unbegun.

        Raises:
            _Halt: A signal or the limit came before the last job.
        """
        executor = self._workers.ready(self.stop)
        waiting, flying = deque(jobs), dict[Future[Outcome], int]()
        while waiting or flying:
            while waiting and len(flying) < executor.workers and self.stop.signal is None and self._left != 0:
                job = waiting.popleft()
                flying[executor.submit(job)] = job.number
                if self._left is not None and job.split == "search":
                    self._left -= 1
            if not flying:
                break
            done, _ = wait(flying, timeout=_POLL, return_when=FIRST_COMPLETED)
            self.stop.report()
            for future in sorted(done, key=flying.__getitem__):
                del flying[future]
                arrived(future.result())
            if self.stop.cancelled:
                executor.shutdown(cancel=True)
                break
        if waiting or flying:
            if self.stop.signal is not None:
                raise _Halt(self.stop.exit_code, self._stopped())
            raise _Halt(3, _LIMIT)

    def _score_finalists(self) -> None:
        """Score the plan's trials on the held-out items; what an earlier sitting scored is kept."""
        if self.genome.evaluate.holdout == 0:
            return
        known = self.store.holdout_numbers()
        planned = finals.plan(
            self.optimizer.trials,
            references=len(self.references),
            direction=self.genome.search.direction,
            finalists=self.genome.evaluate.finalists,
        )
        plan = {trial.number: label for label, trial in planned}
        self.store.label_holdout({label: number for number, label in plan.items() if number in known})
        new = [number for number in plan if number not in known]
        if not new:
            return
        self.observer.note(f"scoring {len(new)} trials on the held-out items")
        jobs = [job_of(self.genome, self.optimizer.trials[number], "holdout") for number in new]

        def arrived(outcome: Outcome) -> None:
            self.store.save_holdout(plan[outcome.number], outcome.number, outcome)

        self._drive(jobs, arrived)
