"""Executors: where jobs run. All have the shape of `concurrent.futures`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

from llmevo.pipeline import Job, Outcome


class Executor(Protocol):
    """Runs jobs somewhere; a job that cannot be run still gives an Outcome, with `error`."""

    @property
    def workers(self) -> int:
        """How many jobs run at once."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts about what the workers loaded (`Pipeline.describe`); waits until the first has loaded.

        Raises:
            GenomeError: The models or the tasks cannot be loaded.
        """
        ...

    def submit(self, job: Job) -> Future[Outcome]:
        """Start a job, or queue it."""
        ...

    def shutdown(self, cancel: bool = False) -> None:
        """Release the workers; with `cancel`, do not wait for jobs in flight."""
        ...


@runtime_checkable
class GroupExecutor(Executor, Protocol):
    """An executor that can give one worker several jobs, which it may train together."""

    def submit_together(self, jobs: Sequence[Job]) -> list[Future[Outcome]]:
        """Queue jobs for one worker; their futures, in the same order."""
        ...
