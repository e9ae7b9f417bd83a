"""The loop over a real search with a deterministic score: everything but the models is the real thing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmevo import genome as genomes
from llmevo import runner
from llmevo.errors import GenomeError, ProposerError, RunLockedError, StoreError
from llmevo.genome import Genome
from llmevo.pipeline import Job, Outcome
from llmevo.runner.observer import RunInfo, RunSummary
from llmevo.stats import holm, paired_p_value
from llmevo.store import Store
from llmevo.trial import Score, State, Trial

Work = Callable[[Job], Outcome]


class FunctionExecutor:
    """Jobs as calls of a function in threads."""

    def __init__(self, work: Work, workers: int = 1, facts: dict[str, Any] | None = None) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._workers = workers
        self._facts = facts or {"items": {"t": 30}, "weights": {"t": 1.0}}
        self._work = work

    @property
    def workers(self) -> int:
        return self._workers

    def describe(self) -> dict[str, Any]:
        return self._facts

    def submit(self, job: Job) -> Future[Outcome]:
        return self._pool.submit(self._work, job)

    def shutdown(self, cancel: bool = False) -> None:
        self._pool.shutdown(wait=not cancel, cancel_futures=True)


def scored(job: Job) -> Outcome:
    """A smooth score of the weights with noise per item; the same job always scores the same."""
    text = json.dumps([job.params, job.recipe, job.split, job.seed], sort_keys=True)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
    weights = [value for value in job.params.values() if isinstance(value, float)]
    level = math.exp(-sum((weight - 0.3 - 0.1 * k) ** 2 for k, weight in enumerate(weights)))
    items = (0.2 + 0.6 * (level if weights else 0.5) + 0.1 * rng.standard_normal(30)).tolist()
    score = Score.from_items(items, "t")
    return Outcome(
        job.number, score, {"t": {"acc,none": score.value}}, {"merge": 0.01, "evaluate": 0.02}, {"merge": 8}
    )


class Recorder:
    """Keeps what an observer is told, and does `at` before it returns from `finished`."""

    def __init__(self, at: Callable[[Trial], None] | None = None) -> None:
        self.info: RunInfo | None = None
        self.notes: list[str] = []
        self.batches: list[int] = []
        self.sifts: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.trials: list[Trial] = []
        self.best: list[int] = []
        self.summary: RunSummary | None = None
        self._at = at

    def started(self, info: RunInfo) -> None:
        self.info = info

    def note(self, line: str) -> None:
        self.notes.append(line)

    def asked(self, trials: Sequence[Trial], seconds: float) -> None:
        assert seconds >= 0
        self.batches.append(len(trials))

    def sifted(self, reached: str, entered: Sequence[int], kept: Sequence[int]) -> None:
        self.sifts.append((reached, tuple(entered), tuple(kept)))

    def finished(self, trial: Trial, best: Trial | None) -> None:
        self.trials.append(trial)
        if best is not None:
            self.best.append(best.number)
        if self._at is not None:
            self._at(trial)

    def ended(self, summary: RunSummary) -> None:
        self.summary = summary


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A genome of two parents and a base; their folders have a configuration, and no weights."""
    for name in ("base", "german", "finnish"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4}
        (folder / "config.json").write_text(json.dumps(config))
    models = tmp_path / "models"
    return f"""\
genome:
  models: [{models}/german, {models}/finnish]
  base_model: {models}/base
  merge_method: task_arithmetic
  layer_granularity: 2
tasks: [{{name: t}}]
search: {{proposer: cma, trials: 24, seed: 5, population: 6}}
"""


def run(
    text: str,
    run_dir: Path,
    *overrides: str,
    work: Work = scored,
    workers: int = 1,
    observer: Recorder | None = None,
    facts: dict[str, Any] | None = None,
    **options: Any,
) -> RunSummary:
    genome: Genome = genomes.parse(text, overrides=overrides)
    executor = FunctionExecutor(work, workers, facts)
    try:
        return runner.run(
            genome, text, run_dir, observer=observer or Recorder(), executor=executor, **options
        )
    finally:
        executor.shutdown()


def same(trials: Sequence[Trial]) -> list[Trial]:
    """Trials without what a clock says."""
    return [replace(trial, cost={}) for trial in trials]


def test_a_run_from_its_start_to_its_end(text: str, tmp_path: Path) -> None:
    observer = Recorder()
    summary = run(text, tmp_path / "run", observer=observer)
    assert (summary.exit_code, summary.reason) == (0, "all 24 trials are done")
    assert [trial.number for trial in observer.trials] == list(range(24))
    assert [trial.origin.split(":")[0] for trial in summary.references] == [
        "baseline",
        "parent",
        "parent",
        "uniform",
    ]
    assert observer.batches == [4, 6, 6, 6, 2]
    assert observer.info is not None
    assert (observer.info.references, observer.info.batch) == (4, 6)
    assert observer.summary == summary
    assert summary.best is not None
    assert summary.best.value == max(trial.value or 0 for trial in summary.trials)
    assert summary.evolved is not None
    assert summary.evolved.origin == "cma"
    assert sum(summary.origins.values()) == 24
    for trial in summary.trials:
        assert set(trial.cost) == {"propose", "merge", "evaluate", "store", "bytes"}
    assert summary.seconds["merge"] == pytest.approx(0.24)
    assert summary.seconds["store"] > 0
    with Store.open(tmp_path / "run", readonly=True) as store:
        assert tuple(store.trials()) == summary.trials
        assert replace(runner.summarise(store), elapsed=summary.elapsed) == summary
        assert store.meta("pipeline") == {"items": {"t": 30}, "weights": {"t": 1.0}}
        assert [event["kind"] for event in store.events] == ["started", "ended"]
    assert (tmp_path / "run" / "genome.yaml").read_text() == text


def test_the_table_is_of_held_out_items(text: str, tmp_path: Path) -> None:
    summary = run(text, tmp_path / "run", "evaluate.finalists=2")
    labels = [row.label for row in summary.table]
    assert labels[0] == "baseline"
    assert labels[1].startswith("parent:")
    assert labels[2:] == ["uniform", "evolved", "evolved:2"]
    parent = summary.table[1]
    assert parent.interval is None
    for row in summary.table:
        assert row.score == scored(runner.job_of(genomes.parse(text), row.trial, "holdout")).score
        assert row.score != row.trial.score
        if row is not parent:
            assert row.interval is not None
            assert row.score is not None
            assert parent.score is not None
            assert row.interval.estimate == pytest.approx(row.score.value - parent.score.value)
            assert row.interval.level == (0.975 if row.label.startswith("evolved") else 0.95)
        assert row.score is not None
        assert row.trial.score is not None
        assert row.optimism == row.trial.score.value - row.score.value
    evolved = [row for row in summary.table if row.label.startswith("evolved")]
    assert parent.score is not None
    alone = [paired_p_value(row.score.items, parent.score.items) for row in evolved if row.score]
    assert [row.p_value for row in evolved] == holm(alone)
    assert all(row.p_value is None for row in summary.table if row not in evolved)
    assert run(text, tmp_path / "none", "evaluate.holdout=0").table == ()


def test_the_best_recipe_is_there_at_every_moment(text: str, tmp_path: Path) -> None:
    seen = []

    def look(trial: Trial) -> None:
        seen.append(yaml.safe_load((tmp_path / "run" / "best" / "recipe.yaml").read_text()))

    observer = Recorder(look)
    summary = run(text, tmp_path / "run", observer=observer)
    recipes = [seen[number] for number in range(24)]
    for number, best in enumerate(observer.best):
        assert recipes[number] == recipes[best]
    assert seen[0] == {
        "merge_method": "passthrough",
        "models": [{"model": str(tmp_path / "models" / "base")}],
        "dtype": "bfloat16",
    }
    assert summary.best is not None
    if summary.best.params:
        assert seen[-1]["merge_method"] == "task_arithmetic"


@pytest.mark.parametrize("proposer", ["cma", "ga", "random", "sobol"])
def test_a_run_cut_anywhere_ends_like_one_that_was_not(text: str, tmp_path: Path, proposer: str) -> None:
    override = f"search.proposer={proposer}"
    whole = run(text, tmp_path / "whole", override)
    cut = tmp_path / "cut"
    for limit in (1, 2, 5, 1, 7, 3):
        part = run(text, cut, override, limit=limit)
        assert part.exit_code == 3
        assert part.resumable
        assert part.table == ()
    finished = run(text, cut, override)
    assert same(finished.trials) == same(whole.trials)
    assert [replace(row, trial=row.trial) for row in finished.table] == [
        replace(row, trial=finished.trials[row.trial.number]) for row in whole.table
    ]


def test_the_number_of_workers_changes_nothing(text: str, tmp_path: Path) -> None:
    """Not even when the trials of a batch arrive in another order."""

    def slow_first(job: Job) -> Outcome:
        time.sleep(0.02 * (3 - job.number % 4))
        return scored(job)

    one = run(text, tmp_path / "one")
    many = run(text, tmp_path / "many", "run.workers=4", work=slow_first, workers=4)
    assert same(one.trials) == same(many.trials)


def test_a_finished_run_is_not_run_again(text: str, tmp_path: Path) -> None:
    first = run(text, tmp_path / "run")

    def never(job: Job) -> Outcome:
        raise AssertionError(f"trial {job.number} was evaluated again")

    again = run(text, tmp_path / "run", work=never)
    assert (again.exit_code, again.trials, again.table) == (0, first.trials, first.table)


def test_a_larger_budget_goes_on(text: str, tmp_path: Path) -> None:
    run(text, tmp_path / "run", "search.trials=10")
    more = run(text, tmp_path / "run", "search.trials=16")
    assert same(more.trials) == same(run(text, tmp_path / "whole", "search.trials=16").trials)
    labels = [row.label for row in more.table]
    assert len(labels) == len(set(labels)) == 6


def test_another_genome_is_refused_with_the_difference(text: str, tmp_path: Path) -> None:
    run(text, tmp_path / "run", limit=2)
    with pytest.raises(StoreError, match=r"search\.seed: 5 -> 6(.|\n)*--run-dir.*--fresh"):
        run(text, tmp_path / "run", "search.seed=6")
    observer = Recorder()
    summary = run(text, tmp_path / "run", "search.seed=6", fresh=True, observer=observer)
    assert summary.exit_code == 0
    assert any("run.old-1" in note for note in observer.notes)
    with Store.open(tmp_path / "run.old-1", readonly=True) as store:
        assert sum(trial.state is State.COMPLETE for trial in store.trials()) == 2


def test_a_run_without_a_trial_takes_a_mended_genome(text: str, tmp_path: Path) -> None:
    with pytest.raises(GenomeError):
        run(text, tmp_path / "run", "genome.merge_method=ties_ties")
    assert run(text, tmp_path / "run").exit_code == 0


def test_other_items_are_refused(text: str, tmp_path: Path) -> None:
    run(text, tmp_path / "run", limit=2)
    with pytest.raises(StoreError, match="other items"):
        run(text, tmp_path / "run", facts={"items": {"t": 31}})


def test_a_second_driver_is_refused(text: str, tmp_path: Path) -> None:
    def intrude(trial: Trial) -> None:
        with pytest.raises(RunLockedError, match=str(os.getpid())):
            run(text, tmp_path / "run")
        with Store.open(tmp_path / "run", readonly=True) as store:  # looking is allowed
            assert store.trials()[trial.number] == trial  # and what is shown is on disk

    assert run(text, tmp_path / "run", "search.trials=5", observer=Recorder(intrude)).exit_code == 0


def test_a_failed_trial_is_data(text: str, tmp_path: Path) -> None:
    def fails(job: Job) -> Outcome:
        if job.number % 3 == 1:
            return Outcome(job.number, error="NaN in layer 2", stage="merge", seconds={"merge": 0.01})
        return scored(job)

    summary = run(text, tmp_path / "run", work=fails)
    assert summary.exit_code == 0
    failed = [trial for trial in summary.trials if trial.state is State.FAILED]
    assert [trial.number for trial in failed] == list(range(1, 24, 3))
    assert {trial.error for trial in failed} == {"merge: NaN in layer 2"}


def test_no_trial_completed_is_an_error(text: str, tmp_path: Path) -> None:
    summary = run(
        text, tmp_path / "run", "search.trials=5", work=lambda job: Outcome(job.number, error="no memory")
    )
    assert summary.exit_code == 1
    assert "no memory" in summary.reason


def test_twenty_failures_in_a_row_end_the_sitting(text: str, tmp_path: Path) -> None:
    def broken(job: Job) -> Outcome:
        return scored(job) if job.number < 4 else Outcome(job.number, error="disk is full")

    summary = run(text, tmp_path / "run", "search.trials=60", work=broken)
    assert summary.exit_code == 3
    assert "disk is full" in summary.reason
    assert len(summary.trials) < 60
    assert run(text, tmp_path / "run", "search.trials=60").exit_code == 0  # the disk was emptied


def test_a_space_that_is_used_up_ends_the_run(text: str, tmp_path: Path) -> None:
    small = text.replace("layer_granularity: 2", "parameters: {weight: {float: [0, 1], step: 0.5}}")
    summary = run(small, tmp_path / "run", "search.proposer=ga", "search.trials=60")
    assert summary.exit_code == 0
    assert "no new point" in summary.reason
    assert len(summary.trials) < 20


def test_a_proposer_that_cannot_go_on_stops_the_run_resumably(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(text, tmp_path / "whole", "search.proposer=random")
    from llmevo.proposers.random import Random

    real = Random.propose

    def outage(self: Random, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> Any:
        if len(trials) > 8:
            raise ProposerError("the endpoint answered 503")
        return real(self, n, trials, rng)

    with monkeypatch.context() as patch:
        patch.setattr(Random, "propose", outage)
        stopped = run(text, tmp_path / "run", "search.proposer=random")
    assert stopped.exit_code == 3
    assert "503" in stopped.reason
    assert same(run(text, tmp_path / "run", "search.proposer=random").trials) == same(whole.trials)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 3)])
def test_a_signal_finishes_what_is_in_flight(text: str, tmp_path: Path, number: int, code: int) -> None:
    whole = run(text, tmp_path / "whole")

    def interrupt(job: Job) -> Outcome:
        if job.number == 7:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        return scored(job)

    observer = Recorder()
    before = signal.getsignal(signal.SIGINT)
    summary = run(text, tmp_path / "run", work=interrupt, observer=observer)
    assert signal.getsignal(signal.SIGINT) is before
    assert summary.exit_code == code
    assert summary.resumable
    assert observer.trials[-1].number == 7  # in flight, so finished and kept
    assert signal.Signals(number).name in observer.notes[-1]
    assert same(run(text, tmp_path / "run").trials) == same(whole.trials)


def test_a_second_signal_stops_at_once(text: str, tmp_path: Path) -> None:
    release = threading.Event()

    def stuck(job: Job) -> Outcome:
        if job.number == 5:
            for _ in range(2):
                told = len(observer.notes) + 1
                os.kill(os.getpid(), signal.SIGINT)
                while len(observer.notes) < told and not release.wait(0.01):
                    pass  # two signals before the first was handled would count as one
            release.wait(30)
        return scored(job)

    observer = Recorder()
    genome = genomes.parse(text)
    executor = FunctionExecutor(stuck)
    start = time.monotonic()
    summary = runner.run(genome, text, tmp_path / "run", observer=observer, executor=executor)
    assert time.monotonic() - start < 25
    release.set()
    assert summary.exit_code == 130
    assert summary.trials[5].state is State.PENDING
    assert run(text, tmp_path / "run").exit_code == 0


def test_a_signal_interrupts_a_proposer_that_waits(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmevo.proposers.random import Random

    def waits(self: Random, n: int, trials: Sequence[Trial], rng: np.random.Generator) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(Random, "propose", waits)
    start = time.monotonic()
    summary = run(text, tmp_path / "run", "search.proposer=random")
    assert time.monotonic() - start < 25
    assert (summary.exit_code, len(summary.trials)) == (3, 4)


def test_models_that_cannot_be_loaded_are_a_genome_error(text: str, tmp_path: Path) -> None:
    class Broken(FunctionExecutor):
        def describe(self) -> dict[str, Any]:
            raise GenomeError("`models` has no weights")

    executor = Broken(scored)
    with pytest.raises(GenomeError, match="no weights"):
        runner.run(genomes.parse(text), text, tmp_path / "run", observer=Recorder(), executor=executor)
    executor.shutdown()
    assert run(text, tmp_path / "run").exit_code == 0


def test_without_references_the_first_trial_is_the_proposers(text: str, tmp_path: Path) -> None:
    summary = run(text, tmp_path / "run", "search.references=false", "search.trials=7")
    assert summary.references == ()
    assert {trial.origin for trial in summary.trials} == {"cma"}
    assert [row.label for row in summary.table] == ["evolved", "evolved:2", "evolved:3"]
    assert {(row.interval, row.p_value) for row in summary.table} == {(None, None)}


def test_warm_starts_come_after_the_references(text: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"{models}/{n}", "parameters": {"weight": 0.5}} for n in ("german", "finnish")],
        "dtype": "bfloat16",
    }
    warm = text + yaml.safe_dump({"warm_start": [recipe]})
    jobs: dict[int, Job] = {}

    def keep(job: Job) -> Outcome:
        jobs.setdefault(job.number, job)
        return scored(job)

    summary = run(warm, tmp_path / "run", "search.trials=8", work=keep)
    assert summary.references[4].origin == "warm_start:0"
    assert jobs[4].recipe == recipe  # outside the space, so the recipe itself is evaluated
    assert jobs[3].recipe is None  # the uniform merge is a point of the space
    assert len({job.seed for job in jobs.values()}) == 1
    assert "warm_start:0" in [row.label for row in summary.table]
