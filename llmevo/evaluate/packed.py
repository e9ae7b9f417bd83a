"""Log-likelihoods from packed tokens: forward passes and the reading of logits.

Imported only where torch and transformers are in use already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from transformers import PreTrainedModel

from llmevo.attention import NotPackable, laid_out, narrowest_window, packed_attention, refuse_model
from llmevo.errors import StageError
from llmevo.evaluate.attention import Layout
from llmevo.evaluate.hardware import free_memory
from llmevo.evaluate.packing import Batch, Limits, Packing, pack
from llmevo.evaluate.trie import Costs

# Tokens in a batch, bytes of its logits, and what beginning a pass costs in tokens. A CPU multiplies some
# hundred rows as fast as any number (256 to 1536 were within 8 %). A GPU wants thousands, and waits for each
# of a pass's many small steps.
_CPU = 1024, 256 << 20, 64.0
_CUDA = 16384, 2 << 30, 4096.0
_ATTENTION = 2.5  # how much longer an operation of the attention takes than one of the linear layers
_ROWS = {"cpu": 64, "cuda": 1024}  # logits that are read at once


@final
class PackedModel:
    """Answers requests on packed tokens.

    Args:
        model: A decoder of transformers; its weights may change.
        longest: Tokens of the longest input.

    Attributes:
        halved: How often batches were made smaller since one did not fit into the accelerator's memory.

    Raises:
        NotPackable: The model's configuration says that it cannot be done.
    """

    def __init__(self, model: PreTrainedModel, longest: int) -> None:
        refuse_model(model)
        self._model = model
        self._longest = longest
        tokens, room, group = _CUDA if model.device.type == "cuda" else _CPU
        text = model.config.get_text_config()
        self._limits = Limits(tokens, max(1, min(tokens, room // (4 * int(text.vocab_size)))))
        self._costs = Costs(_pair_cost(model), group)
        self._window = narrowest_window(model)
        self._layers = int(text.num_hidden_layers)
        self.halved = 0

    def settings(self) -> list[float]:
        """What batches follow from, beside the requests."""
        return [self._costs.pair, self._costs.group, self._limits.tokens, self._limits.logits]

    def pack(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> Packing:
        """The batches that answer `requests`; no context or continuation may be empty.

        Raises:
            NotPackable: A request is longer than the model's sliding window.
        """
        plain = [(context, continuation) for _, context, continuation in requests]
        packing = pack(plain, self._longest, self._costs, self._limits)
        if packing.longest > self._window:
            raise NotPackable(
                f"a request of {packing.longest} tokens is longer than its sliding window of {self._window}"
            )
        return packing

    def answer(self, packing: Packing) -> list[tuple[float, bool]]:
        """The log-likelihood of each request's continuation, and whether greedy decoding would give it.

        Where the accelerator's memory does not suffice, batches are halved, for all that follow too.

        Raises:
            NotPackable: A layer asks for an attention that is not done here.
            StageError: The memory does not suffice for a single row.
        """
        device = self._model.device
        values = torch.empty(packing.pairs, dtype=torch.float32, device=device)
        greedy = torch.empty(packing.pairs, dtype=torch.bool, device=device)
        before = self._limits
        packing.fit(before)
        while (large := self._sweep(packing, values, greedy)) is not None:
            if large.height < 2:
                self._limits = before  # whatever fills the memory, smaller batches do not help
                raise StageError(
                    "evaluate",
                    f"out of memory with one row of {len(large.tokens)} tokens, which cannot be halved; "
                    "lower `evaluate.max_length`, or take a smaller `evaluate.dtype`.",
                )
            self._limits = Limits(
                max(1, min(self._limits.tokens, len(large.tokens)) // 2),
                max(1, min(self._limits.logits, len(large.logits)) // 2),
            )
            self.halved += 1
            free_memory()
            packing.fit(self._limits)
        sums = np.add.reduceat(values.cpu().numpy().astype(np.float64), packing.first)
        alls = np.logical_and.reduceat(greedy.cpu().numpy(), packing.first)
        return list(zip(sums.tolist(), alls.tolist(), strict=True))

    def _sweep(self, packing: Packing, values: torch.Tensor, greedy: torch.Tensor) -> Batch | None:
        """Run the batches and fill in what their pairs get; returns the first that does not fit, if any."""
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.inference_mode(), packed_attention(self._model):
            for batch in packing.batches:
                if batch.computes_prefix or not batch.start:
                    kept = {}
                slots = torch.from_numpy(batch.slots).to(values.device)
                try:
                    values[slots], greedy[slots] = self._run(batch, packing.longest, kept)
                except torch.OutOfMemoryError:
                    return batch
        return None

    def _run(
        self, batch: Batch, longest: int, kept: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward pass: the log-probability of each pair, and whether its target is the likeliest."""
        device = self._model.device
        layout = Layout(batch, device, self._model.dtype, longest, kept)
        with laid_out(layout):
            logits = self._model(
                input_ids=torch.from_numpy(batch.tokens)[None].to(device),
                position_ids=torch.from_numpy(batch.positions)[None].to(device),
                logits_to_keep=torch.from_numpy(batch.logits).to(device),
                use_cache=False,
            ).logits[0]
        if layout.calls != self._layers or len(logits) != len(batch.logits):
            raise NotPackable("not every one of its layers attends as decoders do")
        rows = torch.from_numpy(batch.rows).to(device)
        targets = torch.from_numpy(batch.targets).to(device)
        return _read(logits, rows, targets)


def _read(
    logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, in float32, and greediness of (row, target) pairs; destroys `logits`.

    `torch.logsumexp` would take twice as long as the product that makes the logits.
    """
    step = _ROWS.get(logits.device.type, _ROWS["cpu"])
    picked = logits[rows, targets]
    highest = logits.amax(-1)
    greedy = picked == highest[rows]
    if bool(greedy.any()):  # of equal logits, the first is greedy decoding's
        likeliest = torch.full((len(logits),), -1, device=rows.device)
        likeliest[rows[greedy]] = 0  # many pairs read one row: the choices of an item begin alike
        among = (likeliest == 0).nonzero()[:, 0]
        for first in range(0, len(among), step):
            part = among[first : first + step]
            likeliest[part] = logits.index_select(0, part).argmax(-1)
        greedy &= likeliest[rows] == targets
    totals = []
    for first in range(0, len(logits), step):
        exact = logits[first : first + step].float()
        most = highest[first : first + step].float()
        totals.append(exact.sub_(most[:, None]).exp_().sum(-1).log_())
    values = picked.float() - highest[rows].float() - torch.cat(totals)[rows]
    return values, greedy


def _pair_cost(model: PreTrainedModel) -> float:
    """One query's attention to one key, in units of one token's way through the linear layers."""
    text = model.config.get_text_config()
    ends = {id(layer.weight) for layer in _ends(model)}
    weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in ends)
    heads = int(text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return float(_ATTENTION * 2 * heads * width * text.num_hidden_layers / max(weights, 1))


def _ends(model: PreTrainedModel) -> list[Any]:
    """The embedding and the head."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [layer for layer in layers if layer is not None]
