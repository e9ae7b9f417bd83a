"""The fast mode against the exact one, within the bounds that `llmevo.merge` states."""

from __future__ import annotations

from typing import Any

import pytest

from llmevo.genome import MergeSpec
from llmevo.merge import Merger

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def spec(tiny_llamas) -> MergeSpec:
    return MergeSpec(models=[str(p) for p in tiny_llamas.parents], base_model=str(tiny_llamas.base))


@pytest.fixture(scope="module")
def merger(spec) -> Merger:
    return Merger(spec)


def recipe_of(spec: MergeSpec, method: str, *, count: int = 3, **shared: Any) -> dict[str, Any]:
    """Two layer groups with filters, gradients and a negative weight; the base is not listed."""

    def source(i: int, group: int) -> dict[str, Any]:
        weight = [
            {"filter": "self_attn", "value": [0.2 + 0.3 * i, 0.6]},
            {"filter": "mlp.up", "value": -0.4},
            {"value": 0.4 + 0.1 * i + 0.2 * group},
        ]
        return {
            "model": spec.models[i],
            "layer_range": [2 * group, 2 * group + 2],
            "parameters": {"weight": weight},
        }

    base = {"model": spec.base_model}
    return {
        "merge_method": method,
        "base_model": spec.base_model,
        "slices": [
            {"sources": [*(source(i, g) for i in range(count)), base | {"layer_range": [2 * g, 2 * g + 2]}]}
            for g in (0, 1)
        ],
        "parameters": shared,
        "dtype": spec.dtype,
    }


def linear(spec: MergeSpec, *, normalize: bool = True) -> dict[str, Any]:
    models = [{"model": m, "parameters": {"weight": [0.3 + 0.2 * i, 0.8]}} for i, m in enumerate(spec.models)]
    shared = {"normalize": normalize}
    return {"merge_method": "linear", "models": models, "parameters": shared, "dtype": spec.dtype}


def models_of(spec: MergeSpec, method: str, count: int, *, base: bool, **shared: Any) -> dict[str, Any]:
    parts = [
        {"model": m, "parameters": {"weight": [0.3 + 0.2 * i, 0.8]}}
        for i, m in enumerate(spec.models[:count])
    ]
    recipe = {"merge_method": method, "models": parts, "parameters": shared, "dtype": spec.dtype}
    return recipe | ({"base_model": spec.base_model} if base else {})


def state(merger: Merger) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in merger.model.named_parameters()}


def worst(merger: Merger, recipe: dict[str, Any], digits: int = 8) -> float:
    """The largest difference between the modes, in units in the last of `digits` bits of the result."""
    merger.merge(recipe, seed=1, exact=True)
    exact = state(merger)
    written = merger.merge(recipe, seed=1)
    assert written == sum(t.numel() * t.element_size() for t in exact.values())
    units = []
    for name, fast in state(merger).items():
        a, b = fast.double(), exact[name].double()
        unit = torch.exp2(torch.floor(torch.log2(b.abs().clamp(min=1e-30))) - digits + 1)
        units.append(float(((a - b).abs() / unit.clamp(min=2.0**-12)).max()))
    return max(units)


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(spec, merger, normalize: bool) -> None:
    assert worst(merger, linear(spec, normalize=normalize)) <= 1


@pytest.mark.parametrize("shared", [{}, {"normalize": True, "lambda": 0.7}])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_task_arithmetic(spec, merger, count: int, shared: dict[str, Any]) -> None:
    assert worst(merger, recipe_of(spec, "task_arithmetic", count=count, **shared)) <= 2


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, [0.2, 0.9]])
@pytest.mark.parametrize("base", [0, 1])
def test_slerp(spec, merger, base: int, t: Any) -> None:
    recipe = models_of(spec, "slerp", 2, base=False, t=t) | {"base_model": spec.models[base]}
    assert worst(merger, recipe) <= 1


@pytest.mark.parametrize(
    ("method", "count", "base", "shared", "units"),
    [
        ("nuslerp", 2, False, {}, 4),
        ("nuslerp", 2, True, {}, 6),
        ("multislerp", 3, True, {}, 6),
        ("multislerp", 3, False, {}, 6),
        ("multislerp", 1, True, {}, 0),
        ("multislerp", 2, True, {"normalize_weights": False}, 6),
        ("karcher", 3, False, {}, 6),
        ("karcher", 3, False, {"max_iter": 1, "tol": 1e-3}, 6),
        ("model_stock", 3, True, {}, 6),
    ],
)
def test_spherical_methods(spec, merger, method, count, base, shared, units) -> None:
    """mergekit computes them in bfloat16, rounding after each operation: the bound is its error, not ours."""
    assert worst(merger, models_of(spec, method, count, base=base, **shared)) <= units


@pytest.mark.parametrize(
    ("method", "count", "base", "shared"),
    [
        ("slerp", 2, False, {"t": 0.3}),
        ("nuslerp", 2, False, {}),
        ("nuslerp", 2, True, {}),
        ("multislerp", 3, True, {}),
        ("multislerp", 3, False, {}),
        ("karcher", 3, False, {}),
        ("model_stock", 3, True, {}),
    ],
)
def test_spherical_methods_in_float32(spec, tiny_llamas, method, count, base, shared) -> None:
    """Where mergekit computes in float32, so that its own rounding is out of the way."""
    full = spec.model_copy(update={"dtype": "float32"})
    recipe = models_of(full, method, count, base=base, **shared)
    if method == "slerp":
        recipe["base_model"] = full.models[0]
    assert worst(Merger(full, dtype="float32"), recipe, digits=24) <= 64
