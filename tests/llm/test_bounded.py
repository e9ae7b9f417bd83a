"""Answers that do not end by themselves: the client ends them, and says so."""

from __future__ import annotations

import time

import pytest
from fault_server import huge, ok, serving, trickle

from llmevo.errors import LLMTransportError
from llmevo.llm import Request
from llmevo.llm.bounded import MOST_BYTES
from llmevo.llm.openai import OpenAIChat

ASK = Request(({"role": "user", "content": "Say a number."},))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_trickle_is_cut_at_the_timeout(status: int) -> None:
    """Every byte comes within the read timeout; the whole body would take 20 s."""
    started = time.monotonic()
    with serving(trickle("42", 0.05, status)) as server:
        chat = OpenAIChat("m", base_url=server.url, timeout=0.4, attempts=2, backoff=0.01)
        with pytest.raises(LLMTransportError, match="APITimeoutError"):
            chat.complete(ASK)
        chat.close()
    assert len(server.requests) == 2
    assert 0.8 <= time.monotonic() - started < 10


def test_a_trickle_in_time_is_read() -> None:
    with serving(trickle("42", 0.001)) as server:
        chat = OpenAIChat("m", base_url=server.url, timeout=5.0)
        assert chat.complete(ASK).text == "42"
        chat.close()


def test_a_huge_reply_is_neither_taken_nor_parsed() -> None:
    started = time.monotonic()
    with serving(huge(50)) as server:
        chat = OpenAIChat("m", base_url=server.url, timeout=5.0)
        reply = chat.complete(ASK)
        assert chat.complete(ASK).finish_reason == "length", "the connection that was cut is not used again"
        chat.close()
    assert (reply.text, reply.finish_reason) == ("", "length")
    assert len(server.requests) == 2
    # What the sockets buffer is taken too.
    assert server.sent < 2 * (MOST_BYTES + 12_000_000)
    assert time.monotonic() - started < 15


def test_a_large_reply_within_the_cap_is_read() -> None:
    text = "x" * (MOST_BYTES - 10_000)
    with serving(ok(text)) as server:
        chat = OpenAIChat("m", base_url=server.url)
        assert chat.complete(ASK).text == text
        chat.close()


def test_a_client_that_is_dropped_closes_its_connections() -> None:
    with serving(ok("42")) as server:
        assert OpenAIChat("m", base_url=server.url).complete(ASK).text == "42"
