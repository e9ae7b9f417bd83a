"""What a pipeline says of itself and of its scores, for a person."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmevo.runner.rungs import Rungs
from llmevo.trial import Trial

TRUNCATED = 0.05  # of a task's answers; above it a note says so
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def lines(facts: Mapping[str, Any], rungs: Rungs | None) -> list[str]:
    """A line each on the rungs, the memory, the packing and the like, as far as the pipeline says something.

    Args:
        facts: From `Pipeline.describe`.
        rungs: From `Rungs.of`.
    """
    makers = (_memory, _rounded, _nf4, _prefix, _packed)
    found = [_rungs(facts, rungs), *(make(facts) for make in makers)]
    return [line for line in found if line]


def _rungs(facts: Mapping[str, Any], rungs: Rungs | None) -> str:
    """The rungs, or why there are none."""
    if rungs is not None:
        return f"rungs: {rungs.describe()}"
    if "train" in facts:
        why = facts["train"].get("undivided") or ("the batches are small" if facts.get("shares") else "")
        return f"rungs: none, every training is a whole{': ' if why else ''}{why}"
    items = sum(facts["rungs"][-1].values()) if facts.get("rungs") else 0
    return f"rungs: none, every trial answers all {items} items" if items else ""


def _memory(facts: Mapping[str, Any]) -> str:
    """The plan of `Merger.memory`: what is held where, and how much of it there is."""
    plan = facts.get("memory")
    if not plan:
        return ""
    models = list(plan["models"].values())
    adapters = [model["bytes"] for model in models if model["form"] == "factors"]
    whole = [model for model in models if model["form"] != "factors"]
    held = [model["bytes"] for model in whole if model["where"] == plan["device"]]
    host = [model["bytes"] for model in whole if model["where"] == "host"]
    read = sum(model["where"] == "file" for model in whole)
    parts = [f"{_count(held, 'model')} held ({size(sum(held))})"] if held else []
    parts += [f"{_count(host, 'model')} in main memory ({size(sum(host))})"] if host else []
    parts += [f"{read} read from their files for each merge"] if read else []
    parts += [f"{_count(adapters, 'adapter')} as factors ({size(sum(adapters))})"] if adapters else []
    parts += [f"ranks for DELLA {size(plan['ranks'])}"] if plan["ranks"] else []
    parts += [f"staging {size(plan['staging'])}"] if plan["staging"] else []
    parts.append(f"the merged model {size(plan['merged'])}")
    room = "" if plan["available"] is None else f", {size(plan['available'])} free"
    return f"memory: {plan['mode']} on {plan['device']}, {', '.join(parts)}{room}"


def _rounded(facts: Mapping[str, Any]) -> str:
    """Whether models lose digits before anything is merged or trained."""
    plan = facts.get("memory") or {}
    kinds = [
        f"{count} model{'s' if count > 1 else ''} with tensors in {dtype}"
        for dtype, count in plan.get("rounded", {}).items()
    ]
    return f"rounded: {', '.join(kinds)}, as `genome.dtype` is {plan['dtype']}" if kinds else ""


def _count(things: list[int], name: str) -> str:
    return f"{len(things)} {name}{'s' if len(things) != 1 else ''}"


def _nf4(facts: Mapping[str, Any]) -> str:
    """What QLoRA's base takes beside the resident one, and where its optimizer is."""
    plan = facts.get("train", {}).get("nf4")
    if not plan:
        return ""
    paged = "" if plan["paged"] else "; 8-bit AdamW is not paged without a GPU, its state stays in memory"
    return f"qlora: {size(plan['bytes'])} of 4-bit weights beside the resident ones during a trial{paged}"


def _prefix(facts: Mapping[str, Any]) -> str:
    """Of what the layers below the adapters are computed once, and what holding that takes."""
    plan = facts.get("train", {}).get("prefix")
    if not plan:
        return ""
    when = "" if plan["training"] else ", not in a training, where the model has dropout"
    held = f"{plan['tokens']} tokens of the examples ({size(plan['bytes'])} at most)"
    return f"prefix: the layers below all adapters are computed once for {held}{when}"


def _packed(facts: Mapping[str, Any]) -> str:
    """How many requests share what they have in common, and what that saves."""
    packed = facts.get("packed")
    if not packed:
        return ""
    count, plain = packed["requests"]["packed"], packed["requests"]["plain"]
    if not count + plain:
        return ""
    asked, computed = packed["tokens"]["asked"], packed["tokens"]["computed"]
    saved = f", {computed} tokens computed for {asked}" if count else ""
    why = f"; the others one by one: {packed['why_not']}" if packed["why_not"] and plain else ""
    return f"packed: {count} of {count + plain} requests{saved}{why}"


def size(count: int) -> str:
    """Bytes for a person: `512 B`, `269 MiB`, `1.5 GiB`."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def tokens(trials: Sequence[Trial]) -> int:
    """How many tokens trials were trained on, those that failed included."""
    return sum(int(trial.cost.get("tokens", 0)) for trial in trials)


def affordable(trials: Sequence[Trial], references: int, budget: int) -> int | None:
    """How many more trials it takes until a budget of tokens is spent, by the mean of those before.

    A function of the trials alone, so that a resumed run asks for the same batches. Where all candidates take
    as many tokens as each other, the last one crosses the budget by less than itself.

    Args:
        trials: The whole run, by number.
        references: How many of the first trials no proposer made; they count where no other was trained.
        budget: In tokens, not yet spent.

    Returns:
        At least 1; None where nothing was trained yet.
    """
    own = trials[references:]
    for group in (own, trials[:references]):
        trained = [count for trial in group if (count := tokens([trial]))]
        if trained:
            return max(math.ceil((budget - tokens(own)) * len(trained) / sum(trained)), 1)
    return None


def truncated(metrics: object) -> dict[str, float]:
    """For each task that generates, the share of a trial's answers that were cut off."""
    if not isinstance(metrics, dict):
        return {}
    return {
        task: max(shares)
        for task, by_name in metrics.items()
        if (shares := [value for name, value in by_name.items() if name.startswith("truncated,")])
    }
