"""Where the resident model lives, and in which precision."""

from __future__ import annotations

import gc
import math
import sys
import time
from typing import TYPE_CHECKING

from llmevo.errors import GenomeError

if TYPE_CHECKING:
    import torch

    from llmevo.genome import EvaluateSpec


def device(spec: EvaluateSpec) -> torch.device:
    """The device that `evaluate.device` names; `auto` is the first accelerator, else the CPU.

    Raises:
        GenomeError: The name is not a device, or this machine does not have it.
    """
    import torch

    name = spec.device
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise GenomeError(
            f"`evaluate.device` must be auto, cpu, cuda, cuda:1, ... or mps, but got {name!r}."
        ) from None
    available = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }.get(chosen.type, 0)
    if (chosen.index or 0) >= available:
        raise GenomeError(
            f"`evaluate.device` is {name!r}, but this machine has {available} of {chosen.type}; "
            "use `auto` or `cpu`."
        )
    return chosen


def dtype(spec: EvaluateSpec, on: torch.device) -> torch.dtype:
    """The precision that `evaluate.dtype` names.

    `auto` is bfloat16 on CUDA from Ampere on, and on a CPU that multiplies it faster than float32, else
    float32. CPUs are timed, for their flags do not tell: with AMX bfloat16 is about three times as fast, with
    AVX512-BF16 alone it was measured at 0.6 times. One precision serves a whole run (the runner keeps the
    choice): bfloat16 moves log-probabilities by up to 0.1, which flips near-ties.
    """
    import torch

    if spec.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[spec.dtype]
    if on.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif on.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("amx_tile")) and _gain() > 1.2
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def free_memory() -> None:
    """Give back what a failed pass left behind, so that the next does not run out of memory too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gain() -> float:
    """How many times as fast as float32 this CPU multiplies matrices of a small model in bfloat16."""
    import torch

    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    with torch.inference_mode():
        pairs = {
            kind: (torch.ones(512, 1024, dtype=kind), torch.ones(1024, 1024, dtype=kind)) for kind in best
        }
        for _ in range(8):  # alternating, and the fastest of each: another process slows down both alike
            for kind, (rows, weight) in pairs.items():
                start = time.perf_counter()
                torch.nn.functional.linear(rows, weight)
                best[kind] = min(best[kind], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]
