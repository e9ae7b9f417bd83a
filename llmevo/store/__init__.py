"""The run directory: one SQLite file as the only source of truth, with artefacts beside it.

::

    run.db            meta, trials, rungs, reruns, holdout, events
    lock              held with flock by the one process that drives the run; says its pid
    genome.yaml       the user's file, verbatim
    best/recipe.yaml  and whatever else is written with `write_atomic`

SQLite runs in WAL mode with `synchronous=FULL` (https://sqlite.org/wal.html), so a transaction that returned
survives `kill -9` and power loss. Pages carry no checksum, so each row carries one: a flipped bit is a
StoreError, never a wrong score.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, final

from pydantic import ValidationError

from llmevo.errors import StoreError
from llmevo.genome import Genome
from llmevo.pipeline import Outcome, Split
from llmevo.rundir import lock as lock_directory
from llmevo.rundir import redact, write_atomic
from llmevo.store import migrations
from llmevo.store.database import connect, first, open_to_write, pack
from llmevo.trial import Score, State, Trial

DATABASE = "run.db"


@final
@dataclass(frozen=True, slots=True)
class HoldoutRow:
    """What a trial scored on the held-out items.

    Args:
        label: `evolved`, `evolved:2`, ..., or a reference's origin (`parent:NAME`, `uniform`, `baseline`).
        number: The trial's number.
        score: With per-item scores; None if the evaluation failed.
        metrics: Every metric by task.
        error: Why it failed.
        seconds: Wall time by stage.
    """

    label: str
    number: int
    score: Score | None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@final
class Store:
    """One run's store; made by `create` or `open`, and a context manager.

    All methods raise StoreError when the disk or the file does not serve.
    """

    def __init__(self, run_dir: Path, db: sqlite3.Connection, lock: int | None) -> None:
        self.run_dir = run_dir
        self._db = db
        self._lock = lock
        self._genome: Genome | None = None

    @staticmethod
    def exists(run_dir: str | Path) -> bool:
        """Whether a run was begun in this directory.

        Raises:
            StoreError: There is a file in its place that cannot be read.
        """
        path = Path(run_dir) / DATABASE
        if not path.is_file():
            return False
        if path.with_name("genome.yaml").is_file():  # written last by `create`: what is missing now is lost
            return True
        with closing(connect(path, readonly=True)) as db:
            return bool(first(db, "SELECT count(*) FROM sqlite_master", path))

    @classmethod
    def create(cls, run_dir: str | Path, genome_text: str, genome: Genome) -> Store:
        """Begin a run: the directory, the lock, the verbatim genome, the schema.

        Args:
            run_dir: A directory without a run in it; made if missing.
            genome_text: The user's file.
            genome: What it says, overrides included.

        Raises:
            StoreError: There is a run already.
            RunLockedError: Another process is creating one.
        """
        path = Path(run_dir)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = lock_directory(path)
        except OSError as error:
            raise StoreError(f"`{path}` cannot be a run directory: {error}.") from error
        try:
            if cls.exists(path):
                raise StoreError(f"`{path}` already has a run; open it, or choose another --run-dir.")
            store = cls(path, open_to_write(path / DATABASE), lock)
            with store._transaction():
                migrations.migrate(store._db)
                store._put_meta("genome", genome.model_dump(mode="json", by_alias=True))
                store._put_meta("genome_text", genome_text)
            write_atomic(path / "genome.yaml", genome_text)  # makes the names of the others durable too
        except BaseException:
            os.close(lock)
            raise
        return store

    @classmethod
    def open(cls, run_dir: str | Path, readonly: bool = False) -> Store:
        """Open a run.

        Args:
            run_dir: Where it lies.
            readonly: Only look; works while another process drives the run.

        Raises:
            StoreError: No run there, a corrupt file, or one of a newer llmevo.
            RunLockedError: Another process drives the run.
        """
        path = Path(run_dir)
        if not (path / DATABASE).is_file():
            raise StoreError(f"`{path}` has no run in it ({DATABASE} is missing).")
        lock = None if readonly else lock_directory(path)
        store = None
        try:
            db = connect(path / DATABASE, True) if readonly else open_to_write(path / DATABASE)
            store = cls(path, db, lock)
            store._check()
            if not readonly:
                with store._transaction():
                    migrations.migrate(store._db)
                if not (path / "genome.yaml").is_file():  # killed at the end of `create`
                    write_atomic(path / "genome.yaml", store.genome_text)
        except BaseException:
            if store is not None:
                store.close()
            elif lock is not None:
                os.close(lock)
            raise
        return store

    def _check(self) -> None:
        result = first(self._db, "PRAGMA quick_check(1)", self.run_dir)
        if result != "ok":
            raise StoreError(f"`{self.run_dir / DATABASE}` is damaged ({result}); restore it from a copy.")
        version = self._version()
        if version > len(migrations.MIGRATIONS):
            raise StoreError(
                f"`{self.run_dir}` was written by a newer llmevo (schema {version}, this one knows "
                f"{len(migrations.MIGRATIONS)}); upgrade llmevo."
            )
        if version == 0:
            raise StoreError(f"`{self.run_dir / DATABASE}` is damaged or not of llmevo (it has no schema).")

    def _version(self) -> int:
        return int(first(self._db, "PRAGMA user_version", self.run_dir))

    def close(self) -> None:
        """Let go of the file and the lock."""
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise StoreError(
                f"`{self.run_dir / DATABASE}` cannot be written: {error}. Nothing that was reported is lost; "
                "the same command goes on once it can."
            ) from error

    def _rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Rows whose last two columns are body and crc; the body comes decoded, the crc is dropped."""
        rows = []
        try:
            for *columns, body, crc in self._db.execute(query, arguments):
                if zlib.crc32(str(body).encode("utf-8", "surrogateescape")) != crc:
                    raise StoreError(f"`{self.run_dir / DATABASE}` is damaged: a row does not match its sum.")
                rows.append((*columns, json.loads(body)))
        except (sqlite3.Error, ValueError) as error:
            raise StoreError(f"`{self.run_dir / DATABASE}` cannot be read: {error}.") from error
        return rows

    def _put_meta(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta (key, body, crc) VALUES (?, ?, ?)", (key, *pack(value)))

    def meta(self, key: str, default: Any = None) -> Any:
        """The JSON value that `set_meta` stored under `key`."""
        rows = self._rows("SELECT body, crc FROM meta WHERE key = ?", key)
        return rows[0][0] if rows else default

    def set_meta(self, key: str, value: Any) -> None:
        """Store a JSON value."""
        with self._transaction():
            self._put_meta(key, value)

    @property
    def genome(self) -> Genome:
        """The genome of the run, overrides included."""
        if self._genome is None:
            try:
                self._genome = Genome.model_validate(self.meta("genome"))
            except ValidationError as error:
                raise StoreError(f"`{self.run_dir}`: its genome cannot be read: {error}") from error
        return self._genome

    @property
    def genome_text(self) -> str:
        """The user's genome file, verbatim."""
        return str(self.meta("genome_text"))

    def replace_genome(self, genome_text: str, genome: Genome) -> None:
        """Take over a genome that differs in what may change between two sittings (the budget, say)."""
        with self._transaction():
            self._put_meta("genome", genome.model_dump(mode="json", by_alias=True))
            self._put_meta("genome_text", genome_text)
        self._genome = None
        write_atomic(self.run_dir / "genome.yaml", genome_text)

    def begin(self, trials: Sequence[Trial]) -> None:
        """Record the pending trials of one `ask`, all or none."""
        with self._transaction():
            for trial in trials:
                self._db.execute(
                    "INSERT INTO trials (number, body, crc) VALUES (?, ?, ?)",
                    (trial.number, *pack(trial.to_json())),
                )

    def commit(self, trial: Trial) -> Trial:
        """Record a finished trial; when this returns, it is on disk.

        Returns:
            The trial with the seconds that this took added to `cost["store"]`.

        Raises:
            StoreError: The trial is pending, was never begun, or is already recorded with another result.
        """
        if trial.state is State.PENDING:
            raise StoreError(f"trial {trial.number} is pending and cannot be committed.")
        rows = self._rows("SELECT body, crc FROM trials WHERE number = ?", trial.number)
        known = Trial.from_json(rows[0][0]) if rows else None
        if known is None:
            raise StoreError(f"trial {trial.number} was never begun.")
        if known.state is not State.PENDING and (known.score, known.error) != (trial.score, trial.error):
            raise StoreError(f"trial {trial.number} is already recorded with another result.")
        start = time.perf_counter()
        self._update(trial)
        seconds = time.perf_counter() - start + trial.cost.get("store", 0.0)
        timed = replace(trial, cost={**trial.cost, "store": seconds})
        self._update(timed)  # the time of a commit is known only after it
        return timed

    def _update(self, trial: Trial) -> None:
        with self._transaction():
            self._db.execute(
                "UPDATE trials SET body = ?, crc = ? WHERE number = ?",
                (*pack(trial.to_json()), trial.number),
            )

    def trials(self) -> list[Trial]:
        """Every trial, by number."""
        rows = self._rows("SELECT number, body, crc FROM trials ORDER BY number")
        trials = [Trial.from_json(body) for _, body in rows]
        for index, trial in enumerate(trials):
            if trial.number != index or rows[index][0] != index:
                raise StoreError(f"`{self.run_dir / DATABASE}` is damaged: trial {index} is missing.")
        return trials

    def save_rung(self, rung: int, outcome: Outcome) -> None:
        """Record what a trial scored on the items of a rung, before anything depends on it."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO rungs (number, rung, body, crc) VALUES (?, ?, ?, ?)",
                (outcome.number, rung, *pack(_outcome_json(outcome))),
            )

    def rungs(self, since: int = 0) -> dict[tuple[int, int], Outcome]:
        """What trials from number `since` on scored on rungs below the last, by (number, rung)."""
        if self._version() < 2:  # a run of before there were rungs, opened to look
            return {}
        rows = self._rows("SELECT number, rung, body, crc FROM rungs WHERE number >= ?", since)
        return {(number, rung): _outcome(number, body) for number, rung, body in rows}

    def save_rerun(self, rerun: int, seed: int, split: Split, outcome: Outcome) -> None:
        """Record what a trial scored when it was trained again with another seed."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO reruns (number, rerun, split, seed, body, crc)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (outcome.number, rerun, split, seed, *pack(_outcome_json(outcome))),
            )

    def reruns(self) -> dict[tuple[int, int, Split], Outcome]:
        """What trials scored when they were trained again, by (number, re-run from 1, split)."""
        if self._version() < 3:  # a run of before there were re-runs, opened to look
            return {}
        rows = self._rows("SELECT number, rerun, split, body, crc FROM reruns")
        return {(number, rerun, split): _outcome(number, body) for number, rerun, split, body in rows}

    def save_holdout(self, label: str, number: int, outcome: Outcome) -> None:
        """Record what trial `number` scored on the held-out items.

        A label belongs to one trial: an earlier holder keeps its scores in the file, without the label.
        """
        body = {
            "score": None if outcome.score is None else outcome.score.to_json(),
            "metrics": outcome.metrics,
            "error": outcome.error,
            "seconds": outcome.seconds,
        }
        with self._transaction():
            self._db.execute("UPDATE holdout SET label = NULL WHERE label = ?", (label,))
            self._db.execute(
                "INSERT OR REPLACE INTO holdout (number, label, body, crc) VALUES (?, ?, ?, ?)",
                (number, label, *pack(body)),
            )

    def label_holdout(self, numbers: dict[str, int]) -> None:
        """Give labels to trials that were scored already; whoever else had a label loses it."""
        with self._transaction():
            self._db.execute("UPDATE holdout SET label = NULL")
            for label, number in numbers.items():
                self._db.execute("UPDATE holdout SET label = ? WHERE number = ?", (label, number))

    def holdout_numbers(self) -> set[int]:
        """The trials that were scored on the held-out items, with a label or without."""
        return {number for number, _ in self._rows("SELECT number, body, crc FROM holdout")}

    def holdout(self) -> list[HoldoutRow]:
        """What was scored on the held-out items, in the order of the trials."""
        rows = self._rows(
            "SELECT number, label, body, crc FROM holdout WHERE label IS NOT NULL ORDER BY number"
        )
        return [
            HoldoutRow(label, number, score and Score.from_json(score), **body)
            for number, label, body in rows
            for score in [body.pop("score")]
        ]

    def log(self, kind: str, **data: Any) -> None:
        """Append an event with the wall-clock time, without the language model's key should it be there."""
        event = {"kind": kind, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **data}
        body = json.loads(redact(json.dumps(event), self.genome.llm.api_key_env))
        with self._transaction():
            self._db.execute("INSERT INTO events (body, crc) VALUES (?, ?)", pack(body))

    @property
    def events(self) -> list[dict[str, Any]]:
        """Everything that was logged, oldest first: `kind`, `at` and the event's own keys."""
        return [body for (body,) in self._rows("SELECT body, crc FROM events ORDER BY id")]


def _outcome(number: int, body: dict[str, Any]) -> Outcome:
    score = body.pop("score")
    return Outcome(number, score and Score.from_json(score), **body)


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    score = None if outcome.score is None else outcome.score.to_json()
    return {
        **{f.name: getattr(outcome, f.name) for f in fields(outcome) if f.name != "number"},
        "score": score,
    }
