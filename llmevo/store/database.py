"""The SQLite file under the store: how it is opened, and how a value becomes a row with a sum."""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from pathlib import Path
from typing import Any

from llmevo.errors import StoreError


def pack(data: Any) -> tuple[str, int]:
    """A value as JSON, and the sum that a row keeps beside it."""
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return body, zlib.crc32(body.encode())


def connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """Open the file, to look or to write.

    Raises:
        StoreError: It cannot be opened.
    """
    mode = "ro" if readonly else "rwc"
    if readonly and not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
        mode = "ro&immutable=1"  # SQLite wants to make a -wal even to read; nobody is writing here
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    try:
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30.0)
        # A bit flipped in a text may not be UTF-8; the row's sum must get to see it.
        db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    except sqlite3.Error as error:
        raise StoreError(f"`{path}` cannot be opened: {error}.") from error
    return db


def open_to_write(path: Path) -> sqlite3.Connection:
    """Open the file so that a transaction that returned survives `kill -9` and power loss.

    Raises:
        StoreError: It is no database, or it is damaged.
    """
    db = connect(path, readonly=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        db.close()
        raise StoreError(f"`{path}` is damaged or not a database: {error}.") from error
    return db


def first(db: sqlite3.Connection, query: str, path: Path) -> Any:
    """The first column of the first row.

    Raises:
        StoreError: The file does not answer.
    """
    try:
        return db.execute(query).fetchone()[0]
    except (sqlite3.Error, TypeError) as error:
        raise StoreError(f"`{path}` is damaged or not a run of llmevo: {error}.") from error
