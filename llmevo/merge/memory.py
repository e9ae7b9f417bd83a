"""What a merge will hold in memory, from the headers of the models' files, before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from llmevo.errors import GenomeError
from llmevo.merge import headers
from llmevo.merge.references import Located

if TYPE_CHECKING:
    import torch

# What is left to the evaluation, its activations and everything else on the machine.
_SHARE = 0.8
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def plan(
    located: Mapping[str, Located],
    *,
    dtype: torch.dtype,
    resident_dtype: torch.dtype,
    device: torch.device,
    memory: Literal["auto", "resident", "streamed"],
) -> dict[str, Any]:
    """Decide where the models' weights will lie.

    Args:
        located: The models; the first one's sizes are those of the merged model.
        dtype: Of the models in memory.
        resident_dtype: Of the merged model.
        device: Where merges are computed.
        memory: `resident`: all in the device's memory. `streamed`: read from their files, which are mapped,
            for each merge. `auto`: resident where there is room.

    Returns:
        Plain data: `mode`, `device`, `models` (bytes and `where` by name), `merged` (the merged model's),
        `needed` and `available` (bytes; None where the system does not say).

    Raises:
        GenomeError: If all of it must be resident and does not fit, or streaming is asked for on a GPU.
    """
    sizes = {name: _bytes(where, dtype) for name, where in located.items()}
    first = next(iter(located.values()))
    merged = _bytes(Located(first.name, first.folder, None), resident_dtype)
    free = available(device)
    needed = sum(sizes.values()) + merged
    fits = free is None or needed <= _SHARE * free
    if device.type != "cpu" and memory == "streamed":
        raise GenomeError("`merge.memory` is streamed, which a GPU cannot do: set it to auto or resident")
    if memory == "resident" and not fits:
        raise GenomeError(
            f"`merge.memory` is resident, but the models and the merged model need {needed / 1e9:.1f} GB and "
            f"{_SHARE * (free or 0) / 1e9:.1f} GB are free: set it to auto or streamed, or take fewer models"
        )
    streams = device.type == "cpu" and (memory == "streamed" or (memory == "auto" and not fits))
    models = {}
    for name, where in located.items():
        mapped = streams and can_stream(where, dtype)
        models[name] = {"bytes": sizes[name], "where": "file" if mapped else str(device)}
    held = sum(size for name, size in sizes.items() if models[name]["where"] != "file")
    return {
        "mode": "streamed" if streams else "resident",
        "device": str(device),
        "models": models,
        "merged": merged,
        "needed": held + merged,
        "available": free,
    }


def can_stream(located: Located, dtype: torch.dtype) -> bool:
    """Whether a model's file holds what is merged: no adapter to apply, nothing to cast."""
    if located.adapter is not None:
        return False
    stored = {t.dtype for t in headers.tensors(located.folder, "model", located.name).values()}
    return {_NAMES.get(name) for name in stored} == {str(dtype).removeprefix("torch.")}


def available(device: torch.device) -> int | None:
    """Return the free bytes of a device; None where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        import psutil  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        names = os.sysconf_names
        if "SC_AVPHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.virtual_memory().available)


def _bytes(located: Located, dtype: torch.dtype) -> int:
    """Return a model's bytes in `dtype`: with an adapter, of the tensors that it changes alone."""
    tensors = headers.tensors(located.folder, "model", located.name)
    names = set(tensors)
    if located.adapter is not None:
        adapter = headers.tensors(located.adapter, "adapter_model", located.name)
        modules = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in adapter}
        names = {name for name in tensors if name.rpartition(".")[0] in modules}
    return sum(math.prod(tensors[name].shape) for name in names) * dtype.itemsize
