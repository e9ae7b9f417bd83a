"""The merge in memory against mergekit's run_merge on the same recipe: bit for bit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from llmevo.errors import GenomeError, StageError
from llmevo.genome import MergeSpec
from llmevo.merge import Merger

torch = pytest.importorskip("torch")

# Methods on task vectors: the parameters of each model besides its weight.
_TASK_VECTORS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"density": [0.3, 0.9]},
    "dare_ties": {"density": 0.6},
    "dare_linear": {"density": [0.4, 0.8]},
    "della": {"density": 0.5, "epsilon": 0.2},
    "della_linear": {"density": 0.7, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.8, "gamma": 0.05},
}


def _smooth(spec: MergeSpec, method: str, **extra: Any) -> dict[str, Any]:
    """One gradient over the layers for each model, as mergekit-evolve's `smooth` writes it."""
    weights = ([0.1, 0.9, 0.4], [0.7, 0.2], [0.5, -0.3, 0.6, 0.2])
    return {
        "merge_method": method,
        "base_model": spec.base_model,
        "models": [
            {"model": m, "parameters": {"weight": w, **extra}}
            for m, w in zip(spec.models, weights, strict=True)
        ],
        "parameters": {"normalize": False, "int8_mask": True},
        "dtype": "bfloat16",
    }


def _grouped(spec: MergeSpec, method: str, **extra: Any) -> dict[str, Any]:
    """Two layer groups with filters; the base stands in each slice without parameters."""

    def weight(i: int, group: int) -> list[dict[str, Any]]:
        return [
            {"filter": "self_attn", "value": 0.2 + 0.3 * i},
            {"filter": "mlp", "value": 0.7 - 0.2 * group},
            {"value": 0.4 + 0.1 * i + 0.2 * group},
        ]

    return {
        "merge_method": method,
        "base_model": spec.base_model,
        "slices": [
            {
                "sources": [
                    *(
                        {
                            "model": m,
                            "layer_range": [2 * g, 2 * g + 2],
                            "parameters": {"weight": weight(i, g), **extra},
                        }
                        for i, m in enumerate(spec.models)
                    ),
                    {"model": spec.base_model, "layer_range": [2 * g, 2 * g + 2]},
                ]
            }
            for g in (0, 1)
        ],
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }


def _plain(spec: MergeSpec, method: str, count: int, base: bool, **shared: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": m} for m in spec.models[:count]],
        "parameters": shared,
        "dtype": "bfloat16",
    }
    return recipe | ({"base_model": spec.base_model} if base else {})


def _weighted(recipe: dict[str, Any]) -> dict[str, Any]:
    for i, model in enumerate(recipe["models"]):
        model["parameters"] = {"weight": [0.3 + 0.2 * i, 0.8]}
    return recipe


def _slerp(spec: MergeSpec) -> dict[str, Any]:
    """As mergekit-evolve writes it: each group has its own two models and its own base."""
    a, b, c = spec.models
    groups = [(a, b, 0.3), (b, c, 0.45), (c, a, 0.1), (b, a, 0.5)]
    return {
        "merge_method": "slerp",
        "slices": [
            {
                "sources": [{"model": m, "layer_range": [i, i + 1]} for m in (x, y)],
                "base_model": x,
                "parameters": {"t": t},
            }
            for i, (x, y, t) in enumerate(groups)
        ],
        "dtype": "bfloat16",
    }


def _recipes(spec: MergeSpec) -> dict[str, dict[str, Any]]:
    recipes = {f"{m}-smooth": _smooth(spec, m, **_TASK_VECTORS[m]) for m in ("task_arithmetic", "dare_ties")}
    recipes |= {f"{m}-grouped": _grouped(spec, m, **extra) for m, extra in _TASK_VECTORS.items()}
    recipes |= {
        "linear": _weighted(_plain(spec, "linear", 3, False, normalize=True)),
        "slerp": _slerp(spec),
        "nuslerp": _weighted(_plain(spec, "nuslerp", 2, False)),
        "nuslerp-base": _weighted(_plain(spec, "nuslerp", 2, True, nuslerp_row_wise=True)),
        "multislerp": _weighted(_plain(spec, "multislerp", 3, True)),
        "karcher": _plain(spec, "karcher", 3, False, max_iter=5),
        "model_stock": _plain(spec, "model_stock", 3, True),
        "sce": _plain(spec, "sce", 3, True, select_topk=[0.2, 0.8]),
        "arcee_fusion": _plain(spec, "arcee_fusion", 1, True),
        "nearswap": _plain(spec, "nearswap", 1, True, t=0.01),
        "passthrough": _plain(spec, "passthrough", 1, False),
        "float32": _smooth(spec, "task_arithmetic") | {"dtype": "float32"},
        "out_dtype": _smooth(spec, "task_arithmetic") | {"dtype": "float32", "out_dtype": "bfloat16"},
        "no dtype": {k: v for k, v in _smooth(spec, "ties").items() if k != "dtype"},
    }
    return recipes


_NAMES = sorted(
    _recipes(MergeSpec(models=["a", "b", "c"], base_model="base")),
)


@pytest.mark.parametrize("name", _NAMES)
def test_merge_equals_mergekit(name: str, spec, merger, run_mergekit, tmp_path) -> None:
    recipe = _recipes(spec)[name]
    expected = run_mergekit(recipe, tmp_path / "out", seed=5)
    for parameter in merger.model.parameters():
        parameter.zero_()
    before = torch.get_rng_state()
    written = merger.merge(recipe, seed=5, exact=True)
    assert torch.equal(before, torch.get_rng_state())
    state = merger.model.state_dict()
    assert expected.keys() == state.keys() - {"lm_head.weight"}
    different = [key for key in expected if not torch.equal(expected[key].to(torch.bfloat16), state[key])]
    assert different == []
    assert written == sum(t.numel() * 2 for t in expected.values())


def test_masks_follow_the_seed(spec, merger) -> None:
    recipe = _grouped(spec, "dare_ties", **_TASK_VECTORS["dare_ties"])

    def merged(seed: int) -> Any:
        merger.merge(recipe, seed)
        return torch.cat([p.flatten() for p in merger.model.parameters()])

    first, other, again = merged(1), merged(2), merged(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tied_head_stays_the_embedding(spec, merger) -> None:
    merger.merge(_grouped(spec, "task_arithmetic"), seed=0)
    model = merger.model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    out = model(input_ids=torch.tensor([[1, 5, 7]])).logits
    assert bool(torch.isfinite(out).all())


def test_embeddings_use_the_first_group_and_the_norm_the_last(spec, merger, tiny_llamas) -> None:
    """Checked by hand: these tensors have no layer of their own."""
    from safetensors.torch import load_file

    base, *parents = [load_file(p / "model.safetensors") for p in (tiny_llamas.base, *tiny_llamas.parents)]
    merger.merge(_grouped(spec, "task_arithmetic"), seed=0)
    state = merger.model.state_dict()
    for key, group in (("model.embed_tokens.weight", 0), ("model.norm.weight", 1)):
        weights = [0.4 + 0.1 * i + 0.2 * group for i in range(3)]
        delta = sum(
            w * (p[key].float() - base[key].float()) for w, p in zip(weights, parents, strict=True)
        ) / sum(weights)
        assert torch.allclose(state[key].float(), base[key].float() + delta, atol=0.01)


def test_untied_parents(make_tiny_llama, run_mergekit, tmp_path) -> None:
    base = make_tiny_llama(tmp_path / "base", seed=3, tied=False, layers=2, dtype="float32")
    parents = [
        make_tiny_llama(tmp_path / f"p{i}", seed=i, start=base, tied=False, dtype="float32") for i in (1, 2)
    ]
    spec = MergeSpec(models=[str(p) for p in parents], base_model=str(base), dtype="float32")
    recipe = _weighted(_plain(spec, "task_arithmetic", 2, True)) | {"dtype": "float32"}
    expected = run_mergekit(recipe, tmp_path / "out")
    merger = Merger(spec, device="cpu", dtype=torch.float32)
    merger.merge(recipe, seed=0)
    state = merger.model.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(expected[key], state[key]) for key in expected)
    # The head takes the last layer's weight and the embeddings the first's: they must have gone apart.
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_adapters_equal_mergekit_and_are_never_saved(
    tiny_llamas, loras, run_mergekit, tmp_path, monkeypatch
) -> None:
    parents = [f"{tiny_llamas.base}+{lora}" for lora in loras]
    spec = MergeSpec(models=parents, base_model=str(tiny_llamas.base))
    recipe = _weighted(_plain(spec, "dare_ties", 2, True))
    for model in recipe["models"]:
        model["parameters"]["density"] = 1.0
    expected = run_mergekit(recipe, tmp_path / "out")
    from transformers import PreTrainedModel

    monkeypatch.delattr(PreTrainedModel, "save_pretrained")
    before = torch.get_rng_state()
    merger = Merger(spec, device="cpu", dtype="bfloat16")
    assert torch.equal(before, torch.get_rng_state())
    merger.merge(recipe, seed=0, exact=True)
    state = merger.model.state_dict()
    assert all(torch.equal(expected[key], state[key]) for key in expected)


def test_adapter_is_b_times_a_times_scaling(tiny_llamas, loras) -> None:
    """By hand, for the adapter with rsLoRA, rank and alpha patterns."""
    from safetensors.torch import load_file

    name = f"{tiny_llamas.base}+{loras[1]}"
    merger = Merger(MergeSpec(models=[name]), device="cpu", dtype="bfloat16")
    base = load_file(tiny_llamas.base / "model.safetensors")
    factors = load_file(loras[1] / "adapter_model.safetensors")
    state = merger.model.state_dict()
    for module, scaling in (
        ("model.layers.2.self_attn.q_proj", 8 / 2**0.5),
        ("model.layers.3.mlp.down_proj", 3 / 4**0.5),
    ):
        a = factors[f"base_model.model.{module}.lora_A.weight"].float()
        b = factors[f"base_model.model.{module}.lora_B.weight"].float()
        wanted = base[f"{module}.weight"].float() + (b @ a) * scaling
        assert torch.allclose(state[f"{module}.weight"].float(), wanted, atol=2e-3, rtol=1e-2)
        assert not torch.equal(state[f"{module}.weight"], base[f"{module}.weight"])
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])


def test_models_share_what_an_adapter_leaves_alone(tiny_llamas, loras) -> None:
    names = [f"{tiny_llamas.base}+{loras[1]}"]
    merger = Merger(MergeSpec(models=names, base_model=str(tiny_llamas.base), merge_method="ties"))
    one = merger.facts["bytes"]
    changed = 4 * 2 * (64 * 64 + 64 * 128)  # q_proj and down_proj of 4 layers in bfloat16
    assert merger.bytes_held == one + changed


def test_a_weight_that_is_not_finite_is_refused(make_tiny_llama, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_tiny_llama(tmp_path / "nan", seed=1, layers=2)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GenomeError, match=r"nan.*layers\.1\.mlp\.up_proj\.weight.* 1 of 8192 .*NaN"):
        Merger(MergeSpec(models=[str(folder)]), device="cpu", dtype="bfloat16")


def test_overflow_in_the_merge_names_the_tensor(spec, merger) -> None:
    recipe = _plain(spec, "task_arithmetic", 1, True)
    weight = [{"filter": "layers.1.mlp.gate", "value": 3e38}, {"value": 1}]
    recipe["models"][0]["parameters"] = {"weight": weight}
    recipe["parameters"] = {"lambda": 1e6}
    with pytest.raises(StageError, match=r"merge: tensor `model\.\S+` has values that are NaN or infinite"):
        merger.merge(recipe, seed=0)
    merger.merge(_plain(spec, "passthrough", 1, False), seed=0)
    assert all(bool(torch.isfinite(p).all()) for p in merger.model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "nonsense"}, "nonsense"),
        ({"models": [{"model": "elsewhere"}]}, "`elsewhere`, which is not in the genome"),
        ({"models": None}, "Exactly one of"),
        ({"base_model": None}, "base"),
        ({"parameters": {"normalize": "perhaps"}}, "bool"),
    ],
)
def test_a_wrong_recipe_is_a_failed_trial(change, message: str, spec, merger) -> None:
    with pytest.raises(StageError, match=message) as caught:
        merger.merge(_smooth(spec, "task_arithmetic") | change, seed=0)
    assert caught.value.stage == "merge"
    assert "\n" not in caught.value.reason


def test_slices_must_fill_the_model(spec, merger) -> None:
    recipe = _grouped(spec, "task_arithmetic")
    recipe["slices"].pop()
    with pytest.raises(StageError, match="no weights for 18 tensors"):
        merger.merge(recipe, seed=0)


def test_dtype_that_would_lose_bits_is_refused(make_tiny_llama, tmp_path) -> None:
    """The parent has float32 weights and the genome says bfloat16: mergekit in float32 sees other inputs."""
    folder = make_tiny_llama(tmp_path / "m", seed=1, layers=2, dtype="float32")
    merger = Merger(MergeSpec(models=[str(folder)], dtype="bfloat16"), device="cpu", dtype="float32")
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}], "dtype": "float32"}
    with pytest.raises(StageError, match="`dtype` must be bfloat16"):
        merger.merge(recipe, seed=0)
    merger.merge(recipe | {"dtype": "bfloat16"}, seed=0)


def test_sharded_parents_and_paths_with_odd_characters(make_tiny_llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    whole = make_tiny_llama(tmp_path / "whole", seed=1, layers=2)
    shards = tmp_path / "in shards"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(shards, max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    spec = MergeSpec(models=[str(whole), str(shards)])
    merger = Merger(spec, device="cpu", dtype="bfloat16")
    assert merger.bytes_held == merger.facts["bytes"]
    merger.merge(_weighted(_plain(spec, "linear", 2, False)), seed=0)
    expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    assert all(torch.allclose(expected[k], v, rtol=0.01) for k, v in merger.model.state_dict().items())


def test_import_is_light() -> None:
    code = (
        "import sys, llmevo.merge; "
        "print([m for m in ('torch', 'transformers', 'mergekit', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
