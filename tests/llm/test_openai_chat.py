"""The endpoint client over real HTTP: how often it asks, how long it takes, what it says and hides."""

from __future__ import annotations

import email.utils
import json
import logging
import pickle
import time
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from fault_server import FaultServer, Step, error, hang, ok, only, raw, reset, serving

from llmevo import LLMError
from llmevo.genome import LLMSpec
from llmevo.llm import Message, Request, client_from
from llmevo.llm.openai import OpenAIChat, unbounded

KEY = "sk-test-0123456789abcdef-secret"
SCHEMA = {
    "type": "object",
    "properties": {"minimum": {"type": "integer", "minimum": 0, "maximum": 100}},
    "required": ["minimum"],
    "additionalProperties": False,
}
MESSAGES: tuple[Message, ...] = ({"role": "user", "content": "Say a number."},)
FREE = Request(MESSAGES)
BOUND = Request(MESSAGES, SCHEMA, seed=7)


OPEN: list[OpenAIChat] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text


def chat(server: FaultServer, **options: Any) -> OpenAIChat:
    settings = {"timeout": 5.0, "attempts": 4, "backoff": 0.01, **options}
    OPEN.append(OpenAIChat("wanted-model", base_url=server.url, **settings))
    return OPEN[-1]


def fails(server: FaultServer, request: Request = FREE, **options: Any) -> str:
    """The message of the LLMError, after looking for the key in everything that hangs on it."""
    with pytest.raises(LLMError) as caught:
        chat(server, **options).complete(request)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert KEY not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


def test_a_reply_and_its_numbers() -> None:
    with serving(ok("42")) as server:
        client = chat(server)
        reply = client.complete(FREE)
    assert (reply.text, reply.finish_reason, reply.model, reply.mode) == (
        "42",
        "stop",
        "served-model",
        "none",
    )
    assert (reply.usage.prompt, reply.usage.completion) == (11, 7)
    assert (reply.usage.reasoning, reply.usage.cached) == (2, 3)
    assert [attempt.outcome for attempt in reply.attempts] == ["ok"]
    (seen,) = server.requests
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.json["temperature"] == 0.7
    assert seen.json["max_tokens"] == 2048
    assert "response_format" not in seen.json
    assert KEY not in repr(client) + client.describe() + repr(vars(client)) + repr(reply)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(client)


def test_schema_is_sent_strict_and_without_bounds() -> None:
    with serving(ok("{}")) as server:
        reply = chat(server).complete(BOUND)
    sent = server.requests[0].json
    assert reply.mode == "json_schema"
    assert sent["seed"] == 7
    assert sent["response_format"]["json_schema"]["strict"] is True
    # The property happens to be called like a bound, and stays; the bounds go.
    assert sent["response_format"]["json_schema"]["schema"]["properties"] == {"minimum": {"type": "integer"}}
    assert unbounded(SCHEMA)["required"] == ["minimum"]


@pytest.mark.parametrize(
    ("kind", "mode", "requests"),
    [("json_schema", "json_schema", 1), ("json_object", "json_object_schema", 2), (None, "text", 4)],
)
@pytest.mark.parametrize("status", [400, 422])
def test_ladder(kind: str | None, mode: str, requests: int, status: int) -> None:
    with serving(only(kind, status, "response_format is not supported", "{}")) as server:
        client = chat(server)
        assert client.complete(BOUND).mode == mode
        assert len(server.requests) == requests
        again = client.complete(BOUND)
        assert again.mode == mode
        assert len(server.requests) == requests + 1, "the mode is remembered"
        assert len(again.attempts) == 1


def test_ladder_to_plain_json_object() -> None:
    def step(request: dict[str, Any]) -> Any:
        plain = request["response_format"] == {"type": "json_object"}
        return (ok("{}") if plain else error(400, "unknown field schema"))(request)

    with serving(step) as server:
        assert chat(server).complete(BOUND).mode == "json_object"
    assert len(server.requests) == 3


def test_500_with_a_validation_body_is_a_refusal() -> None:
    """llama-cpp-python's server answers an unknown response format like this."""
    body = "[{'type': 'literal_error', 'msg': \"Input should be 'text' or 'json_object'\"}]"
    with serving(only("json_object", 500, body, "{}")) as server:
        assert chat(server).complete(BOUND).mode == "json_object_schema"
    assert len(server.requests) == 2


def test_400_in_every_form_tells_the_first_reason() -> None:
    with serving(error(400, "the first reason"), error(400, "another")) as server:
        assert "the first reason" in fails(server, BOUND)
    assert len(server.requests) == 4


def test_400_without_schema_is_final() -> None:
    with serving(error(400, "no")) as server:
        assert "check `llm.model`" in fails(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_refused_key_is_final_and_not_repeated(status: int) -> None:
    with serving(error(status, f"Incorrect API key provided: {KEY}.")) as server:
        message = fails(server, BOUND)
    assert "`OPENAI_API_KEY`" in message
    assert "***" in message
    assert len(server.requests) == 1


def test_refused_key_as_400_is_final() -> None:
    """Gemini's endpoint answers a bad key with 400."""
    with serving(error(400, f"API key not valid: {KEY}", code="API_KEY_INVALID")) as server:
        fails(server, BOUND)
    assert len(server.requests) == 1


def test_404_is_final() -> None:
    with serving(error(404, "model not found")) as server:
        assert "model not found" in fails(server, BOUND)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [error(429, "slow down"), error(500, "oops"), error(503, "busy"), reset()])
def test_transient_faults_are_retried(fault: Step) -> None:
    with serving(fault, fault, ok("42")) as server:
        reply = chat(server).complete(FREE)
    assert reply.text == "42"
    assert len(server.requests) == 3
    assert [attempt.outcome == "ok" for attempt in reply.attempts] == [False, False, True]


@pytest.mark.parametrize("fault", [error(429, "slow down"), error(500, "oops"), reset()])
def test_retries_end(fault: Step) -> None:
    started = time.monotonic()
    with serving(fault) as server:
        assert "failed after 4 requests" in fails(server)
    assert len(server.requests) == 4
    assert time.monotonic() - started < 15


def test_half_a_body_is_retried() -> None:
    whole = ok("42")({}).body
    with serving(raw(whole, cut=40), ok("42")) as server:
        assert chat(server).complete(FREE).text == "42"
    assert len(server.requests) == 2


def test_exhausted_quota_is_final() -> None:
    with serving(error(429, "You exceeded your current quota", code="insufficient_quota")) as server:
        assert "top it up" in fails(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("retry-after-ms", 400.0), ("retry-after", 1.0), ("retry-after", None)],
)
def test_retry_after_is_honoured(header: str, seconds: float | None) -> None:
    # A date has whole seconds, so the wait is between two and three of them, less what comes before it.
    value = email.utils.formatdate(time.time() + 3, usegmt=True) if seconds is None else str(seconds)
    with serving(error(429, "wait", headers={header: value}), ok("42")) as server:
        chat(server).complete(FREE)
    first, second = (seen.at for seen in server.requests)
    least = {"retry-after-ms": 0.4}.get(header, 1.0 if seconds is not None else 1.2)
    assert least <= second - first < least + 10


def test_retry_after_beyond_the_deadline_stops_at_once() -> None:
    started = time.monotonic()
    with serving(error(429, "wait", headers={"retry-after": "3600"})) as server:
        fails(server, deadline=2.0, timeout=1.0)
    assert len(server.requests) == 1
    assert time.monotonic() - started < 15


def test_hang_is_bounded() -> None:
    started = time.monotonic()
    with serving(hang(30)) as server:
        message = fails(server, timeout=0.2, attempts=2)
    assert "APITimeoutError" in message
    assert len(server.requests) == 2
    assert time.monotonic() - started < 15


def test_nothing_listens() -> None:
    with serving(ok("")) as server:
        pass
    assert "APIConnectionError" in fails(server, attempts=2)


@pytest.mark.parametrize(
    ("step", "finish"),
    [
        (ok("", choices=[]), "empty"),
        (ok("", choices=None), "empty"),
        (ok(None), "empty"),
        (ok("  \n"), "empty"),
        (ok('{"a": 1', "length"), "length"),
        (ok("", "length"), "length"),
        (ok(None, "content_filter"), "content_filter"),
        (raw(b"<html>hello</html>"), "malformed"),
        (raw(b"[1, 2]"), "malformed"),
        (raw(b"[" * 100_000), "malformed"),
        (ok("", choices=[{"message": {"content": None, "refusal": "I will not"}}]), "refusal"),
    ],
)
def test_useless_contents_are_replies_not_errors(step: Step, finish: str) -> None:
    with serving(step) as server:
        assert chat(server).complete(FREE).finish_reason == finish
    assert len(server.requests) == 1


def test_content_in_parts() -> None:
    with serving(ok([{"type": "text", "text": "4"}, {"type": "text", "text": "2"}])) as server:
        assert chat(server).complete(FREE).text == "42"


def test_reasoning_models_are_served() -> None:
    """They refuse `max_tokens` and `temperature`, one after the other, and are asked rightly ever after."""

    def step(request: dict[str, Any]) -> Any:
        if "max_tokens" in request:
            text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        elif "temperature" in request:
            text = "Unsupported value: 'temperature' does not support 0.7 with this model."
        else:
            return ok("{}")(request)
        return error(400, text)(request)

    with serving(step) as server:
        client = chat(server)
        assert client.complete(BOUND).mode == "json_schema"
        assert len(server.requests) == 3
        client.complete(BOUND)
        assert len(server.requests) == 4
    assert server.requests[-1].json["max_completion_tokens"] == 2048


def test_key_must_be_there_for_openai_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(LLMError, match="`OPENAI_API_KEY` must hold the key"):
        OpenAIChat("m")
    spec = LLMSpec(backend="openai", model="m", base_url="http://127.0.0.1:9/v1", api_key_env="OTHER_KEY")
    with pytest.raises(LLMError, match="`OTHER_KEY` must hold the key"):
        client_from(spec)


def test_local_servers_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(ok("42")) as server:
        client = client_from(LLMSpec(model="m", base_url=server.url))
        assert isinstance(client, OpenAIChat)
        OPEN.append(client)
        assert client.complete(FREE).text == "42"
    assert client.describe() == "m at 127.0.0.1, no key (because llm.base_url is given)"
    assert not client.small


def test_auto_takes_the_endpoint_only_where_it_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    named = client_from(LLMSpec(model="m"))
    assert (
        named.describe() == "m at api.openai.com, key from $OPENAI_API_KEY (because $OPENAI_API_KEY is set)"
    )
    with pytest.raises(LLMError, match=r"`llm\.model` must name"):
        client_from(LLMSpec(base_url="http://127.0.0.1:9/v1"))


def test_request_overrides_the_client() -> None:
    with serving(ok("42")) as server:
        chat(server, temperature=None).complete(FREE)
        chat(server).complete(Request(MESSAGES, temperature=0.0, max_tokens=5))
    first, second = (seen.json for seen in server.requests)
    assert "temperature" not in first
    assert (second["temperature"], second["max_tokens"]) == (0.0, 5)
    assert json.dumps(first["messages"]) == json.dumps([dict(MESSAGES[0])])
