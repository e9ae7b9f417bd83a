"""`kill -9` of a real run at a dozen random moments: real merges, real lm-eval tasks, separate processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from choice_task import sums, write_choice_task

from llmevo.genome import Genome
from llmevo.store import Store
from llmevo.trial import State, Trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # minutes where the cores are shared

_KILLS = 12
_TRIALS = 40

_DRIVER = """
import json, sys
from llmevo import genome, runner

class Lines:
    def say(self, kind, **data):
        print(json.dumps({"kind": kind, **data}), flush=True)
    def started(self, info):
        self.say("started", trials=len(info.trials))
    def note(self, line):
        self.say("note", line=line)
    def asked(self, trials, seconds):
        self.say("asked", count=len(trials))
    def sifted(self, reached, entered, kept):
        self.say("sifted", reached=reached, kept=list(kept))
    def finished(self, trial, best):
        self.say("finished", trial=trial.to_json())
    def ended(self, summary):
        self.say("ended", exit_code=summary.exit_code, reason=summary.reason)

if __name__ == "__main__":
    path, run_dir = sys.argv[1:]
    text = open(path).read()
    sys.exit(runner.run(genome.load(path), text, run_dir, observer=Lines()).exit_code)
"""


@pytest.fixture(scope="module")
def genome_file(tmp_path_factory: pytest.TempPathFactory, tiny_llamas: Any) -> Path:
    """Three tiny Llamas merged by DARE-TIES (random masks), scored on sixteen four-choice items."""
    folder = tmp_path_factory.mktemp("kill")
    write_choice_task(folder, "sums", {"test": sums(range(16), (2, 1, 3, 5))})
    genome = {
        "genome": {
            "models": [str(parent) for parent in tiny_llamas.parents],
            "base_model": str(tiny_llamas.base),
            "merge_method": "dare_ties",
            "layer_granularity": 2,
        },
        "tasks": [{"name": "sums", "metric": "gold_logprob,none"}],
        "search": {"proposer": "cma", "trials": _TRIALS, "population": 5, "seed": 3},
        "evaluate": {"task_path": [str(folder)], "device": "cpu", "dtype": "float32", "holdout": 0.25},
    }
    path = folder / "genome.yaml"
    path.write_text(yaml.safe_dump(genome))
    (folder / "driver.py").write_text(_DRIVER)
    return path


class Driver:
    """A run in a process group of its own."""

    def __init__(self, genome_file: Path, run_dir: Path) -> None:
        self.errors = run_dir.with_suffix(".stderr")
        with self.errors.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(genome_file.with_name("driver.py")), str(genome_file), str(run_dir)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def lines(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                yield json.loads(line)

    def until(self, kind: str) -> list[dict[str, Any]]:
        """Read up to and with a line of this kind, or to the end."""
        read = []
        for line in self.lines():
            read.append(line)
            if line["kind"] == kind:
                break
        return read

    def end(self) -> list[dict[str, Any]]:
        read = list(self.lines())
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return read


@pytest.fixture(scope="module")
def whole(genome_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    driver = Driver(genome_file, run_dir)
    lines = driver.end()
    assert driver.process.returncode == 0, driver.errors.read_text()
    assert sum(line["kind"] == "finished" for line in lines) == _TRIALS
    return run_dir


def without_clock(trials: list[Trial]) -> list[Trial]:
    return [replace(trial, cost={}) for trial in trials]


def assert_same_run(run_dir: Path, whole: Path) -> None:
    with Store.open(run_dir, readonly=True) as ours, Store.open(whole, readonly=True) as theirs:
        assert without_clock(ours.trials()) == without_clock(theirs.trials())
        assert [replace(row, seconds={}) for row in ours.holdout()] == [
            replace(row, seconds={}) for row in theirs.holdout()
        ]
    best = Path("best") / "recipe.yaml"
    assert (run_dir / best).read_text() == (whole / best).read_text()


def test_kill_minus_nine_at_a_dozen_moments(
    genome_file: Path, whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run_dir = tmp_path / "run"
    draw = random.Random(0)
    acknowledged: dict[int, Trial] = {}
    kills = starting = finished = evaluated_again = 0

    def note(lines: list[dict[str, Any]]) -> None:
        nonlocal evaluated_again
        for line in lines:
            if line["kind"] == "finished":
                trial = Trial.from_json(line["trial"])
                evaluated_again += trial.number in acknowledged
                acknowledged[trial.number] = trial

    while kills < _KILLS:
        driver = Driver(genome_file, run_dir)
        at_start = kills % 3 == 0
        if at_start:  # anywhere in the start-up, the creation of the store included
            time.sleep(draw.uniform(0, 6))
        else:  # anywhere in a trial
            note(driver.until("finished"))
            time.sleep(draw.uniform(0, 0.5))
        driver.process.send_signal(signal.SIGKILL)  # the driver alone; its worker must end by itself
        note(driver.end())
        if driver.process.returncode == 0:  # a fast machine came to the end first: begin another run
            assert_same_run(run_dir, whole)
            assert evaluated_again == 0
            finished += 1
            run_dir, acknowledged = tmp_path / f"run{finished}", {}
            continue
        assert driver.process.returncode == -signal.SIGKILL, driver.errors.read_text()
        kills += 1
        starting += at_start
        if not Store.exists(run_dir):
            assert not acknowledged
            continue
        with Store.open(run_dir, readonly=True) as store:
            known = store.trials()
        for trial in acknowledged.values():
            assert known[trial.number] == trial, "an acknowledged trial was lost or changed"

    survived = len(acknowledged)
    last = Driver(genome_file, run_dir)
    note(last.end())
    assert last.process.returncode == 0, last.errors.read_text()
    assert_same_run(run_dir, whole)
    assert evaluated_again == 0
    record_property(
        "counted",
        f"{kills} kills, {starting} of them while starting; {survived} of the last run's {_TRIALS} trials "
        "acknowledged between them, 0 lost, 0 evaluated twice; final run identical",
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 3)])
def test_a_signal_to_the_process_group(
    genome_file: Path, whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run_dir = tmp_path / "run"
    driver = Driver(genome_file, run_dir)
    driver.until("finished")
    os.killpg(driver.process.pid, number)
    lines = driver.end()
    assert driver.process.returncode == code, driver.errors.read_text()
    assert lines[-1]["kind"] == "ended"
    assert number.name in lines[-1]["reason"]
    with Store.open(run_dir, readonly=True) as store:
        trials = store.trials()
    assert 0 < sum(trial.state is State.COMPLETE for trial in trials) < _TRIALS
    assert not [trial.error for trial in trials if trial.error]
    again = Driver(genome_file, run_dir)
    again.end()
    assert again.process.returncode == 0
    assert_same_run(run_dir, whole)


def test_the_genome_of_the_run_is_kept(genome_file: Path, whole: Path) -> None:
    with Store.open(whole, readonly=True) as store:
        assert store.genome == Genome.model_validate(yaml.safe_load(genome_file.read_text()))
        facts = store.meta("pipeline")
    assert facts["items"] == {"sums": {"search": 12, "holdout": 4}}
