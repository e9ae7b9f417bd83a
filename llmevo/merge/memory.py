"""What a merge will hold in memory, from the headers of the models' files, before anything is loaded."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
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
        memory: `resident`: in the device's memory. `streamed`: on a CPU, read from mapped files a merge;
            on a GPU, copied block by block from pinned memory, or from files. `auto`: resident if it fits.
        factors: Names of the adapters that stay factors; their base is held too, in any case.
        ranked: Models whose differences' ranks are held too, a byte an element: those that DELLA masks.

    Returns:
        Plain data: `mode`, `device`, `models` (by name, `bytes`, `where`: a device, `host` or `file`, and
        `form`: `weights`, `changed` for the tensors that an adapter changes, `factors`), the bytes `merged`,
        `staging` (where blocks are copied to), `ranks`, `needed` and `available` (None where unknown), the
        `dtype`, and of models that are stored in others and lose digits to it how many are `rounded`, by
        theirs.

    Raises:
        GenomeError: If all of it must be resident and does not fit, or not even the merged model does.
    """
    merged = _bytes(replace(next(iter(located.values())), adapter=None), resident_dtype)
    models = _models(located, factors, dtype, device)
    ranks = sum(models[name]["bytes"] for name in ranked) // dtype.itemsize
    free, staging = available(device), 0
    needed = sum(model["bytes"] for model in models.values()) + merged + ranks
    streams = memory == "streamed" or not _fits(needed, free, must=memory == "resident")
    if streams:
        near = merged + _move(models, bases(located, factors), dtype, device)
        staging = 0 if device.type == "cpu" else _staging(near, len(models), dtype, device, free)
        needed = near + staging + (ranks if device.type == "cpu" else 0)
    return {
        "mode": "streamed" if streams else "resident",
        "device": str(device),
        "models": models,
        "merged": merged,
        "staging": staging,
        "ranks": ranks,
        "needed": needed,
        "available": free,
        "dtype": str(dtype).removeprefix("torch."),
        "rounded": _rounded(located.values(), dtype),
    }


def _rounded(located: Iterable[Located], dtype: torch.dtype) -> dict[str, int]:
    """How many models have tensors of another dtype that has digits or a range which `dtype` lacks."""
    found: Counter[str] = Counter()
    for where in {where.folder: where for where in located}.values():
        others = headers.dtypes(where) - {None, str(dtype).removeprefix("torch.")}
        found.update(name for name in others if name and dtype.itemsize < 4)
    return dict(sorted(found.items()))


def _models(
    located: Mapping[str, Located], factors: Collection[str], dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return the entry of each model, all of them in the device's memory."""
    forms = {name: "weights" if where.adapter is None else "changed" for name, where in located.items()}
    forms |= dict.fromkeys(factors, "factors")
    return {
        name: {
            "bytes": adapters.count_bytes(where) if name in factors else _bytes(where, dtype),
            "where": str(device),
            "form": forms.get(name, "weights"),
        }
        for name, where in bases(located, factors).items()
    }


def _fits(needed: int, free: int | None, must: bool) -> bool:
    """Return whether so many bytes may be resident; raise GenomeError if they `must` be and do not fit."""
    fits = free is None or needed <= _SHARE * free
    if must and not fits:
        raise GenomeError(
            f"`merge.memory` is resident, but the models and the merged model need {needed / 1e9:.1f} GB and "
            f"{_SHARE * (free or 0) / 1e9:.1f} GB are free: set it to auto or streamed, or take fewer models"
        )
    return fits


def _staging(near: int, models: int, dtype: torch.dtype, device: torch.device, free: int | None) -> int:
    """Return the bytes that blocks of models are copied to; raise GenomeError if they do not fit."""
    staging = AREAS * models * BLOCK * dtype.itemsize
    if free is not None and near + staging > _SHARE * free:
        raise GenomeError(
            f"`evaluate.device`: the merged model and what is copied to it block by block need "
            f"{(near + staging) / 1e9:.1f} GB on {device}, and {_SHARE * free / 1e9:.1f} GB are free: take a "
            "larger one, or the CPU"
        )
    return staging


def _move(
    models: dict[str, dict[str, Any]],
    located: Mapping[str, Located],
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Say of models that leave the device's memory where they lie; return the bytes of those that stay."""
    import torch

    moved = {name: where for name, where in located.items() if models[name]["form"] != "factors"}
    places = {name: "file" for name, where in moved.items() if can_stream(where, dtype)}
    if device.type != "cpu":
        free = available(torch.device("cpu"))
        roomy = free is None or sum(models[name]["bytes"] for name in moved) <= _SHARE * free
        places = dict.fromkeys(moved, "host") | ({} if roomy else places)
    for name, place in places.items():
        models[name]["where"] = place
    stay: int = sum(model["bytes"] for model in models.values() if model["where"] == str(device))
    return stay


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
