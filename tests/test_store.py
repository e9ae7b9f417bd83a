"""The store keeps what it acknowledged, whatever happens to the process or the file."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmevo.errors import RunLockedError, StoreError
from llmevo.genome import Genome
from llmevo.pipeline import Outcome
from llmevo.rundir import move_aside, write_atomic
from llmevo.store import DATABASE, Store, migrations
from llmevo.trial import Score, State, Trial

TEXT = "genome: {models: [a, b]}  # verbatim, with a comment: ä\ntasks: [{name: t}]\n"
GENOME = Genome.model_validate({"genome": {"models": ["a", "b"]}, "tasks": [{"name": "t"}]})

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=20)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, jsons, max_size=3)


@st.composite
def scores(draw: st.DrawFn) -> Score:
    items = draw(st.dictionaries(texts, st.lists(finite, max_size=5), max_size=3))
    return Score(draw(finite), draw(st.none() | st.floats(0, 1e300)), items)


@st.composite
def histories(draw: st.DrawFn) -> list[Trial]:
    trials = []
    for number in range(draw(st.integers(0, 6))):
        state = draw(st.sampled_from(list(State)))
        trials.append(
            Trial(
                number,
                draw(st.dictionaries(texts, st.none() | st.booleans() | finite | texts, max_size=3)),
                draw(texts),
                state,
                draw(objects),
                draw(st.integers(0, number)),
                draw(scores()) if state is State.COMPLETE else None,
                draw(texts) if state is State.FAILED else None,
                draw(objects),
                {"merge": draw(st.floats(0, 1e6))},
            )
        )
    return trials


def pending(trial: Trial) -> Trial:
    return replace(trial, state=State.PENDING, score=None, error=None, metrics={}, cost={})


def without_time(trials: list[Trial]) -> list[Trial]:
    return [
        replace(trial, cost={key: value for key, value in trial.cost.items() if key != "store"})
        for trial in trials
    ]


def filled(run_dir: Path, count: int = 30) -> list[Trial]:
    """A run with `count` finished trials and one pending."""
    with Store.create(run_dir, TEXT, GENOME) as store:
        trials = [Trial(number, {"x": number / 7}, "random") for number in range(count + 1)]
        store.begin(trials)
        for trial in trials[:-1]:
            score = Score.from_items([trial.number, 0.5, 1 / 3] * 20, "t")
            store.commit(replace(trial, state=State.COMPLETE, score=score))
        store.save_holdout("evolved", 3, Outcome(3, Score(0.25), {"t": {"acc,none": 0.25}}))
        store.log("started", trials=0)
        return store.trials()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories())
def test_trials_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, history: list[Trial]
) -> None:
    run_dir = tmp_path_factory.mktemp("store") / "run"
    with Store.create(run_dir, TEXT, GENOME) as store:
        store.begin([pending(trial) for trial in history])
        for trial in reversed(history):
            if trial.state is not State.PENDING:
                timed = store.commit(trial)
                assert timed.cost["store"] > 0
                assert store.trials()[trial.number] == timed
                store.commit(trial)  # the same result again is no error
    with Store.open(run_dir, readonly=True) as store:
        known = without_time(store.trials())
    expected = [pending(trial) if trial.state is State.PENDING else trial for trial in history]
    assert known == expected


def test_everything_else_comes_back(tmp_path: Path) -> None:
    filled(tmp_path / "run", 5)
    with Store.open(tmp_path / "run") as store:
        assert store.genome == GENOME
        assert store.genome_text == TEXT == (tmp_path / "run" / "genome.yaml").read_text()
        assert store.meta("none") is None
        store.set_meta("a", {"b": [1, None]})
        assert store.meta("a") == {"b": [1, None]}
        (row,) = store.holdout()
        assert (row.label, row.number, row.score) == ("evolved", 3, Score(0.25))
        store.save_holdout("evolved", 4, Outcome(4, error="no"))  # another winner
        assert [(row.label, row.number, row.error) for row in store.holdout()] == [("evolved", 4, "no")]
        assert store.holdout_numbers() == {3, 4}
        store.label_holdout({"evolved": 3, "evolved:2": 4})
        assert [row.label for row in store.holdout()] == ["evolved", "evolved:2"]
        (event,) = store.events
        assert event["kind"] == "started"


def test_what_breaks_a_rule_is_refused(tmp_path: Path) -> None:
    with Store.create(tmp_path, TEXT, GENOME) as store:
        trial = Trial(0, {"x": 1.0}, "random")
        with pytest.raises(StoreError, match="never begun"):
            store.commit(replace(trial, state=State.FAILED, error="e"))
        store.begin([trial])
        with pytest.raises(StoreError, match="pending"):
            store.commit(trial)
        store.commit(replace(trial, state=State.FAILED, error="e"))
        with pytest.raises(StoreError, match="another result"):
            store.commit(replace(trial, state=State.COMPLETE, score=Score(1.0)))
        # One transaction for a whole ask: trial 0 is there, so trial 1 must not be recorded either.
        with pytest.raises(StoreError):
            store.begin([Trial(1, {}, "random"), trial])
        assert [known.number for known in store.trials()] == [0]
    with pytest.raises(StoreError, match="already has a run"):
        Store.create(tmp_path, TEXT, GENOME)
    with pytest.raises(StoreError, match="no run in it"):
        Store.open(tmp_path / "elsewhere")


def test_a_reader_sees_a_live_run(tmp_path: Path) -> None:
    with Store.create(tmp_path, TEXT, GENOME) as writer:
        writer.begin([Trial(0, {"x": 1.0}, "random")])
        with Store.open(tmp_path, readonly=True) as reader:
            assert len(reader.trials()) == 1
            writer.begin([Trial(1, {"x": 1.0}, "random")])
            assert len(reader.trials()) == 2
            with pytest.raises(StoreError, match="cannot be written"):
                reader.set_meta("a", 1)


def test_a_reader_needs_no_write_permission(tmp_path: Path) -> None:
    trials = filled(tmp_path / "run", 3)
    code = (
        "import os, sys\n"
        "from llmevo.store import Store\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "with Store.open(sys.argv[1], readonly=True) as store: print(len(store.trials()))\n"
    )
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    for folder in (tmp_path / "run", *(tmp_path / "run").parents):
        if folder.owner() == "root" and folder.stat().st_mode & 0o077 == 0:
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(len(trials)), done.stderr


def _hold(run_dir: str, ready: Any, release: Any) -> None:
    with Store.open(run_dir):
        ready.set()
        release.wait(30)


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready, release))
    process.start()
    assert ready.wait(30)
    with pytest.raises(RunLockedError, match=rf"pid {process.pid}\b"):
        Store.open(tmp_path)
    with pytest.raises(RunLockedError):
        move_aside(tmp_path)
    process.kill()  # the lock dies with its holder
    process.join()
    with Store.open(tmp_path) as store:
        assert len(store.trials()) == 2


def test_many_start_at_once_and_one_wins(tmp_path: Path) -> None:
    won, lost = [], []

    def begin() -> None:
        try:
            won.append(Store.create(tmp_path / "run", TEXT, GENOME)._lock)
        except StoreError as error:
            lost.append(error)

    threads = [threading.Thread(target=begin) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == 9
    os.close(won[0])


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    db = sqlite3.connect(tmp_path / DATABASE)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="newer llmevo"):
        Store.open(tmp_path)


def test_migrations_run_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = filled(tmp_path, 2)

    def adds(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE extra (x)")

    def fails(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE more (x)")
        raise sqlite3.OperationalError("disk is full")

    monkeypatch.setattr(migrations, "MIGRATIONS", [*migrations.MIGRATIONS, adds, fails])
    with pytest.raises(StoreError, match="disk is full"):
        Store.open(tmp_path)
    monkeypatch.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:-1])
    for _ in range(2):
        with Store.open(tmp_path) as store:
            assert store.trials() == trials
            tables = store._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            assert ("extra",) in tables
            assert ("more",) not in tables


def _survives(run_dir: Path, trials: list[Trial]) -> bool:
    """Whether the run still reads as `trials`; False if it says that it is damaged; else the test fails."""
    try:
        if not Store.exists(run_dir):
            raise AssertionError("a damaged run passes for none: a new one would overwrite it")
        with Store.open(run_dir) as store:
            assert store.trials() == trials
            assert store.genome == GENOME
            assert [row.score for row in store.holdout()] == [Score(0.25)]
    except StoreError:
        return False
    return True


def test_a_truncated_file_is_never_a_shorter_run(tmp_path: Path) -> None:
    trials = filled(tmp_path / "run")
    whole = (tmp_path / "run" / DATABASE).read_bytes()
    assert _survives(tmp_path / "run", trials)
    random_cut = random.Random(0)
    cuts = [0, 1, 99, 100, 4096, len(whole) - 4096, len(whole) - 1]
    for cut in cuts + [random_cut.randrange(len(whole)) for _ in range(40)]:
        (tmp_path / "run" / DATABASE).write_bytes(whole[:cut])
        assert not _survives(tmp_path / "run", trials), f"cut at {cut} of {len(whole)}"


def test_flipped_bits_are_harmless_or_found(tmp_path: Path) -> None:
    trials = filled(tmp_path / "run")
    path = tmp_path / "run" / DATABASE
    whole = path.read_bytes()
    draw = random.Random(1)
    found = 0
    for _ in range(300):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        found += not _survives(tmp_path / "run", trials)
    assert found > 100  # most of the file is rows


def test_a_torn_log_gives_a_prefix(tmp_path: Path) -> None:
    """Cut the write-ahead log anywhere: what is left is a history as it was at some moment."""
    with Store.create(tmp_path / "live", TEXT, GENOME) as store:
        for number in range(12):
            store.begin([Trial(number, {"x": number / 3}, "random")])
            store.commit(replace(Trial(number, {"x": number / 3}, "random"), state=State.FAILED, error="e"))
        database = (tmp_path / "live" / DATABASE).read_bytes()
        log = (tmp_path / "live" / f"{DATABASE}-wal").read_bytes()
        trials = store.trials()
    target = tmp_path / "torn"
    target.mkdir()
    (target / "genome.yaml").write_text(TEXT)
    lengths = set()
    draw = random.Random(2)
    for cut in [0, len(log), *(draw.randrange(len(log)) for _ in range(60))]:
        for old in target.glob(f"{DATABASE}*"):
            old.unlink()
        (target / DATABASE).write_bytes(database)
        (target / f"{DATABASE}-wal").write_bytes(log[:cut])
        try:
            with Store.open(target) as store:
                known = store.trials()
        except StoreError:
            continue  # cut before the schema
        assert [t.params for t in known] == [t.params for t in trials[: len(known)]]
        assert all(t.error == "e" for t in known[:-1])
        lengths.add(len(known))
    assert len(trials) in lengths
    assert len(lengths) > 5


_WRITER = """
import sys
from dataclasses import replace
from llmevo.store import Store
from llmevo.trial import Score, State, Trial

with Store.open(sys.argv[1]) as store:
    for trial in store.trials():
        if trial.state is State.PENDING:
            store.commit(replace(trial, state=State.COMPLETE, score=Score.from_items([trial.number] * 50)))
            print(trial.number, flush=True)
    number = len(store.trials())
    while True:
        store.begin([Trial(number + k, {"x": 0.5}, "random", batch=number) for k in range(3)])
        for k in range(3):
            trial = Trial(number + k, {"x": 0.5}, "random", batch=number)
            store.commit(replace(trial, state=State.COMPLETE, score=Score.from_items([number + k] * 50)))
            print(number + k, flush=True)
        number += 3
"""


@pytest.mark.slow
def test_kill_minus_nine_during_commits(tmp_path: Path) -> None:
    with Store.create(tmp_path, TEXT, GENOME):
        pass
    draw = random.Random(3)
    acknowledged: set[int] = set()
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged.add(int(writer.stdout.readline()))
        try:
            threading.Event().wait(draw.uniform(0, 0.15))
            writer.send_signal(signal.SIGKILL)
            acknowledged.update(
                int(line) for line in writer.stdout.read().splitlines(keepends=True) if line[-1] == "\n"
            )
        finally:
            writer.wait()
            writer.stdout.close()
        with Store.open(tmp_path, readonly=True) as store:
            trials = store.trials()
        assert len(trials) % 3 == 0  # an ask is recorded whole or not at all
        for number in acknowledged:
            assert trials[number].score == Score.from_items([number] * 50)
    assert len(acknowledged) > 8  # each writer reports one before it is killed


def test_a_run_killed_while_it_is_created_is_none(tmp_path: Path) -> None:
    assert not Store.exists(tmp_path)
    sqlite3.connect(tmp_path / DATABASE).execute("PRAGMA journal_mode = WAL").connection.close()
    assert not Store.exists(tmp_path)
    with Store.create(tmp_path, TEXT, GENOME):
        pass
    (tmp_path / "genome.yaml").unlink()
    assert Store.exists(tmp_path)
    with Store.open(tmp_path):
        assert (tmp_path / "genome.yaml").read_text() == TEXT


def test_move_aside_keeps_everything(tmp_path: Path) -> None:
    for name in ("run.old-1", "run.old-2"):
        trials = filled(tmp_path / "run", 2)
        assert move_aside(tmp_path / "run") == tmp_path / name
        with Store.open(tmp_path / name) as store:
            assert store.trials() == trials


def test_write_atomic(tmp_path: Path) -> None:
    write_atomic(tmp_path / "best" / "recipe.yaml", "a: ä\n")
    write_atomic(tmp_path / "best" / "recipe.yaml", "b\n")
    assert [(path.name, path.read_text()) for path in (tmp_path / "best").iterdir()] == [
        ("recipe.yaml", "b\n")
    ]
    with pytest.raises(StoreError, match="cannot be written"):
        write_atomic(tmp_path / "best" / "recipe.yaml" / "below", "c")


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    trials = filled(tmp_path, 3)
    with Store.open(tmp_path) as store:
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own "database or disk is full"
        with pytest.raises(StoreError, match=r"cannot be written: .*full"):
            store.begin([Trial(4 + n, {"x": 0.1}, "r", attrs={"note": "x" * 5000}) for n in range(9)])
        assert store.trials() == trials
        store._db.execute("PRAGMA max_page_count = 1000000")
        store.begin([Trial(4, {"x": 0.1}, "r")])
    with Store.open(tmp_path) as store:
        assert len(store.trials()) == 5
