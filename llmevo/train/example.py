"""What is learnt from and asked: one tokenised example, whatever the kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import numpy.typing as npt


@final
@dataclass(frozen=True, slots=True)
class Text:
    """What the metrics on texts need of an example.

    Args:
        prompt: Token ids that stand before the answer, shape (length,); empty where there is no answer apart.
        answer: The text that should follow; empty where there is none apart.
        size: UTF-8 bytes of the text whose tokens are learnt.
    """

    prompt: npt.NDArray[np.int64]
    answer: str
    size: int


@final
@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example.

    An encoder's input and what is to be said of it are one run of tokens with a border between them: the
    decoder's tokens, or one token that is the number of the class.

    Args:
        tokens: Token ids, shape (length,), at least two.
        targets: Which of them are learnt, shape (length,); never the first, which nothing predicts.
        border: How many of the tokens are input alone; 0 for a causal model, whose tokens are one text.
        value: What a regression should say; its class is 0.
        text: For the metrics on texts; None where there is none.
    """

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.bool_]
    border: int = 0
    value: float = 0.0
    text: Text | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> Example:
        """The example without what follows its first `count` tokens."""
        if count == len(self.tokens):
            return self
        return replace(self, tokens=self.tokens[:count], targets=self.targets[:count])


def learning(tokens: Sequence[int], spans: Sequence[tuple[int, int]], text: Text) -> Example:
    """A causal model's example of which the tokens from `start` up to `end` of each span are learnt."""
    targets = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        targets[start:end] = True
    targets[:1] = False
    return Example(ids(tokens), targets, text=text)


def ids(tokens: Sequence[int]) -> npt.NDArray[np.int64]:
    """Token ids as an array, shape (length,)."""
    return np.array(tokens, dtype=np.int64)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
