"""What a merge will hold in memory, from the headers of the models' files, before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from llmevo.errors import GenomeError
from llmevo.merge import adapters, headers
from llmevo.merge.references import Located
from llmevo.merge.streamed_engine import AREAS, BLOCK

if TYPE_CHECKING:
    import torch

# What is left to the evaluation, its activations and everything else on the machine.
_SHARE = 0.8


def plan(
    located: Mapping[str, Located],
    *,
    dtype: torch.dtype,
    resident_dtype: torch.dtype,
    device: torch.device,
    memory: Literal["auto", "resident", "streamed"],
    factors: Collection[str] = (),
    ranked: Collection[str] = (),
) -> dict[str, Any]:
    """Decide where the models' weights will lie.

    Args:
        located: The models; the first one's sizes are those of the merged model.
        dtype: Of the models in memory.
        resident_dtype: Of the merged model.
        device: Where merges are computed.
        memory: `resident`: all in the device's memory. `streamed`: on a CPU, read from their files, which are
            mapped, for each merge; on a GPU, copied from main memory (pinned) block by block, or from the
            files where main memory has no room either. `auto`: resident where there is room.
        factors: Names of the adapters that stay factors. Their base is held too, whether or not it is one of
            the models.
        ranked: Models whose differences' ranks are held too, a byte an element: those that DELLA masks.

    Returns:
        Plain data: `mode`, `device`, `models` (by name, `bytes`, `where`, which is a device, `host` or
        `file`, and `form`: `weights`, `changed` for the tensors that an adapter changes, `factors`),
        `merged` (the merged model's bytes), `staging` (what blocks are copied to), `ranks`, `needed` and
        `available` (bytes of the device; None where the system does not say).

    Raises:
        GenomeError: If all of it must be resident and does not fit, or not even the merged model does.
    """
    first = next(iter(located.values()))
    forms = {
        name: "factors" if name in factors else "weights" if where.adapter is None else "changed"
        for name, where in located.items()
    }
    located = bases(located, factors)
    sizes = {
        name: adapters.count_bytes(where) if name in factors else _bytes(where, dtype)
        for name, where in located.items()
    }
    merged = _bytes(Located(first.name, first.folder, None), resident_dtype)
    ranks = sum(sizes[name] for name in ranked) // dtype.itemsize
    free = available(device)
    needed = sum(sizes.values()) + merged + ranks
    fits = free is None or needed <= _SHARE * free
    if memory == "resident" and not fits:
        raise GenomeError(
            f"`merge.memory` is resident, but the models and the merged model need {needed / 1e9:.1f} GB and "
            f"{_SHARE * (free or 0) / 1e9:.1f} GB are free: set it to auto or streamed, or take fewer models"
        )
    streams = memory == "streamed" or not fits
    places = dict.fromkeys(located, str(device))
    if streams:
        places |= _elsewhere({n: w for n, w in located.items() if n not in factors}, sizes, dtype, device)
    copies = streams and device.type != "cpu"
    staging = AREAS * len(located) * BLOCK * dtype.itemsize if copies else 0
    if streams:
        near = sum(size for name, size in sizes.items() if places[name] == str(device))
        needed = near + merged + staging + (0 if copies else ranks)
    if copies and free is not None and needed > _SHARE * free:
        raise GenomeError(
            f"`evaluate.device`: the merged model and what is copied to it block by block need "
            f"{needed / 1e9:.1f} GB on {device}, and {_SHARE * free / 1e9:.1f} GB are free: take a larger "
            "one, or the CPU"
        )
    return {
        "mode": "streamed" if streams else "resident",
        "device": str(device),
        "models": {
            name: {"bytes": sizes[name], "where": places[name], "form": forms.get(name, "weights")}
            for name in located
        },
        "merged": merged,
        "staging": staging,
        "ranks": ranks,
        "needed": needed,
        "available": free,
    }


def _elsewhere(
    located: Mapping[str, Located], sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device
) -> dict[str, str]:
    """Return where models lie that are not in the device's memory: in their files, or main memory."""
    import torch

    in_files = {name: "file" for name, where in located.items() if can_stream(where, dtype)}
    if device.type == "cpu":
        return in_files
    free = available(torch.device("cpu"))
    if free is None or sum(sizes[name] for name in located) <= _SHARE * free:
        return dict.fromkeys(located, "host")
    return dict.fromkeys(located, "host") | in_files


def can_stream(located: Located, dtype: torch.dtype) -> bool:
    """Whether a model's file holds what is merged: no adapter to apply, nothing to cast."""
    return located.adapter is None and headers.stored_in(located, dtype)


def bases(located: Mapping[str, Located], factors: Collection[str]) -> dict[str, Located]:
    """Return the models, and before them the bases of adapters that stay factors, if they are no models."""
    there = {where.folder for where in located.values() if where.adapter is None}
    missing = {located[name].folder for name in factors} - there
    return {str(folder): Located(str(folder), folder, None) for folder in sorted(missing)} | dict(located)


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
