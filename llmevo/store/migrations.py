"""The store's schema, as the steps that lead to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable


def _m001_initial(db: sqlite3.Connection) -> None:
    # The generated columns are for people with the sqlite3 shell; llmevo reads `body` only.
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, body TEXT NOT NULL, crc INTEGER NOT NULL)")
    db.execute(
        "CREATE TABLE trials (number INTEGER PRIMARY KEY, body TEXT NOT NULL, crc INTEGER NOT NULL,"
        " state TEXT AS (body ->> '$.state'), origin TEXT AS (body ->> '$.origin'),"
        " value REAL AS (body ->> '$.score.value'), error TEXT AS (body ->> '$.error'))"
    )
    db.execute(
        "CREATE TABLE holdout (number INTEGER PRIMARY KEY, label TEXT UNIQUE, body TEXT NOT NULL,"
        " crc INTEGER NOT NULL)"
    )
    db.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, body TEXT NOT NULL, crc INTEGER NOT NULL)")


def _m002_rungs(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE TABLE rungs (number INTEGER NOT NULL, rung INTEGER NOT NULL, body TEXT NOT NULL,"
        " crc INTEGER NOT NULL, value REAL AS (body ->> '$.score.value'), PRIMARY KEY (number, rung))"
    )


def _m003_reruns(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE TABLE reruns (number INTEGER NOT NULL, rerun INTEGER NOT NULL, split TEXT NOT NULL,"
        " seed INTEGER NOT NULL, body TEXT NOT NULL, crc INTEGER NOT NULL,"
        " value REAL AS (body ->> '$.score.value'), PRIMARY KEY (number, rerun, split))"
    )


# Each takes the schema one version up; SQLite's user_version counts those that have run.
MIGRATIONS: list[Callable[[sqlite3.Connection], None]] = [_m001_initial, _m002_rungs, _m003_reruns]


def migrate(db: sqlite3.Connection) -> None:
    """Run the steps that this file has not had; inside a transaction, so that it is all or none."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    for number, migration in enumerate(MIGRATIONS[version:], start=version + 1):
        migration(db)
        db.execute(f"PRAGMA user_version = {number}")
