"""Scripted language models, which answer in the wire format of the real ones.

So the proposer's prompt, schema, decoder and bookkeeping are part of what is measured. What a script would
like to say is a point of the space; how it is said follows from the request's schema: a key that is a gene's
shown name gets the gene's encoded value, wherever in the schema it stands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from spaces import Problem

from llmevo.llm import Reply, Request
from llmevo.llm.encode import encode
from llmevo.space import Categorical, Params

GOOD_NOISE = 0.05  # standard deviation of a good guest's numbers, of a gene's axis
FAIR_NOISE = 0.15
GOOD_CHOICE = 0.9  # how often its choices are right
FAIR_CHOICE = 0.6


class ScriptedChat:
    """A chat client that answers with the points of `draw`, a function of the request's seed."""

    small = True  # no reasons are asked for

    def __init__(self, problem: Problem, draw: Callable[[np.random.Generator], Params]) -> None:
        self.problem = problem
        self.draw = draw
        self.calls = 0

    def complete(self, request: Request) -> Reply:
        """Answer in form, whatever is asked for."""
        assert request.schema is not None
        self.calls += 1
        rng = np.random.default_rng(request.seed)
        return Reply(json.dumps(self._fill(request.schema, rng, {})), mode="json_schema", model="scripted")

    def _fill(self, node: Mapping[str, Any], rng: np.random.Generator, point: Mapping[str, Any]) -> Any:
        if "enum" in node:
            return node["enum"][int(rng.integers(len(node["enum"])))]
        kind = node["type"][0] if isinstance(node["type"], list) else node["type"]
        if kind == "array":
            return [self._fill(node["items"], rng, {}) for _ in range(int(node["minItems"]))]
        if kind == "object":
            # Below an object whose keys are genes, one point is spelled out.
            fresh = encode(self.problem.space, self.draw(rng))
            genes = fresh if any(key in fresh for key in node["properties"]) else point
            return {
                key: genes[key] if key in genes else self._fill(part, rng, genes)
                for key, part in node["properties"].items()
            }
        return {"string": "as told", "integer": 50, "number": 0.5, "boolean": True}.get(kind)


def random_json(problem: Problem) -> ScriptedChat:
    """The worst model that still answers in form: uniform points."""
    return ScriptedChat(problem, problem.space.sample)


def guesser(problem: Problem, noise: float, right: float) -> ScriptedChat:
    """A model that knows about where the optimum is.

    Args:
        problem: What it knows the optimum of.
        noise: Standard deviation of each number, in the unit cube; clipped at the bounds.
        right: Probability that an unordered choice is the best one; else it is drawn uniformly.
    """
    space = problem.space
    goal = space.to_unit(problem.optimum)

    def draw(rng: np.random.Generator) -> Params:
        unit = goal + rng.normal(0.0, noise, len(space))
        for index, gene in enumerate(space.genes.values()):
            if isinstance(gene, Categorical) and not gene.ordered:
                unit[index] = goal[index] if rng.random() < right else rng.random()
        return space.from_unit(np.clip(unit, 0.0, 1.0))

    return ScriptedChat(problem, draw)
