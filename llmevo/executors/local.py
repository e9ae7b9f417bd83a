"""Jobs in processes of this machine, one resident model each.

A worker is spawned, loads its pipeline once and answers jobs over a pipe. What kills it (a segfault, the
kernel's out-of-memory killer, a time-out) costs the trial that it was running; another worker takes its
place.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, final

from llmevo import quiet
from llmevo.errors import GenomeError
from llmevo.executors.heap import keep_freed_blocks
from llmevo.genome import Genome
from llmevo.pipeline import Job, MergePipeline, Outcome, Pipeline

_SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and CUDA's state
_GRACE = 5.0  # seconds for an idle worker to leave before it is killed


@final
class LocalExecutor:
    """Runs jobs in `workers` processes.

    Args:
        genome: What each worker's pipeline is made from.
        workers: Processes; at least 1. The machine's cores are divided among them.
        timeout: Seconds for one job, loading not counted; None for no limit.
        log: File that takes what the workers print; None for this process's stderr.
        make: Makes a worker's pipeline; importable by name, since the worker is a new interpreter.

    The models are loaded in the background as soon as this is made. An error while a pipeline is made comes
    out of `describe` and of every future as GenomeError: the next job would meet it again.
    """

    def __init__(
        self,
        genome: Genome,
        workers: int = 1,
        timeout: float | None = None,
        *,
        log: Path | None = None,
        make: Callable[[Genome], Pipeline] = MergePipeline,
    ) -> None:
        if workers < 1:
            raise GenomeError(f"`workers >= 1` must hold, but got {workers}.")
        self._workers = workers
        self._queue: SimpleQueue[list[tuple[Job, Future[Outcome]]] | None] = SimpleQueue()
        self._facts: Future[dict[str, Any]] = Future()
        self._cancelled = threading.Event()
        threads = max(1, _cores() // workers)
        self._seats = [_Seat(genome, timeout, log, make, threads) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(seat,), name=f"llmevo-worker-{index}", daemon=True)
            for index, seat in enumerate(self._seats)
        ]
        # multiprocessing ends what is left at exit with SIGTERM, which workers ignore; this comes first.
        atexit.register(self._kill)
        for thread in self._threads:
            thread.start()

    @property
    def workers(self) -> int:
        """How many jobs run at once."""
        return self._workers

    def describe(self) -> dict[str, Any]:
        """What the first pipeline says of itself; waits until it is loaded.

        Raises:
            GenomeError: It could not be made.
        """
        return self._facts.result()

    def submit(self, job: Job) -> Future[Outcome]:
        """Queue a job; a job that kills its worker gives an Outcome with `error`."""
        return self.submit_together([job])[0]

    def submit_together(self, jobs: Sequence[Job]) -> list[Future[Outcome]]:
        """Queue jobs for one worker. If it dies of what they have in common, each is run alone."""
        futures: list[Future[Outcome]] = [Future() for _ in jobs]
        self._queue.put(list(zip(jobs, futures, strict=True)))
        return futures

    def shutdown(self, cancel: bool = False) -> None:
        """End the workers, after the queued jobs or, with `cancel`, at once."""
        if cancel:
            self._kill()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        self._cancelled.set()
        for seat in self._seats:
            seat.kill(for_good=True)

    def _serve(self, seat: _Seat) -> None:
        """One worker's thread: start it, then hand it job after job."""
        broken = self._start(seat)
        while (items := self._queue.get()) is not None:
            if len(items) > 1 and broken is None and not self._cancelled.is_set() and seat.alive:
                seat.ahead([job for job, _ in items])
            for job, future in items:
                if self._cancelled.is_set() or not future.set_running_or_notify_cancel():
                    future.cancel()
                    continue
                if broken is None and not seat.alive:
                    broken = self._start(seat)
                if broken is not None:
                    future.set_exception(broken)
                    continue
                outcome = seat.run(job)
                if self._cancelled.is_set():
                    # The worker was killed by us: this says nothing about the trial.
                    future.set_exception(CancelledError())
                else:
                    future.set_result(outcome)
        seat.close()

    def _start(self, seat: _Seat) -> BaseException | None:
        """The error that stood in the way, or None."""
        if self._cancelled.is_set():
            return CancelledError()
        try:
            facts = seat.start()
        except Exception as error:
            with contextlib.suppress(InvalidStateError):  # another worker was first
                self._facts.set_exception(error)
            return error
        with contextlib.suppress(InvalidStateError):
            self._facts.set_result(facts)
        return None


@final
class _Seat:
    """A place for one worker process, and the worker that has it."""

    def __init__(
        self,
        genome: Genome,
        timeout: float | None,
        log: Path | None,
        make: Callable[[Genome], Pipeline],
        threads: int,
    ) -> None:
        self._arguments = (genome, make, threads, None if log is None else str(log))
        self._timeout = timeout
        self._lock = threading.Lock()
        self._closed = False
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def start(self) -> dict[str, Any]:
        """Spawn a worker and wait until it has loaded; return its pipeline's facts."""
        with self._lock:
            if self._closed:
                raise CancelledError()
            self._connection, theirs = _SPAWN.Pipe()
            self._process = _SPAWN.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
            self._process.start()
            theirs.close()  # so that the worker's end closes when the worker dies
        try:
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            raise GenomeError(
                f"a worker ended while it loaded the models ({self._obituary()}). What it printed says why; "
                "a script that starts a run must do so under `if __name__ == '__main__':`."
            ) from None
        if kind == "error":
            self.kill()
            raise GenomeError(str(answer))
        facts: dict[str, Any] = answer
        return facts

    def run(self, job: Job) -> Outcome:
        """Send a job and wait for what becomes of it."""
        assert self._connection is not None
        try:
            self._connection.send(job)
            if not self._connection.poll(self._timeout):
                self.kill()
                return Outcome(job.number, error=f"time-out: no result within {self._timeout:g} s")
            outcome: Outcome = self._connection.recv()
        except (EOFError, OSError):
            return Outcome(job.number, error=f"the worker died ({self._obituary()})")
        return outcome

    def ahead(self, jobs: Sequence[Job]) -> None:
        """Have the worker do what the jobs have in common; one that dies or hangs is only ended."""
        assert self._connection is not None
        try:
            self._connection.send(list(jobs))
            if self._connection.poll(None if self._timeout is None else len(jobs) * self._timeout):
                self._connection.recv()
                return
        except (EOFError, OSError):
            pass
        self.kill()

    def _obituary(self) -> str:
        assert self._process is not None
        self._process.join(_GRACE)
        code = self._process.exitcode
        if code is None:
            self.kill()
            return "it closed its pipe"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    def kill(self, for_good: bool = False) -> None:
        """End the worker at once, whatever it does; `for_good`: no other will follow."""
        with self._lock:
            self._closed = self._closed or for_good
            if self._process is not None:
                self._process.kill()
                self._process.join()

    def close(self) -> None:
        """Let an idle worker go."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.join(_GRACE)
        self.kill(for_good=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(
    connection: Connection, genome: Genome, make: Callable[[Genome], Pipeline], threads: int, log: str | None
) -> None:
    """The worker process: load, then answer until the pipe closes."""
    # Ctrl-C and a batch system's SIGTERM reach the whole process group; only the driver decides what stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.dup2(descriptor, 2)
    os.dup2(2, 1)  # stdout is for results
    # Threads that spin for long while they wait for each other take the core that another process needs:
    # beside a busy neighbour a forward pass took 1.8 s, and 1.4 s with this bound; alone 0.6 s either way.
    # The variable is read when torch is imported, so only here.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
    keep_freed_blocks()
    quiet.semaphores()
    try:
        pipeline = make(genome)
        facts = pipeline.describe()
    except GenomeError as error:
        connection.send(("error", str(error)))
        return
    except Exception as error:
        connection.send(("error", f"the pipeline could not be made: {type(error).__name__}: {error}"))
        raise
    connection.send(("ready", facts))
    with contextlib.suppress(EOFError, OSError):
        while True:
            asked = connection.recv()
            if isinstance(asked, list):
                pipeline.ahead(asked)
                connection.send(None)
            else:
                connection.send(pipeline.run(asked))


def _die_with_parent() -> None:
    """End this process when its parent is gone, also after `kill -9` in the middle of a job."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
