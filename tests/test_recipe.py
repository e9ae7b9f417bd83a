"""Recipes: the space of a genome, and what mergekit reads in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo import genome, recipe
from llmevo.errors import GenomeError, SpaceError, StageError
from llmevo.recipe import methods as recipe_methods
from llmevo.space import Categorical, Float

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 6


def recipes(layers: int = LAYERS, **spec: Any) -> recipe.Recipes:
    spec = {"models": ["org/german", "org/finnish"], "base_model": "org/base"} | spec
    top = {key: spec.pop(key) for key in ("warm_start", "random_init", "search") if key in spec}
    return recipe.Recipes(genome.Genome.model_validate({"genome": spec, "tasks": ["one"], **top}), layers)


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a small Llama, which mergekit-evolve insists on."""
    folder = tmp_path_factory.mktemp("llama")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_genes_are_named_after_what_they_set() -> None:
    assert recipes().space.names == ["german.weight", "finnish.weight"]
    grouped = recipes(layer_granularity=3, filters=["mlp"]).space.names
    assert grouped[:4] == [
        "german.weight.layers_0_2.mlp",
        "german.weight.layers_0_2.rest",
        "german.weight.layers_3_5.mlp",
        "german.weight.layers_3_5.rest",
    ]
    assert recipes(layer_granularity=3, smooth=True).space.names[:2] == [
        "german.weight.point_0",
        "german.weight.point_1",
    ]
    assert recipes(filters=["mlp"]).space.names[:2] == ["german.weight.mlp", "german.weight.rest"]
    assert recipes(merge_method="slerp", layer_granularity=3).space.names == ["t.layers_0_2", "t.layers_3_5"]
    assert recipes(merge_method="ties").space.names[2:] == ["german.density", "finnish.density"]


def test_labels_are_short_and_unique() -> None:
    named = recipe.labels(["a/x", "b/x", "c/y@rev", "base+some/adapter@v1", "./local/z/", "a/x@v2", "a/x@v3"])
    assert named == {
        "a/x": "a/x",
        "b/x": "b/x",
        "c/y@rev": "y",
        "base+some/adapter@v1": "adapter",
        "./local/z/": "z",
        "a/x@v2": "a/x@v2",
        "a/x@v3": "a/x@v3",
    }
    assert len(set(named.values())) == len(named)


def test_defaults_start_inside_their_range() -> None:
    assert recipes().space.genes["german.weight"] == Float(0, 1.5, init=0.5)
    three = ["a", "b", "c", "d"]
    assert recipes(models=three).space.genes["a.weight"] == Float(0, 1.5, init=0.3)
    assert recipes(models=three, merge_method="linear").space.genes["a.weight"] == Float(0, 1.5, init=0.25)
    assert recipes(allow_negative_weights=True).space.genes["german.weight"] == Float(-1, 1.5, init=0.5)
    density = recipes(merge_method="ties").space.genes["german.density"]
    assert isinstance(density, Float)
    assert density.low < density.start < density.high
    assert recipes(merge_method="slerp").space.genes["t"] == Float(0, 1, init=0.5)


def test_parameters_are_fixed_or_genes_for_all_or_for_each_model() -> None:
    made = recipes(
        merge_method="della",
        parameters={
            "weight": {"german": {"float": [0, 2]}, "org/finnish": 0.3},
            "density": 0.5,
            "lambda": {"float": [0.5, 1.5]},
            "rescale": {"choice": [True, False]},
        },
    )
    assert made.space.genes == {
        "rescale": Categorical(True, False),
        "lambda": Float(0.5, 1.5),
        "german.weight": Float(0, 2),
    }
    written = made.recipe({"rescale": False, "lambda": 0.75, "german.weight": 2})
    assert written["parameters"] == {"int8_mask": True, "normalize": True, "rescale": False, "lambda": 0.75}
    sources = written["slices"][0]["sources"]
    assert sources[0]["parameters"] == {"weight": 2.0, "density": 0.5, "epsilon": 0.15}
    assert sources[1]["parameters"] == {"weight": 0.3, "density": 0.5, "epsilon": 0.15}
    assert "parameters" not in sources[2]


def test_lambda_is_one_gene_unless_it_is_grouped() -> None:
    gene = {"float": [0.5, 1.5]}
    one = recipes(layer_granularity=2, parameters={"lambda": gene, "weight": 1})
    assert one.space.names == ["lambda"]
    many = recipes(layer_granularity=2, parameters={"lambda": gene | {"grouped": True}, "weight": 1})
    assert many.space.names == ["lambda.layers_0_1", "lambda.layers_2_3", "lambda.layers_4_5"]
    written = many.recipe(dict.fromkeys(many.space.names, 0.5) | {"lambda.layers_2_3": 1.5})
    assert [part["parameters"] for part in written["slices"]] == [
        {"lambda": 0.5},
        {"lambda": 1.5},
        {"lambda": 0.5},
    ]
    flat = recipes(layer_granularity=2, parameters={"weight": {"float": [0, 1], "grouped": False}})
    assert flat.space.names == ["german.weight", "finnish.weight"]


def test_a_list_of_methods_is_a_gene_and_what_follows_depends_on_it() -> None:
    made = recipes(
        merge_method=["task_arithmetic", "dare_ties", "slerp"],
        parameters={"lambda": {"float": [0.5, 1]}},
    )
    space = made.space
    assert space.genes["merge_method"] == Categorical("task_arithmetic", "dare_ties", "slerp")
    assert space.conditions["t"].values == ("slerp",)
    assert space.conditions["german.density"].values == ("dare_ties",)
    assert set(space.conditions["german.weight"].values) == {"task_arithmetic", "dare_ties"}
    point = space.validate({"merge_method": "slerp", "t": 0.25})
    assert point["german.weight"] is None
    assert made.recipe(point)["merge_method"] == "slerp"
    rng = np.random.default_rng(0)
    for _ in range(20):
        point = space.sample(rng)
        written = made.recipe(point)
        assert written["merge_method"] == point["merge_method"]
        assert made.params_of(written) == pytest.approx(point)


def test_one_name_never_means_two_ranges() -> None:
    made = recipes(models=["org/german"], merge_method=["slerp", "nearswap"])
    assert made.space.genes["t"] == Float(0, 1, init=0.5)
    assert made.space.genes["nearswap.t"] == Float(1e-5, 1e-2, log=True, init=1e-3)


def test_random_init_is_a_function_of_the_seed() -> None:
    starts = [
        recipes(
            random_init=True,
            search={"seed": seed},
            parameters={"int8_mask": {"choice": [True, False]}},
            merge_method="ties",
        ).space.start()
        for seed in (1, 1, 2)
    ]
    assert starts[0] == starts[1] != starts[2]
    assert (
        starts[0]
        != recipes(merge_method="ties", parameters={"int8_mask": {"choice": [True, False]}}).space.start()
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"merge_method": "tiess"}, "Did you mean 'ties'?"),
        ({"merge_method": "passthrough"}, "`genome.merge_method` must be one of"),
        ({"base_model": None}, "give `genome.base_model`"),
        ({"layer_granularity": 4}, "`genome.layer_granularity` must divide the number of layers, 6"),
        ({"merge_method": "karcher"}, "leaves nothing to search"),
        ({"merge_method": "nuslerp", "models": ["a", "b", "c"]}, "exactly 2 non-base inputs"),
        ({"merge_method": "slerp", "models": ["a"], "base_model": None}, "takes two models"),
        ({"merge_method": "slerp", "models": ["a", "b", "c"], "smooth": True}, "excludes `smooth`"),
        ({"parameters": {"densty": 1}}, "`genome.parameters.densty` must be a parameter of task_arithmetic"),
        ({"parameters": {"density": 1}}, "that has an effect"),
        ({"parameters": {"weight": {"frnch": 1}}}, "must name one of german, finnish, base, but got 'frnch'"),
        ({"parameters": {"weight": "much"}}, "`genome.parameters.weight` must be a valid number"),
        ({"parameters": {"lambda": {"german": 1}}}, "one value for all models"),
        ({"parameters": {"normalize": {"float": [0, 1]}}}, "{choice: [true, false]}"),
        ({"merge_method": "karcher", "parameters": {"max_iter": {"float": [1, 9]}}}, "{int: [low, high]}"),
        ({"parameters": {"normalize": {"choice": [True, "x"]}}}, "must be a valid boolean"),
    ],
)
def test_a_genome_that_makes_no_recipe_is_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(GenomeError) as caught:
        recipes(**spec)
    assert said in str(caught.value)


def shapes() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "layer_granularity": st.sampled_from([0, 2, 3]),
            "filters": st.sampled_from([None, ["mlp"], ["self_attn", "norm"]]),
            "smooth": st.booleans(),
        }
    )


@pytest.mark.parametrize("method", recipe_methods.names())
@settings(max_examples=8, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 99))
def test_every_method_writes_what_reads_back(method: str, shape: dict[str, Any], seed: int) -> None:
    """Through YAML and mergekit's own resolver, tensor by tensor, to the same point."""
    spec: dict[str, Any] = {"merge_method": method, **shape}
    if method in ("nearswap", "arcee_fusion"):
        spec["models"] = ["org/german"]
    if not any(
        recipe_methods.default_gene(method, name, [method], 2, False)
        for name in recipe_methods.find(method).parameters
    ):
        spec["merge_method"] = [method, "task_arithmetic"]  # nothing to search by itself
    made = recipes(**spec)
    point = made.space.sample(np.random.default_rng(seed))
    written = yaml.safe_load(yaml.safe_dump(made.recipe(point)))
    assert made.params_of(written) == pytest.approx(point, abs=1e-9)


def test_a_recipe_needs_a_point_of_its_space() -> None:
    with pytest.raises(SpaceError, match="missing"):
        recipes().recipe({"german.weight": 1})
    with pytest.raises(SpaceError, match="did you mean"):
        recipes().recipe({"german.wieght": 1, "finnish.weight": 1})


def test_dellas_epsilon_fits_its_density() -> None:
    made = recipes(merge_method="della", parameters={"epsilon": {"float": [0, 0.5]}})
    rng = np.random.default_rng(0)
    for point in [
        *(made.space.sample(rng) for _ in range(50)),
        made.space.from_unit([1.0] * len(made.space)),
    ]:
        for source in made.recipe(point)["slices"][0]["sources"][:2]:
            density, epsilon = source["parameters"]["density"], source["parameters"]["epsilon"]
            assert density == 1 or 0 < density - epsilon <= density + epsilon < 1


@pytest.mark.parametrize("method", ["linear", "multislerp", "task_arithmetic", "dare_linear", "della_linear"])
def test_weights_that_sum_to_nothing_are_refused_before_a_merge(method: str) -> None:
    made = recipes(merge_method=method, normalize=True, allow_negative_weights=True)
    point = made.space.start()
    for pair in ((1.0, -1.0), (0.0, 0.0), (0.5, -0.5001)):
        with pytest.raises(StageError, match="divides by that") as caught:
            made.recipe(point | dict(zip(["german.weight", "finnish.weight"], pair, strict=True)))
        assert caught.value.stage == "merge"
    made.recipe(point | {"german.weight": 1.0, "finnish.weight": -0.5})
    free = recipes(merge_method=method, normalize=False, allow_negative_weights=True)
    free.recipe(point | {"german.weight": 1.0, "finnish.weight": -1.0})


def test_a_gradient_of_weights_must_not_sum_to_nothing_on_its_way() -> None:
    made = recipes(merge_method="linear", allow_negative_weights=True, smooth=True, layer_granularity=3)
    point = dict.fromkeys(made.space.names, 1.0)
    made.recipe(point)
    with pytest.raises(StageError, match="changes its sign"):
        made.recipe(point | {"german.weight.point_1": -1.0, "finnish.weight.point_1": -0.5})


def test_slerp_takes_its_position_directly_and_of_many_models_the_best_two() -> None:
    written = recipes(merge_method="slerp", base_model=None).recipe({"t": 0.9})
    part = written["slices"][0]
    assert (part["base_model"], part["parameters"]["t"]) == ("org/german", 0.9)
    flipped = recipes(merge_method="slerp", base_model="org/finnish").recipe({"t": 0.9})["slices"][0]
    assert [source["model"] for source in flipped["sources"]] == ["org/finnish", "org/german"]
    three = recipes(merge_method="slerp", models=["a", "b", "c"])
    part = three.recipe({"a.weight": 0.25, "b.weight": 0.0, "c.weight": 0.75})["slices"][0]
    assert ([s["model"] for s in part["sources"]], part["parameters"]["t"]) == (["c", "a"], 0.25)
    assert three.recipe(dict.fromkeys(three.space.names, 0.0))["slices"][0]["parameters"]["t"] == 0.5


def test_a_tokenizer_named_base_is_found_without_a_base_model() -> None:
    made = recipes(merge_method="linear", tokenizer_source="base")
    written = made.recipe(made.space.start())
    assert "base_model" not in written
    assert written["tokenizer_source"] == "org/base"


def test_references_are_the_base_the_parents_the_uniform_merge_and_the_warm_starts() -> None:
    warm = {
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
        "models": [
            {"model": "org/german", "parameters": {"weight": [0.2, 0.8]}},
            {"model": "org/finnish", "parameters": {"weight": 0.5}},
        ],
        "dtype": "bfloat16",
    }
    foreign = {"merge_method": "ties"} | {key: warm[key] for key in ("base_model", "models")}
    made = recipes(warm_start=[warm, foreign], smooth=True, layer_granularity=3)
    found = {reference.origin: reference for reference in made.references()}
    assert list(found) == [
        "baseline",
        "parent:german",
        "parent:finnish",
        "uniform",
        "warm_start:0",
        "warm_start:1",
    ]
    assert found["parent:german"].recipe == {
        "merge_method": "passthrough",
        "models": [{"model": "org/german"}],
        "dtype": "bfloat16",
    }
    assert found["baseline"].recipe["models"] == [{"model": "org/base"}]
    assert found["uniform"].params == dict.fromkeys(made.space.names, 0.5)
    assert found["warm_start:0"].params == {
        "german.weight.point_0": pytest.approx(0.2),
        "german.weight.point_1": pytest.approx(0.8),
        "finnish.weight.point_0": pytest.approx(0.5),
        "finnish.weight.point_1": pytest.approx(0.5),
    }
    assert found["warm_start:1"].params is None
    assert found["warm_start:1"].recipe == foreign


def test_methods_without_weights_are_compared_with_the_average() -> None:
    uniform = recipes(merge_method="sce").references()[-1]
    assert (uniform.origin, uniform.params, uniform.recipe["merge_method"]) == ("uniform", None, "linear")
    weights = [source["parameters"]["weight"] for source in uniform.recipe["slices"][0]["sources"]]
    assert weights == [0.5, 0.5]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"base_model": "org/other"},
        {
            "models": [
                {"model": "org/german", "parameters": {"weight": 9.0}},
                {"model": "org/finnish", "parameters": {"weight": 1}},
            ]
        },
        {"models": [{"model": "org/german", "parameters": {"weight": 1}}]},
        {"models": [{"model": "org/german"}, {"model": "org/finnish", "parameters": {"weight": 1}}]},
        {"parameters": {"lambda": 0.5}},
        {"parameters": {"normalize": True}},
    ],
)
def test_a_recipe_outside_the_space_has_no_point(change: dict[str, Any]) -> None:
    same = {
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in ("org/german", "org/finnish")],
    }
    made = recipes()
    assert made.params_of(same) == {"german.weight": 1.0, "finnish.weight": 1.0}
    assert made.params_of(same | change) is None


def test_layers_that_are_moved_have_no_point_and_nonsense_is_refused() -> None:
    made = recipes(merge_method="linear")
    span = [
        {"model": m, "layer_range": [1, 6], "parameters": {"weight": 1}}
        for m in ("org/german", "org/finnish")
    ]
    assert made.params_of({"merge_method": "linear", "slices": [{"sources": span}]}) is None
    with pytest.raises(GenomeError, match="mergekit refuses it"):
        made.params_of({"merge_method": "linear", "models": 3})


@pytest.mark.parametrize("path", sorted((ROOT / "genomes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_genome_that_we_ship_makes_recipes_offline(path: Path) -> None:
    loaded = genome.load(path)
    # The models of the quickstart are made by `make run`, from SmolLM2-135M with its 30 layers.
    layers = 30 if path.stem == "quickstart" else recipe.num_layers(loaded, offline=True)
    made = recipe.Recipes(loaded, layers)
    written = made.recipe(made.space.start())
    if loaded.train is None:  # a recipe does not say how its merge is trained
        assert made.params_of(written) == pytest.approx(made.space.start(), abs=1e-9)
    else:
        assert made.params_of(written) is None
        assert next(r.params for r in made.references() if r.origin == "default") == made.space.start()
    for reference in made.references():
        if reference.origin.startswith("warm_start"):
            assert reference.params is not None


def test_the_number_of_layers_is_the_files_or_the_first_models(config_folder: Path) -> None:
    def layers(**spec: Any) -> int:
        return recipe.num_layers(
            genome.Genome.model_validate(
                {"genome": {"models": [str(config_folder)]} | spec, "tasks": ["one"]}
            ),
            offline=True,
        )

    assert layers() == LAYERS
    assert layers(models=[f"{config_folder}@main+org/adapter"]) == LAYERS
    assert layers(num_layers=32, models=["org/nowhere"]) == 32
    with pytest.raises(GenomeError, match=r"choose one of \[1, 2, 3, 6\]"):
        layers(layer_granularity=4)
    with pytest.raises(GenomeError, match=r"could not be .*or give `genome.num_layers`"):
        layers(models=["org/nowhere"])
    (config_folder.parent / "empty").mkdir(exist_ok=True)
    with pytest.raises(GenomeError, match="must be a JSON file"):
        layers(models=[str(config_folder.parent / "empty")])


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bloom", "T5", "Bart", "OPT", "GPTNeoX"])
def test_each_kind_of_model_says_its_layers_in_a_word_of_its_own(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")()
    config.save_pretrained(tmp_path)
    spec = {"genome": {"models": [str(tmp_path)]}, "tasks": ["one"]}
    assert recipe.num_layers(genome.Genome.model_validate(spec)) == config.num_hidden_layers
