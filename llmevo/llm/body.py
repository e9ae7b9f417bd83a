"""What stands in the body of a chat completion, whoever served it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmevo.llm import Attempt, Reply, Usage, bounded

# What gateways to Anthropic, Mistral and Gemini call the two.
_FINISH = {
    "max_tokens": "length",
    "model_length": "length",
    "safety": "content_filter",
    "recitation": "content_filter",
}


def reply(body: str, model: str, mode: str, seconds: float, attempts: Sequence[Attempt]) -> Reply:
    """The Reply in a 200's body; whatever is wrong with it becomes its `finish_reason`."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    data = data if isinstance(data, dict) else {}
    text, finish = (
        "",
        "empty" if data else "length" if len(body.encode()) >= bounded.MOST_BYTES else "malformed",
    )
    choices = data.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        message = choices[0].get("message")
        message = message if isinstance(message, dict) else {}
        text = _content(message.get("content"))
        finish = str(choices[0].get("finish_reason") or "stop").casefold()
        finish = _FINISH.get(finish, finish)
        if message.get("refusal"):
            finish = "refusal"
        elif not text.strip() and finish not in ("length", "content_filter"):
            finish = "empty"
    name = data.get("model")
    return Reply(
        text,
        finish,
        _usage(data.get("usage")),
        name if isinstance(name, str) else model,
        seconds,
        tuple(attempts),
        mode,
    )


def _content(content: Any) -> str:
    if isinstance(content, list):  # some gateways answer in parts
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _usage(usage: Any) -> Usage:
    def number(node: Any, key: str) -> int | None:
        value = node.get(key) if isinstance(node, dict) else None
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    details = usage if isinstance(usage, dict) else {}
    return Usage(
        number(usage, "prompt_tokens"),
        number(usage, "completion_tokens"),
        number(details.get("completion_tokens_details"), "reasoning_tokens"),
        number(details.get("prompt_tokens_details"), "cached_tokens"),
    )
