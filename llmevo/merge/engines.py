"""Who runs the merge's inner loops."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from llmevo.merge.layout import Arena
from llmevo.merge.numba_engine import NumbaEngine
from llmevo.merge.streamed_engine import StreamedEngine
from llmevo.merge.torch_engine import TorchEngine
from llmevo.merge.works import Engine

if TYPE_CHECKING:
    import torch


def engine_for(arena: Arena, device: torch.device, *, streamed: bool) -> Engine:
    """Return numba's engine in main memory, where it is installed and knows the dtypes; torch's for the rest.

    Args:
        arena: The buffers.
        device: Where merges are computed.
        streamed: Whether models lie elsewhere. What is in main memory, or in a mapped file, needs no copy for
            a merge on the CPU.
    """
    import torch

    dtypes = {buffer.dtype for buffer in arena.buffers}

    if device.type == "cpu" and importlib.util.find_spec("numba") is not None:
        from llmevo.merge.cells import converts_halves

        if dtypes <= {torch.bfloat16, torch.float32} or converts_halves():
            return NumbaEngine(arena)
    return StreamedEngine(arena, device) if streamed else TorchEngine(arena)
