"""mergekit-evolve as the oracle: the same array gives the same recipe, but for its defects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo import genome, recipe
from llmevo.errors import GenomeError, StageError
from llmevo.recipe import methods as recipe_methods
from llmevo.recipe.methods import EVOLVE

LAYERS = 6


def recipes(**spec: Any) -> recipe.Recipes:
    spec = {"models": ["org/german", "org/finnish"], "base_model": "org/base"} | spec
    return recipe.Recipes(genome.Genome.model_validate({"genome": spec, "tasks": ["one"]}), LAYERS)


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a small Llama, which mergekit-evolve insists on."""
    folder = tmp_path_factory.mktemp("llama")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shapes() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "layer_granularity": st.sampled_from([0, 2, 3]),
            "filters": st.sampled_from([None, ["mlp"], ["self_attn", "norm"]]),
            "smooth": st.booleans(),
        }
    )


def canonical(written: dict[str, Any], method: str) -> dict[str, Any]:
    """As mergekit reads it, without the parameters that the method does not have."""
    from mergekit.config import MergeConfiguration

    data = MergeConfiguration.model_validate(written).model_dump(mode="json", exclude_none=True)
    top = {
        name: value
        for name, value in data.pop("parameters", {}).items()
        if name in recipe_methods.find(method).parameters
    }
    return data | {"parameters": top}


@pytest.mark.parametrize("method", sorted(set(EVOLVE) - {"slerp"}))
@settings(max_examples=25, deadline=None)
@given(
    shape=shapes(),
    models=st.integers(1, 3),
    negative=st.booleans(),
    normalize=st.sampled_from([None, True, False]),
    flat=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_same_array_gives_the_recipe_of_mergekit_evolve(
    method: str,
    shape: dict[str, Any],
    models: int,
    negative: bool,
    normalize: bool | None,
    flat: bool,
    seed: int,
    config_folder: Path,
) -> None:
    from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

    spec = {
        "models": [str(config_folder), "org/finnish", "org/other"][:models],
        "merge_method": method,
        # linear with a base_model is theirs to crash on; see docs/mergekit-evolve.md
        "base_model": None if method == "linear" else "org/base",
        "tokenizer_source": "org/finnish",
        "allow_negative_weights": negative,
        "normalize": normalize,
        **shape,
    }
    theirs = ModelGenome(ModelGenomeDefinition.model_validate(spec))
    array = np.random.default_rng(seed).normal(0.5, 1.0, theirs.initial_genotype().shape)
    if flat:
        array = array.reshape(-1)
    expected = theirs.genotype_merge_config(array).model_dump(mode="json", exclude_none=True)
    ours = recipes(**spec)
    try:
        written = ours.from_genotype(array)
    except StageError as error:
        assert negative
        assert error.stage == "merge"  # noqa: PT017
        return
    assert canonical(written, method) == canonical(expected, method)


@settings(max_examples=25, deadline=None)
@given(models=st.integers(2, 4), step=st.sampled_from([0, 2, 3]), seed=st.integers(0, 2**32 - 1))
def test_slerp_of_an_array_is_that_of_mergekit_evolve(
    models: int, step: int, seed: int, config_folder: Path
) -> None:
    from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

    spec = {
        "models": [str(config_folder), "b", "c", "d"][:models],
        "merge_method": "slerp",
        "base_model": None,
        "layer_granularity": step,
    }
    theirs = ModelGenome(ModelGenomeDefinition.model_validate(spec))
    array = np.random.default_rng(seed).normal(0.5, 1.0, theirs.initial_genotype().shape)
    expected = canonical(
        theirs.genotype_merge_config(array).model_dump(mode="json", exclude_none=True), "slerp"
    )
    written = canonical(recipes(**spec).from_genotype(array), "slerp")
    for mine, other in zip(written["slices"], expected["slices"], strict=True):
        assert mine["parameters"]["t"] == pytest.approx(other["parameters"]["t"], abs=1e-12)
        assert mine | {"parameters": {}} == other | {"parameters": {}}
        assert other["parameters"]["t"] <= 0.5  # the reason why our own slerp has the position as its gene


def test_an_array_of_another_shape_or_method_is_refused() -> None:
    with pytest.raises(GenomeError, match=r"shape \(1, 2, 1, 1\)"):
        recipes().from_genotype(np.zeros(3))
    with pytest.raises(GenomeError, match="array of mergekit-evolve"):
        recipes(merge_method="della").from_genotype(np.zeros(4))


@pytest.mark.parametrize("method", ["linear", "multislerp"])
def test_weights_that_sum_to_nothing_make_mergekit_write_nan(method: str) -> None:
    """Why such a recipe is refused before the merge."""
    import torch
    from mergekit.merge_methods import merge_tensors

    with torch.no_grad():
        merged = merge_tensors([torch.ones(4), torch.arange(4.0)], method, parameters={"weight": [1.0, -1.0]})
    assert not torch.isfinite(merged).all()
    with pytest.raises(StageError):
        recipes(merge_method=method, allow_negative_weights=True, base_model=None).recipe(
            {"german.weight": 1.0, "finnish.weight": -1.0}
        )


def test_a_base_model_that_linear_ignores_is_left_out() -> None:
    """mergekit-evolve adds the base without a weight, which mergekit then misses."""
    made = recipes(merge_method="linear")
    for source in made.recipe(made.space.start())["slices"][0]["sources"]:
        assert source["model"] != "org/base"
