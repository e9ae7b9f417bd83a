"""Parameter values -> a mergekit configuration, in the layout that mergekit-evolve writes.

Without `smooth` the recipe has one output slice for each layer group, with that group's values; with
`smooth` it names the models once and gives lists, between whose entries mergekit interpolates. With filters a
value is a list of `{filter, value}`, of which mergekit takes the first whose filter is in the tensor's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from llmevo.errors import StageError
from llmevo.recipe.methods import Method
from llmevo.space import Value

Key: TypeAlias = tuple[str, str | None]  # parameter, and model or None for a shared one
Grid: TypeAlias = Sequence[Sequence[Any]]  # [layer group][filter set]; [[value]] for the whole model
Grids: TypeAlias = Mapping[Key, Grid]

# Weights that sum to less than this share of their absolute sum are refused where they are normalised.
MIN_SUM = 1e-3


@final
@dataclass(frozen=True)
class Layout:
    """What a recipe says besides its values.

    Args:
        models: The parents.
        base_model: The base, or None.
        num_layers: Transformer layers.
        step: Layers in a group.
        filters: Substrings with values of their own; the rest follows them.
        smooth: Lists to interpolate between, instead of slices.
        dtype: In which mergekit computes and writes.
        tokenizer_source: As in mergekit.
    """

    models: tuple[str, ...]
    base_model: str | None
    num_layers: int
    step: int
    filters: tuple[str, ...]
    smooth: bool
    dtype: str
    tokenizer_source: str | None

    @property
    def groups(self) -> int:
        """Number of layer groups."""
        return self.num_layers // self.step

    @property
    def sets(self) -> int:
        """Number of filter sets, the rest included."""
        return len(self.filters) + 1

    def layer_range(self, group: int) -> list[int]:
        """First layer of a group, and the one after its last."""
        return [group * self.step, (group + 1) * self.step]

    def inputs(self, base: str | None) -> list[str]:
        """The models that a recipe with the base `base` reads."""
        return [*self.models, *([base] if base is not None and base not in self.models else [])]


def write(method: Method, layout: Layout, grids: Grids) -> dict[str, Any]:
    """The recipe of any method but slerp.

    Raises:
        StageError: Weights that are normalised sum to nothing; see `check_sums`.
    """
    check_sums(method, layout, grids)
    base = layout.base_model if method.uses_base(layout.base_model) else None
    top = {name: grid[0][0] for (name, model), grid in grids.items() if model is None and _is_one(grid)}
    shared = {key: grid for key, grid in grids.items() if key[1] is None and not _is_one(grid)}

    def of_model(model: str, group: int | None) -> dict[str, Any]:
        own = {name: _setting(grid, layout, group) for (name, m), grid in grids.items() if m == model}
        return {"parameters": own} if own else {}

    recipe: dict[str, Any] = {"merge_method": method.name}
    if layout.smooth:
        recipe["models"] = [{"model": model} | of_model(model, None) for model in layout.inputs(base)]
        top |= {name: _setting(grid, layout, None) for (name, _), grid in shared.items()}
    else:
        recipe["slices"] = []
        for group in range(layout.groups):
            sources = [
                {"model": model, "layer_range": layout.layer_range(group)} | of_model(model, group)
                for model in layout.inputs(base)
            ]
            own = {name: _setting(grid, layout, group) for (name, _), grid in shared.items()}
            recipe["slices"].append({"sources": sources} | ({"parameters": own} if own else {}))
    if top:
        recipe["parameters"] = top
    return _finish(recipe, layout, base)


def write_slerp(
    layout: Layout, pairs: Sequence[tuple[str, str]], t: Grid, shared: Mapping[str, Value] | None = None
) -> dict[str, Any]:
    """The recipe of a slerp.

    Args:
        layout: As in `write`.
        pairs: For each layer group the model at t = 0 and the one at t = 1.
        t: The position between them.
        shared: Further parameters for the whole recipe.
    """
    recipe: dict[str, Any] = {"merge_method": "slerp"}
    base = None
    if layout.smooth:
        base = pairs[0][0]
        recipe["models"] = [{"model": model} for model in pairs[0]]
        recipe["parameters"] = {"t": _setting(t, layout, None), **(shared or {})}
    else:
        recipe["slices"] = [
            {
                "sources": [{"model": model, "layer_range": layout.layer_range(group)} for model in pair],
                "base_model": pair[0],
                "parameters": {"t": _setting(t, layout, group)},
            }
            for group, pair in enumerate(pairs)
        ]
        if shared:
            recipe["parameters"] = dict(shared)
    return _finish(recipe, layout, base)


def _finish(recipe: dict[str, Any], layout: Layout, base: str | None) -> dict[str, Any]:
    if base is not None:
        recipe["base_model"] = base
    recipe["dtype"] = layout.dtype
    if layout.tokenizer_source is not None:
        # mergekit reads `base` as the recipe's base_model, which a method without a base does not have.
        alone = layout.tokenizer_source == "base" and base is None
        recipe["tokenizer_source"] = layout.base_model if alone else layout.tokenizer_source
    return recipe


def _is_one(grid: Grid) -> bool:
    return len(grid) == 1 and len(grid[0]) == 1


def _setting(grid: Grid, layout: Layout, group: int | None) -> Any:
    """The mergekit setting of one parameter, for one group, or as a gradient over all (`group` None)."""
    if _is_one(grid):
        return grid[0][0]

    def over_groups(index: int) -> Any:
        if group is not None:
            return grid[group][index]
        values = [row[index] for row in grid]
        return values[0] if len(values) == 1 else values

    if layout.sets == 1:
        return over_groups(0)
    named = [{"filter": name, "value": over_groups(index)} for index, name in enumerate(layout.filters)]
    return [*named, {"value": over_groups(layout.sets - 1)}]


def value_at(grid: Grid, group: int, index: int) -> Any:
    """The value for a layer group and a filter set."""
    return grid[0][0] if _is_one(grid) else grid[group][index]


def check_sums(method: Method, layout: Layout, grids: Grids) -> None:
    """Refuse weights that are divided by their sum where that sum is nothing, or changes its sign on the way.

    mergekit divides without a check: an exact zero gives NaN in every tensor (linear, multislerp), a
    small sum weights of any size. Such a trial fails before anything is merged. Methods that elect signs
    divide element by element and guard that themselves.

    Raises:
        StageError: Stage `merge`, with the sum and where it is.
    """
    flag = grids.get(("normalize", None), grids.get(("normalize_weights", None)))
    if method.consensus or flag is None or not flag[0][0]:
        return
    weights = [grid for (name, model), grid in grids.items() if name == "weight" and model is not None]
    for index in range(layout.sets):
        signs = set()
        for group in range(layout.groups):
            values = [float(value_at(grid, group, index)) for grid in weights]
            total, size = sum(values), sum(abs(value) for value in values)
            signs.add(total > 0)
            if abs(total) <= MIN_SUM * size or size == 0:
                raise StageError(
                    "merge",
                    f"the weights {values} of layers {layout.layer_range(group)} sum to {total:.3g}, and "
                    f"{method.name} with normalize divides by that; set `normalize: false` or other weights",
                )
        if layout.smooth and len(signs) > 1:
            raise StageError(
                "merge",
                f"the sum of the weights changes its sign between layer groups, so that {method.name} with "
                "normalize and smooth would divide by nothing between them; set `normalize: false`",
            )
