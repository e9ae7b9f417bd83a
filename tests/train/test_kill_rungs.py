"""`kill -9` of the real command in the middle of a search whose rungs are tokens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("peft")

from llmevo.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # minutes where the cores are shared

_PROGRAM = "from llmevo.cli import main; main()"


@pytest.fixture(scope="module")
def start(
    tiny_folder: Path, facts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Starts `llmevo run`, in a process group of its own, on a directory."""
    folder = tmp_path_factory.mktemp("kill-rungs")
    genome = {
        "genome": {"models": [str(tiny_folder)], "dtype": "float32"},
        "tasks": ["validation_loss"],
        "train": {
            "data": str(facts_file),
            "rank": {"choice": [2, 4], "ordered": True},
            "learning_rate": {"float": [1e-4, 3e-2], "log": True},
            "batch_size": 8,
            "epochs": 5,
            "schedule": "wsd",
            "dropout": 0.1,
        },
        "search": {
            "trials": 8,
            "population": 6,
            "proposer": "random",
            "seed": 1,
            "halving": {"enabled": True},
        },
        "evaluate": {"device": "cpu", "dtype": "float32", "finalists": 1, "reruns": 0},
    }
    (folder / "genome.yaml").write_text(yaml.safe_dump(genome))

    def begin(run_dir: Path) -> subprocess.Popen[str]:
        given = ["run", str(folder / "genome.yaml"), "--run-dir", str(run_dir), "--display", "none"]
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return begin


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Kill the command and not its worker, which must end by itself, once `reached`."""
    while not reached():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def rungs_in(run_dir: Path) -> int:
    """How many outcomes of rungs are in the store, from outside."""
    if not Store.exists(run_dir):
        return 0
    with Store.open(run_dir, readonly=True) as store:
        return len(store.rungs())


def result_of(run_dir: Path) -> list[Any]:
    with Store.open(run_dir, readonly=True) as store:
        trials = [{**trial.to_json(), "cost": None} for trial in store.trials()]
        return [trials, [(row.label, row.score) for row in store.holdout()]]


def test_a_run_killed_in_a_rung_and_between_rungs_ends_as_one_that_was_not(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    finish(start(whole))
    # In the first rung: one outcome is stored, others are not, and states of trainings lie beside.
    kill_when(start(run_dir), lambda: rungs_in(run_dir) >= 1)
    first = rungs_in(run_dir)
    assert 1 <= first < 6
    # Between the rungs: all six are stored, and who goes on is decided anew.
    kill_when(start(run_dir), lambda: rungs_in(run_dir) >= 6)
    assert 6 <= rungs_in(run_dir) < 8
    finish(start(run_dir))
    assert result_of(run_dir) == result_of(whole)
    assert rungs_in(run_dir) == rungs_in(whole) == 8
    kept = [sorted(path.name for path in (folder / "adapters").iterdir()) for folder in (run_dir, whole)]
    assert kept[0] == kept[1]
