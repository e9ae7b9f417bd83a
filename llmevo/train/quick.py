"""LoRA and the loss of the head as single operations, with less traffic through memory than autograd makes.

The scale is applied on the side of the rank, the product is added where the base's output lies, and the
gradient for the input is added up in one place. The head's gradient is taken while its logits are there, a
few rows at a time, so that the logits of a batch are never in memory (as in Liger, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.nn import functional

from llmevo.train.norms import quick_norms

_ROWS = 128  # targets whose logits are in memory at once: 25 MB with 49152 words


def _times(x: torch.Tensor, m: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Each candidate's rows of `x` (rows, i) times its matrix of `m` (candidates, i, o)."""
    if len(counts) == 1:
        return x @ m[0]
    if min(counts) == max(counts):
        return torch.bmm(x.view(len(counts), -1, x.shape[1]), m).view(len(x), -1)
    return torch.cat([part @ one for part, one in zip(torch.split(x, list(counts)), m, strict=True)])


def _add_times(y: torch.Tensor, x: torch.Tensor, m: torch.Tensor, counts: Sequence[int]) -> None:
    """Add `_times(x, m, counts)` to `y`."""
    if min(counts) == max(counts) and len(counts) > 1:
        y.view(len(counts), -1, y.shape[1]).baddbmm_(x.view(len(counts), -1, x.shape[1]), m)
        return
    parts = zip(torch.split(y, list(counts)), torch.split(x, list(counts)), m, strict=True)
    for into, part, one in parts:
        into.addmm_(part, one)


def _across(x: torch.Tensor, y: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Each candidate's `x^T y`, shape (candidates, i, o), of (rows, i) and (rows, o)."""
    if min(counts) == max(counts) and len(counts) > 1:
        first, second = (part.view(len(counts), -1, part.shape[1]) for part in (x, y))
        return torch.bmm(first.transpose(1, 2), second)
    parts = zip(torch.split(x, list(counts)), torch.split(y, list(counts)), strict=True)
    # The narrower one is the transposed one, which is up to twice as fast.
    narrow = x.shape[1] > y.shape[1]
    return torch.stack([(second.T @ first).T if narrow else first.T @ second for first, second in parts])


class _Product(torch.autograd.Function):
    """`x W^T + bias`, and for each candidate's rows `scale x A^T B^T`; gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scales: Sequence[float],
        counts: Sequence[int],
    ) -> torch.Tensor:
        flat, kind = x.reshape(-1, x.shape[-1]), a.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = _scaled(_times(flat, a.transpose(1, 2), counts), scales, counts)
        y = functional.linear(flat, weight, bias)
        _add_times(y, low, b.transpose(1, 2), counts)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.rest = scales, counts, kind
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        flat, weight, a, b, low = ctx.saved_tensors
        scales, counts, kind = ctx.rest
        dy = gradients[0].reshape(-1, gradients[0].shape[-1])
        inner = _scaled(_times(dy, b, counts), scales, counts)
        da = _across(inner, flat, counts).to(kind) if ctx.needs_input_grad[3] else None
        db = _across(dy, low, counts).to(kind) if ctx.needs_input_grad[4] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            _add_times(dx, inner, a, counts)
            dx = dx.view(*gradients[0].shape[:-1], -1)
        return dx, None, None, da, db, None, None


def _scaled(low: torch.Tensor, scales: Sequence[float], counts: Sequence[int]) -> torch.Tensor:
    for part, scale in zip(torch.split(low, list(counts)), scales, strict=True):
        part.mul_(scale)
    return low


def product(
    x: torch.Tensor,
    base: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    scales: Sequence[float],
    counts: Sequence[int],
) -> torch.Tensor:
    """A frozen linear module with a LoRA for each candidate, in the precision of `x`.

    Args:
        x: Shape (..., inputs); the first rows are the first candidate's, and so on.
        base: The module.
        a: Shape (candidates, rank, inputs).
        b: Shape (candidates, outputs, rank).
        scales: Of each candidate's BA.
        counts: How many rows each candidate has.
    """
    if type(base) is torch.nn.Linear:
        found: torch.Tensor = _Product.apply(x, base.weight, base.bias, a, b, scales, counts)  # type: ignore[no-untyped-call]
        return found
    # Quantised or transposed weights keep their own product.
    y: torch.Tensor = base(x)
    flat = x.reshape(-1, x.shape[-1])
    inner = _times(flat, a.to(x.dtype).transpose(1, 2), counts)
    factors = torch.cat(
        [inner.new_full((count, 1), scale) for count, scale in zip(counts, scales, strict=True)]
    )
    return y + _times(inner * factors, b.to(x.dtype).transpose(1, 2), counts).view(y.shape)


@contextmanager
def quick(model: Any, name: str) -> Iterator[None]:
    """Within the block, peft's plain LoRA layers compute by `product`, RMS normalisations by one operation.

    Args:
        model: The resident model with an adapter on it.
        name: The adapter's.
    """
    chosen = [module for module in model.modules() if _plain(module, name)]
    try:
        for module in chosen:
            module.forward = _forward(module, name)
        with quick_norms(model):
            yield
    finally:
        for module in chosen:
            del module.forward


def _plain(module: Any, name: str) -> bool:
    if not isinstance(module, LoraLinear) or name not in module.lora_A or module.merged:
        return False
    still = isinstance(module.lora_dropout[name], torch.nn.Identity)
    free = module.lora_A[name].bias is None is module.lora_B[name].bias
    return still and free and name not in module.lora_variant and module.active_adapters == [name]


def _forward(module: Any, name: str) -> Any:
    base, scale = module.base_layer, float(module.scaling[name])
    a, b = module.lora_A[name].weight, module.lora_B[name].weight

    def forward(x: torch.Tensor) -> torch.Tensor:
        return product(x, base, a[None], b[None], (scale,), (x.numel() // x.shape[-1],))

    return forward


class _HeadLoss(torch.autograd.Function):
    """The negative log-likelihood of each label; the gradient for the hidden states is made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        learns: bool,
    ) -> torch.Tensor:
        losses = hidden.new_empty(len(labels), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if learns else None
        for start in range(0, len(labels), _ROWS):
            part = slice(start, start + _ROWS)
            logits = functional.linear(hidden[part], weight, bias).float()
            wanted = labels[part, None]
            logits -= logits.amax(1, keepdim=True)
            shifted = logits.gather(1, wanted)
            logits.exp_()
            total = logits.sum(1, keepdim=True)
            losses[part] = (total.log() - shifted)[:, 0]
            if gradient is None:
                continue
            logits /= total
            logits.scatter_add_(1, wanted, torch.full_like(shifted, -1.0))
            torch.mm(logits.to(weight.dtype), weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0][:, None]).to(gradient.dtype), None, None, None, None


def head_loss(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each label under a frozen linear head.

    Args:
        head: A `torch.nn.Linear`.
        hidden: Shape (targets, width).
        labels: Shape (targets,).

    Returns:
        float32, shape (targets,).
    """
    learns = torch.is_grad_enabled() and hidden.requires_grad
    found: torch.Tensor = _HeadLoss.apply(hidden, head.weight, head.bias, labels, learns)  # type: ignore[no-untyped-call]
    return found
