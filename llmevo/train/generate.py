"""What a model says after a prompt: greedy, in batches, until it ends its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from llmevo.train.example import Example
from llmevo.train.seq2seq import padded

_TOKENS_AT_ONCE = 4096  # of a batch, with those that are still to come


def generate(
    model: Any, tokenizer: Any, examples: Sequence[Example], most: int, context: int
) -> tuple[list[str], list[bool]]:
    """Greedy answers to the examples' prompts.

    Args:
        model: A transformers model that generates; a decoder's prompts are padded on the left.
        tokenizer: The model's tokenizer.
        examples: Each with a `text` whose prompt is not empty.
        most: Tokens of an answer at most.
        context: Tokens that the model takes; a prompt leaves a decoder the rest of them.

    Returns:
        The answers without prompts and special tokens, and which of them had no end within `most` tokens,
        in the examples' order.
    """
    import torch

    stops = _stops(model, tokenizer, examples)
    pad = filler(tokenizer)
    answers, cut = [""] * len(examples), [False] * len(examples)
    whole = bool(model.config.is_encoder_decoder)
    prompts = [example.text.prompt for example in examples if example.text is not None]
    with torch.inference_mode(), _plain(model, stops, pad):
        for group, limit in _batches([len(prompt) for prompt in prompts], most, None if whole else context):
            tokens, mask = padded([prompts[index] for index in group], pad, left=not whole)
            width = tokens.shape[1]
            said = model.generate(
                torch.from_numpy(tokens).to(model.device),
                attention_mask=torch.from_numpy(mask).to(model.device),
                max_new_tokens=limit,
            )
            for index, row in zip(group, said[:, 1 if whole else width :].cpu().numpy(), strict=True):
                ends = np.flatnonzero(np.isin(row, stops))
                cut[index] = not len(ends)
                answer = row[: ends[0]] if len(ends) else row
                answers[index] = tokenizer.decode(answer, skip_special_tokens=True)
    return answers, cut


def _batches(lengths: Sequence[int], most: int, context: int | None) -> Iterator[tuple[list[int], int]]:
    """Indices in groups of similar length, the longest first, and how long their answers may be."""
    room = [most if context is None else max(1, min(most, context - length)) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(1, _TOKENS_AT_ONCE // (lengths[order[0]] + most))
        # No answer is cut because of a neighbour's long prompt.
        group = [index for index in order[:count] if room[index] == room[order[0]]]
        yield group, room[order[0]]
        order = order[len(group) :]


def _stops(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """What ends an answer: the tokenizer's and the model's own end, and the special token that was learnt."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for example in examples:
        learnt = example.tokens[example.targets].tolist()
        found.update([token for token in learnt if token in special][-1:])
    return sorted(token for token in found if token is not None)


def filler(tokenizer: Any) -> int:
    """The token that pads rows."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


@contextmanager
def _plain(model: Any, stops: list[int], pad: int) -> Iterator[None]:
    """Greedy decoding and nothing else, whatever the model's files say of sampling and penalties."""
    from transformers import GenerationConfig

    own = model.generation_config
    start = own.decoder_start_token_id
    if start is None:
        start = getattr(model.config, "decoder_start_token_id", None)
    # transformers 5.23 makes a T5's cache as deep as its encoder.
    deep = getattr(model.config, "num_decoder_layers", None) or 0
    model.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=deep <= getattr(model.config, "num_hidden_layers", deep),
        num_beams=1,
        eos_token_id=stops or None,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=start,
    )
    try:
        yield
    finally:
        model.generation_config = own
