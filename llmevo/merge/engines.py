"""Who runs the merge's inner loops."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llmevo.merge.layout import Arena
from llmevo.merge.numba_engine import NumbaEngine
from llmevo.merge.torch_engine import TorchEngine
from llmevo.merge.works import Engine

if TYPE_CHECKING:
    import torch


def engine_for(arena: Arena, device: torch.device, dtypes: Iterable[torch.dtype]) -> Engine:
    """Return numba's engine for what it knows: main memory, bfloat16 and float32; torch's for the rest."""
    import torch

    known = {torch.bfloat16, torch.float32}
    if device.type == "cpu" and set(dtypes) <= known and importlib.util.find_spec("numba") is not None:
        return NumbaEngine(arena)
    return TorchEngine(arena)
