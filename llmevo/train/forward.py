"""From examples to the negative log-likelihood of each token to learn, with no work that nobody asked for.

The language-model head, a fifth of a small model's arithmetic, runs at the positions that predict a target
only, in float32 from there on; examples share rows where the model's attention keeps them apart. Both are
tried on the model before they are used, so that a model that scales its logits or does not know packed rows
is computed the plain way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np
import numpy.typing as npt

from llmevo.train.data import Batch, Example, lay_out

if TYPE_CHECKING:
    import torch

_PROBE = 24  # tokens of each example that packing is tried on
# Mean difference in nats. Rounding makes 2e-6, 6e-3 and 3e-2 on a real model, tokens that see each other 0.5.
_TOLERANCE = {"torch.float32": 1e-4, "torch.float16": 0.03, "torch.bfloat16": 0.1}


class Losses(Protocol):
    """A forward pass of the resident model, of whatever kind the model is."""

    packed: bool
    partial: bool

    def losses(self, examples: Sequence[Example]) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """The loss of each target (nats; squared errors of values), and the index of its example.

        Args:
            examples: What goes through the model at once.

        Returns:
            float32, shape (targets,), with gradients where they are on; and shape (targets,).
        """
        ...


@final
class Forward:
    """The forward pass of one resident model.

    Args:
        model: A causal transformers model; its weights may change, and adapters come and go.
        examples: Some to try packing on; at least two, or it is not tried.

    Attributes:
        packed: Whether examples share rows.
        partial: Whether the head runs at the targets only.
    """

    def __init__(self, model: Any, examples: Sequence[Example]) -> None:
        self._model = model
        self._body = model.base_model
        self._head = model.get_output_embeddings()
        self.packed = self.partial = False
        short = [Example(e.tokens[:_PROBE], np.arange(len(e.tokens[:_PROBE])) > 0) for e in examples[:3]]
        tolerance = _TOLERANCE.get(str(model.dtype), 1e-4)
        plain = self._probe(short)
        self.partial = _is_linear(self._head) and self._body is not model
        self.partial = self.partial and _close(self._probe(short), plain, tolerance)
        self.packed = len(short) > 1
        self.packed = self.packed and _close(self._probe(short), plain, tolerance)

    def _probe(self, examples: list[Example]) -> torch.Tensor | None:
        """Each target's loss in the examples' order; None where the model does not take the input."""
        import torch

        try:
            with torch.inference_mode():
                batch = lay_out(examples, self.packed, sum(map(len, examples)))
                found = self.nll(batch)
        except (TypeError, ValueError, AttributeError, RuntimeError):
            if not (self.packed or self.partial):
                raise  # the plain way must work
            return None
        return found[torch.from_numpy(np.argsort(batch.owners, kind="stable")).to(found.device)]

    def losses(self, examples: Sequence[Example]) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """The negative log-likelihood of each target; see `Losses`."""
        batch = lay_out(examples, self.packed)
        return self.nll(batch), batch.owners

    def nll(self, batch: Batch) -> torch.Tensor:
        """The negative log-likelihood of each target of a laid out batch, float32, shape (targets,)."""
        import torch

        from llmevo.train.quick import head_loss

        device = self._model.device
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.tokens).to(device),
            "use_cache": False,
        }
        if self.packed:
            inputs["position_ids"] = torch.from_numpy(batch.positions).to(device)
        sources = torch.from_numpy(batch.sources).to(device)
        labels = torch.from_numpy(batch.labels).to(device)
        if not self.partial:
            logits = self._model(**inputs).logits.flatten(0, 1)[sources].float()
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return head_loss(self._head, self._body(**inputs).last_hidden_state.flatten(0, 1)[sources], labels)


def _is_linear(head: Any) -> bool:
    import torch

    return type(head) is torch.nn.Linear


def _close(found: torch.Tensor | None, plain: torch.Tensor | None, tolerance: float) -> bool:
    if found is None or plain is None or found.shape != plain.shape:
        return False
    return bool((found - plain).abs().mean() <= tolerance)
