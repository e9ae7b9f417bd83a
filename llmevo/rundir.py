"""The run directory on disk: one driver at a time, and files that are never half written."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from llmevo.errors import RunLockedError, StoreError

LOCK = "lock"
_SHORTEST_KEY = 8  # a shorter value is in too many words to be taken out


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that every reader, also after a power loss, sees the old text or the new one.

    Raises:
        StoreError: The disk does not serve.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise StoreError(f"`{path}` cannot be written: {error}.") from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: files that were created or renamed in it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_aside(run_dir: Path) -> Path:
    """Rename a run directory to the first free of `NAME.old-1`, `NAME.old-2`, ...; nothing is deleted.

    Raises:
        RunLockedError: A process drives the run.
    """
    held = lock(run_dir)
    try:
        number = 1
        while (target := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
            number += 1
        run_dir.rename(target)
    finally:
        os.close(held)
    return target


def lock(run_dir: Path) -> int:
    """Take the run: the descriptor returned holds it until it is closed, however the process ends.

    Raises:
        RunLockedError: Another process holds it; the message names its pid.
    """
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise RunLockedError(
            f"`{run_dir}` is driven by another process (pid {owner}); wait for it, stop it, or choose "
            "another --run-dir."
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def redact(text: str, variable: str) -> str:
    """`text` without the value of an environment variable, where that is long enough to be a key.

    Keys are never written on purpose; an endpoint's answer that repeats one must not bring it to disk either.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    return text.replace(key, "***") if len(key) >= _SHORTEST_KEY else text
