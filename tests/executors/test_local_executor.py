"""Worker processes that die, hang or cannot start cost a trial, never the run."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from llmevo.errors import GenomeError
from llmevo.executors.local import LocalExecutor
from llmevo.genome import Genome
from llmevo.pipeline import Job, Outcome
from llmevo.trial import Score

GENOME = Genome.model_validate({"genome": {"models": ["a", "b"]}, "tasks": [{"name": "t"}]})


class Deeds:
    """A pipeline that does to its process what the job's params say."""

    def __init__(self, genome: Genome) -> None:
        self._genome = genome
        self._runs = 0

    def describe(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}

    def ahead(self, jobs: Sequence[Job]) -> None:
        if any(job.params.get("ahead") == "sigkill" for job in jobs):
            os.kill(os.getpid(), signal.SIGKILL)
        self._runs += 100

    def run(self, job: Job) -> Outcome:
        self._runs += 1
        deed = job.params["deed"]
        print(f"job {job.number}: {deed}")
        if deed == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "segfault":
            ctypes.string_at(0)
        if deed == "exit":
            os._exit(7)
        if deed == "raise":
            raise RuntimeError("a pipeline that breaks its promise")
        if deed == "hang":
            time.sleep(600)
        return Outcome(job.number, Score(float(os.getpid())), {"t": {"runs": float(self._runs)}})


def no_models(genome: Genome) -> Deeds:
    raise GenomeError(f"`{genome.genome.models[0]}` is not a model")


def dies_loading(genome: Genome) -> Deeds:
    os._exit(3)


def loads_for_ever(genome: Genome) -> Deeds:
    time.sleep(600)
    return Deeds(genome)


@pytest.fixture
def start() -> Iterator[Callable[..., LocalExecutor]]:
    executors = []

    def make(**options: Any) -> LocalExecutor:
        executors.append(LocalExecutor(GENOME, **{"make": Deeds, **options}))
        return executors[-1]

    yield make
    for executor in executors:
        executor.shutdown(cancel=True)


def job(number: int, deed: str = "work") -> Job:
    return Job(number, {"deed": deed}, seed=0)


@pytest.mark.parametrize(
    ("deed", "reason"),
    [("sigkill", "SIGKILL"), ("segfault", "SIGSEGV"), ("exit", "exit code 7"), ("raise", "exit code 1")],
)
def test_a_dead_worker_costs_its_trial_only(
    start: Callable[..., LocalExecutor], tmp_path: Path, deed: str, reason: str
) -> None:
    executor = start(log=tmp_path / "log")
    futures = [executor.submit(job(0)), executor.submit(job(1, deed)), executor.submit(job(2))]
    first, dead, after = (future.result(30) for future in futures)
    assert dead.score is None
    assert dead.error is not None
    assert reason in dead.error
    assert first.score is not None
    assert after.score is not None
    assert first.score != after.score  # another process


def test_a_time_out_ends_the_worker(start: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    executor = start(timeout=0.5, log=tmp_path / "log")
    pid = executor.describe()["pid"]
    began = time.monotonic()
    outcome = executor.submit(job(4, "hang")).result(30)
    assert time.monotonic() - began < 30
    assert (outcome.number, outcome.score) == (4, None)
    assert "time-out" in str(outcome.error)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert executor.submit(job(5)).result(30).score is not None


def test_workers_work_at_once_and_keep_their_pipeline(
    start: Callable[..., LocalExecutor], tmp_path: Path
) -> None:
    executor = start(workers=2, log=tmp_path / "log")
    outcomes = [future.result(30) for future in [executor.submit(job(n)) for n in range(40)]]
    assert [outcome.number for outcome in outcomes] == list(range(40))
    runs = {outcome.score.value: outcome.metrics["t"]["runs"] for outcome in outcomes if outcome.score}
    assert sum(runs.values()) == 40  # one pipeline a process, none made anew
    expected = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    assert executor.describe()["threads"] == expected
    assert "job 39: work" in (tmp_path / "log").read_text()


def test_a_pipeline_that_cannot_be_made_is_said_once(start: Callable[..., LocalExecutor]) -> None:
    executor = start(make=no_models)
    with pytest.raises(GenomeError, match="`a` is not a model"):
        executor.describe()
    with pytest.raises(GenomeError, match="`a` is not a model"):
        executor.submit(job(0)).result(30)


def test_a_worker_that_dies_while_it_loads(start: Callable[..., LocalExecutor]) -> None:
    executor = start(make=dies_loading)
    with pytest.raises(GenomeError, match="exit code 3"):
        executor.describe()


def test_shutdown_waits_or_does_not(start: Callable[..., LocalExecutor], tmp_path: Path) -> None:
    tidy = start(log=tmp_path / "log")
    future = tidy.submit(job(0))
    tidy.shutdown()
    assert future.result(0).score is not None
    hasty = start(log=tmp_path / "log")
    hasty.describe()
    flying, queued = hasty.submit(job(0, "hang")), hasty.submit(job(1))
    time.sleep(0.1)
    began = time.monotonic()
    hasty.shutdown(cancel=True)
    assert time.monotonic() - began < 30
    for each in (flying, queued):
        with pytest.raises(CancelledError):
            each.result(0)
    loading = start(make=loads_for_ever)
    time.sleep(0.3)
    began = time.monotonic()
    loading.shutdown(cancel=True)
    assert time.monotonic() - began < 30


_DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_local_executor import GENOME, Deeds, job
from llmevo.executors.local import LocalExecutor

if __name__ == "__main__":
    executor = LocalExecutor(GENOME, make=Deeds)
    print(executor.describe()["pid"], flush=True)
    if sys.argv[2] == "signals":
        print(executor.submit(job(0)).result(60).score.value, flush=True)
        sys.stdin.readline()
        print(executor.submit(job(1)).result(60).score.value, flush=True)
    elif sys.argv[2] == "forgets":
        executor.submit(job(0, "hang"))
    else:
        executor.submit(job(0, "hang")).result()
"""


def drive(tmp_path: Path, what: str) -> subprocess.Popen[str]:
    script = tmp_path / "driver.py"
    script.write_text(_DRIVER)
    return subprocess.Popen(
        [sys.executable, str(script), str(Path(__file__).parent), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_worker_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    with drive(tmp_path, "hangs") as driver:
        assert driver.stdout is not None
        worker = int(driver.stdout.readline())
        time.sleep(0.2)
        driver.kill()
    assert gone(worker)


def test_a_forgotten_executor_does_not_keep_the_process(tmp_path: Path) -> None:
    with drive(tmp_path, "forgets") as driver:
        assert driver.stdout is not None
        worker = int(driver.stdout.readline())
        assert driver.wait(20) == 0
    assert gone(worker)


def test_signals_to_the_group_leave_the_worker_alone(tmp_path: Path) -> None:
    with drive(tmp_path, "signals") as driver:
        assert driver.stdout is not None
        assert driver.stdin is not None
        worker = int(driver.stdout.readline())
        first = driver.stdout.readline()
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.stdout.readline() == first
    assert gone(worker)


def test_jobs_together_are_a_job_each_and_one_after_the_other_where_that_kills_the_worker(
    start: Callable[..., LocalExecutor],
) -> None:
    executor = start()
    well = [Job(0, {"deed": "work"}, 0), Job(1, {"deed": "exit"}, 0), Job(2, {"deed": "work"}, 0)]
    first, second, third = (future.result(timeout=60) for future in executor.submit_together(well))
    assert first.metrics["t"]["runs"] == 101
    assert "exit code 7" in str(second.error)
    assert third.metrics["t"]["runs"] == 1  # by another worker
    fatal = [Job(number, {"deed": "work", "ahead": "sigkill"}, 0) for number in range(3)]
    outcomes = [future.result(timeout=60) for future in executor.submit_together(fatal)]
    assert [outcome.number for outcome in outcomes] == [0, 1, 2]
    assert [outcome.metrics["t"]["runs"] for outcome in outcomes] == [1, 2, 3]
