"""Which way of enforcing a schema an endpoint really keeps: asked, not believed.

Endpoints accept a `response_format` and then ignore it (llama.cpp issues 18963 and 24097, Ollama 8063 are
examples). So each mode, from the strictest on, gets one small request whose schema contradicts its prompt: a
model that is constrained cannot obey the prompt, one that is not has no reason to obey the schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final
from urllib.parse import urlsplit

from llmevo.errors import LLMError
from llmevo.llm import MODES, ChatClient, Request
from llmevo.rundir import write_atomic

_KEY, _VALUE = "zk7q", "umbra-41"
_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {_KEY: {"type": "string", "enum": [_VALUE]}},
    "required": [_KEY],
    "additionalProperties": False,
}
_PROMPT = "What is bread? Answer in one short plain sentence, not in JSON."

Verdict = Literal["enforced", "ignored", "refused", "cut off", "not asked"]


@final
@dataclass(frozen=True, slots=True)
class Rung:
    """What became of one mode.

    Args:
        mode: Of `MODES`.
        verdict: `enforced`; `ignored` (it answered as it liked); `refused`; `cut off` (the answer ended at
            the token limit before there was any, so nothing is known); `not asked`.
        detail: One line.
    """

    mode: str
    verdict: Verdict
    detail: str = ""


@final
@dataclass(frozen=True, slots=True)
class Ladder:
    """The mode that was reached, and how.

    Args:
        mode: Of `MODES`.
        rungs: What was tried, in order.
    """

    mode: str
    rungs: tuple[Rung, ...]

    def describe(self) -> str:
        """One line for people."""
        tried = ", ".join(f"{rung.mode} {rung.verdict}" for rung in self.rungs)
        return f"answers are asked for as {self.mode} ({tried})"


def climb(client: ChatClient) -> Ladder:
    """Find the strictest mode that the endpoint enforces.

    An answer that is cut off before it begins (a reasoning model that thinks past its limit) proves nothing;
    then the mode, which was not refused, is taken.

    Args:
        client: Must heed `Request.mode`.

    Raises:
        LLMError: The endpoint does not serve, or refuses every mode.
    """
    rungs: list[Rung] = []
    refusal: LLMError | None = None
    for mode in MODES[:-1]:
        try:
            rung = _try(client, mode)
        except LLMError as error:
            if type(error) is not LLMError:  # its subclasses are outages, not refusals
                raise
            refusal = refusal or error
            rungs.append(Rung(mode, "refused", " ".join(str(error).split())[:200]))
            continue
        rungs.append(rung)
        if rung.verdict in ("enforced", "cut off"):
            return Ladder(mode, tuple(rungs))
    if refusal is not None and all(rung.verdict == "refused" for rung in rungs):
        # Perhaps it is not the mode that is refused: a wrong model name, say. This raises then.
        client.complete(_request("text"))
    return Ladder(MODES[-1], (*rungs, Rung(MODES[-1], "not asked")))


def _request(mode: str) -> Request:
    return Request(({"role": "user", "content": _PROMPT},), _SCHEMA, name="canary", mode=mode)


def _try(client: ChatClient, mode: str) -> Rung:
    reply = client.complete(_request(mode))
    shown = " ".join(reply.text.split())[:80]
    if reply.finish_reason == "length" and not reply.text:
        return Rung(mode, "cut off", "no answer within the token limit")
    try:
        answer = json.loads(reply.text)
    except (ValueError, RecursionError):
        return Rung(mode, "ignored", shown or reply.finish_reason)
    kept = isinstance(answer, dict) if mode == "json_object" else answer == {_KEY: _VALUE}
    return Rung(mode, "enforced" if kept else "ignored", shown)


def remembered(path: Path, base_url: str, model: str) -> str | None:
    """The mode that an earlier sitting found for this endpoint and model; None if none did."""
    try:
        mode = json.loads(path.read_text(encoding="utf-8"))[_name(base_url, model)]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return mode if mode in MODES else None


def remember(path: Path, base_url: str, model: str, mode: str) -> None:
    """Keep what was found, beside what was found for others.

    Raises:
        StoreError: The disk does not serve.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    write_atomic(path, json.dumps({**known, _name(base_url, model): mode}, indent=1) + "\n")


def _name(base_url: str, model: str) -> str:
    parts = urlsplit(base_url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.hostname}{port}{parts.path} {model}"
