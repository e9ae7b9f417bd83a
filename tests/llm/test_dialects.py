"""Servers that all call themselves OpenAI-compatible: the same client gets the same proposal out of each.

`dialects/*.json` holds what each answers, written down from its documentation and from reports of its users
(`sources`). A real HTTP server plays them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_server import Answer, FaultServer, Step, serving

from llmevo import Categorical, Float, LLMError, Optimizer, Space
from llmevo.errors import LLMQuotaError
from llmevo.llm import Message, Request
from llmevo.llm.encode import encode, schema
from llmevo.llm.openai import OpenAIChat
from llmevo.proposers.llm import LLM

DIALECTS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "dialects").glob("*.json"))
}
SPACE = Space({"x": Float(-1, 1), "y": Float(0, 1), "kind": Categorical("a", "b")})
MESSAGES: tuple[Message, ...] = (
    {"role": "system", "content": "You optimise."},
    {"role": "user", "content": 'Answer with JSON, with 2 entries in "proposals".'},
)
ASK = Request(MESSAGES, schema(SPACE, 2, why=True), seed=11, name="propose")
OPEN: list[OpenAIChat] = []


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    yield
    while OPEN:
        OPEN.pop().close()


def chat(server: FaultServer, **options: Any) -> OpenAIChat:
    OPEN.append(OpenAIChat("m", base_url=server.url, **{"timeout": 10.0, "backoff": 0.01, **options}))
    return OPEN[-1]


def content(request: dict[str, Any]) -> str:
    """Proposals that follow from the seed, as many as the prompt wants."""
    count = int(re.findall(r"with (\d+) entries", request["messages"][-1]["content"])[-1])
    rng = np.random.default_rng(request.get("seed", 0) + len(request["messages"][-1]["content"]))
    made = [{"genome": encode(SPACE, SPACE.sample(rng)), "why": "as it is"} for _ in range(count)]
    return json.dumps({"proposals": made})


def kind_of(request: dict[str, Any]) -> str:
    given = request.get("response_format")
    if given is None:
        return "text"
    return "json_object_schema" if "schema" in given else str(given["type"])


def answer(body: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(body).encode())


def served(dialect: dict[str, Any], text: str | None = None, **changes: Any) -> dict[str, Any]:
    """A reply in the dialect with this content and these changes of its choice."""
    body: dict[str, Any] = json.loads(json.dumps(dialect["reply"]))
    body["choices"][0]["message"]["content"] = text
    body["choices"][0] |= changes
    return body


def speaking(dialect: dict[str, Any]) -> Step:
    """The server: refuses what it does not know, and answers the rest."""

    def step(request: dict[str, Any]) -> Answer:
        for name, body in dialect.get("refuses", {}).items():
            if name in request:
                return answer(body, 400)
        if kind_of(request) not in dialect["accepts"]:
            refusal = dialect.get(
                "refusal", {"status": 400, "body": {"error": {"message": "response_format"}}}
            )
            return answer(refusal["body"], refusal["status"])
        return answer(served(dialect, content(request)))

    return step


@pytest.mark.parametrize("name", DIALECTS)
def test_one_call(name: str) -> None:
    """The strictest form that the server takes is found with one request for each refusal, and remembered."""
    dialect = DIALECTS[name]
    assert dialect["sources"], "a shape without a source is an invention"
    ladder = ["json_schema", "json_object_schema", "json_object", "text"]
    expected = next(kind for kind in ladder if kind in dialect["accepts"])
    refusals = ladder.index(expected) + len(dialect.get("refuses", {}))
    with serving(speaking(dialect)) as server:
        client = chat(server)
        reply = client.complete(ASK)
        assert len(server.requests) == refusals + 1
        again = client.complete(ASK)
        assert len(server.requests) == refusals + 2
    assert (reply.mode, again.mode) == (expected, expected)
    assert json.loads(reply.text) == json.loads(content(server.requests[-1].json))
    assert reply.finish_reason == "stop"
    usage = reply.usage
    assert [usage.prompt, usage.completion, usage.reasoning, usage.cached] == dialect["usage"]
    assert reply.model == dialect["reply"].get("model", "m")
    assert not any("n" in seen.json for seen in server.requests), "several answers are not portable"


def test_only_the_schema_beside_json_object_says_how_many() -> None:
    """The other bounds are refused or ignored; without this one a small model may answer with none at all."""
    for name, bounded in (("llama_cpp_python", True), ("vllm", False)):
        with serving(speaking(DIALECTS[name])) as server:
            chat(server).complete(ASK)
        form = server.requests[-1].json["response_format"]
        sent = form["schema"] if bounded else form["json_schema"]["schema"]
        assert ("minItems" in sent["properties"]["proposals"]) is bounded
        assert "maximum" not in json.dumps(sent)
        assert "maxLength" not in json.dumps(sent)


@pytest.mark.parametrize("name", DIALECTS)
def test_the_proposer_over_each(name: str) -> None:
    with serving(speaking(DIALECTS[name])) as server:
        search = Optimizer(SPACE, LLM(SPACE, "maximize", client=chat(server)), direction="maximize", seed=1)
        for size in (1, 3, 3):
            for trial in search.ask(size):
                search.tell(trial, float(SPACE.to_unit(trial.params)[0]))
    assert [trial.origin for trial in search.trials] == ["start", *["llm", "llm+noise", "llm+noise"] * 2]


@pytest.mark.parametrize("name", [name for name in DIALECTS if "context" in DIALECTS[name]])
@pytest.mark.parametrize("status", [400, 500])
def test_a_prompt_that_does_not_fit_is_said_at_once(name: str, status: int) -> None:
    """No other form would make it shorter, and no retry; early llama-servers said it with status 500."""
    said = DIALECTS[name]["context"]
    with (
        serving(lambda request: answer(said["body"], status)) as server,
        pytest.raises(LLMError, match="context"),
    ):
        chat(server).complete(ASK)
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", [name for name in DIALECTS if "unknown_model" in DIALECTS[name]])
def test_an_unknown_model_is_said_at_once(name: str) -> None:
    said = DIALECTS[name]["unknown_model"]
    with (
        serving(lambda request: answer(said["body"], said["status"])) as server,
        pytest.raises(LLMError, match=r"check `llm\.model`"),
    ):
        chat(server).complete(ASK)
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["vllm", "ollama", "llama_cpp"])
def test_reasoning_is_not_the_answer(name: str) -> None:
    """A model that thought until its tokens were used up has said nothing, whatever its thoughts hold."""
    thought = served(DIALECTS[name], "", finish_reason="length")
    with serving(lambda request: answer(thought)) as server:
        reply = chat(server).complete(ASK)
    assert (reply.text, reply.finish_reason) == ("", "length")


@pytest.mark.parametrize(
    ("finish", "meaning"),
    [
        ("stop", "stop"),
        (None, "stop"),
        ("length", "length"),
        ("max_tokens", "length"),
        ("MAX_TOKENS", "length"),
        ("model_length", "length"),
        ("content_filter", "content_filter"),
        ("SAFETY", "content_filter"),
    ],
)
def test_why_an_answer_ended(finish: str | None, meaning: str) -> None:
    """The same two ends have other names on gateways to Mistral, Gemini and Anthropic."""
    cut = served(DIALECTS["vllm"], '{"proposals":[', finish_reason=finish)
    with serving(lambda request: answer(cut)) as server:
        assert chat(server).complete(ASK).finish_reason == meaning


def test_white_space_until_the_tokens_are_used_up() -> None:
    """vLLM's grammars allow it, and some models do it; it is a cut answer, not an empty one."""
    blank = served(DIALECTS["vllm"], '{"proposals":[' + " \n" * 2000, finish_reason="length")
    with serving(lambda request: answer(blank)) as server:
        reply = chat(server).complete(ASK)
        assert server.requests[0].json["max_tokens"] > 0, "without it the server would go on"
    assert reply.finish_reason == "length"


def test_an_error_in_a_200() -> None:
    """OpenRouter tells an upstream failure with status 200 and without choices."""
    failed = {"error": {"message": "Provider returned error", "code": 502}}
    with serving(lambda request: answer(failed)) as server:
        assert chat(server).complete(ASK).finish_reason == "empty"


def test_credit_that_is_used_up() -> None:
    """OpenRouter and DeepSeek say it with status 402."""
    spent = {"error": {"message": "Insufficient credits", "code": 402}}
    with (
        serving(lambda request: answer(spent, 402)) as server,
        pytest.raises(LLMQuotaError, match="top it up"),
    ):
        chat(server).complete(ASK)
    assert len(server.requests) == 1


def test_a_refused_grammar_is_a_refused_form() -> None:
    """llama-server cannot build a grammar of some schemas; plain JSON is the next best."""
    body = {
        "error": {
            "code": 400,
            "message": "Failed to initialize samplers: failed to parse grammar",
            "type": "invalid_request_error",
        }
    }

    def step(request: dict[str, Any]) -> Answer:
        bound = kind_of(request) in ("json_schema", "json_object_schema")
        return answer(body, 400) if bound else answer(served(DIALECTS["llama_cpp"], content(request)))

    with serving(step) as server:
        assert chat(server).complete(ASK).mode == "json_object"
    assert len(server.requests) == 3
