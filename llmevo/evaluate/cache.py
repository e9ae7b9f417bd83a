"""A model's answers, kept so that the same weights are never asked the same items twice.

One SQLite file serves all runs of a user, and many processes at once. It may forget: a damaged, locked or
full file reads as "not kept", and never stops a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import sys
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from llmevo import usercache

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    weights TEXT NOT NULL,
    segment TEXT NOT NULL,
    digest BLOB NOT NULL,
    answers BLOB NOT NULL,
    UNIQUE (weights, segment)
)
"""
_CAP = 1 << 30
_PRUNE_TO = 0.8
_PATIENCE = 5.0  # seconds to wait for another process's write
_MEMORY = 64 << 20


def open_cache() -> AnswerCache | None:
    """The user's cache: `answers.db` in the folder `$LLMEVO_CACHE`, by default `~/.cache/llmevo`.

    Returns:
        None where `$LLMEVO_CACHE` is `off`, `0` or empty.
    """
    folder = usercache.folder()
    return None if folder is None else AnswerCache(folder / "answers.db")


@final
class AnswerCache:
    """Answers by (identity of the weights, fingerprint of the requests).

    Args:
        path: The SQLite file; made, with its folder, when something is first kept.
        cap: Bytes that the file may take; beyond it, the oldest answers go.
    """

    def __init__(self, path: Path, cap: int = _CAP) -> None:
        self._path = path
        self._cap = cap

    def get(self, weights: str, segment: str) -> Any | None:
        """What was put under this key, as JSON gives it back; None if it is not kept."""
        if not self._path.exists():
            return None
        with self._forgiving(), contextlib.closing(self._open()) as connection:
            row = connection.execute(
                "SELECT digest, answers FROM answers WHERE weights = ? AND segment = ?", (weights, segment)
            ).fetchone()
            # SQLite does not notice a flipped bit in a value; a wrong answer is worse than none.
            if row is not None and row[0] == _digest(weights, segment, row[1]):
                return unpack(row[1])
        return None

    def put(self, weights: str, segment: str, answers: Any) -> None:
        """Keep `answers`, which must be JSON, under this key; what stands there already is replaced."""
        blob = pack(answers)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._forgiving(), contextlib.closing(self._open()) as connection, connection:
            connection.execute(
                "INSERT OR REPLACE INTO answers (weights, segment, digest, answers) VALUES (?, ?, ?, ?)",
                (weights, segment, _digest(weights, segment, blob), blob),
            )
            self._prune(connection)

    def _open(self) -> sqlite3.Connection:
        """A connection for one operation.

        A connection of its own for each: workers may be forked, threads may share this object, and a file
        that another process has replaced is seen.
        """
        connection = sqlite3.connect(self._path, timeout=_PATIENCE)
        try:
            # A crash of the machine may damage the file, which costs what it held and nothing else.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(_TABLE)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """End an operation that fails in silence; remove the file if it is damaged."""
        try:
            yield
        except sqlite3.OperationalError:
            pass  # locked, read-only, disk full: not kept this time
        except sqlite3.DatabaseError:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
                self._path.with_name(f"{self._path.name}-journal").unlink(missing_ok=True)

    def _prune(self, connection: sqlite3.Connection) -> None:
        """Forget the oldest answers if the file has outgrown its cap."""

        def pragma(name: str) -> int:
            return int(connection.execute(f"PRAGMA {name}").fetchone()[0])

        page = pragma("page_size")
        used = (pragma("page_count") - pragma("freelist_count")) * page
        if used <= self._cap:
            return
        excess = used - int(self._cap * _PRUNE_TO)
        last = 0
        for number, size in connection.execute(
            "SELECT number, length(answers) + length(digest) + length(weights) + length(segment) "
            "FROM answers ORDER BY number"
        ):
            last, excess = number, excess - size
            if excess <= 0:
                break
        connection.execute("DELETE FROM answers WHERE number <= ?", (last,))


@final
class Recent:
    """The answers of this process, the latest first to stay: what a run without a cache file remembers.

    Args:
        room: Bytes of packed answers that are kept.
    """

    def __init__(self, room: int = _MEMORY) -> None:
        self._blobs: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._room = room
        self._held = 0

    def get(self, weights: str, segment: str) -> Any | None:
        """What was put under this key; None if it is not kept."""
        blob = self._blobs.get((weights, segment))
        if blob is None:
            return None
        self._blobs.move_to_end((weights, segment))
        return unpack(blob)

    def put(self, weights: str, segment: str, answers: Any) -> None:
        """Keep `answers`, which must be JSON, and forget those that were not asked for the longest."""
        blob = pack(answers)
        self._held += _size(blob) - _size(self._blobs.pop((weights, segment), None))
        self._blobs[weights, segment] = blob
        while self._held > self._room and len(self._blobs) > 1:
            self._held -= _size(self._blobs.popitem(last=False)[1])


def pack(answers: Any) -> bytes:
    """JSON, deflated. Floats survive to the last bit."""
    return zlib.compress(json.dumps(answers, separators=(",", ":")).encode(), 1)


def unpack(blob: bytes) -> Any:
    """What `pack` was given, tuples as lists."""
    return json.loads(zlib.decompress(blob))


def _size(blob: bytes | None) -> int:
    return 0 if blob is None else sys.getsizeof(blob)


def _digest(weights: str, segment: str, blob: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((weights.encode(), segment.encode(), blob))).digest()
