"""The loss of a model with an encoder and a decoder: pairs padded to one width, nothing packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
import numpy.typing as npt

from llmevo.errors import GenomeError
from llmevo.train.example import Example

if TYPE_CHECKING:
    import torch

_UNUSED = -100  # transformers' label of what is not learnt


@final
class PairForward:
    """The forward pass of a resident encoder-decoder.

    Args:
        model: A transformers model for sequence-to-sequence; its weights may change.

    Attributes:
        packed: Never: an encoder's tokens all see each other, and relative positions have no place to begin.
        partial: Never: all of the decoder's positions predict something.

    Raises:
        GenomeError: The model cannot make a decoder's input from what it should say.
    """

    packed = False
    partial = False

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise GenomeError(
                f"`train` needs a model that shifts its labels itself, but {type(model).__name__} does not; "
                "take a T5, BART or the like."
            )
        self._model = model

    def losses(self, examples: Sequence[Example]) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """The negative log-likelihood of each of the decoder's tokens; see `Losses`."""
        import torch

        device = self._model.device
        inputs = encoder_inputs(examples, device)
        labels, _ = padded([example.tokens[example.border :] for example in examples], _UNUSED)
        wanted = torch.from_numpy(labels).to(device)
        said = self._model.prepare_decoder_input_ids_from_labels(labels=wanted)
        logits = self._model(**inputs, decoder_input_ids=said, use_cache=False).logits
        owners, places = np.nonzero(labels != _UNUSED)
        chosen = logits[torch.from_numpy(owners).to(device), torch.from_numpy(places).to(device)]
        found = torch.nn.functional.cross_entropy(chosen.float(), wanted[wanted != _UNUSED], reduction="none")
        return found, owners.astype(np.int64)


def padded(
    rows: Sequence[npt.NDArray[np.int64]], filler: int, left: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of unequal lengths as one array, and which of it is theirs (1) or filler (0).

    Args:
        rows: Token ids, each of shape (length,).
        filler: What stands where a row has nothing.
        left: Whether the filler stands before the row.

    Returns:
        Both of shape (rows, longest length).
    """
    width = max(1, *map(len, rows)) if rows else 1
    found = np.full((len(rows), width), filler, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        found[index, place], mask[index, place] = row, 1
    return found, mask


def encoder_inputs(examples: Sequence[Example], device: torch.device, filler: int = 0) -> dict[str, Any]:
    """What stands before each example's border, padded on the right, with its mask."""
    import torch

    tokens, mask = padded([example.tokens[: example.border] for example in examples], filler)
    return {
        "input_ids": torch.from_numpy(tokens).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
    }
