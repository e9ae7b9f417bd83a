"""Genes <-> mergekit recipe: the space that a genome spans, and the recipe at each of its points.

A recipe is a mergekit configuration as plain data, with the user's own model names. A gene is named after
what it sets: `german.weight`, `german.weight.layers_0_7`, `german.weight.layers_0_7.mlp`, `t.layers_0_7`,
`lambda`, `merge_method`. With filters, the tensors that match none have the genes that end in `.rest`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from llmevo.errors import GenomeError
from llmevo.genome import Genome, MergeSpec
from llmevo.recipe import methods as recipe_methods
from llmevo.recipe.labels import labels, num_layers
from llmevo.recipe.methods import EVOLVE, Method
from llmevo.recipe.read import read_params
from llmevo.recipe.space import SpacePlan, chooses_pairs, layout_of, slerp_models
from llmevo.recipe.write import Grid, Grids, Key, Layout, value_at, write, write_slerp
from llmevo.space import Params, Value

__all__ = ["Recipes", "Reference", "labels", "num_layers"]


@final
@dataclass(frozen=True, slots=True)
class Reference:
    """A recipe that is evaluated before the search, to compare with.

    Args:
        origin: `baseline`, `parent:LABEL`, `uniform`, `warm_start:INDEX` or `default`.
        recipe: The mergekit configuration.
        params: The point of the space that gives the same merge; None if there is none.
    """

    origin: str
    recipe: dict[str, Any]
    params: Params | None


@final
class Recipes:
    """The space of a genome, and the recipe at each of its points.

    Args:
        genome: The genome.
        num_layers: Transformer layers of its models; see `num_layers`.

    Attributes:
        space: The genes, named after what they set.
        labels: The short name of each model, by its path.

    Raises:
        GenomeError: A method that mergekit does not have or that does not fit the models, a parameter that no
            method takes, a value or gene that it does not take, or nothing that varies.
    """

    def __init__(self, genome: Genome, num_layers: int) -> None:
        self._genome, self._spec = genome, genome.genome
        self._layout = layout_of(genome.genome, num_layers)
        plan = SpacePlan(genome, self._layout)
        self.space, self.labels = plan.space, plan.labels
        self._methods, self._cells = plan.methods, plan.cells

    def recipe(self, params: Mapping[str, Value]) -> dict[str, Any]:
        """The mergekit configuration at the point `params`.

        Raises:
            SpaceError: `params` is no point of the space.
            StageError: Weights to be normalised sum to nothing; the trial fails before a merge.
        """
        valid = self.space.validate(params)
        if self._genome.alone is not None:
            return self._alone(self._genome.alone)
        name = str(valid["merge_method"]) if len(self._methods) > 1 else next(iter(self._methods))
        return self._write(self._methods[name], self._grids(name, valid))

    def _grids(self, method: str, params: Params) -> dict[Key, Grid]:
        return {
            key: [[cell.value if cell.name is None else params[cell.name] for cell in row] for row in cells]
            for key, cells in self._cells[method].items()
        }

    def _write(self, method: Method, grids: dict[Key, Grid]) -> dict[str, Any]:
        if method.name == "slerp":
            pairs, t = _slerp(self._spec, self._layout, grids)
            shared = {name: grid[0][0] for (name, _), grid in grids.items() if name not in ("t", "weight")}
            return write_slerp(self._layout, pairs, t, shared)
        if "epsilon" in method.parameters and "density" in method.parameters:
            grids = grids | _fit_epsilon(self._layout, grids, method)
        return write(method, self._layout, grids)

    def references(self) -> list[Reference]:
        """What is evaluated first: the baseline, each parent, the uniform merge, warm starts, the default.

        The uniform merge gives each parent the weight 1/n, with everything else where the search starts: the
        average of the models for linear, the base plus the mean task vector for methods on task vectors,
        the middle of a slerp of two. Methods that take no weights (sce, model_stock, karcher and so on) are
        compared with the linear average. Of several methods it is the one where the search starts.

        With `train`, all of these are untrained. The `default`, there if a hyperparameter is a gene, is not:
        it is where the search starts, with the hyperparameters that a user would take.
        """
        spec = self._spec
        base = spec.base_model
        found = [] if base is None else [Reference("baseline", self._alone(base), None)]
        found += [
            Reference(f"parent:{self.labels[m]}", self._alone(m), None) for m in spec.models if m != base
        ]
        if self._genome.alone is not None:
            found = [Reference("baseline", self._alone(self._genome.alone), None)]
        else:
            uniform = self._uniform()
            found.append(Reference("uniform", uniform, self._trained_params_of(uniform)))
        for index, entry in enumerate(self._genome.warm_start):
            if isinstance(entry, str):
                raise GenomeError(
                    f"`warm_start.{index}` must be a recipe, but got the path {entry!r}; use genome.load."
                )
            found.append(Reference(f"warm_start:{index}", entry, self._trained_params_of(entry)))
        if self._genome.train is not None and self._genome.train.genes():
            start = self.space.start()
            found.append(Reference("default", self.recipe(start), start))
        return found

    def _trained_params_of(self, recipe: Mapping[str, Any]) -> Params | None:
        """The point of `recipe`; none under `train`, where a point is trained and a reference is not."""
        return self.params_of(recipe) if self._genome.train is None else None

    def _alone(self, model: str) -> dict[str, Any]:
        return {"merge_method": "passthrough", "models": [{"model": model}], "dtype": self._spec.dtype}

    def _uniform(self) -> dict[str, Any]:
        start = self.space.start()
        name = str(start["merge_method"]) if len(self._methods) > 1 else next(iter(self._methods))
        grids = self._grids(name, start)
        weighted = [key for key in grids if key[0] == "weight"]
        if name == "slerp" and not chooses_pairs(self._spec):
            return self._write(self._methods[name], grids | {("t", None): [[0.5]]})
        if name == "slerp" or not weighted:
            average = recipe_methods.find("linear")
            equal: Grids = {
                ("weight", model): [[1.0 / len(self._spec.models)]] for model in self._spec.models
            }
            return write(average, self._layout, {**equal, ("normalize", None): [[True]]})
        return self._write(self._methods[name], grids | {key: [[1.0 / len(weighted)]] for key in weighted})

    def params_of(self, recipe: Mapping[str, Any]) -> Params | None:
        """The point of the space that gives the same merge as `recipe`; None if there is none.

        Raises:
            GenomeError: `recipe` is not a mergekit configuration.
        """
        return read_params(recipe, self._layout, self._methods, self._cells, self.space, self.recipe)

    def from_genotype(self, genotype: npt.ArrayLike) -> dict[str, Any]:
        """The recipe that mergekit-evolve makes of one of its arrays.

        Equal to `ModelGenome.genotype_merge_config`, except for the defects in docs/mergekit-evolve.md.

        Args:
            genotype: Shape (layer groups, models, filter sets, parameters), or flat.

        Raises:
            GenomeError: Several methods, one that mergekit-evolve does not know, or another shape.
            StageError: As `recipe`.
        """
        layout, name = self._layout, self._spec.methods[0]
        if len(self._methods) > 1 or name not in EVOLVE:
            raise GenomeError(
                f"`genome.merge_method` must be one of {', '.join(EVOLVE)} to read an array of "
                f"mergekit-evolve, but got {self._spec.merge_method!r}."
            )
        shape = (layout.groups, len(layout.models), layout.sets, len(EVOLVE[name]))
        array = np.asarray(genotype, dtype=float)
        if array.shape != shape and array.shape != (math.prod(shape),):
            raise GenomeError(f"`genotype` must have the shape {shape}, or be flat, but got {array.shape}.")
        array = array.reshape(shape)
        if name == "slerp":
            best = np.argsort(-array[:, :, 0, 0], axis=1, kind="stable")[:, :2]
            genes = np.take_along_axis(array[:, :, 0, 0], best, axis=1)
            pairs = [(layout.models[first], layout.models[second]) for first, second in best]
            return write_slerp(layout, pairs, (1 / (1 + np.exp(genes[:, :1] - genes[:, 1:]))).tolist())
        grids: dict[Key, Grid] = {}
        for position, parameter in enumerate(EVOLVE[name]):
            values = array[:, :, :, position]
            if parameter == "density" or not self._spec.allow_negative_weights:
                values = np.abs(values)
            if parameter == "density":
                values = np.clip(values, 0.0, 1.0)
            grids |= {(parameter, model): values[:, i].tolist() for i, model in enumerate(layout.models)}
        method = self._methods[name]
        for flag in ("normalize", "int8_mask"):
            if flag in method.parameters:
                grids[flag, None] = [[method.default(flag, self._spec.normalize)]]
        return write(method, layout, grids)


def _slerp(spec: MergeSpec, layout: Layout, grids: Mapping[Key, Grid]) -> tuple[list[tuple[str, str]], Grid]:
    """The pair of models of each layer group, and t.

    Of more than two models, the two with the largest weights are taken, and t is the second one's share of
    their sum. (mergekit-evolve: softmax, so that genes in [0, 1] never leave [0.27, 0.5].)
    """
    if not chooses_pairs(spec):
        first, second = slerp_models(spec)
        return [(first, second)] * layout.groups, grids["t", None]
    pairs, t = [], []
    for group in range(layout.groups):
        ranked = sorted(layout.models, key=lambda model: -value_at(grids["weight", model], group, 0))
        high, low = (float(value_at(grids["weight", model], group, 0)) for model in ranked[:2])
        pairs.append((ranked[0], ranked[1]))
        t.append([max(low, 0.0) / (high + max(low, 0.0)) if high > 0 else 0.5])
    return pairs, t


def _fit_epsilon(layout: Layout, grids: Mapping[Key, Grid], method: Method) -> dict[Key, Grid]:
    """Each model's epsilon, made small enough for its density.

    DELLA draws with probabilities in density +- epsilon, which must lie inside (0, 1); mergekit raises where
    they do not. At density 1 nothing is dropped, and epsilon has no effect.
    """
    fitted: dict[Key, Grid] = {}
    for (name, model), density in grids.items():
        if name != "density":
            continue
        epsilon = grids.get(("epsilon", model), [[method.parameters["epsilon"].spec.default]])
        one = len(density) == len(density[0]) == len(epsilon) == len(epsilon[0]) == 1
        fitted["epsilon", model] = [
            [
                _fit(value_at(density, group, s), value_at(epsilon, group, s))
                for s in range(1 if one else layout.sets)
            ]
            for group in range(1 if one else layout.groups)
        ]
    return fitted


def _fit(density: float, epsilon: float) -> float:
    return min(epsilon, round(0.99 * min(density, max(1 - density, 0.0)), 12))
