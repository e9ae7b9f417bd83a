"""Hashes of weight files, kept so that a file that has not changed is read for its hash only once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from llmevo import usercache

_NAME = "hashes.json"
# Files that are remembered; the latest stay.
_KEPT = 1000
# A file that was written this recently may be written again within one tick of the file system's clock.
_SETTLED = 2_000_000_000  # ns


def of_file(path: Path) -> bytes:
    """Return the blake2b hash of a file's content.

    It is kept in the user's cache under the path, with size and times; a file of the same size and times is
    not read again. Whatever is wrong with the cache, the file is read.
    """
    stamp = _stamp(path)
    if time.time_ns() - max(stamp[1:]) <= _SETTLED:
        return _read(path)
    return _settled(path.resolve(), *stamp)


@functools.lru_cache(maxsize=_KEPT)
def _settled(path: Path, *stamp: int) -> bytes:
    """Return the hash of a file that has this stamp, from the cache or else from its content."""
    folder = usercache.folder()
    if folder is None:
        return _read(path)
    kept = _load(folder).get(str(path))
    if isinstance(kept, list) and kept[:-1] == list(stamp) and isinstance(kept[-1], str):
        with contextlib.suppress(ValueError):
            return bytes.fromhex(kept[-1])
    digest = _read(path)
    if stamp == _stamp(path):
        _keep(folder, str(path), [*stamp, digest.hex()])
    return digest


def _read(path: Path) -> bytes:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "blake2b").digest()


def _stamp(path: Path) -> tuple[int, int, int]:
    """Size, and when content and inode were changed; a copy that keeps its time still has a new inode."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _load(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        table = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        if isinstance(table, dict):
            return table
    return {}


def _keep(folder: Path, key: str, entry: list[Any]) -> None:
    """Add an entry. Of two processes at once one may lose its entry, which costs it a reading."""
    table = _load(folder)
    table.pop(key, None)
    table[key] = entry
    latest = dict(list(table.items())[-_KEPT:])
    beside = folder / f".{_NAME}.{os.getpid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(latest), encoding="utf-8")
        os.replace(beside, folder / _NAME)
