"""From examples to the negative log-likelihood of each token to learn, with no work that nobody asked for.

The language-model head, a fifth of a small model's arithmetic, runs at the positions that predict a target
only, in float32 from there on; examples share rows where the model's attention keeps them apart. Both are
tried on the model before they are used, so that a model that scales its logits or does not know packed rows
is computed the plain way. With adapters in the upper layers only, the layers below are computed once for each
example (`prefix`), which is tried in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np
import numpy.typing as npt

from llmevo.train.data import Batch, Example, lay_out

if TYPE_CHECKING:
    import torch

    from llmevo.train.prefix import Prefix

_LARGE = 200.0  # logits at which a cap, of 30 or so, shows
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
        known: Examples of which what the layers below the adapters make is kept, in about the order in which
            they will be asked for; none, and nothing is kept.

    Attributes:
        packed: Whether examples share rows.
        partial: Whether the head runs at the targets only.
        apart: Whether examples lie in one row, and each attends by itself.
        prefix: What is kept of the layers below the adapters; None where nothing is.
    """

    def __init__(self, model: Any, examples: Sequence[Example], known: Sequence[Example] = ()) -> None:
        self._model = model
        self._body = model.base_model
        self._head = model.get_output_embeddings()
        self.packed = self.partial = self.apart = False
        self.prefix: Prefix | None = None
        short = [Example(e.tokens[:_PROBE], np.arange(len(e.tokens[:_PROBE])) > 0) for e in examples[:3]]
        tolerance = _TOLERANCE.get(str(model.dtype), 1e-4)
        plain = self._probe(short)
        self.partial = _is_linear(self._head) and self._body is not model and self._only_the_head(short)
        self.partial = self.partial and _close(self._probe(short), plain, tolerance)
        self.packed = len(short) > 1
        self.packed = self.packed and _close(self._probe(short), plain, tolerance)
        self._window = self._longest_apart()
        self.apart = self.packed and self._window > 0
        self.apart = self.apart and _close(self._probe(short), plain, tolerance) and self._trains(short)
        self._short, self._tolerance = short, tolerance
        self._tried: dict[int, bool] = {}
        self.prefix = self._make_prefix(known) if known else None

    def _make_prefix(self, known: Sequence[Example]) -> Prefix | None:
        from llmevo.train.prefix import Prefix

        made = Prefix(self._body, lambda batch: self._body(**self._inputs(batch)), self.packed, known)
        return made if made.tokens else None

    @contextmanager
    def above(self) -> Iterator[None]:
        """Compute only what is above the lowest adapter, where what is below it is known.

        Within the block the adapters stay where they are, the weights below them what they are; the model is
        in evaluation mode when it begins.
        """
        prefix = self.prefix
        if prefix is None:
            yield
            return
        with prefix.above():
            first, prefix.first = prefix.first, 0
            if first and first not in self._tried:
                self._model.eval()
                plain = self._probe(self._short)
                prefix.first = first
                self._tried[first] = _close(self._probe(self._short), plain, self._tolerance)
            prefix.first = first if self._tried.get(first) else 0
            yield

    def _longest_apart(self) -> float:
        """Up to how many tokens an example may attend by itself; 0 where model or device are not for it."""
        from llmevo.attention import NotPackable, narrowest_window, refuse_model

        if self._model.device.type != "cpu":
            return 0
        try:
            refuse_model(self._model)
        except NotPackable:
            return 0
        return narrowest_window(self._model)

    def _trains(self, examples: list[Example]) -> bool:
        """Whether a training computes the examples like that, too; dropped attention is not known there."""
        import torch

        try:
            with torch.random.fork_rng(devices=[]):
                self._model.train()
                return self._probe(examples) is not None
        finally:
            self._model.eval()

    def _only_the_head(self, examples: list[Example]) -> bool:
        """Whether logits are what the head makes, and nothing bends them.

        A cap hardly changes small logits, as those of a model that has learnt little; so it is tried on
        inputs of the head that make large ones.
        """
        import torch

        made: list[torch.Tensor] = []

        def enlarge(head: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            largest = float(head.forward(given[0]).abs().max())
            return (given[0] * (_LARGE / max(largest, 1e-6)), *given[1:])

        hooks = [
            self._head.register_forward_pre_hook(enlarge),
            self._head.register_forward_hook(lambda head, given, output: made.append(output)),
        ]
        try:
            with torch.inference_mode():
                logits = self._model(**self._inputs(lay_out(examples, False))).logits
        finally:
            for hook in hooks:
                hook.remove()
        if len(made) != 1 or made[0].shape != logits.shape:
            return False
        return bool((logits - made[0]).abs().max() <= 0.01 * _LARGE)

    def _probe(self, examples: list[Example]) -> torch.Tensor | None:
        """Each target's loss in the examples' order; None where the model does not take the input."""
        import torch

        from llmevo.attention import NotPackable

        try:
            with torch.inference_mode():
                batch = lay_out(examples, self.packed, sum(map(len, examples)))
                found = self.nll(batch)
        except (TypeError, ValueError, AttributeError, RuntimeError, NotPackable):
            if not (self.packed or self.partial or self.prefix):
                raise  # the plain way must work
            return None
        return found[torch.from_numpy(np.argsort(batch.owners, kind="stable")).to(found.device)]

    def losses(self, examples: Sequence[Example]) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """The negative log-likelihood of each target; see `Losses`."""
        batch = lay_out(examples, self.packed, sum(map(len, examples)) if self.in_one_row(examples) else 0)
        return self.nll(batch), batch.owners

    def in_one_row(self, examples: Sequence[Example]) -> bool:
        """Whether these examples are best laid out in one row now."""
        if not self.apart or max(map(len, examples)) > self._window:
            return False
        # What is computed again in the backward pass would not know how the examples lay.
        return not any(getattr(part, "gradient_checkpointing", False) for part in self._model.modules())

    def nll(self, batch: Batch) -> torch.Tensor:
        """The negative log-likelihood of each target of a laid out batch, float32, shape (targets,)."""
        import torch

        from llmevo.train.quick import head_loss

        device = self._model.device
        inputs, sources = self._inputs(batch), torch.from_numpy(batch.sources).to(device)
        labels = torch.from_numpy(batch.labels).to(device)
        # What lies below is computed on entering, before examples lie as in this batch.
        with self._entered(batch), self._attending(batch):
            if not self.partial:
                logits = self._model(**inputs).logits.flatten(0, 1)[sources].float()
                return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            hidden = self._body(**inputs).last_hidden_state
        return head_loss(self._head, hidden.flatten(0, 1)[sources], labels)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model is called with."""
        import torch

        device = self._model.device
        found = {"input_ids": torch.from_numpy(batch.tokens).to(device), "use_cache": False}
        if self.packed:
            found["position_ids"] = torch.from_numpy(batch.positions).to(device)
        return found

    def _attending(self, batch: Batch) -> AbstractContextManager[None]:
        """Let each example attend by itself, where the batch is laid out for it."""
        if not self.apart:
            return nullcontext()
        from llmevo.train.apart import apart, whole

        return apart(self._model, batch) if whole(batch) else nullcontext()

    def _entered(self, batch: Batch) -> AbstractContextManager[None]:
        """Let the model begin above what is known, if it may."""
        prefix = self.prefix
        # What drops in a training would have to be drawn anew.
        if prefix is None or not prefix.first or (self._body.training and not prefix.still):
            return nullcontext()
        return prefix.entered(batch)


def _is_linear(head: Any) -> bool:
    import torch

    return type(head) is torch.nn.Linear


def _close(found: torch.Tensor | None, plain: torch.Tensor | None, tolerance: float) -> bool:
    if found is None or plain is None or found.shape != plain.shape:
        return False
    return bool((found - plain).abs().mean() <= tolerance)
