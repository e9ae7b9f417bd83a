"""Where a run's jobs go: started when there is something to do, fed one job a worker, left in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, final

from llmevo.executors import Executor, GroupExecutor
from llmevo.executors.local import LocalExecutor
from llmevo.genome import Genome
from llmevo.pipeline import Job, Outcome, Split
from llmevo.proposers.population import notes
from llmevo.runner import opening
from llmevo.runner.signals import Stop
from llmevo.store import Store
from llmevo.trial import Trial

LIMIT = "the limit of this sitting is reached"
_POLL = 0.2  # seconds between looks at whether a second signal came


class Halt(Exception):
    """The sitting ends before the run does.

    Args:
        exit_code: Of the process.
        reason: One line.
    """

    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code
        self.reason = reason


def job_of(
    genome: Genome, trial: Trial, split: Split = "search", rung: int | None = None, rerun: int = 0
) -> Job:
    """The job that evaluates a trial: on the held-out items with mergekit's own arithmetic, as the export.

    All trials of a run share one seed: equal recipes give equal weights, DARE and DELLA masks are common
    random numbers across the search, and `mergekit-yaml --random-seed` finds the evaluated model again.
    """
    seed, recipe = genome.search.seed, trial.attrs.get("recipe")
    inherit = dict(notes(trial)) if genome.search.proposer == "population" else None
    return Job(trial.number, trial.params, seed, split, recipe, rung, split == "holdout", rerun, inherit)


@final
class Workers:
    """The executor: the one given, or local processes that are started when there is something to do.

    Args:
        genome: What is searched.
        store: Of the run.
        given: Left open at the end; None for local processes.
        stop: Says when a signal came.
        limit: How many trials may be worked on; None for all.
    """

    def __init__(
        self, genome: Genome, store: Store, given: Executor | None, stop: Stop, limit: int | None
    ) -> None:
        self._genome = genome
        self._store = store
        self._executor = given
        self._owned = given is None
        self._stop = stop
        self._limit = limit
        self._touched: set[int] = set()
        self._facts: dict[str, Any] | None = None

    @property
    def spent(self) -> bool:
        """Whether as many trials were worked on as this sitting may."""
        return self._limit is not None and len(self._touched) >= self._limit

    def start(self) -> Executor:
        """The executor, perhaps still loading."""
        if self._executor is None:
            spec = self._genome.run
            log = self._store.run_dir / "workers.log"
            genome = opening.settled(self._genome, self._store)
            self._executor = LocalExecutor(genome, spec.workers, spec.timeout, log=log)
        return self._executor

    def facts(self) -> dict[str, Any]:
        """What the pipeline says of itself, with the rungs that the run was begun with.

        Raises:
            GenomeError: The models or tasks cannot be loaded.
            StoreError: The items are others than those that the run was scored on.
            Interrupted: A signal came while they loaded.
        """
        executor = self.start()
        if self._facts is None:
            with self._stop.interruptible():
                facts = executor.describe()
            self._facts = opening.check_facts(self._store, facts)
        return self._facts

    def drive(self, jobs: Iterable[Job], arrived: Callable[[Outcome], None]) -> None:
        """Run jobs, one a worker at a time, so that a signal leaves the rest unbegun.

        Where trainings together pay (`train.together`), a worker has so many jobs of the search at a time.

        Args:
            jobs: What to run, in this order.
            arrived: Is given each outcome, in the order in which they come.

        Raises:
            Halt: A signal or the limit came before the last job.
            GenomeError: As `facts`; StoreError and Interrupted too.
        """
        facts, executor = self.facts(), self.start()
        together = executor if isinstance(executor, GroupExecutor) else None
        most = 1 if together is None else facts.get("train", {}).get("together", 1)
        waiting, flying = deque(jobs), dict[Future[Outcome], int]()
        groups: dict[Future[Outcome], Future[Outcome]] = {}  # the first of each one's group
        while waiting or flying:
            while waiting and len({groups[f] for f in flying}) < executor.workers and self._may(waiting[0]):
                group = self._next(waiting, most)
                futures = [executor.submit(group[0])] if together is None else together.submit_together(group)
                for future, job in zip(futures, group, strict=True):
                    flying[future], groups[future] = job.number, futures[0]
            if not flying:
                break
            done, _ = wait(flying, timeout=_POLL, return_when=FIRST_COMPLETED)
            self._stop.report()
            for future in sorted(done, key=flying.__getitem__):
                del flying[future]
                arrived(future.result())
            if self._stop.cancelled:
                executor.shutdown(cancel=True)
                break
        if waiting or flying:
            if self._stop.signal is not None:
                raise Halt(self._stop.exit_code, self._stop.reason)
            raise Halt(3, LIMIT)

    def _next(self, waiting: deque[Job], most: int) -> list[Job]:
        """Take the next jobs of one worker: one, or of trials of the search as many as train together."""
        group: list[Job] = []
        alike = True
        while waiting and alike and len(group) < max(most, 1) and self._may(waiting[0]):
            job = waiting.popleft()
            group.append(job)
            if job.split == "search":
                self._touched.add(job.number)
            alike = job.split == "search" and job.recipe is None
            alike = alike and bool(waiting) and (waiting[0].rung, waiting[0].recipe) == (job.rung, None)
        return group

    def _may(self, job: Job) -> bool:
        begun = job.split == "search" and job.number in self._touched
        return self._stop.signal is None and (begun or not self.spent)

    def release(self, cancel: bool) -> None:
        """End the processes that were started here; those that are still loading are not waited for."""
        if self._owned and self._executor is not None:
            self._executor.shutdown(cancel=cancel or self._facts is None)
