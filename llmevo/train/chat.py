"""A chat as an example: its template's text, of which the assistant's turns are learnt."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from llmevo.errors import GenomeError
from llmevo.train.example import Example, Text, common, ids, learning
from llmevo.train.rows import Row

_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")  # a template that says itself what the assistant writes


def chat(row: Row, tokenizer: Any) -> Example:
    """The example that a row of `messages` is.

    Learnt is what the template has between `{% generation %}` and `{% endgeneration %}`; where it has no such
    marks, each of the assistant's turns from where the template asks for it to where its text of the
    conversation up to there ends.

    Raises:
        GenomeError: There is no template, it refuses the messages, or it rewrites earlier turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise GenomeError(
            f"{row.where}: `messages` need a tokenizer with a chat template, but the model's has none; give "
            "`prompt` and `completion`."
        )
    messages: list[dict[str, Any]] = row.content["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    tokens = _render(row, tokenizer, len(messages), False)
    marked = _marked(row, tokenizer)
    spans = marked or [_span(row, tokenizer, tokens, index) for index in turns]
    before = _render(row, tokenizer, turns[-1], True)
    answer = messages[turns[-1]]["content"]
    size = sum(len(messages[index]["content"].encode()) for index in turns)
    if any(messages[index].get("tool_calls") for index in turns):
        # Calls are written by the template, so what is learnt is known by its tokens alone.
        said = [tokenizer.decode(tokens[start:end], skip_special_tokens=True) for start, end in spans]
        size, answer = sum(len(text.encode()) for text in said), said[-1]
    return learning(tokens, spans, Text(ids(before), answer, size))


def _render(row: Row, tokenizer: Any, count: int, answer: bool) -> list[int]:
    """The tokens of the first `count` messages, with what asks for an `answer` behind them."""
    text = _templated(row, tokenizer, count, tokenize=False, add_generation_prompt=answer)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _templated(row: Row, tokenizer: Any, count: int, **options: Any) -> Any:
    from jinja2 import TemplateError

    messages = row.content["messages"][:count]
    try:
        return tokenizer.apply_chat_template(messages, tools=row.content.get("tools"), **options)
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise GenomeError(
            f"{row.where}: the model's chat template must take these `messages`, but says: {reason}; change "
            "them, or give `prompt` and `completion`."
        ) from None


def _span(row: Row, tokenizer: Any, tokens: list[int], index: int) -> tuple[int, int]:
    """Where an assistant's turn begins and ends in the whole conversation."""
    before = _render(row, tokenizer, index, True)
    after = _render(row, tokenizer, index + 1, False)
    start, end = common(tokens, before), common(tokens, after)
    # The last token of a turn may merge with what follows, so one may differ; more is another text.
    if start < len(before) - 1 or end < len(after) - 1 or start >= end:
        raise GenomeError(
            f"{row.where}: turn {index} reads otherwise once later turns follow, as the chat template "
            "rewrites earlier ones; give each answer as `prompt` and `completion`."
        )
    return start, end


def _marked(row: Row, tokenizer: Any) -> list[tuple[int, int]]:
    """What the template itself marks as the assistant's; empty where it marks nothing."""
    template = tokenizer.get_chat_template(tools=row.content.get("tools"))
    if not _MARKS.search(template):
        return []
    count = len(row.content["messages"])
    found = _templated(
        row, tokenizer, count, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = np.array([0, *found["assistant_masks"], 0], dtype=np.int8)
    edges = np.flatnonzero(np.diff(mask)).reshape(-1, 2)
    if not len(edges):
        raise GenomeError(
            f"{row.where}: the chat template marks with `generation` what the assistant says, but nothing of "
            "these messages; mend the template, or give `prompt` and `completion`."
        )
    return [(int(start), int(end)) for start, end in edges]
