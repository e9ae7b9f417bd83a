"""Every method's recipes are merged: with layer groups, filters and gradients, into finite weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmevo import genome, recipe
from llmevo.recipe import methods as recipe_methods

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def merger(tiny_llamas: Any) -> Any:
    from llmevo.merge import Merger

    return Merger(_genome(tiny_llamas, {}).genome, device="cpu", dtype="bfloat16")


def _genome(llamas: Any, spec: dict[str, Any]) -> genome.Genome:
    spec = {"models": [str(p) for p in llamas.parents], "base_model": str(llamas.base)} | spec
    return genome.Genome.model_validate({"genome": spec, "tasks": ["one"]})


@pytest.mark.parametrize("method", recipe_methods.names())
def test_every_method_merges(method: str, tiny_llamas: Any, merger: Any) -> None:
    spec: dict[str, Any] = {"merge_method": method}
    if method in ("nearswap", "arcee_fusion"):
        spec["models"] = [str(tiny_llamas.parents[0])]
    if method in ("slerp", "nuslerp"):
        spec["models"] = [str(path) for path in tiny_llamas.parents[:2]]
    if method in ("karcher", "ram", "arcee_fusion"):
        spec["merge_method"] = [method, "task_arithmetic"]
    rng = np.random.default_rng(0)
    shapes: list[dict[str, Any]] = [{}, {"layer_granularity": 2, "filters": ["mlp"]}]
    shapes.append({"layer_granularity": 1, "filters": ["mlp"], "smooth": True})
    for shape in shapes:
        loaded = _genome(tiny_llamas, spec | shape)
        made = recipe.Recipes(loaded, recipe.num_layers(loaded, offline=True))
        chosen = {"merge_method": method} if "merge_method" in made.space.genes else {}
        merger.merge(made.recipe(made.space.validate(made.space.sample(rng) | chosen)), seed=1)
        assert all(parameter.isfinite().all() for parameter in merger.model.parameters())


def test_every_reference_merges(tiny_llamas: Any, merger: Any) -> None:
    made = recipe.Recipes(_genome(tiny_llamas, {"merge_method": "sce"}), 4)
    for reference in made.references():
        merger.merge(reference.recipe, seed=1)
        assert all(parameter.isfinite().all() for parameter in merger.model.parameters())


def test_a_slerp_of_many_models_merges_a_pair_for_each_layer_group(tiny_llamas: Any, merger: Any) -> None:
    loaded = _genome(tiny_llamas, {"merge_method": "slerp", "layer_granularity": 2})
    made = recipe.Recipes(loaded, 4)
    written = made.recipe(made.space.sample(np.random.default_rng(1)))
    pairs = [[source["model"] for source in part["sources"]] for part in written["slices"]]
    assert pairs[0] != pairs[1]
    merger.merge(written, seed=0)
    assert all(parameter.isfinite().all() for parameter in merger.model.parameters())
