"""Points of a space as a language model sees them: integer levels, native small ints, strings, null.

A number becomes an integer level 0..100 on its warped axis (logarithmic where the gene is), rounded. Whole
numbers of at most four digits and grids of at most 100 values stay native, since `rank = 16` means something
to a model. Categories are strings, genes whose condition does not hold are null. EvoLLM (https://arxiv.org/abs/2402.18381),
OPRO and LLM-Evo-Merge all show integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from llmevo.space import Categorical, Float, Gene, Int, Params, Space, Value

LEVELS = 100
_NATIVE_INT = 9999
_LONGEST_NAME = 48
_LONGEST_LABEL = 60
_LONGEST_WHY = 160

Encoded: TypeAlias = dict[str, int | float | str | None]


def is_native(gene: Gene) -> bool:
    """Whether a numeric gene is shown by its value instead of a level."""
    if isinstance(gene, Int):
        return max(abs(gene.low), abs(gene.high)) <= _NATIVE_INT
    return isinstance(gene, Float) and gene.count is not None and gene.count <= LEVELS


def names(space: Space) -> dict[str, str]:
    """What each gene is called in prompts and replies: its own name, or `g<index>` if that is unwieldy.

    The names are distinct.
    """
    shown: dict[str, str] = {}
    for index, name in enumerate(space):
        plain = len(name) <= _LONGEST_NAME and name.isascii() and name.isprintable()
        shown[name] = name if plain else f"g{index}"
    if len(set(shown.values())) < len(shown):  # a gene is itself called g3, say
        shown = {name: f"g{index}" for index, name in enumerate(space)}
    return shown


def labels(gene: Categorical) -> list[str]:
    """One distinct string for each choice, in order."""
    plain = [choice if isinstance(choice, str) else json.dumps(choice) for choice in gene.choices]
    if len(set(plain)) < len(plain):
        plain = [json.dumps(choice) for choice in gene.choices]
    return [f"{i}:{text[:40]}" if len(text) > _LONGEST_LABEL else text for i, text in enumerate(plain)]


def encode_value(gene: Gene, value: Value) -> int | float | str | None:
    """What the model sees of one value; None stays None."""
    if isinstance(gene, Categorical):
        # None may be a choice of its own, and then has a label.
        return labels(gene)[gene.index(value)] if value is not None or None in gene.choices else None
    if value is None:
        return None
    if is_native(gene):
        assert isinstance(value, (int, float))
        return value
    return round(LEVELS * gene.to_unit(value))  # type: ignore[arg-type]


def encode(space: Space, params: Mapping[str, Value]) -> Encoded:
    """A point under the shown names."""
    shown = names(space)
    return {
        shown[name]: encode_value(gene, params[name]) if space.is_active(name, params) else None
        for name, gene in space.genes.items()
    }


def level_key(space: Space, params: Mapping[str, Value]) -> str:
    """Equal for points that a model cannot tell apart: a copy of a shown point has its key."""
    return json.dumps(list(encode(space, params).values()))


def text(encoded: Encoded) -> str:
    """Compact JSON, the form in which points are shown and asked for."""
    return json.dumps(encoded, separators=(",", ":"))


def domain(gene: Gene) -> str:
    """The allowed values of a gene, in words for the parameter table."""
    if isinstance(gene, Categorical):
        return "one of " + ", ".join(json.dumps(label) for label in labels(gene))
    if is_native(gene):
        kind = "whole number" if isinstance(gene, Int) else "number"
        step = f" in steps of {gene.step:g}" if gene.step not in (None, 1) else ""
        return f"{kind} from {gene.low:g} to {gene.high:g}{step}"
    axis = "logarithmic" if gene.log else "linear"
    marks = ", ".join(f"{level} is {gene.from_unit(level / LEVELS):.3g}" for level in (0, 50, 100))
    return f"level from 0 to 100 on a {axis} axis: {marks}"


def _value_schema(gene: Gene) -> dict[str, Any]:
    if isinstance(gene, Categorical):
        return {"type": "string", "enum": labels(gene)}
    if not is_native(gene):
        return {"type": "integer", "minimum": 0, "maximum": LEVELS}
    kind = "integer" if isinstance(gene, Int) else "number"
    return {"type": kind, "minimum": gene.low, "maximum": gene.high}


def schema(space: Space, n: int, *, why: bool) -> dict[str, Any]:
    """JSON schema of a reply with `n` genomes: all keys required, nothing else allowed.

    Args:
        space: What the genomes are points of.
        n: Number of proposals.
        why: Whether each comes with a reason; it stands after the genome, so that a reply that is cut off
            loses prose and no numbers.
    """
    shown = names(space)
    genome: dict[str, Any] = {}
    for name, gene in space.genes.items():
        value = _value_schema(gene)
        if name in space.conditions:
            value["type"] = [value["type"], "null"]
            if "enum" in value:
                value["enum"] = [*value["enum"], None]
        genome[shown[name]] = value
    proposal: dict[str, Any] = {"genome": _closed(genome)}
    if why:
        proposal["why"] = {"type": "string", "maxLength": _LONGEST_WHY}
    proposals = {"type": "array", "items": _closed(proposal), "minItems": n, "maxItems": n}
    return _closed({"proposals": proposals})


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def start_params(space: Space, parent: Params | None) -> Params:
    """Where missing values come from: `parent`, or the space's start."""
    return space.start() if parent is None else dict(parent)
