"""Attention over the tokens of an evaluation's batch, in which requests share what they begin with.

Imported only where torch and transformers are in use already.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch.nn import functional

from llmevo.attention import refuse
from llmevo.evaluate.packing import Batch


@final
class Layout:
    """Which token of a batch sees which, on the device.

    Args:
        batch: The batch.
        device: Where the model is.
        dtype: Of its activations.
        longest: Tokens of the longest sequence, against which sliding windows are held.
        kept: Each layer's keys and values of the prefix; filled by the batch that computes the prefix, and
            used by those that follow it.

    Attributes:
        calls: How often attention was asked for.
    """

    def __init__(
        self,
        batch: Batch,
        device: torch.device,
        dtype: torch.dtype,
        longest: int,
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.calls = 0
        self._longest = longest
        self._kept = kept
        self._start = batch.start
        self._head = batch.start if batch.computes_prefix else 0
        self._scatter = torch.from_numpy(batch.scatter).to(device)
        self._buckets = []
        for bucket in batch.buckets:
            gather = torch.from_numpy(bucket.gather).to(device)
            mask = None
            if bucket.seen.size or batch.start:
                mask = _mask(torch.from_numpy(bucket.seen).to(device), gather, batch.start, dtype)
            self._buckets.append((gather, mask))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attention of one layer, `[tokens, heads, width]` each and back."""
        self.calls += 1
        outputs = []
        if self._head:
            self._kept[layer] = key[: self._head], value[: self._head]
            whole = _attention(
                query[None, : self._head], key[None, : self._head], value[None, : self._head], None, scale
            )
            outputs.append(whole[0])
        blocks = []
        for gather, mask in self._buckets:
            rows, width = gather.shape
            queries, keys, values = (
                tensor.index_select(0, gather.view(-1)).view(rows, width, *tensor.shape[1:])
                for tensor in (query, key, value)
            )
            if self._start:
                prefix = [kept.expand(rows, -1, -1, -1) for kept in self._kept[layer]]
                keys = torch.cat((prefix[0], keys), dim=1)
                values = torch.cat((prefix[1], values), dim=1)
            blocks.append(_attention(queries, keys, values, mask, scale).flatten(0, 1))
        laid = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        outputs.append(laid.index_select(0, self._scatter))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def check(self, options: dict[str, Any]) -> None:
        """Raise NotPackable if a layer asks for what is not done here."""
        refuse(options, self._longest)


def _mask(seen: torch.Tensor, gather: torch.Tensor, start: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores, `[rows, 1, width, start + width]`: 0 where seen, else minus infinity."""
    rows, width = gather.shape
    place = torch.arange(width, device=seen.device)
    visible = (place[None, :] <= place[:, None]).expand(rows, width, width)
    if seen.numel():
        visible = visible & (place[:, None] < seen[:, None, :])
    mask = torch.zeros(rows, 1, width, start + width, dtype=dtype, device=seen.device)
    mask[:, 0, :, start:].masked_fill_(~visible, float("-inf"))
    return mask


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """`[rows, tokens, heads, width]` each and back; causal where no mask is given."""
    grouped = query.shape[2] // key.shape[2]
    if grouped > 1 and query.device.type != "cpu":
        # With a mask, only the slow kernels of other devices know grouped heads.
        key, value = (tensor.repeat_interleave(grouped, dim=2) for tensor in (key, value))
        grouped = 1
    result: torch.Tensor = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=grouped > 1,
    ).transpose(1, 2)
    return result
