"""Resolved parameters against those of mergekit's planner, on random recipes of every fast method."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmevo.merge import Merger, plan, weights

torch = pytest.importorskip("torch")

from llmevo.merge.fast import METHODS  # noqa: E402
from llmevo.merge.masks import METHODS as MASKED  # noqa: E402

_NUMBER = st.one_of(st.floats(-2, 2, width=32), st.integers(-2, 2))
_SIMPLE = st.one_of(_NUMBER, st.lists(_NUMBER, min_size=1, max_size=4))
_FILTERS = st.sampled_from(["self_attn", "mlp", "layers.1.", "norm", "embed", "*", "nowhere"])
_SETTING = st.one_of(
    _SIMPLE,
    st.builds(
        lambda parts, last: [*({"filter": f, "value": v} for f, v in parts), {"value": last}],
        st.lists(st.tuples(_FILTERS, _SIMPLE), max_size=3),
        _SIMPLE,
    ),
)


@st.composite
def _recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe with `{0}`, `{1}`, ... for models and `{b}` for the base."""
    method = draw(st.sampled_from(sorted([*METHODS, *MASKED])))
    count = 2 if method in ("slerp", "nuslerp") else 3
    shared = {"slerp": ["t"], "multislerp": ["eps"], "karcher": ["tol"]}.get(method, [])
    own = [] if method in ("slerp", "karcher", "model_stock") else ["weight"]
    if method in MASKED:
        shared, own = ["lambda"], ["weight", "density"]
    # A model's own setting, a slice's or the recipe's: the most specific one that says something counts.
    top = {name: draw(_SETTING) for name in [*shared, *own]}
    parts = [{name: draw(_SETTING) for name in own if draw(st.booleans())} for _ in range(count)]
    models = [{"model": f"{{{i}}}", "parameters": part} for i, part in enumerate(parts)]
    recipe: dict[str, Any] = {"merge_method": method, "parameters": top, "dtype": "bfloat16"}
    if method == "slerp":
        recipe["base_model"] = "{0}"
    elif method not in ("linear", "nuslerp", "karcher"):
        recipe["base_model"] = "{b}"
    if not draw(st.booleans()):
        return recipe | {"models": models}
    slices = []
    for low, high in ((0, 1), (1, 4)):
        sources = [model | {"layer_range": [low, high]} for model in models]
        if recipe.get("base_model") == "{b}":
            sources.append({"model": "{b}", "layer_range": [low, high]})
        own_part = {name: draw(_SETTING) for name in shared if draw(st.booleans())}
        slices.append({"sources": sources, "parameters": own_part})
    return recipe | {"slices": slices}


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=_recipes(), numbers=st.lists(_NUMBER, min_size=40, max_size=40))
def test_parameters_are_those_of_the_planner(spec, merger, recipe, numbers) -> None:
    """Also of a second recipe of the same structure, whose numbers alone are new."""
    text = json.dumps(recipe).replace('"{b}"', json.dumps(spec.base_model))
    for i, model in enumerate(spec.models):
        text = text.replace(f'"{{{i}}}"', json.dumps(model))
    first = json.loads(text)
    _compare(merger, first)
    _compare(merger, _renumbered(first, iter(numbers * 10)))


def _compare(merger: Merger, recipe: dict[str, Any]) -> None:
    with weights.loaders(merger._loaders):
        resolved = merger._resolver.resolve(recipe)
        traced = plan.trace(*merger._plannable(recipe))
    assert resolved is not None
    for row, (target, entry) in enumerate(zip(resolved.skeleton.targets, traced, strict=True)):
        task = entry.step.task
        assert target.name == entry.step.name
        assert target.models == task.model_order
        for name, value in task.parameters.items():
            if name in resolved.values:
                assert float(resolved.values[name][row, 0]) == value
            else:
                assert target.constants[name] == value
        for column, model in enumerate(task.model_order):
            for name, value in (task.input_parameters.get(model, {})).items():
                assert float(resolved.values[name][row, column]) == value


def _renumbered(part: Any, numbers: Any) -> Any:
    if isinstance(part, dict):
        return {k: v if k == "layer_range" else _renumbered(v, numbers) for k, v in part.items()}
    if isinstance(part, list):
        return [_renumbered(entry, numbers) for entry in part]
    return next(numbers) if isinstance(part, int | float) else part


def test_the_planner_is_asked_once_for_a_structure(spec, merger, monkeypatch) -> None:
    def recipe(weight: float) -> dict[str, Any]:
        models = [{"model": m, "parameters": {"weight": [weight, 0.5]}} for m in spec.models]
        return {"merge_method": "linear", "models": models, "dtype": "bfloat16"}

    asked = []
    trace = plan.trace
    monkeypatch.setattr(plan, "trace", lambda *given, **named: asked.append(given) or trace(*given, **named))
    merger.merge(recipe(0.1), seed=0)
    before = len(asked)
    merger.merge(recipe(0.2), seed=0)
    assert len(asked) == before


@pytest.mark.parametrize("value", [True, "0.5", {"value": {"value": 1}}])
def test_unknown_forms_are_left_to_the_planner(spec, merger, value: Any) -> None:
    models = [{"model": m, "parameters": {"weight": value}} for m in spec.models]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    with weights.loaders(merger._loaders):
        assert merger._resolver.resolve(recipe) is None
