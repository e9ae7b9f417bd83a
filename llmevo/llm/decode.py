"""From a reply's text to points of a space; every repair is counted, nothing is executed.

What is expected is `{"proposals":[{"genome":{...}}, ...]}`. Fences, prose and thinking around it are
passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from llmevo.llm.encode import LEVELS, is_native, labels, names, start_params
from llmevo.space import Categorical, Float, Gene, Int, Params, Space, Value

_LONGEST_REPLY = 1_000_000  # characters
_STARTS = 200  # places where an object may begin
_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.S)
COUNTS = ("unknown", "missing", "clipped", "wrong_type", "rejected")


@final
@dataclass(frozen=True, slots=True)
class Decoded:
    """The points in a reply, and what had to be done to get them.

    Args:
        points: Valid params, in the reply's order.
        counts: Unknown keys dropped, missing values and values of a wrong type inherited from the best point,
            values clipped, and genomes rejected for want of any known key.
        problem: Why there is no point, in one word; None if there is one.
    """

    points: list[Params] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    problem: str | None = None


def decode(space: Space, text: str, parent: Params | None = None) -> Decoded:
    """Read the proposals out of a reply.

    Args:
        space: What they must be points of.
        text: The reply.
        parent: Where missing values come from; the space's start if None.
    """
    if len(text) > _LONGEST_REPLY:
        return Decoded(problem="too_long")
    found = _proposals(_THINKING.sub("", text))
    if found is None:
        return Decoded(problem="no_json")
    counts = dict.fromkeys(COUNTS, 0)
    points = []
    for item in found:
        genome = item.get("genome", item) if isinstance(item, dict) else None
        point = _point(space, genome, parent, counts) if isinstance(genome, dict) else None
        if point is None:
            counts["rejected"] += 1
        else:
            points.append(point)
    return Decoded(points, counts, None if points else "no_genome")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)


def _proposals(text: str) -> list[Any] | None:
    """The list of proposals in the first JSON that has one."""
    for value in _values(text):
        if isinstance(value, dict):
            inner = value.get("proposals")
            if isinstance(inner, list):
                return inner
            if isinstance(value.get("genome"), dict):
                return [value]
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            return value
    return None


def _values(text: str) -> Iterator[Any]:
    """Every JSON object or array in `text`, from the first on, skipping what is none."""
    position = 0
    for _ in range(_STARTS):
        match = re.compile(r"[\[{]").search(text, position)
        if match is None:
            return
        try:
            value, position = _JSON.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            position = match.start() + 1
        else:
            yield value


def _point(
    space: Space, genome: Mapping[str, Any], parent: Params | None, counts: dict[str, int]
) -> Params | None:
    """Valid params from one genome, or None if it has no known key."""
    shown = names(space)
    if not any(key in genome for key in shown.values()):
        return None
    counts["unknown"] += len(set(genome) - set(shown.values()))
    inherited = start_params(space, parent)
    params: Params = {}
    for name, gene in space.genes.items():
        if not space.is_active(name, params):
            params[name] = None
            continue
        spare = inherited.get(name) if space.is_active(name, inherited) else gene.start
        key = shown[name]
        if genome.get(key) is None and not (isinstance(gene, Categorical) and None in gene.choices):
            counts["missing"] += 1
            params[name] = spare
            continue
        value, remark = _value(gene, genome.get(key))
        if remark is not None:
            counts[remark] += 1
        params[name] = spare if remark == "wrong_type" else value
    return space.validate(params)


def _value(gene: Gene, raw: Any) -> tuple[Value, str | None]:
    """The gene's value for what the model wrote, and `clipped` or `wrong_type` if it had to be changed."""
    if isinstance(gene, Categorical):
        return _choice(gene, raw)
    number = _number(raw)
    if number is None:
        return None, "wrong_type"
    if not is_native(gene):
        level = min(max(number, 0.0), float(LEVELS))
        return gene.from_unit(level / LEVELS), None if level == number else "clipped"
    inside = min(max(number, gene.low), gene.high)
    return _on_grid(gene, inside), None if inside == number else "clipped"


def _on_grid(gene: Float | Int, number: float) -> Value:
    """The value of the gene's grid that is nearest to a number within its bounds."""
    step = 1 if gene.step is None else gene.step
    nearest = gene.low + round((number - gene.low) / step) * step
    return round(nearest) if isinstance(gene, Int) else gene.validate(min(nearest, gene.high), "value")


def _number(raw: Any) -> float | None:
    """A finite number, also from a string of digits."""
    if isinstance(raw, str) and len(raw) <= 40:
        try:
            raw = float(raw)
        except ValueError:
            return None
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return None
    try:
        number = float(raw)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _choice(gene: Categorical, raw: Any) -> tuple[Value, str | None]:
    written = labels(gene)
    candidates = [raw] if isinstance(raw, str) else []
    if raw is None or isinstance(raw, (bool, int, float)):
        candidates.append(json.dumps(raw))
    for candidate in candidates:
        if candidate in written:
            return gene.choices[written.index(candidate)], None
    for candidate in candidates:
        folded = [label.strip().casefold() for label in written]
        if folded.count(candidate.strip().casefold()) == 1:
            return gene.choices[folded.index(candidate.strip().casefold())], None
    return None, "wrong_type"
