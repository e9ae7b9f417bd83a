"""Finalists and the default with fresh seeds: who is the best of them, and what the table says."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("lm_eval")

from test_run import InProcess, searched  # noqa: E402
from test_run import data as data  # noqa: E402
from test_token_rungs import died_and_went_on, without_clock  # noqa: E402

from llmevo.cli import console  # noqa: E402
from llmevo.genome import Genome  # noqa: E402
from llmevo.pipeline import Outcome, training_seed  # noqa: E402
from llmevo.report import findings  # noqa: E402
from llmevo.runner import reruns  # noqa: E402
from llmevo.stats import paired_over_seeds  # noqa: E402
from llmevo.store import DATABASE, Store  # noqa: E402
from llmevo.trial import Score, State, Trial  # noqa: E402

TRAIN = {
    "rank": 4,
    "learning_rate": {"float": [1e-3, 3e-2], "log": True},
    "target_modules": "attn",
    "layers": 1,
    "batch_size": 8,
    "epochs": 0.5,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def genome(data: dict[str, Any], facts_file: Path) -> Genome:
    evaluate = {**data["evaluate"], "finalists": 2, "reruns": 2}
    train = {"data": str(facts_file), **TRAIN}
    return Genome.model_validate({**data, "train": train, "evaluate": evaluate})


@pytest.fixture(scope="module")
def finished(genome: Genome, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, InProcess]:
    run_dir = tmp_path_factory.mktemp("again") / "run"
    return run_dir, searched(genome, run_dir)


def test_the_test_examples_are_read_after_all_seeds_are_trained(finished: tuple[Path, InProcess]) -> None:
    run_dir, executor = finished
    done = [(job.split, job.rerun) for job, _ in executor.done]
    again = [("search", rerun) for rerun in (1, 2) for _ in range(3)]
    assert done[:11] == [("search", 0)] * 5 + again
    assert done[11:] == [("holdout", 0)] * 4 + [("holdout", rerun) for _, rerun in again]
    with sqlite3.connect(run_dir / DATABASE) as db:
        seeds = db.execute("SELECT DISTINCT rerun, seed FROM reruns ORDER BY rerun").fetchall()
    assert seeds == [(1, training_seed(0, 1)), (2, training_seed(0, 2))]
    db.close()
    assert len({0, *(seed for _, seed in seeds)}) == 3
    losses = {job.rerun: o.metrics["train"]["loss_last"] for job, o in executor.done if job.number == 1}
    assert len(set(losses.values())) == 3  # each seed is another training
    assert sorted(path.name for path in (run_dir / "adapters").iterdir()) == sorted(
        f"trial{trial.number:04d}" for label, trial in _planned(run_dir) if reruns_label(label)
    )


def reruns_label(label: str) -> bool:
    return label == "default" or label.startswith("evolved")


def _planned(run_dir: Path) -> list[tuple[str, Trial]]:
    return [(row.label, row.trial) for row in findings.load(run_dir).summary.table]


def test_rows_are_means_over_seeds_and_intervals_allow_for_seeds(finished: tuple[Path, InProcess]) -> None:
    run_dir, executor = finished
    table = findings.load(run_dir).summary.table
    held = [(job, outcome.score) for job, outcome in executor.done if job.split == "holdout"]
    by_trial: dict[int, list[Score]] = {}
    for job, score in held:
        assert score is not None
        by_trial.setdefault(job.number, []).append(score)
    assert {row.label: row.seeds for row in table} == {
        "baseline": 0, "default": 3, "evolved": 3, "evolved:2": 3,
    }  # fmt: skip
    groups = [np.array([s.value for s in scores]) for scores in by_trial.values() if len(scores) == 3]
    deviation = np.sqrt(np.mean([group.var(ddof=1) for group in groups]))
    for row in table:
        values = [score.items["validation_loss"] for score in by_trial[row.trial.number]]
        assert row.score is not None
        assert row.score.value == pytest.approx(np.mean(values))
        assert row.score.items["validation_loss"] == pytest.approx(np.mean(values, axis=0))
        assert row.spread is not None
        assert (row.spread.deviation, row.spread.freedom) == (pytest.approx(deviation), 6)
        items = np.mean(values, axis=0)
        seeds = deviation / np.sqrt(row.seeds) if row.seeds else 0.0
        assert row.score.stderr == pytest.approx(np.hypot(items.std(ddof=1) / np.sqrt(len(items)), seeds))
    rival = next(row for row in table if row.label == "default")
    for row in table:
        if row.label.startswith("evolved"):
            expected = paired_over_seeds(
                row.score.items, rival.score.items, (3, 3), row.spread, level=1 - 0.05 / 2
            )[0]  # fmt: skip
            assert row.interval == expected
            assert row.p_value is not None


def test_the_winner_has_the_best_mean_and_its_own_adapter(finished: tuple[Path, InProcess]) -> None:
    run_dir, executor = finished
    found = findings.load(run_dir)
    means: dict[int, list[float]] = {}
    for job, outcome in executor.done:
        if job.split == "search" and outcome.score is not None:
            means.setdefault(job.number, []).append(outcome.score.value)
    several = {number: np.mean(values) for number, values in means.items() if len(values) == 3}
    best = max(several, key=lambda number: several[number])
    assert found.summary.best is not None
    assert found.summary.best.number == best
    evolved = [row.trial.number for row in found.summary.table if row.label.startswith("evolved")]
    assert evolved == sorted(evolved, key=lambda number: -several[number])
    kept = run_dir / "adapters" / f"trial{best:04d}" / "adapter_model.safetensors"
    assert (run_dir / "best" / "adapter" / kept.name).read_bytes() == kept.read_bytes()
    said = console.end_of_run(found).replace("\n", " ")
    assert "the mean of 3 trainings with different seeds" in said
    row = next(json_row for json_row in found.to_json()["held_out"] if json_row["label"] == "default")
    assert row["seeds"] == 3


@pytest.mark.parametrize(
    "fatal", [8, *(pytest.param(j, marks=pytest.mark.slow) for j in (6, 11, 13, 16, 21))]
)
def test_a_run_that_dies_at_its_end_comes_to_the_same_end(
    finished: tuple[Path, InProcess],
    genome: Genome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fatal: int,
) -> None:
    run_dir = tmp_path / "run"
    assert died_and_went_on(genome, run_dir, fatal, monkeypatch) == 10 * 4  # nothing is trained twice
    assert without_clock(run_dir) == without_clock(finished[0])
    ours, theirs = findings.load(run_dir).summary.table, findings.load(finished[0]).summary.table
    assert [(r.label, r.score, r.interval, r.p_value) for r in ours] == [
        (r.label, r.score, r.interval, r.p_value) for r in theirs
    ]
    best = Path("best") / "adapter" / "adapter_model.safetensors"
    assert (run_dir / best).read_bytes() == (finished[0] / best).read_bytes()


def trial(number: int, value: float) -> Trial:
    return Trial(number, {}, "random", State.COMPLETE, score=Score(value))


def test_a_lucky_seed_is_no_winner() -> None:
    trials = [trial(0, 0.5), trial(1, 0.9), trial(2, 0.8), trial(3, 0.7), trial(4, 0.95)]
    planned = [("default", trials[0]), *(("evolved", t) for t in trials[1:4])]
    values = {0: 0.5, 1: 0.3, 2: 0.75, 3: None}
    again: dict[tuple[int, int, Any], Outcome] = {
        (number, 1, "search"): Outcome(number, None if value is None else Score(value))
        for number, value in values.items()
    }
    order = reruns.best_first([t for _, t in planned], again, "maximize")
    assert [t.number for t in order] == [2, 1, 0, 3]  # who failed once is behind
    assert reruns.best_of(trials, planned, again, "maximize") == trials[2]
    assert reruns.best_of(trials, planned, {}, "maximize") == trials[4]
    order = reruns.best_first([t for _, t in planned], again, "minimize")
    assert [t.number for t in order] == [0, 1, 2, 3]


def test_what_the_store_keeps_of_a_rerun(tmp_path: Path, genome: Genome) -> None:
    outcome = Outcome(3, Score(0.5, 0.1, {"t": [0.0, 1.0]}), {"train": {"tokens": 8.0}}, tokens=8)
    with Store.create(tmp_path / "run", "", genome) as store:
        store.save_rerun(2, 77, "holdout", outcome)
        store.save_rerun(1, 76, "search", Outcome(3, error="diverged", stage="train"))
        assert store.reruns()[3, 2, "holdout"] == outcome
        assert store.reruns()[3, 1, "search"].error == "diverged"
