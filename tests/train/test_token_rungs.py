"""Searches whose rungs are shares of a training: who goes on, what it costs, what does not change."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("lm_eval")

from test_run import InProcess, searched  # noqa: E402
from test_run import data as data  # noqa: E402
from test_run import letters as letters  # noqa: E402

from llmevo import genome as genomes  # noqa: E402
from llmevo import runner  # noqa: E402
from llmevo.cli import console  # noqa: E402
from llmevo.cli.display import NoDisplay, score_text  # noqa: E402
from llmevo.errors import GenomeError  # noqa: E402
from llmevo.genome import Genome  # noqa: E402
from llmevo.genome.sections import HalvingSpec  # noqa: E402
from llmevo.pipeline import Job, Outcome  # noqa: E402
from llmevo.report import findings  # noqa: E402
from llmevo.runner.replay import replay  # noqa: E402
from llmevo.store import Store  # noqa: E402
from llmevo.train import Trainer  # noqa: E402
from llmevo.train.loop import Training  # noqa: E402
from llmevo.trial import Trial, ranked  # noqa: E402

TRAIN = {
    "rank": {"choice": [2, 4], "ordered": True},
    "learning_rate": {"float": [1e-4, 3e-2], "log": True},
    "batch_size": 8,
    "epochs": 2.5,
    "target_modules": "attn",
    "layers": 1,
    "schedule": "wsd",
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def halved(data: dict[str, Any], facts_file: Path) -> Genome:
    """Twenty steps, two and six of which are rungs; a batch of six, of which two and then one go on."""
    search = {"trials": 8, "population": 6, "proposer": "random", "seed": 1, "halving": {"enabled": True}}
    return Genome.model_validate({**data, "train": {"data": str(facts_file), **TRAIN}, "search": search})


@pytest.fixture(scope="module")
def finished(halved: Genome, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, InProcess]:
    run_dir = tmp_path_factory.mktemp("halved") / "run"
    return run_dir, searched(halved, run_dir)


def trials_of(run_dir: Path) -> list[Trial]:
    with Store.open(run_dir, readonly=True) as store:
        return store.trials()


def without_clock(run_dir: Path) -> list[Any]:
    return [{**trial.to_json(), "cost": None} for trial in trials_of(run_dir)]


def test_a_batch_is_trained_further_the_better_it_is(finished: tuple[Path, InProcess]) -> None:
    run_dir, executor = finished
    jobs = [job.rung for job, _ in executor.done if job.split == "search"]
    assert jobs == [None, None, *[0] * 6, *[1] * 2, None]
    batch = trials_of(run_dir)[2:]
    with Store.open(run_dir, readonly=True) as store:
        stored = store.rungs()
    for rung, (entered, kept) in enumerate([(6, 2), (2, 1)]):
        here = {number: outcome for (number, r), outcome in stored.items() if r == rung}
        assert len(here) == entered
        losses = {n: outcome.metrics["validation_loss"]["nll,none"] for n, outcome in here.items()}
        best = sorted(losses, key=lambda n: losses[n])[:kept]
        assert best == sorted((t.number for t in batch if _place(t) > rung), key=lambda n: losses[n])
    assert ranked(batch, "maximize")[0].score.rung is None


def _place(trial: Trial) -> float:
    assert trial.score is not None
    return 2 if trial.score.rung is None else trial.score.rung


@pytest.mark.slow
def test_whoever_comes_to_the_end_is_what_an_undivided_training_gives(
    finished: tuple[Path, InProcess], halved: Genome, tmp_path: Path
) -> None:
    run_dir, _ = finished
    search = halved.search.model_copy(update={"halving": HalvingSpec(enabled=False)})
    kept = halved.evaluate.model_copy(update={"finalists": 6})
    searched(halved.model_copy(update={"search": search, "evaluate": kept}), tmp_path / "run")
    divided, whole = trials_of(run_dir), trials_of(tmp_path / "run")
    assert [t.params for t in divided] == [t.params for t in whole]
    winner = next(t.number for t in divided[2:] if t.score is not None and t.score.rung is None)
    assert divided[winner].score == whole[winner].score
    assert divided[winner].metrics == whole[winner].metrics
    weights = Path("adapters") / f"trial{winner:04d}" / "adapter_model.safetensors"
    assert (run_dir / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


def test_tokens_and_seconds_of_each_rung_are_in_the_cost(finished: tuple[Path, InProcess]) -> None:
    run_dir, _ = finished
    for trial in trials_of(run_dir)[1:]:
        train, rungs = trial.metrics["train"], trial.cost["rungs"]
        assert trial.cost["tokens"] == train["tokens"] == sum(rung["tokens"] for rung in rungs)
        assert trial.cost["train"] == pytest.approx(sum(rung["train"] for rung in rungs))
        assert len(rungs) == 1 if trial.number == 1 else _place(trial) + 1
        share = {0: 0.1, 1: 0.3, 2: 1.0}[_place(trial)]
        assert train["budget"] * (share - 0.05) < train["tokens"] <= train["budget"] * share + 0.5
        assert ("bytes" in trial.cost and "train" in trial.cost["bytes"]) == (share == 1.0)


def test_it_is_said_what_was_saved(finished: tuple[Path, InProcess]) -> None:
    run_dir, _ = finished
    found = findings.load(run_dir)
    effort = found.effort()
    trained = trials_of(run_dir)[1:]
    budget = trained[0].metrics["train"]["budget"]
    assert effort is not None
    assert (effort.unit, effort.without) == ("tokens", 7 * budget)
    assert effort.spent == sum(trial.metrics["train"]["tokens"] for trial in trained) < 0.5 * effort.without
    saved = effort.without - effort.spent
    assert f"{effort.spent} trained on; halving saved {saved} of {effort.without}" in console.end_of_run(
        found
    )
    assert found.to_json()["effort"]["unit"] == "tokens"
    early = next(trial for trial in trained if trial.score is not None and trial.score.rung == 0)
    assert score_text(early).endswith("(9% of the tokens)")  # as many whole steps as fit


def test_states_go_with_their_trials(finished: tuple[Path, InProcess]) -> None:
    run_dir, _ = finished
    best = ranked(trials_of(run_dir)[2:], "maximize")[0].number
    assert sorted(path.name for path in (run_dir / "adapters").iterdir()) == ["trial0001", f"trial{best:04d}"]


def test_the_run_can_be_played_again(finished: tuple[Path, InProcess], tmp_path: Path) -> None:
    found = replay(finished[0], tmp_path / "again", NoDisplay())
    assert found.identical, found.differences


class Killed(Exception):
    """In place of a `kill -9`: nothing runs after it."""


class Mortal:
    """An executor that dies at the end of its `fatal`-th job, before anybody hears of it."""

    workers = 1

    def __init__(self, inner: InProcess, fatal: int) -> None:
        self._inner, self._left = inner, fatal

    def describe(self) -> dict[str, Any]:
        return self._inner.describe()

    def submit(self, job: Job) -> Future[Outcome]:
        self._left -= 1
        done = self._inner.submit(job)
        if self._left == 0:
            raise Killed
        return done

    def shutdown(self, cancel: bool = False) -> None:
        """There is nothing to end."""


def died_and_went_on(genome: Genome, run_dir: Path, fatal: int, patch: pytest.MonkeyPatch) -> int:
    """Run until the `fatal`-th job, which is lost, and again to the end; return the steps that were done."""
    steps: list[int] = []
    step = Training._step
    patch.setattr(Training, "_step", lambda self, number: steps.append(number) or step(self, number))
    mortal = Mortal(InProcess(genome, run_dir), fatal)
    with pytest.raises(Killed):
        runner.run(genome, genomes.dump(genome), run_dir, observer=NoDisplay(), executor=mortal)
    searched(genome, run_dir)
    return len(steps)


@pytest.mark.parametrize(
    "fatal", [9, *(pytest.param(job, marks=pytest.mark.slow) for job in (3, 8, 10, 11, 12))]
)
def test_a_run_that_dies_in_a_rung_ends_as_one_that_does_not(
    finished: tuple[Path, InProcess],
    halved: Genome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fatal: int,
) -> None:
    run_dir = tmp_path / "run"
    steps = died_and_went_on(halved, run_dir, fatal, monkeypatch)
    assert without_clock(run_dir) == without_clock(finished[0])
    with Store.open(run_dir, readonly=True) as ours, Store.open(finished[0], readonly=True) as theirs:
        assert [row.score for row in ours.holdout()] == [row.score for row in theirs.holdout()]
    assert steps == 20 + 6 * 2 + 2 * 4 + 14  # what was trained before the death is not trained again


def rungs_in(run_dir: Path) -> int:
    """How many outcomes of rungs are in the store, from outside."""
    if not Store.exists(run_dir):
        return 0
    with Store.open(run_dir, readonly=True) as store:
        return len(store.rungs())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes where the cores are shared
def test_a_command_killed_in_a_rung_ends_as_one_that_was_not(
    finished: tuple[Path, InProcess], halved: Genome, tmp_path: Path
) -> None:
    """`kill -9` of the real command and not of its worker, which must end by itself."""
    whole, run_dir = finished[0], tmp_path / "run"
    (tmp_path / "genome.yaml").write_text(genomes.dump(halved))
    given = ["run", str(tmp_path / "genome.yaml"), "--run-dir", str(run_dir), "--display", "none"]

    def start() -> subprocess.Popen[str]:
        program = "from llmevo.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", program, *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    killed = start()
    while rungs_in(run_dir) < 1:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    # One outcome is stored, others are not, and states of trainings lie beside.
    assert 1 <= rungs_in(run_dir) < 6
    resumed = start()
    _, said = resumed.communicate(timeout=900)
    assert resumed.returncode == 0, said
    assert without_clock(run_dir) == without_clock(whole)
    with Store.open(run_dir, readonly=True) as ours, Store.open(whole, readonly=True) as theirs:
        assert [row.score for row in ours.holdout()] == [row.score for row in theirs.holdout()]
    assert rungs_in(run_dir) == rungs_in(whole) == 8
    kept = [sorted(path.name for path in (folder / "adapters").iterdir()) for folder in (run_dir, whole)]
    assert kept[0] == kept[1]


def test_merge_then_train_with_rungs_by_the_loss_and_the_task_at_the_end(
    halved: Genome, tiny_llamas: Any, letters: Path, tmp_path: Path
) -> None:
    first, second, _ = tiny_llamas.parents
    spec = {"models": [str(first), str(second)], "base_model": str(tiny_llamas.base)}
    old = json.loads(halved.model_dump_json(by_alias=True))
    changed = {
        "genome": {**spec, "merge_method": "task_arithmetic", "dtype": "float32"},
        "tasks": [{"name": "letters", "metric": "acc,none"}],
        "search": {**old["search"], "trials": 11, "proposer": "cma"},
    }
    old["evaluate"]["task_path"] = [str(letters)]
    genome = Genome.model_validate({**old, **changed})
    searched(genome, tmp_path / "run")
    trials = trials_of(tmp_path / "run")
    origins = [t.origin.split(":")[0] for t in trials[:5]]
    assert origins == ["baseline", "parent", "parent", "uniform", "default"]
    assert {name.split(".")[0] for name in trials[-1].params} >= {"train"}
    assert any("weight" in name for name in trials[-1].params)
    places = [_place(trial) for trial in trials[5:]]
    assert sorted(places) == [0, 0, 0, 0, 1, 2]
    for trial in trials[5:]:
        assert trial.score is not None
        if trial.score.rung is None:
            assert set(trial.score.items) == {"letters"}
            assert trial.value == trial.metrics["letters"]["acc,none"]
            assert trial.cost["items"] == {"scored": 14, "cached": 0}
        else:
            assert set(trial.score.items) == {"validation_loss"}
            assert trial.value == -trial.metrics["validation_loss"]["nll,none"]
            assert "items" not in trial.cost
    assert ranked(trials[5:], "maximize")[0].score.rung is None


@pytest.mark.parametrize(
    ("train", "why"),
    [
        ({"epochs": 4}, "has 6 steps, fewer than 8"),
        ({"epochs": 1}, r"\(10% of \d+ tokens\) has 1 steps"),
        ({"tokens": 200}, r"\(10% of 200 tokens\) ends before the first step of \d+; raise `train.tokens`"),
        ({"warmup": 0.1}, "would be over before the warm-up"),
        ({"schedule": "wsd", "decay": {"float": [0.1, 0.8]}}, "would see the learning rate fall"),
    ],
)
def test_rungs_that_would_say_little_are_left_out_and_asked_for_are_refused(
    tiny: Any, tokenizer: Any, make_spec: Any, train: dict[str, Any], why: str
) -> None:
    spec = make_spec(**{"epochs": None if "tokens" in train else 5, "batch_size": 4, **train})
    plain = Trainer(spec, tiny, tokenizer, seed=0)
    assert plain.shares == ()
    assert re.search(why, plain.describe()["undivided"])
    assert Trainer(spec, tiny, tokenizer, seed=0, halving=HalvingSpec(enabled=False)).shares == ()
    asked = HalvingSpec(enabled=True)
    if "fewer than" in why or "has 1" in why:
        assert Trainer(spec, tiny, tokenizer, seed=0, halving=asked).shares == (0.1, 0.3)
        return
    with pytest.raises(GenomeError, match=f"`search.halving.enabled` must not be true here: .*{why}"):
        Trainer(spec, tiny, tokenizer, seed=0, halving=asked)
