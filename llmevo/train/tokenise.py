"""From a row to a tokenised example: what of it is learnt, and where an answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np

from llmevo.errors import GenomeError
from llmevo.train.chat import chat
from llmevo.train.example import Example, Text, common, ids, learning
from llmevo.train.rows import Row

Kind: TypeAlias = Literal["causal", "seq2seq", "classification", "regression"]
"""What a model makes of a text: more text, another text, a class, a number."""


def tokenise(row: Row, tokenizer: Any, kind: Kind, labels: Sequence[str | int]) -> Example:
    """The example that a row is.

    Args:
        row: Checked.
        tokenizer: The model's.
        kind: Of model.
        labels: The classes, by number; empty for other kinds.

    Raises:
        GenomeError: The row has no token to learn, or does not suit the model.
    """
    if kind == "seq2seq":
        example = _pair(row, tokenizer)
    elif kind != "causal":
        example = _labelled(row, tokenizer, labels)
    elif row.kind == "messages":
        example = chat(row, tokenizer)
    else:
        example = _plain(row, tokenizer)
    if not example.targets.any():
        raise GenomeError(
            f"{row.where}: it must have at least one token to learn after the first, but has "
            f"{len(example)} tokens and none to learn; lengthen or remove it."
        )
    return example


def shorten(example: Example, longest: int, tokenizer: Any) -> Example:
    """Cut an example off behind `longest` tokens; of an encoder's input the last, special token is kept."""
    border = example.border
    if border == 0:
        short = example.first(min(longest, len(example)))
    else:
        kept = np.arange(border) < longest
        if border > longest and example.tokens[border - 1] in tokenizer.all_special_ids:
            kept[longest - 1], kept[border - 1] = False, True
        kept = np.concatenate([kept, np.arange(len(example) - border) < longest])
        tokens, targets = example.tokens[kept], example.targets[kept]
        short = replace(example, tokens=tokens, targets=targets, border=min(border, longest))
    if short.text is None:
        return short
    # What is left of the text is known by its tokens alone.
    learnt = short.tokens[short.targets]
    size = len(tokenizer.decode(learnt, skip_special_tokens=True).encode())
    prompt = short.tokens[: short.border] if border else short.text.prompt
    return replace(short, text=replace(short.text, prompt=prompt, size=size))


def _plain(row: Row, tokenizer: Any) -> Example:
    """A text, or a prompt with its completion."""
    asks = row.kind == "prompt"
    prompt = row.content["prompt"] if asks else ""
    answer = row.content["completion"] if asks else ""
    text = prompt + answer if asks else row.content["text"]
    tokens = list(tokenizer(text).input_ids)
    before = list(tokenizer(prompt).input_ids) if asks else []
    # The longest common beginning: a token that spans the border belongs to the completion.
    known = common(tokens, before)
    end = tokenizer.eos_token_id
    if end is not None and tokens[-1:] != [end]:
        tokens.append(end)
    if end is not None and before[-1:] == [end]:
        before.pop()
    size = len((answer or text).encode())
    if known == 0:  # nothing predicts the first token
        size -= len(tokenizer.decode(tokens[:1], skip_special_tokens=True).encode())
    return learning(tokens, [(known, len(tokens))], Text(ids(before), answer, max(size, 0)))


def _pair(row: Row, tokenizer: Any) -> Example:
    """An encoder's input and what the decoder should say, each tokenised by itself."""
    if row.kind != "prompt":
        raise GenomeError(
            f"{row.where}: a model with an encoder and a decoder learns `prompt` and `completion`, but got "
            f"{row.kind!r}."
        )
    answer = row.content["completion"]
    source = list(tokenizer(row.content["prompt"]).input_ids)
    said = list(tokenizer(text_target=answer).input_ids)
    end = tokenizer.eos_token_id
    if end is not None and said[-1:] != [end]:
        said.append(end)
    if not source:
        raise GenomeError(
            f"{row.where}: `prompt` must have at least one token for the encoder, but has none."
        )
    targets = np.arange(len(source) + len(said)) >= len(source)
    text = Text(ids(source), answer, len(answer.encode()))
    return Example(ids([*source, *said]), targets, len(source), text=text)


def _labelled(row: Row, tokenizer: Any, labels: Sequence[str | int]) -> Example:
    """A text, or two, with its class as the last token, or with its value."""
    source = list(tokenizer(row.content["text"], row.content.get("text_pair")).input_ids)
    if not source:
        raise GenomeError(f"{row.where}: `text` must have at least one token, but has none; remove it.")
    label = row.content["label"]
    number = labels.index(label) if labels else 0
    targets = np.arange(len(source) + 1) == len(source)
    return Example(ids([*source, number]), targets, len(source), 0.0 if labels else float(label))
