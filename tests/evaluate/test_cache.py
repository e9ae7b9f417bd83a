"""The cache of answers: exact, shared by processes, bounded, and never in the way."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo.evaluate.cache import AnswerCache, Recent, open_cache, pack, unpack

ANSWERS = st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.booleans()), max_size=5)


@given(ANSWERS, st.lists(st.text(), max_size=3))
def test_answers_survive_to_the_last_bit(answers: list[tuple[float, bool]], texts: list[str]) -> None:
    value = [[list(answer) for answer in answers], texts]
    assert unpack(pack(value)) == value


def test_a_key_is_weights_and_segment(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "deep" / "answers.db")
    assert cache.get("w", "s") is None
    cache.put("w", "s", [[[-1.5, True]]])
    cache.put("w", "t", [[0.1]])
    cache.put("w", "s", [[[-2.5, False]]])
    again = AnswerCache(tmp_path / "deep" / "answers.db")
    assert again.get("w", "s") == [[[-2.5, False]]]
    assert again.get("w", "t") == [[0.1]]
    assert again.get("v", "s") is None


def test_the_oldest_go_when_the_file_is_full(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    cache = AnswerCache(path, cap=200_000)
    for i in range(200):
        cache.put(f"w{i}", "s", [os.urandom(1500).hex()])  # about 1.5 kB when deflated
    kept = [i for i in range(200) if cache.get(f"w{i}", "s") is not None]
    assert kept == list(range(kept[0], 200))
    assert 50 < len(kept) < 150
    assert path.stat().st_size < 250_000


def test_a_flipped_bit_is_not_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    cache = AnswerCache(path)
    cache.put("w", "s", ["x" * 500 + os.urandom(400).hex()])
    with sqlite3.connect(path) as connection:
        (blob,) = connection.execute("SELECT answers FROM answers").fetchone()
        broken = bytearray(blob)
        broken[len(broken) // 2] ^= 1
        connection.execute("UPDATE answers SET answers = ?", (bytes(broken),))
    assert cache.get("w", "s") is None
    cache.put("w", "s", [1.0])
    assert cache.get("w", "s") == [1.0]


@pytest.mark.parametrize("damage", ["garbage", "torn", "zeros"])
def test_a_damaged_file_is_begun_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "answers.db"
    cache = AnswerCache(path)
    for i in range(50):
        cache.put(f"w{i}", "s", [os.urandom(500).hex()])
    whole = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(b"not a database at all" * 1000)
    elif damage == "torn":
        path.write_bytes(whole[: len(whole) // 2 + 7])
    else:
        path.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    for i in range(50):
        cache.get(f"w{i}", "s")  # whatever it says, it says it in peace
    for _ in range(3):
        cache.put("new", "s", [2.0])
        if cache.get("new", "s") == [2.0]:
            break
    assert cache.get("new", "s") == [2.0]


def test_a_locked_file_is_not_waited_for_and_a_folder_that_cannot_be_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmevo.evaluate.cache._PATIENCE", 0.05)
    path = tmp_path / "answers.db"
    cache = AnswerCache(path)
    cache.put("w", "s", [1.0])
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    assert cache.get("w", "s") is None
    cache.put("w", "t", [2.0])
    other.rollback()
    other.close()
    assert cache.get("w", "s") == [1.0]
    (tmp_path / "file").write_text("")
    nowhere = AnswerCache(tmp_path / "file" / "answers.db")
    nowhere.put("w", "s", [1.0])
    assert nowhere.get("w", "s") is None


_WRITER = """
import sys
from pathlib import Path
from llmevo.evaluate.cache import AnswerCache
cache = AnswerCache(Path(sys.argv[1]))
for i in range(40):
    cache.put(f"{sys.argv[2]}-{i}", "s", [float(i), "x" * 300])
    assert cache.get(f"{sys.argv[2]}-{i}", "s") == [float(i), "x" * 300]
"""


def test_many_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(n)]) for n in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0, 0]
    cache = AnswerCache(path)
    assert all(cache.get(f"{n}-{i}", "s") == [float(i), "x" * 300] for n in range(4) for i in range(40))


@pytest.mark.parametrize("value", ["off", "0", "", "OFF"])
def test_the_cache_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LLMEVO_CACHE", value)
    assert open_cache() is None


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMEVO_CACHE", str(tmp_path / "kept"))
    cache: Any = open_cache()
    cache.put("w", "s", [1.0])
    assert (tmp_path / "kept" / "answers.db").exists()


def test_memory_forgets_what_was_not_asked_for_the_longest() -> None:
    recent = Recent(room=4000)
    for i in range(3):
        recent.put(f"w{i}", "s", [os.urandom(700).hex()])
    assert recent.get("w0", "s") is not None
    for i in range(3, 7):
        recent.put(f"w{i}", "s", [os.urandom(700).hex()])
        assert recent.get("w0", "s") is not None
    assert recent.get("w1", "s") is None
