"""Where the resident model lives, and in which precision."""

from __future__ import annotations

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

    `auto` is bfloat16 where the hardware multiplies it (CUDA from Ampere on; CPUs with AVX512-BF16 or AMX,
    where it is about three times as fast as float32), else float32. One precision serves a whole run:
    bfloat16 moves log-probabilities by up to 0.1, which flips near-ties.
    """
    import torch

    if spec.dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[spec.dtype]
    if on.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif on.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("amx_tile"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32
