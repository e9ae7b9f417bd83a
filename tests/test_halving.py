"""Whole runs with rungs: cut, killed, played again and on many workers, they end with the same trials."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_runner import Recorder, run, same, scored
from test_runner import text as text

from llmevo import genome as genomes
from llmevo import runner
from llmevo.cli.display import NoDisplay, PlainDisplay
from llmevo.errors import StoreError
from llmevo.pipeline import Job, Outcome
from llmevo.runner.replay import replay
from llmevo.store import DATABASE, Store, migrations
from llmevo.trial import Score, State, ranked

SIZES = (4, 8, 16, 30)
FACTS: dict[str, Any] = {
    "items": {"t": {"search": 30, "holdout": 30}},
    "weights": {"t": 1.0},
    "rungs": [{"t": size} for size in SIZES],
}
CRASHES = 25


def prefix(job: Job) -> Outcome:
    """`scored` on the items of the job's rung."""
    whole = scored(job)
    assert whole.score is not None
    if job.rung is None:
        return replace(whole, items={"scored": 14, "cached": 16})
    size = SIZES[job.rung]
    score = Score.from_items(list(whole.score.items["t"])[:size], "t")
    return replace(whole, score=score, metrics={"t": {"acc,none": score.value}}, items={"scored": size})


def test_a_batch_sees_more_items_the_better_it_is(text: str, tmp_path: Path) -> None:
    jobs: list[Job] = []

    def keep(job: Job) -> Outcome:
        jobs.append(job)
        return prefix(job)

    observer = Recorder()
    summary = run(text, tmp_path / "run", work=keep, facts=FACTS, observer=observer)
    assert summary.exit_code == 0
    assert observer.batches == [4, 6, 6, 6, 2]
    # References are always scored in full; six trials are halved to three, two and one, a last pair to one.
    in_search = Counter(job.rung for job in jobs if job.split == "search")
    assert in_search == {None: 4 + 3 + 1, 0: 3 * 6 + 2, 1: 3 * 3, 2: 3 * 2}
    assert [len(entered) for _, entered, _ in observer.sifts] == [6, 3, 2] * 3 + [2]
    assert [reached for reached, _, _ in observer.sifts] == ["4 items", "8 items", "16 items"] * 3 + [
        "4 items"
    ]
    rungs = Counter(trial.score.rung for trial in summary.trials[4:] if trial.score is not None)
    assert rungs == {None: 4, 0: 3 * 3 + 1, 1: 3 * 1, 2: 3 * 1}
    for trial in summary.trials:
        assert trial.score is not None
        size = 30 if trial.score.rung is None else SIZES[trial.score.rung]
        assert trial.score.count == size
        assert trial.cost["items"]["scored"] >= 4
    # Nobody who dropped out is best, evolved or a finalist, however lucky on four items.
    assert summary.evolved is not None
    assert summary.evolved.score is not None
    assert summary.evolved.score.rung is None
    assert summary.best == ranked(summary.trials, "maximize")[0]
    # What goes to the held-out items is merged as the export is.
    held_out = [job for job in jobs if job.split == "holdout"]
    assert held_out
    assert all(job.exact and job.rung is None for job in held_out)
    assert not any(job.exact for job in jobs if job.split == "search")


def test_every_second_rung_begins_with_the_latest(text: str, tmp_path: Path) -> None:
    jobs: list[Job] = []

    def keep(job: Job) -> Outcome:
        jobs.append(job)
        return prefix(job)

    run(text, tmp_path / "run", work=keep, facts=FACTS, workers=1)
    for batch in range(3):
        numbers = range(4 + 6 * batch, 10 + 6 * batch)
        mine = [job for job in jobs if job.split == "search" and job.number in numbers]
        orders = [[job.number for job in mine if job.rung == rung] for rung in (0, 1, 2, None)]
        assert [len(order) for order in orders] == [6, 3, 2, 1]
        for number, order in enumerate(orders):
            assert order == sorted(order, reverse=number % 2 == 1)


def test_every_outcome_is_stored_before_anything_depends_on_it(text: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def look(job: Job) -> Outcome:
        with Store.open(tmp_path / "run", readonly=True) as store:
            known = store.rungs()
        if job.rung is not None and job.split == "search":
            for number, rung in seen:
                assert (number, rung) in known
            seen.append((job.number, job.rung))
        return prefix(job)

    run(text, tmp_path / "run", work=look, facts=FACTS)
    assert len(seen) == len(set(seen)) == 3 * 6 + 2 + 3 * 3 + 3 * 2


@pytest.mark.parametrize("proposer", ["cma", "ga", "random"])
def test_a_run_cut_anywhere_ends_like_one_that_was_not(text: str, tmp_path: Path, proposer: str) -> None:
    override = f"search.proposer={proposer}"
    whole = run(text, tmp_path / "whole", override, work=prefix, facts=FACTS)
    asked: list[tuple[int, int | None, str]] = []

    def keep(job: Job) -> Outcome:
        asked.append((job.number, job.rung, job.split))
        return prefix(job)

    for limit in (1, 2, 5, 1, 7, 3):
        part = run(text, tmp_path / "cut", override, limit=limit, work=keep, facts=FACTS)
        assert part.exit_code == 3
    finished = run(text, tmp_path / "cut", override, work=keep, facts=FACTS)
    assert same(finished.trials) == same(whole.trials)
    assert finished.table == tuple(
        replace(row, trial=finished.trials[row.trial.number]) for row in whole.table
    )
    assert len(asked) == len(set(asked)), "a stored rung was asked again"


def test_the_number_of_workers_changes_nothing(text: str, tmp_path: Path) -> None:
    def slow_first(job: Job) -> Outcome:
        time.sleep(0.01 * (3 - job.number % 4))
        return prefix(job)

    one = run(text, tmp_path / "one", work=prefix, facts=FACTS)
    many = run(text, tmp_path / "many", "run.workers=4", work=slow_first, workers=4, facts=FACTS)
    assert same(one.trials) == same(many.trials)


def test_a_trial_stops_where_it_fails(text: str, tmp_path: Path) -> None:
    def fails(job: Job) -> Outcome:
        if job.number % 6 == 5 or (job.rung == 1 and job.number % 6 == 0) or job.number >= 22:
            return Outcome(job.number, error="NaN in layer 2", stage="merge", seconds={"merge": 0.01})
        return prefix(job)

    summary = run(text, tmp_path / "run", work=fails, facts=FACTS)
    assert summary.exit_code == 0
    failed = {trial.number for trial in summary.trials if trial.state is State.FAILED}
    assert {5, 11, 17, 22, 23} <= failed
    assert {trial.error for trial in summary.trials if trial.error} == {"merge: NaN in layer 2"}
    again = run(text, tmp_path / "run", work=scored, facts=FACTS)
    assert same(again.trials) == same(summary.trials)


def test_the_next_best_takes_the_place_of_those_that_failed(text: str, tmp_path: Path) -> None:
    """Also where the run is cut at any moment: those that dropped out are committed last."""

    def fails(job: Job) -> Outcome:
        whole = job.split == "search" and job.rung is None and job.number >= 4
        if (whole and job.number % 5) or (job.rung == 1 and job.number % 4 == 0):
            return Outcome(job.number, error="NaN in layer 2", stage="merge")
        return prefix(job)

    observer = Recorder()
    whole = run(text, tmp_path / "run", work=fails, facts=FACTS, observer=observer)
    batches = [whole.trials[first : first + 6] for first in (4, 10, 16)]
    assert sum("in the place of" in note for note in observer.notes) >= 2
    for batch in batches:
        full = [t for t in batch if t.score is not None and t.score.rung is None]
        spare = [t for t in batch if t.score is not None and t.score.rung is not None]
        assert len(full) == 1 or (not full and not spare)
    for step in (1, 2, 3):
        name = tmp_path / f"cut{step}"
        while run(text, name, work=fails, facts=FACTS, limit=step).exit_code == 3:
            pass
        with Store.open(name, readonly=True) as store:
            assert same(store.trials()) == same(whole.trials)


def test_a_run_of_before_there_were_rungs_goes_on_without(text: str, tmp_path: Path) -> None:
    plain = {key: value for key, value in FACTS.items() if key != "rungs"}
    run(text, tmp_path / "run", limit=7, facts=plain)
    whole = run(text, tmp_path / "run", facts=FACTS)
    assert all(trial.score is not None and trial.score.rung is None for trial in whole.trials)
    assert same(whole.trials) == same(run(text, tmp_path / "other", facts=plain).trials)


def test_other_rungs_are_refused(text: str, tmp_path: Path) -> None:
    run(text, tmp_path / "run", limit=6, work=prefix, facts=FACTS)
    with pytest.raises(StoreError, match="rungs"):
        run(text, tmp_path / "run", work=prefix, facts={**FACTS, "rungs": [{"t": 6}, {"t": 30}]})


def test_other_right_answers_are_refused(text: str, tmp_path: Path) -> None:
    """A run that began before the items were hashed goes on; it cannot tell."""
    run(text, tmp_path / "old", limit=6, work=prefix, facts=FACTS)
    run(text, tmp_path / "old", limit=7, work=prefix, facts={**FACTS, "documents": "one"})
    run(text, tmp_path / "run", limit=6, work=prefix, facts={**FACTS, "documents": "one"})
    with pytest.raises(StoreError, match="documents: one -> two"):
        run(text, tmp_path / "run", work=prefix, facts={**FACTS, "documents": "two"})


def test_a_replay_serves_the_rungs(text: str, tmp_path: Path) -> None:
    run(text, tmp_path / "run", work=prefix, facts=FACTS, limit=9)
    run(text, tmp_path / "run", work=prefix, facts=FACTS)
    found = replay(tmp_path / "run", tmp_path / "again", NoDisplay())
    assert found.identical, found.differences
    stored = []
    for name in ("run", "again"):
        with Store.open(tmp_path / name, readonly=True) as store:
            stored.append({key: outcome.score for key, outcome in store.rungs().items()})
    assert stored[0] == stored[1]


def test_a_database_of_the_old_schema_gains_the_table(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {key: value for key, value in FACTS.items() if key != "rungs"}
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:1])
        run(text, tmp_path / "run", limit=6, facts=plain)
    path = tmp_path / "run" / DATABASE
    db = sqlite3.connect(path)  # scores of then say nothing of a rung
    for number, body in db.execute("SELECT number, body FROM trials").fetchall():
        assert body.count(',"rung":null') <= 1
        old = body.replace(',"rung":null', "")
        crc = zlib.crc32(old.encode())
        db.execute("UPDATE trials SET body = ?, crc = ? WHERE number = ?", (old, crc, number))
    db.commit()
    db.close()
    with Store.open(tmp_path / "run", readonly=True) as store:  # looking changes nothing
        before = store.trials()
        assert store.rungs() == {}
    summary = run(text, tmp_path / "run", facts=plain)
    finished = [trial for trial in before if trial.state is State.COMPLETE]
    assert finished
    assert summary.exit_code == 0
    assert [summary.trials[trial.number] for trial in finished] == finished
    with Store.open(tmp_path / "run") as store:
        store.save_rung(1, prefix(Job(3, {}, 5, rung=1)))
        assert store.rungs() == {(3, 1): prefix(Job(3, {}, 5, rung=1))}


class Deadly:
    """An executor whose process is killed somewhere during its `fatal`-th job, or just after it."""

    workers = 2

    def __init__(self, fatal: int, delay: float) -> None:
        self._left = fatal
        self._delay = delay

    def describe(self) -> dict[str, Any]:
        return FACTS

    def submit(self, job: Job) -> Future[Outcome]:
        self._left -= 1
        if self._left == 0:
            threading.Timer(self._delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        done: Future[Outcome] = Future()
        done.set_result(prefix(job))
        return done

    def shutdown(self, cancel: bool = False) -> None:
        pass


def _sit(text: str, run_dir: Path, fatal: int, delay: float) -> None:
    genome = genomes.parse(text)
    runner.run(genome, text, run_dir, observer=NoDisplay(), executor=Deadly(fatal, delay))


def test_kill_minus_nine_between_any_two_commits(text: str, tmp_path: Path) -> None:
    whole = run(text, tmp_path / "whole", work=prefix, facts=FACTS)
    fork = multiprocessing.get_context("fork")
    draw = random.Random(0)
    kills = runs = 0
    while kills < CRASHES:
        run_dir = tmp_path / f"run{runs}"
        process = fork.Process(
            target=_sit, args=(text, run_dir, draw.randint(1, 20), draw.choice([0.0, draw.uniform(0, 0.02)]))
        )
        process.start()
        process.join(60)
        if process.exitcode == 0:
            runs += 1
            with Store.open(run_dir, readonly=True) as store:
                assert same(store.trials()) == same(whole.trials)
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    finished = run(text, run_dir, work=prefix, facts=FACTS)
    assert same(finished.trials) == same(whole.trials)
    assert runs >= 1


def test_a_failed_commit_of_a_rung_is_no_result(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(text, tmp_path / "whole", work=prefix, facts=FACTS)
    real = Store.save_rung
    count = np.zeros(1, int)

    def full(self: Store, rung: int, outcome: Outcome) -> None:
        count[0] += 1
        if count[0] == 9:
            raise StoreError("disk is full")
        real(self, rung, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save_rung", full)
        with pytest.raises(StoreError, match="disk is full"):
            run(text, tmp_path / "run", work=prefix, facts=FACTS)
    assert same(run(text, tmp_path / "run", work=prefix, facts=FACTS).trials) == same(whole.trials)


def test_what_was_loaded_and_what_is_cut_off_is_said_once(text: str, tmp_path: Path) -> None:
    def cut(job: Job) -> Outcome:
        items = {"scored": 4, "halved": 3} if (job.number, job.split) == (1, "search") else {"scored": 4}
        return replace(prefix(job), metrics={"t": {"acc,none": 0.5, "truncated,none": 0.2}}, items=items)

    models = {
        "a": {"bytes": 3 * 2**28, "where": "cpu", "form": "weights"},
        "b": {"bytes": 2**30, "where": "file", "form": "weights"},
        "c": {"bytes": 2**20, "where": "cpu", "form": "factors"},
    }
    memory = {"mode": "streamed", "device": "cpu", "models": models, "merged": 2**28, "available": 2**33}
    memory |= {"ranks": 2**21, "staging": 0}
    packed = {
        "requests": {"packed": 8, "plain": 2},
        "tokens": {"asked": 90, "computed": 30},
        "why_not": "rolling",
    }
    facts = {**FACTS, "memory": memory, "packed": packed}
    observer = Recorder()
    run(text, tmp_path / "run", work=cut, facts=facts, observer=observer, limit=12)
    held = "1 model held (768 MiB), 1 read from their files for each merge, 1 adapter as factors (1 MiB)"
    rest = "ranks for DELLA 2 MiB, the merged model 256 MiB, 8 GiB free"
    assert observer.notes.count(f"memory: streamed on cpu, {held}, {rest}") == 1
    share = "packed: 8 of 10 requests, 30 tokens computed for 90; the others one by one: rolling"
    assert observer.notes.count(share) == 1
    rungs = "rungs: 4, 8, 16 of 30 items, after each of which one trial in 2 goes on"
    assert observer.notes.count(rungs) == 1
    shrunk = [note for note in observer.notes if "out of memory" in note]
    assert shrunk == ["trial 1: out of memory; batches were halved 3 times and stay so"]
    said = [note for note in observer.notes if "cut off" in note]
    assert said == [
        "t: 20% of trial 0's answers were cut off at the longest allowed length (max_gen_toks) before they "
        "had ended"
    ]


def test_the_time_that_is_left_does_not_count_loading(text: str, tmp_path: Path) -> None:
    stream = io.StringIO()

    class Slow:
        """Loads for half a second; a trial then says that it took a tenth of one."""

        workers = 1

        def describe(self) -> dict[str, Any]:
            time.sleep(0.5)
            return FACTS

        def submit(self, job: Job) -> Future[Outcome]:
            done: Future[Outcome] = Future()
            done.set_result(replace(prefix(job), seconds={"evaluate": 0.1}))
            return done

        def shutdown(self, cancel: bool = False) -> None:
            pass

    genome = genomes.parse(text)
    runner.run(genome, text, tmp_path / "run", observer=PlainDisplay(stream), executor=Slow(), limit=4)
    first = next(line for line in stream.getvalue().splitlines() if line.startswith("trial   0"))
    seconds = float(first.split("left ")[1].split(" s")[0])
    assert 2.3 <= seconds < 4  # 23 trials of a tenth of a second each; loading would make it fourteen
