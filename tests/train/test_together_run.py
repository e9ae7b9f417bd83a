"""`kill -9` of a run whose worker trains candidates together: it ends as one that nothing disturbs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("peft")

from llmevo.store import Store
from llmevo.trial import Trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # minutes where the cores are shared


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, facts_file: Path) -> Path:
    """Six candidates in two batches; the layers below their adapters are computed once."""
    train = {
        "data": str(facts_file),
        "layers": 2,
        "rank": {"int": [1, 8]},
        "learning_rate": {"float": [1e-3, 1e-2]},
        "batch_size": 8,
        "together": 3,
    }
    data = {
        "genome": {"models": [str(tiny_folder)], "dtype": "float32"},
        "tasks": ["validation_loss"],
        "train": train,
        "search": {"trials": 8, "population": 3, "proposer": "ga", "halving": {"enabled": False}},
        "evaluate": {"device": "cpu", "dtype": "float32", "finalists": 1, "reruns": 0},
        "run": {"cache": False},
    }
    path = tmp_path_factory.mktemp("together") / "genome.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def begin(genome: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """`llmevo run` in a process of its own."""
    code = "from llmevo.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(genome), "--run-dir", str(run_dir), "--json"]
    with run_dir.with_suffix(".out").open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})


def ended(run: subprocess.Popen[bytes], run_dir: Path) -> list[Trial]:
    """The trials of a run that has come to its end."""
    assert run.wait(300) == 0, run_dir.with_suffix(".out").read_text()
    with Store.open(run_dir, readonly=True) as store:
        assert store.meta("pipeline")["train"]["together"] == 3
        assert store.meta("pipeline")["train"]["prefix"]["training"]
        return store.trials()


def killed_with_a_stack_done(run: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Kill a run when it has trained two candidates or more and scored none of them."""
    before = states(run_dir)
    try:
        # A training alone leaves no state: it ends within the minute after which it would save itself.
        while run.poll() is None and len(states(run_dir) - before) < 2:
            time.sleep(0.001)
    finally:
        run.kill()
        run.wait(60)
    assert run.returncode == -signal.SIGKILL, run_dir.with_suffix(".out").read_text()


def states(run_dir: Path) -> set[str]:
    """The trainings that are not over, as far as they are on the disk."""
    return {path.name for path in (run_dir / "adapters").glob("trial*.safetensors")}


def content(trial: Trial) -> dict[str, Any]:
    found = {"origin": trial.origin, **trial.params, "value": trial.value}
    return found | trial.metrics.get("train", {})


def test_a_run_killed_between_a_stack_and_its_trials_ends_as_one_that_is_not(
    genome: Path, tmp_path: Path
) -> None:
    whole = ended(begin(genome, tmp_path / "whole"), tmp_path / "whole")
    assert [trial.origin for trial in whole[:2]] == ["baseline", "default"]
    assert len(whole) == 8
    run_dir = tmp_path / "killed"
    finished = []
    for _ in range(2):
        killed_with_a_stack_done(begin(genome, run_dir), run_dir)
        with Store.open(run_dir, readonly=True) as store:
            finished.append(sum(trial.score is not None for trial in store.trials()))
    assert 2 <= finished[0] < finished[1] < 8
    again = ended(begin(genome, run_dir), run_dir)
    for ours, theirs in zip(again, whole, strict=True):
        assert content(ours) == pytest.approx(content(theirs), abs=1e-5)
    assert not list((run_dir / "adapters").glob("*.safetensors"))
