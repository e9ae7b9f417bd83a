"""Examples one behind another in a single row, each with an attention of its own.

Rows of equal length are filled up where examples end, and a row of several needs a mask of as many entries as
it has pairs of tokens. Here nothing is filled up, and the attention of each example is causal by itself. On a
CPU that spares a tenth of a step on short examples; a GPU would wait for so many small kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch.nn import functional

from llmevo.attention import laid_out, packed_attention, refuse
from llmevo.train.data import Batch


@final
class Apart:
    """Attention within each of the sequences that lie one behind another.

    Args:
        lengths: Tokens of each sequence, in the order in which they lie.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attention of one layer, `[tokens, heads, width]` each and back."""
        del layer
        grouped = query.shape[1] > key.shape[1]
        # Split at once: a slice's backward pass would fill a gradient of the whole for each sequence.
        heads = (torch.split(part.transpose(0, 1), self._lengths, 1) for part in (query, key, value))
        found = [
            functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=grouped
            )
            for q, k, v in zip(*heads, strict=True)
        ]
        return torch.cat(found, dim=2)[0].transpose(0, 1)

    def check(self, options: dict[str, Any]) -> None:
        """Raise NotPackable if a layer asks for what is not done here."""
        refuse(options, max(self._lengths))


def whole(batch: Batch) -> bool:
    """Whether a batch is one row in which every token is of an example."""
    return len(batch.tokens) == 1 and int(batch.lengths.sum()) == batch.tokens.shape[1]


@contextmanager
def apart(model: Any, batch: Batch) -> Iterator[None]:
    """Within the block, the examples of a batch in one row do not see each other.

    Args:
        model: A transformers model.
        batch: What it will be given; see `whole`.

    Raises:
        NotPackable: The model does not leave its attention to a function.
    """
    lengths: list[int] = batch.lengths[batch.starts.argsort()].tolist()
    with packed_attention(model), laid_out(Apart(lengths)):
        yield
