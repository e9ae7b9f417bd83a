"""What a pipeline says of itself and of its scores, for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmevo.genome.sections import HalvingSpec

TRUNCATED = 0.05  # of a task's answers; above it a note says so
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def lines(facts: Mapping[str, Any], halving: HalvingSpec) -> list[str]:
    """A line each on the rungs, the memory plan and the packing, as far as the pipeline says something.

    Args:
        facts: From `Pipeline.describe`.
        halving: How rungs were asked for.
    """
    sizes = [sum(rung.values()) for rung in facts.get("rungs") or ()]
    found = [rungs_text(sizes, halving.eta)] if sizes else []
    for key in ("memory", "packed"):
        said = ", ".join(_pairs(facts.get(key) or {}))
        found += [f"{key}: {said}"] if said else []
    return found


def rungs_text(sizes: list[int], eta: int) -> str:
    """The rungs: `rungs: 60, 120, 240 of 480 items, after each of which one trial in 2 goes on`."""
    *few, whole = sizes
    if not few:
        return f"rungs: none, every trial answers all {whole} items"
    shown = ", ".join(map(str, few))
    return f"rungs: {shown} of {whole} items, after each of which one trial in {eta} goes on"


def _pairs(data: Any, path: str = "") -> Iterator[str]:
    """`name value` for every leaf that says something, names joined from the top."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _pairs(value, f"{path} {key}".strip().replace("_", " "))
    elif isinstance(data, (list, tuple)):
        if data:
            yield f"{path} {', '.join(map(str, data))}".strip()
    elif data is not None and data != "":
        yield f"{path} {_value(path, data)}".strip()


def _value(path: str, data: Any) -> str:
    """Bytes in a unit, shares in percent, everything else as it is."""
    if isinstance(data, bool):
        return "yes" if data else "no"
    if isinstance(data, int) and "bytes" in path:
        return size(data)
    return f"{data:.3g}" if isinstance(data, float) else str(data)


def size(count: int) -> str:
    """Bytes for a person: `512 B`, `269 MiB`, `1.5 GiB`."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def truncated(metrics: object) -> dict[str, float]:
    """For each task that generates, the share of a trial's answers that were cut off."""
    if not isinstance(metrics, dict):
        return {}
    return {
        task: max(shares)
        for task, by_name in metrics.items()
        if (shares := [value for name, value in by_name.items() if name.startswith("truncated,")])
    }
