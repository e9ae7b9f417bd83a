"""Hashes of weight files are kept by path, size and times, and never believed for another file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from llmevo.merge import hashes


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files were read, with a cache of the test's own and a file system that settles at once."""
    monkeypatch.setenv("LLMEVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_SETTLED", -1)
    seen: list[Path] = []
    read = hashes._read
    monkeypatch.setattr(hashes, "_read", lambda path: (seen.append(path), read(path))[1])
    return seen


def fresh(path: Path) -> bytes:
    """The hash as a new process would say it."""
    hashes._settled.cache_clear()
    return hashes.of_file(path)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, reads: list[Path]) -> None:
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"one")
    other.write_bytes(b"two")
    assert fresh(file) == hashlib.blake2b(b"one").digest()
    assert fresh(other) == hashlib.blake2b(b"two").digest()
    assert fresh(file) == hashlib.blake2b(b"one").digest()
    assert reads == [file, other]
    # Another content of the same size and the same modification time, as `cp -p` leaves it.
    times = file.stat()
    file.write_bytes(b"six")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fresh(file) == hashlib.blake2b(b"six").digest()
    assert reads == [file, other, file]


def test_what_is_wrong_with_the_cache_costs_a_reading(tmp_path: Path, reads: list[Path]) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    wanted = fresh(file)
    kept = tmp_path / "cache" / "hashes.json"
    text = kept.read_text()
    for damaged in ("", "[]", text[:-5], text.replace(wanted.hex(), "zz"), text.replace("[", "[1, ")):
        kept.write_text(damaged)
        assert fresh(file) == wanted
        assert fresh(file) == wanted
    assert len(reads) == 6


def test_a_file_just_written_and_no_cache(tmp_path: Path, reads: list[Path], monkeypatch) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    monkeypatch.setattr(hashes, "_SETTLED", 3600 * 10**9)
    assert fresh(file) == fresh(file)
    monkeypatch.setenv("LLMEVO_CACHE", "off")
    monkeypatch.setattr(hashes, "_SETTLED", -1)
    assert fresh(file) == hashes.of_file(file)
    assert len(reads) == 3
    assert not (tmp_path / "cache").exists()
