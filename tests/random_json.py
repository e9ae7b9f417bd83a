"""A chat client that knows nothing: random JSON that fulfils the schema, by the request's seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmevo.llm import Reply, Request


class RandomJSON:
    """The worst model that still answers in form: the control for anything that asks a model.

    Args:
        faults: Share of the answers that are prose instead.
    """

    def __init__(self, faults: float = 0.0) -> None:
        self.faults = faults

    def complete(self, request: Request) -> Reply:
        assert request.schema is not None
        rng = np.random.default_rng(request.seed)
        prose = rng.random() < self.faults
        return Reply(
            "I would rather not." if prose else json.dumps(_value(request.schema, rng)), mode="grammar"
        )


def _value(node: Mapping[str, Any], rng: np.random.Generator) -> Any:
    if "enum" in node:
        return node["enum"][int(rng.integers(len(node["enum"])))]
    kinds = node["type"] if isinstance(node["type"], list) else [node["type"]]
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "object":
        return {key: _value(part, rng) for key, part in node["properties"].items()}
    if kind == "array":
        return [_value(node["items"], rng) for _ in range(node["minItems"])]
    if kind == "integer":
        return int(rng.integers(node["minimum"], node["maximum"], endpoint=True))
    if kind == "number":
        return float(rng.uniform(node["minimum"], node["maximum"]))
    return None if kind == "null" else "because"
