"""The section `train`: what it allows, its genes, and the settings at a point."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from llmevo import genome as genomes
from llmevo.errors import GenomeError
from llmevo.genome import Genome, TrainSettings
from llmevo.recipe import Recipes
from llmevo.space import Categorical, Condition, Float, Int


def parsed(train: dict[str, Any], **other: Any) -> Genome:
    data = {"genome": {"models": ["a/model"]}, "tasks": ["validation_loss"], **other}
    return genomes.parse(yaml.safe_dump({**data, "train": {"data": "facts.jsonl", **train}}))


LOG = {"float": [5e-5, 2e-3], "log": True}


def test_a_genome_of_train_genes_alone() -> None:
    genome = parsed({"rank": {"int": [4, 64], "log": True}, "learning_rate": LOG})
    recipes = Recipes(genome, 4)
    assert recipes.space.names == ["train.rank", "train.learning_rate"]
    assert recipes.space.start() == {"train.rank": 32, "train.learning_rate": 3e-4}
    alone = {"merge_method": "passthrough", "models": [{"model": "a/model"}], "dtype": "bfloat16"}
    assert recipes.recipe(recipes.space.start()) == alone
    baseline, default = recipes.references()
    assert (baseline.origin, baseline.recipe, baseline.params) == ("baseline", alone, None)
    assert (default.origin, default.params) == ("default", recipes.space.start())
    assert genomes.parse(genomes.dump(genome)) == genome
    assert genome.for_lm_eval() is None


def test_off_needs_no_quotes() -> None:
    """YAML reads it as false."""
    text = (
        "genome: {models: [a/model]}\ntasks: [validation_loss]\ntrain: {data: facts.jsonl, together: off}\n"
    )
    genome = genomes.parse(text)
    assert genome.train.together == "off"
    assert genomes.parse(genomes.dump(genome)) == genome


def test_merge_and_train_genes_together() -> None:
    models = {"models": ["a/x", "b/y"], "base_model": "a/base", "merge_method": "task_arithmetic"}
    genome = parsed({"learning_rate": LOG}, genome=models, tasks=["validation_loss", "mine"])
    recipes = Recipes(genome, 4)
    assert recipes.space.names == ["x.weight", "y.weight", "train.learning_rate"]
    origins = {reference.origin: reference.params for reference in recipes.references()}
    # Untrained, whatever they are; the default is where the search starts.
    assert {name for name, params in origins.items() if params is None} == {
        "baseline",
        "parent:x",
        "parent:y",
        "uniform",
    }
    assert origins["default"] == recipes.space.start()
    tasks = genome.for_lm_eval()
    assert tasks is not None
    assert [task.name for task in tasks.tasks] == ["mine"]
    assert tasks.search.halving.enabled is False


def test_merge_genes_with_fixed_training_have_no_default() -> None:
    models = {"models": ["a/x", "b/y"], "base_model": "a/base"}
    references = Recipes(parsed({}, genome=models), 4).references()
    assert all(reference.params is None for reference in references)
    assert "default" not in [reference.origin for reference in references]


def test_a_merge_that_is_fixed_with_train_genes() -> None:
    models = {"models": ["a/x", "b/y"], "base_model": "a/base", "parameters": {"weight": 0.5}}
    assert Recipes(parsed({"learning_rate": LOG}, genome=models), 4).space.names == ["train.learning_rate"]


def test_genes_that_only_some_adapters_have_are_conditional() -> None:
    genome = parsed(
        {
            "adapter": {"choice": ["lora", "ia3", "loraplus"]},
            "rank": {"choice": [8, 32]},
            "loraplus_ratio": {"float": [4, 32]},
            "batch_size": {"int": [8, 32], "step": 8},
        }
    )
    assert genome.train is not None
    space = Recipes(genome, 4).space
    assert space.conditions == {
        "train.rank": Condition("train.adapter", ("lora", "loraplus")),
        "train.loraplus_ratio": Condition("train.adapter", ("loraplus",)),
    }
    assert space.genes["train.rank"] == Categorical(8, 32, init=32)
    assert space.genes["train.batch_size"] == Int(8, 32, step=8, init=16)
    assert space.genes["train.loraplus_ratio"] == Float(4, 32, init=16.0)
    point = space.validate({"train.adapter": "ia3", "train.batch_size": 8})
    settings = genome.train.settings(point)
    assert (settings.adapter, settings.rank, settings.batch_size) == ("ia3", 32, 8)


def test_alpha_may_follow_the_rank() -> None:
    genome = parsed({"rank": {"choice": [8, 32]}, "alpha_over_rank": {"choice": [1, 2, 4]}})
    assert genome.train is not None
    space = Recipes(genome, 4).space
    assert space.start() == {"train.rank": 32, "train.alpha_over_rank": 1}
    assert genome.train.settings({"train.rank": 8, "train.alpha_over_rank": 4}).alpha == 32.0
    assert genome.train.settings(space.start()) == TrainSettings()
    assert genomes.parse(genomes.dump(genome)) == genome
    fixed = parsed({"rank": 8, "alpha_over_rank": 2, "init": "orthogonal", "learning_rate": LOG}).train
    assert fixed is not None
    assert (fixed.settings({}).alpha, fixed.settings({}).init) == (16.0, "orthogonal")


def test_a_gene_starts_at_its_own_init_or_where_the_default_is_not_allowed_in_the_middle() -> None:
    space = Recipes(
        parsed(
            {
                "rank": {"int": [4, 64], "init": 8},
                "alpha": {"float": [64, 128]},
                "batch_size": {"choice": [2, 4]},
                "warmup": {"float": [0, 0.1]},
            }
        ),
        4,
    ).space
    assert space.start() == {
        "train.rank": 8,
        "train.alpha": 96.0,
        "train.batch_size": 2,
        "train.warmup": 0.05,
    }


def test_random_init_leaves_the_default_alone() -> None:
    space = Recipes(parsed({"learning_rate": LOG}, random_init=True), 4).space
    assert space.start() == {"train.learning_rate": 3e-4}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"rank": 0}, "`rank` must be a whole number >= 1, but got 0"),
        ({"rank": 2.5}, "`rank` must be a whole number >= 1, but got 2.5"),
        ({"rank": True}, "`rank` must be a whole number >= 1, but got True"),
        ({"rank": None}, "`rank` must be a whole number >= 1, but got None"),
        ({"rank": {"choice": [4, "big"]}}, "`rank` must be a whole number >= 1, but got 'big'"),
        ({"rank": {"float": [1, 8]}, "alpha": 0}, "`alpha` must be a number > 0, or null, but got 0"),
        ({"learning_rate": {"float": [0, 1]}}, "`learning_rate` must be a number > 0 and <= 10, but got 0.0"),
        ({"dropout": 1}, "`dropout` must be a number >= 0 and < 1, but got 1"),
        ({"adapter": "qalora"}, "`adapter` must be one of lora, rslora, .* but got 'qalora'"),
        ({"adapter": {"choice": ["lora", "prefix_tuning"]}}, "must not be prefix_tuning: it adds tokens"),
        ({"alpha": 16, "alpha_over_rank": 2}, "`alpha` and `alpha_over_rank` exclude each other"),
        ({"init": "eva"}, "`init` must be one of default, gaussian, orthogonal, pissa, olora, but got 'eva'"),
        ({"init": "olora", "adapter": "qlora"}, "`init` must not be pissa or olora with the adapter qlora"),
        ({"init": "orthogonal", "rank": {"int": [4, 64]}}, "`rank` must be even with `init: orthogonal`"),
        ({"init": {"choice": ["default", "gaussian"]}, "adapter": "pissa"}, "`init` has no effect with"),
        ({"dropout": {"float": [0, 0.1]}, "adapter": "deltalora"}, "`dropout` has no effect with"),
        ({"target_modules": "all"}, "`target_modules` must be one of attn, mlp, all-linear, but got 'all'"),
        ({"target_modules": []}, "`train.target_modules` must have at least 1 item"),
        ({"schedule": ["wsd"]}, "`schedule` must be one of constant, wsd, but got the list"),
        ({"checkpointing": "yes"}, "`checkpointing` must be true or false, but got 'yes'"),
        ({"epochs": 1, "tokens": 5}, "`epochs` and `tokens` exclude each other; remove one"),
        ({"accumulation": {"int": [1, 9]}, "batch_size": {"int": [8, 16]}}, "they may be 9 and 8"),
        ({"adapter": "ia3", "rank": {"int": [1, 8]}}, "`rank` has no effect with the adapter ia3"),
        ({"loraplus_ratio": {"float": [2, 8]}}, "`loraplus_ratio` has no effect with the adapter lora"),
        ({"data": {"train": "a", "validation": 0.6, "test": 0.4}}, "must leave something of `train`"),
        ({"data": {"train": "a", "validaton": "b"}}, "did you mean `train.data.validation`"),
        ({"learning_rat": 1}, "did you mean `train.learning_rate`"),
    ],
)
def test_what_is_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(GenomeError, match=message):
        parsed(train)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": None}, "`tasks` names validation_loss, which needs `train.data`; add `train`"),
        ({"tasks": ["validation_loss", "validation_loss"]}, "must not name a task twice"),
        (
            {"tasks": [{"name": "validation_loss", "metric": "acc"}]},
            "has the metric 'nll,none', but got 'acc'",
        ),
        (
            {"search": {"halving": {"eta": 3}}},
            "`search.halving.eta` has no effect here, where rungs are tokens; use `search.halving.tokens`",
        ),
        (
            {"tasks": ["t"], "train": None, "search": {"halving": {"tokens": {"eta": 2}}}},
            "`search.halving.tokens` has no effect here, where rungs are items; add `train`",
        ),
        ({"search": {"halving": {"tokens": {"shares": [0.3, 0.1]}}}}, "must ascend"),
    ],
)
def test_what_the_genome_refuses_around_it(data: dict[str, Any], message: str) -> None:
    whole = {"genome": {"models": ["m"]}, "tasks": ["validation_loss"], "train": {"data": "f"}, **data}
    with pytest.raises(GenomeError, match=message):
        genomes.parse(yaml.safe_dump(whole))


def test_nothing_to_search_is_said() -> None:
    with pytest.raises(GenomeError, match=r"`train` leaves nothing to search; make a hyperparameter a gene"):
        Recipes(parsed({}), 4)
    with pytest.raises(GenomeError, match=r"`genome.parameters` must be empty where one model is trained"):
        Recipes(parsed({"learning_rate": LOG}, genome={"models": ["m"], "parameters": {"weight": 1}}), 4)


def test_what_had_an_effect_is_told_from_what_had_none() -> None:
    whole = set(TrainSettings().held())
    assert whole >= {"adapter", "rank", "alpha", "epochs", "batch_size", "init"}
    assert not whole & {"tokens", "decay", "layers", "loraplus_ratio", "delta_lambda", "delta_start"}
    assert TrainSettings(tokens=900).held().keys() ^ whole == {"tokens", "epochs"}
    assert TrainSettings(schedule="wsd").held().keys() - whole == {"decay"}
    assert whole - TrainSettings(adapter="ia3").held().keys() == {"rank", "alpha", "dropout", "init"}
