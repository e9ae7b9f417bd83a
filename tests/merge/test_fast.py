"""The fast mode against the exact one, within the bounds that `llmevo.merge` states."""

from __future__ import annotations

from typing import Any

import pytest

from llmevo.errors import GenomeError, StageError
from llmevo.genome import MergeSpec, MergeStageSpec
from llmevo.merge import Merger

torch = pytest.importorskip("torch")


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
        ("karcher", 3, False, {"tol": 0.0}),
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


def test_only_what_changed_is_written(spec, merger) -> None:
    recipe = recipe_of(spec, "task_arithmetic")
    merger.merge(recipe, seed=0, exact=True)
    assert merger.merge(recipe, seed=0) == merger.facts["bytes"]
    assert merger.merge(recipe, seed=0) == 0
    before = state(merger)
    changed = recipe_of(spec, "task_arithmetic")
    changed["slices"][1]["sources"][0]["parameters"]["weight"][1]["value"] = 0.9
    ups = [name for name in before if "mlp.up" in name and name.split(".")[2] in "23"]
    assert merger.merge(changed, seed=0) == sum(before[name].numel() * 2 for name in ups)
    after = state(merger)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ups
    merger.merge(recipe, seed=0, exact=True)
    merger.merge(changed, seed=0)
    assert all(torch.equal(after[name], tensor) for name, tensor in state(merger).items())


def test_a_failed_merge_is_forgotten_and_parameters_stay_where_they_are(spec, merger) -> None:
    pointers = [p.data_ptr() for p in merger.model.parameters()]
    good = models_of(spec, "linear", 3, base=False)
    merger.merge(good, seed=0)
    before = state(merger)
    bad = models_of(spec, "linear", 3, base=False, normalize=False)
    bad["models"][0]["parameters"]["weight"] = [{"filter": "layers.2", "value": 3e38}, {"value": 1.0}]
    bad["models"][1]["parameters"]["weight"] = [{"filter": "layers.2", "value": 3e38}, {"value": 1.0}]
    with pytest.raises(StageError, match=r"merge: tensor `model\.layers\.2\.\S+` has values that are NaN"):
        merger.merge(bad, seed=0)
    assert merger.merge(good, seed=0) == merger.facts["bytes"]
    assert all(torch.equal(before[name], tensor) for name, tensor in state(merger).items())
    assert pointers == [p.data_ptr() for p in merger.model.parameters()]
    assert merger.model.lm_head.weight.data_ptr() == merger.model.model.embed_tokens.weight.data_ptr()


def test_weights_that_cancel_are_a_failed_trial(spec, merger) -> None:
    recipe = models_of(spec, "linear", 2, base=False, normalize=True)
    for part, weight in zip(recipe["models"], (1.0, -1.0), strict=True):
        part["parameters"] = {"weight": weight}
    with pytest.raises(StageError, match="NaN or infinite"):
        merger.merge(recipe, seed=0)


@pytest.mark.parametrize(
    ("parents", "resident"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16"), ("bfloat16", "float16")],
)
def test_dtypes(make_tiny_llama, tmp_path, parents: str, resident: str) -> None:
    """Untied models; the result is rounded to the recipe's dtype and then cast, as the exact mode does."""
    base = make_tiny_llama(tmp_path / "base", seed=3, tied=False, layers=2, dtype=parents)
    others = [
        make_tiny_llama(tmp_path / f"p{i}", seed=i, start=base, tied=False, dtype=parents) for i in (1, 2)
    ]
    spec = MergeSpec(models=[str(p) for p in others], base_model=str(base), dtype=parents)
    made = Merger(spec, dtype=resident)
    for method, based in (("linear", False), ("task_arithmetic", True)):
        digits = 11 if "float16" in (parents, resident) and "bfloat16" not in (parents, resident) else 8
        assert worst(made, models_of(spec, method, 2, base=based), digits=digits) <= 2
    state_dict = made.model.state_dict()
    assert not torch.equal(state_dict["lm_head.weight"], state_dict["model.embed_tokens.weight"])


def test_adapters_are_merged_where_they_changed_something(tiny_llamas, loras) -> None:
    """As factors, and as the matrices that a masked method in the genome needs."""
    names = [f"{tiny_llamas.base}+{lora}" for lora in loras]
    changed = 4 * 2 * (64 * 64 + 64 * 128)
    for methods in (["task_arithmetic"], ["task_arithmetic", "ties"]):
        spec = MergeSpec(models=names, base_model=str(tiny_llamas.base), merge_method=methods)
        made = Merger(spec)
        assert (made.memory["models"][names[1]]["bytes"] == changed) == ("ties" in methods)
        recipe = models_of(spec, "task_arithmetic", 2, base=True)
        made.merge(recipe, seed=0, exact=True)
        exact = state(made)
        made.merge(recipe, seed=0)
        assert all(
            torch.allclose(exact[n].float(), t.float(), atol=2e-3, rtol=2**-7) for n, t in state(made).items()
        )
        recipe["models"][1]["parameters"]["weight"] = [0.1, 0.2]
        assert made.merge(recipe, seed=0) == changed


def test_streamed_models_stay_in_their_files(spec, merger) -> None:
    streamed = Merger(spec, MergeStageSpec(memory="streamed"))
    assert streamed.memory["mode"] == "streamed"
    assert {m["where"] for m in streamed.memory["models"].values()} == {"file"}
    assert streamed.bytes_held == 0
    assert merger.memory["mode"] == "resident"
    assert merger.memory["needed"] == merger.bytes_held + merger.facts["bytes"]
    for recipe in (recipe_of(spec, "task_arithmetic"), models_of(spec, "ties", 3, base=True, density=0.5)):
        streamed.merge(recipe, seed=0)
        merger.merge(recipe, seed=0)
        theirs = state(merger)
        assert all(torch.equal(theirs[name], tensor) for name, tensor in state(streamed).items())


def test_too_little_memory_is_said_before_loading(spec, monkeypatch) -> None:
    from llmevo.merge import memory

    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(GenomeError, match=r"`merge\.memory` is resident, but"):
        Merger(spec, MergeStageSpec(memory="resident"))
    assert Merger(spec).memory["mode"] == "streamed"


def test_identity(spec, merger, tmp_path) -> None:
    import shutil

    recipe = recipe_of(spec, "task_arithmetic")
    name = merger.identity(recipe, 0)
    int(name, 16)
    assert merger.identity(recipe | {"tokenizer_source": "base"}, 1) == name
    assert Merger(spec).identity(recipe, 0) == name
    # A gradient with one value twice, and the same value written as a whole number.
    ones = [recipe_of(spec, "task_arithmetic", **{"lambda": value}) for value in (1, 1.0, [1.0, 1.0])]
    assert len({merger.identity(one, 0) for one in ones}) == 1
    others = [
        merger.identity(recipe, 0, exact=True),
        merger.identity(recipe_of(spec, "task_arithmetic", **{"lambda": 0.5}), 0),
        merger.identity(models_of(spec, "linear", 3, base=False), 0),
        merger.identity(models_of(spec, "dare_linear", 2, base=True, density=0.5), 0),
        merger.identity(models_of(spec, "dare_linear", 2, base=True, density=0.5), 1),
        Merger(spec, dtype="float32").identity(recipe, 0),
        name,
    ]
    assert len(set(others)) == len(others)
    # Copies of the models elsewhere are the same models.
    moved = {
        m: str(shutil.copytree(m, tmp_path / f"m{i}")) for i, m in enumerate([spec.base_model, *spec.models])
    }
    copy = MergeSpec(models=[moved[m] for m in spec.models], base_model=moved[spec.base_model])
    assert Merger(copy).identity(recipe_of(copy, "task_arithmetic"), 0) == name


def test_identity_of_exact_and_generic_merges_is_one(spec, merger) -> None:
    """A method without a fast form is merged exactly, whatever is asked for."""
    recipe = models_of(spec, "nuslerp", 2, base=False, nuslerp_flatten=False)
    assert merger.identity(recipe, 0) == merger.identity(recipe, 0, exact=True)
