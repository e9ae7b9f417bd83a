"""Models as bare buffers, for tests of the merge's engines."""

from __future__ import annotations

from typing import Any

from llmevo.merge.layout import Arena, Slot


def buffers(size: int, count: int, *, dtype: Any = None, seed: int = 0) -> tuple[Arena, list[Slot]]:
    """An output, a base and `count` models near it; in bfloat16, unless another dtype is named."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(size, generator=generator) * 0.05
    models = [base + 0.01 * torch.randn(size, generator=generator) for _ in range(count)]
    arena = Arena()
    slots = [arena.slot(t.to(dtype or torch.bfloat16)) for t in (torch.zeros(size), base, *models)]
    return arena, slots
