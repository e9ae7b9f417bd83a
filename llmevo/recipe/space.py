"""The genes of a genome, and where each value of a recipe comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np

from llmevo.errors import GenomeError
from llmevo.genome import Genome, MergeSpec
from llmevo.genome.spec import ChoiceGene, FloatGene, IntGene
from llmevo.recipe import methods as recipe_methods
from llmevo.recipe.labels import labels, resolve_label
from llmevo.recipe.methods import GROUPED, Method, Parameter
from llmevo.recipe.write import Key, Layout
from llmevo.space import Categorical, Condition, Float, Gene, Int, Space, Value


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """Where a value of a recipe comes from: the gene `name`, or `value` where that is None."""

    name: str | None
    value: Value = None


Cells: TypeAlias = list[list[Cell]]  # [layer group][filter set], or [[cell]] for the whole model


def layout_of(spec: MergeSpec, num_layers: int) -> Layout:
    """The layout of a genome's recipes.

    Raises:
        GenomeError: `layer_granularity` does not divide `num_layers`.
    """
    step = spec.layer_granularity or num_layers
    if num_layers % step:
        raise GenomeError(
            f"`genome.layer_granularity` must divide the number of layers, {num_layers}, but got {step}."
        )
    return Layout(
        models=tuple(spec.models),
        base_model=spec.base_model,
        num_layers=num_layers,
        step=step,
        filters=tuple(spec.filters or ()),
        smooth=spec.smooth,
        dtype=spec.dtype,
        tokenizer_source=spec.tokenizer_source,
    )


@final
class SpacePlan:
    """The space of a genome, with a plan for each method that says where each value comes from.

    Args:
        genome: The genome.
        layout: Of its recipes.

    Attributes:
        labels: The short name of each model, by its path.
        methods: What the recipes may use.
        cells: By method and parameter, the genes and fixed values of a recipe.
        space: The genes.

    Raises:
        GenomeError: See `recipe.Recipes`.
    """

    def __init__(self, genome: Genome, layout: Layout) -> None:
        spec = genome.genome
        self._genome, self._spec, self._layout = genome, spec, layout
        self.labels = labels([*spec.models, *([spec.base_model] if spec.base_model else [])])
        # One model that is trained needs no method; what sets one up would have no effect.
        named = [] if genome.alone else spec.methods
        self.methods = {name: recipe_methods.find(name) for name in named}
        self._genes: dict[str, Gene] = {}
        self._users: dict[str, list[str]] = {}
        self._check_parameters()
        for method in self.methods.values():
            self._check_inputs(method)
        self.cells = {name: self._plan(method) for name, method in self.methods.items()}
        self.space = self._make_space()

    def _check_parameters(self) -> None:
        if self._genome.alone and self._spec.parameters:
            raise GenomeError(
                "`genome.parameters` must be empty where one model is trained and nothing merged, but got "
                f"{', '.join(self._spec.parameters)}; remove them, or name more models."
            )
        for name, setting in self._spec.parameters.items():
            takers = [m for m in self.methods.values() if name in self._parameters(m)]
            if not takers:
                known = sorted({p for m in self.methods.values() for p in self._parameters(m)})
                raise GenomeError(
                    f"`genome.parameters.{name}` must be a parameter of {' or '.join(self.methods)} that has "
                    f"an effect: {', '.join(known) or 'there is none'}; remove it or correct its name."
                )
            if isinstance(setting, dict):
                for model in setting:
                    resolve_label(model, self.labels, f"genome.parameters.{name}")

    def _parameters(self, method: Method) -> dict[str, Parameter]:
        """The parameters of `method`; a slerp of many models has weights that choose two, instead of t."""
        if method.name == "slerp" and chooses_pairs(self._spec):
            return {"weight": recipe_methods.find("linear").parameters["weight"]}
        return method.parameters

    def _check_inputs(self, method: Method) -> None:
        spec, where = self._spec, f"`genome.merge_method` {method.name}"
        base = spec.base_model if method.uses_base(spec.base_model) else None
        if method.base == "required" and base is None and method.name != "slerp":
            raise GenomeError(f"{where} works on task vectors: give `genome.base_model`.")
        if method.name == "slerp":
            if len(slerp_models(spec)) < 2:
                raise GenomeError(
                    f"{where} takes two models, but got {spec.models}; add one to `genome.models`."
                )
            if len(spec.models) > 2 and (spec.smooth or spec.filters):
                raise GenomeError(
                    f"{where} with more than two models chooses two for each layer group, which excludes "
                    "`smooth` and `filters`; remove them, or keep two models."
                )
            return
        try:
            method.contract.validate_ids(self._layout.inputs(base), base)
        except ValueError as error:
            raise GenomeError(
                f"{where} does not fit `genome.models` {spec.models} with `genome.base_model` "
                f"{spec.base_model!r}: {error}."
            ) from None

    def _plan(self, method: Method) -> dict[Key, Cells]:
        """Where each value of a recipe of `method` comes from; registers the genes on the way."""
        plan: dict[Key, Cells] = {}
        for parameter in self._parameters(method).values():
            if parameter.scope == "shared":
                models: Sequence[str | None] = [None]
            else:
                models = [
                    m for m in self._spec.models if parameter.scope == "input" or m != self._spec.base_model
                ]
            for model in models:
                cells = self._cells(method, parameter, model)
                if cells is not None:
                    plan[parameter.name, model] = cells
        return plan

    def _cells(self, method: Method, parameter: Parameter, model: str | None) -> Cells | None:
        spec, name = self._spec, parameter.name
        setting = spec.parameters.get(name)
        where = f"genome.parameters.{name}"
        if isinstance(setting, dict):
            if model is None:
                raise GenomeError(
                    f"`{where}` is one value for all models in {method.name}, but got one for each."
                )
            mine = [v for key, v in setting.items() if resolve_label(key, self.labels, where) == model]
            setting, where = (mine[0] if mine else None), f"{where}.{self.labels[model]}"
        if isinstance(setting, (FloatGene, IntGene, ChoiceGene)):
            gene: Gene | None = recipe_methods.check_gene(parameter, setting, where)
            grouped = name in GROUPED if setting.grouped is None else setting.grouped
        elif setting is not None:
            return [[Cell(None, parameter.check(setting, where))]]
        else:
            parents = sum(m != spec.base_model for m in spec.models) or 1
            negative = spec.allow_negative_weights
            gene = recipe_methods.default_gene(method.name, name, spec.methods, parents, negative)
            grouped = name in GROUPED
        if gene is None:
            value = method.default(name, spec.normalize)
            return None if value is None else [[Cell(None, value)]]
        stem = name if model is None else f"{self.labels[model]}.{name}"
        if not grouped:
            return [[self._register(method, stem, gene)]]
        return [[self._register(method, stem + suffix, gene) for suffix in row] for row in self._suffixes()]

    def _suffixes(self) -> list[list[str]]:
        layout = self._layout
        groups = [""]
        if layout.groups > 1:
            spans = [layout.layer_range(group) for group in range(layout.groups)]
            # Under `smooth` a gene is a point of a curve through all layers, not the value of some of them.
            groups = [
                f".point_{group}" if layout.smooth else f".layers_{first}_{end - 1}"
                for group, (first, end) in enumerate(spans)
            ]
        sets = ["", *(f".{name}" for name in layout.filters)][layout.sets > 1 :]
        return [
            [group + name for name in ([*sets, ".rest"] if layout.sets > 1 else sets)] for group in groups
        ]

    def _register(self, method: Method, name: str, gene: Gene) -> Cell:
        """A cell for the gene `name`, shared with other methods if they search it in the same range."""
        if self._genes.get(name, gene) != gene:
            name = f"{method.name}.{name}"
        self._genes[name] = gene
        self._users.setdefault(name, []).append(method.name)
        return Cell(name)

    def _make_space(self) -> Space:
        genes: dict[str, Gene] = {}
        conditions = {}
        if len(self.methods) > 1:
            genes["merge_method"] = Categorical(*self.methods)
            for name, users in self._users.items():
                if len(users) < len(self.methods):
                    conditions[name] = Condition("merge_method", tuple(users))
        genes |= self._genes
        if not genes and self._genome.train is None:
            raise GenomeError(
                f"`genome.merge_method` {self._spec.methods[0]} leaves nothing to search; make a parameter a "
                "gene in `genome.parameters`, or give several methods."
            )
        if self._genome.random_init:
            rng = np.random.default_rng([self._genome.search.seed, len(genes)])
            genes = {name: _starting_at(gene, rng.random()) for name, gene in genes.items()}
        if self._genome.train is not None:
            genes |= self._genome.train.genes()
            conditions |= self._genome.train.conditions()
        if not genes:
            raise GenomeError(
                "`train` leaves nothing to search; make a hyperparameter a gene, such as "
                "`train.learning_rate: {float: [5.0e-5, 2.0e-3], log: true}`."
            )
        return Space(genes, conditions)


def chooses_pairs(spec: MergeSpec) -> bool:
    """Whether slerp has more than two models, of which it takes two for each layer group."""
    return len(spec.models) > 2


def slerp_models(spec: MergeSpec) -> list[str]:
    """The models of a slerp, the one at t = 0 first."""
    models, base = list(spec.models), spec.base_model
    if len(models) == 1 and base is not None and base not in models:
        return [base, *models]
    return sorted(models, key=lambda model: model != base)


def _starting_at(gene: Gene, unit: float) -> Gene:
    """`gene` with the `init` at a coordinate in [0, 1]."""
    if isinstance(gene, Categorical):
        return Categorical(*gene.choices, ordered=gene.ordered, init=gene.from_unit(unit))
    if isinstance(gene, Int):
        return Int(gene.low, gene.high, log=gene.log, step=gene.step, init=gene.from_unit(unit))
    return Float(gene.low, gene.high, log=gene.log, step=gene.step, init=gene.from_unit(unit))
