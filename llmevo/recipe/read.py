"""A mergekit configuration -> the point of a space that gives the same merge, if there is one.

mergekit's own resolver says what a recipe sets for each tensor. Two recipes are the same merge if it says the
same for every tensor; so however a warm start was written (models, slices, gradients, filters, a value for
all), it is recognised, and nothing is taken for equal that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from llmevo.errors import GenomeError, SpaceError, StageError
from llmevo.recipe.methods import Method
from llmevo.recipe.space import Cells
from llmevo.recipe.write import Key, Layout
from llmevo.space import Params, Space

# The tensors of a layer in Llama's names, which mergekit's filters are written for.
_IN_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
_TOLERANCE = 1e-6

# What a recipe sets for one tensor: (base model, parameter, model or None) -> value.
_Settings: TypeAlias = dict[tuple[str, str | None], Any]


def settings(recipe: Mapping[str, Any], layout: Layout, method: Method) -> dict[str, _Settings] | None:
    """What `recipe` sets, by tensor name; None if it moves layers or does not fit the models.

    Raises:
        GenomeError: `recipe` is not a mergekit configuration.
    """
    from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
    from pydantic import ValidationError

    try:
        config = MergeConfiguration.model_validate(dict(recipe))
    except (ValidationError, RuntimeError) as error:
        raise GenomeError(
            "a warm start must be a mergekit configuration, but mergekit refuses it: "
            + " ".join(str(error).split())
        ) from None
    whole = (0, layout.num_layers)
    if config.models:
        sources = [
            InputSliceDefinition(model=m.model, layer_range=whole, parameters=m.parameters)
            for m in config.models
        ]
        if config.base_model is not None and all(s.model != config.base_model for s in sources):
            sources.append(InputSliceDefinition(model=config.base_model, layer_range=whole))
        slices = [OutputSliceDefinition(sources=sources)]
    else:
        slices = config.slices or []
    found: dict[str, _Settings] = {}
    first = 0
    for number, part in enumerate(slices):
        end = part.sources[0].layer_range[1]
        if any(source.layer_range != (first, end) for source in part.sources):
            return None
        reader = ConfigReader(config=config, slice_out=part, t=0)
        if number == 0:
            found["model.embed_tokens.weight"] = _resolve(reader, part, method, "model.embed_tokens.weight")
        for layer in range(first, end):
            at = reader.with_t((layer - first) / (end - first - 1) if end - first > 1 else 1)
            for name in _layer_tensors(layout, layer):
                found[name] = _resolve(at, part, method, name)
        if number == len(slices) - 1:
            for name in ("model.norm.weight", "lm_head.weight"):
                found[name] = _resolve(reader, part, method, name)
        first = end
    if first != layout.num_layers or any(not value for value in found.values()):
        return None
    return found


def _layer_tensors(layout: Layout, layer: int) -> list[str]:
    # A filter that is in none of Llama's names gets a name of its own, so that its value is compared, too.
    names = [*_IN_LAYER, *(name for name in layout.filters if not any(name in known for known in _IN_LAYER))]
    return [f"model.layers.{layer}.{name}.weight" for name in names]


def _resolve(reader: Any, part: Any, method: Method, tensor: str) -> _Settings:
    """What mergekit's resolver finds for one tensor; empty if the recipe lacks a parameter."""
    from mergekit.merge_methods import get
    from mergekit.parameter_resolver import resolve_parameters

    base = None if method.base == "ignored" else reader.base_model
    try:
        shared, own = resolve_parameters(
            get(method.name).spec,
            tensor_name=tensor,
            inputs={source.model: tensor for source in part.sources},
            sources=reader.parameter_sources,
            base_model=base,
            t=reader.t,
        )
    except (RuntimeError, ValueError):
        return {}
    found: _Settings = {("base_model", None): None if base is None else str(base)}
    found |= {(name, None): value for name, value in shared.items() if name in method.parameters}
    for model, values in own.items():
        found["input", str(model)] = True
        found |= {(n, str(model)): value for n, value in values.items() if n in method.parameters}
    if base is not None and any(source.model == base for source in part.sources):
        found["input", str(base)] = True
    found.pop(("int8_mask", None), None)
    return found


def _same(a: dict[str, _Settings], b: dict[str, _Settings]) -> bool:
    if a.keys() != b.keys():
        return False
    for name, ours in a.items():
        theirs = b[name]
        if ours.keys() != theirs.keys():
            return False
        for key, value in ours.items():
            other = theirs[key]
            number = isinstance(value, float) and isinstance(other, (int, float))
            if abs(value - other) > _TOLERANCE if number else value != other:
                return False
    return True


def read_params(
    recipe: Mapping[str, Any],
    layout: Layout,
    methods: Mapping[str, Method],
    cells: Mapping[str, Mapping[Key, Cells]],
    space: Space,
    write: Callable[[Params], dict[str, Any]],
) -> Params | None:
    """The point of `space` that gives the same merge as `recipe`; None if there is none.

    Args:
        recipe: A mergekit configuration.
        layout: Of the space's recipes.
        methods: The space's methods.
        cells: Where each value of a recipe comes from, by method.
        space: The space.
        write: The recipe at a point of the space.

    Raises:
        GenomeError: `recipe` is not a mergekit configuration.
    """
    name = str(recipe.get("merge_method"))
    if name not in methods or recipe.get("dtype") not in (None, layout.dtype):
        return None
    target = settings(recipe, layout, methods[name])
    if target is None:
        return None
    point: dict[str, Any] = {"merge_method": name} if "merge_method" in space.genes else {}
    for (parameter, model), grid in cells[name].items():
        for index in range(len(grid[0])):
            column = [row[index] for row in grid]
            if column[0].name is None:
                continue
            values = _column(
                target, layout, (parameter, model), index if len(grid[0]) > 1 else None, len(column)
            )
            if values is None:
                return None
            point |= {str(cell.name): value for cell, value in zip(column, values, strict=True)}
    try:
        inactive = {gene: None for gene in space.names if gene not in point}
        params = space.validate(point | inactive)
        mine = settings(write(params), layout, methods[name])
    except (SpaceError, StageError):
        return None
    return params if mine is not None and _same(target, mine) else None


def _column(
    target: dict[str, _Settings], layout: Layout, key: Key, index: int | None, points: int
) -> list[Any] | None:
    """The values of one parameter for each layer group (or point of a gradient) in one filter set."""
    values: list[Any] = []
    for layer in range(layout.num_layers):
        names = [n for n in _layer_tensors(layout, layer) if index is None or _set(n, layout) == index]
        if not names or key not in target[names[0]]:
            return None
        values.append(target[names[0]][key])
    if points == 1:
        return values[:1]
    if not layout.smooth:
        return values[:: layout.step]
    # Layer l sits at l / (L - 1) of the gradient; solve for the points that give the layers' values.
    at = np.arange(layout.num_layers) / (layout.num_layers - 1) * (points - 1)
    hats = np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(points)))
    solved: list[Any] = np.linalg.lstsq(hats, np.asarray(values, dtype=float))[0].tolist()
    return solved


def _set(tensor: str, layout: Layout) -> int:
    """Which filter set a tensor falls into; the last one if no filter is in its name."""
    return next((i for i, name in enumerate(layout.filters) if name in tensor), len(layout.filters))
