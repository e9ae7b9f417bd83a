"""Adapters that stay factors: against mergekit, against the matrices that they stand for, and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo.errors import GenomeError
from llmevo.genome import MergeSpec, MergeStageSpec
from llmevo.merge import Merger

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from llmevo.merge import adapters  # noqa: E402
from llmevo.merge.layout import Arena  # noqa: E402
from llmevo.merge.numba_engine import NumbaEngine  # noqa: E402
from llmevo.merge.references import locate  # noqa: E402
from llmevo.merge.torch_engine import TorchEngine  # noqa: E402
from llmevo.merge.works import Product, Sum, Term  # noqa: E402


@pytest.fixture(scope="module")
def names(tiny_llamas, loras) -> list[str]:
    return [f"{tiny_llamas.base}+{lora}" for lora in loras]


def recipe_of(method: str, models: list[str], base: str | None = None, **shared: Any) -> dict[str, Any]:
    weighted = method not in ("slerp", "karcher", "model_stock")
    parts: list[dict[str, Any]] = [{"model": m} for m in models]
    for i, part in enumerate(parts if weighted else []):
        part["parameters"] = {"weight": [0.9 - 0.3 * i, 0.4]}
    recipe = {"merge_method": method, "models": parts, "parameters": shared, "dtype": "bfloat16"}
    return recipe | ({"base_model": base} if base else {})


def state(merger: Merger) -> dict[str, Any]:
    return {name: p.detach().float().clone() for name, p in merger.model.named_parameters()}


def unit(tensor: Any) -> Any:
    """The last place of a bfloat16."""
    return torch.exp2(torch.floor(torch.log2(tensor.abs().clamp(min=2.0**-30))) - 7)


def files(folder: Path, pattern: str = "*.safetensors") -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: t for file in folder.glob(pattern) for key, t in load_file(file).items()}


def test_weights_are_mergekit_s_but_for_the_rounding_of_each_parent(
    tiny_llamas, loras, names, run_mergekit, tmp_path
) -> None:
    """mergekit rounds base + product to the models' dtype first: half a unit for each, times its weight."""
    merger = Merger(MergeSpec(models=names, base_model=str(tiny_llamas.base)))
    recipe = recipe_of("task_arithmetic", names, str(tiny_llamas.base))
    weights = [0.75, 0.25]
    for part, weight in zip(recipe["models"], weights, strict=True):
        part["parameters"]["weight"] = weight
    expected = run_mergekit(recipe, tmp_path / "out")
    merger.merge(recipe, seed=0)
    base, ours = files(tiny_llamas.base), state(merger)
    held = [
        adapters.load(where, adapters._scales(where), Arena(), torch.device("cpu"))
        for where in map(locate, names)
    ]
    changed = 0
    for key, theirs in expected.items():
        origin = base[key].double()
        parts = [known[key].delta().double() for known in held if key in known]
        used = [weight for weight, known in zip(weights, held, strict=True) if key in known]
        wanted = origin + sum((w * p for w, p in zip(used, parts, strict=True)), torch.zeros(()))
        # Ours is the sum, rounded once; float32 has errors of its own where it is near the middle.
        assert bool(((ours[key] - wanted).abs() <= unit(wanted) * 0.5001 + 1e-7).all())
        slack = sum(
            (w * (unit(origin + p) / 2 + 2**-7 * p.abs()) for w, p in zip(used, parts, strict=True)),
            torch.zeros(()),
        )
        assert bool(((ours[key] - theirs.double()).abs() <= slack + unit(wanted)).all())
        changed += bool(parts)
    assert changed == 4 * 7


def test_plan_and_memory(tiny_llamas, loras, names) -> None:
    spec = MergeSpec(models=names, base_model=str(tiny_llamas.base))
    merger = Merger(spec)
    stored = [sum(t.numel() for t in files(lora).values()) * 4 for lora in loras]
    plan = merger.memory["models"]
    assert [plan[name] for name in names] == [
        {"bytes": size, "where": "cpu", "form": "factors"} for size in stored
    ]
    assert merger.bytes_held == merger.facts["bytes"] + sum(stored)
    assert merger.memory["needed"] == merger.bytes_held + merger.memory["merged"]
    # Their base is held even where the genome does not name it; on the disk, if that is wanted.
    alone = Merger(MergeSpec(models=names, merge_method="linear"), MergeStageSpec(memory="streamed"))
    assert alone.memory["models"][str(tiny_llamas.base)]["form"] == "weights"
    assert alone.bytes_held == sum(stored)
    assert alone.facts["models"] == names


def test_elements_need_matrices(tiny_llamas, names, make_lora, tmp_path) -> None:
    """Masked methods in the genome, exact mode, high ranks and more than a plain LoRA."""
    base = str(tiny_llamas.base)
    high, dora = make_lora(tmp_path / "high", tiny_llamas.base, seed=3, r=60), tmp_path / "dora"
    make_lora(dora, tiny_llamas.base, seed=4, use_dora=True)
    pissa = Path(shutil.copytree(names[0].split("+")[1], tmp_path / "pissa"))
    settings = json.loads((pissa / "adapter_config.json").read_text())
    (pissa / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": "pissa"}))
    cases = [
        (MergeSpec(models=names, base_model=base, merge_method=["linear", "ties"]), MergeStageSpec()),
        (MergeSpec(models=names, base_model=base), MergeStageSpec(mode="exact")),
        *(
            (MergeSpec(models=[f"{base}+{folder}"], base_model=base), MergeStageSpec())
            for folder in (high, dora, pissa)
        ),
    ]
    for spec, stage in cases:
        forms = {model["form"] for model in Merger(spec, stage).memory["models"].values()}
        assert forms == {"weights", "changed"}


@pytest.mark.parametrize(
    ("method", "based", "shared"),
    [
        ("linear", False, {}),
        ("linear", False, {"normalize": False}),
        ("task_arithmetic", True, {"normalize": True, "lambda": 0.7}),
        ("slerp", False, {"t": [0.2, 0.9]}),
        ("nuslerp", False, {}),
        ("nuslerp", True, {}),
        ("multislerp", True, {}),
        ("karcher", False, {}),
        ("model_stock", True, {}),
    ],
)
@pytest.mark.parametrize("mixed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_methods_give_what_they_give_on_matrices(tiny_llamas, names, method, based, shared, mixed) -> None:
    """The same recipe on factors and on matrices; mixed: a full model, and an adapted one as the base."""
    models = [names[0], str(tiny_llamas.parents[0])] if mixed else names
    base = names[1] if mixed else str(tiny_llamas.base)
    spec = MergeSpec(models=models, base_model=base, merge_method=method)
    recipe = recipe_of(method, models, base if based else None, **shared)
    if method == "slerp":
        recipe["base_model"] = models[0]
    merger = Merger(spec)
    assert "factors" in {model["form"] for model in merger.memory["models"].values()}
    whole = Merger(spec.model_copy(update={"merge_method": [method, "ties"]}))
    merger.merge(recipe, seed=0)
    whole.merge(recipe, seed=0)
    ours, theirs = state(merger), state(whole)
    errors = [float(((ours[n] - theirs[n]).abs() / (unit(theirs[n]) + 2**-11)).max()) for n in ours]
    assert max(errors) <= 3
    assert any(not torch.equal(ours[n], files(tiny_llamas.base)[n].float()) for n in ours)
    assert merger.identity(recipe, 0) != whole.identity(recipe, 0)
    assert merger.identity(recipe, 0, exact=True) == whole.identity(recipe, 0, exact=True)


def test_a_recipe_that_needs_elements_is_merged_exactly(tiny_llamas, names) -> None:
    spec = MergeSpec(models=names, base_model=str(tiny_llamas.base))
    merger = Merger(spec)
    recipe = recipe_of("ties", names, spec.base_model)
    for part in recipe["models"]:
        part["parameters"]["density"] = 0.5
    merger.merge(recipe, seed=0)
    ours = state(merger)
    held = merger.bytes_held
    merger.merge(recipe, seed=0, exact=True)
    assert all(torch.equal(ours[name], tensor) for name, tensor in state(merger).items())
    assert merger.bytes_held == held


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
    # Each number of factors and dtype is compiled by itself, which takes seconds.
    form=st.sampled_from([(1, torch.bfloat16), (3, torch.bfloat16), (2, torch.float32)]),
    ranks=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    shifts=st.booleans(),
    seed=st.integers(0, 99),
)
def test_engines_agree_on_products(rows, columns, form, ranks, shifts, seed) -> None:
    count, dtype = form
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    base, source = draw(rows * columns).to(dtype), draw(rows * columns).to(dtype)
    factors = [(draw(rows, rank), draw(rank, columns), float(draw(1))) for rank in ranks[:count]]
    exact = base.double() * (0.7 if shifts else 0) + source.double() * 0.3
    exact += sum((c * (b.double() @ a.double()) for b, a, c in factors), torch.zeros(())).view(-1)
    # Errors are of the size of what is added up, which may cancel.
    size = base.double().abs() + source.double().abs()
    sizes = [abs(c) * (b.double().abs() @ a.double().abs()) for b, a, c in factors]
    size += torch.stack(sizes).sum(0).view(-1)
    for engine in (NumbaEngine, TorchEngine):
        arena = Arena()
        slots = [arena.slot(t) for t in (torch.zeros_like(base), base, source)]
        terms = tuple(Term(arena.slot(b), arena.slot(a), a.shape[0], c) for b, a, c in factors)
        own = Sum(slots[0], (slots[2],), (0.3,), slots[1] if shifts else None)
        assert engine(arena).run([Product(own, terms, columns)]) == []
        near = (2**-8 if dtype == torch.bfloat16 else 2**-20) * size
        assert bool(((arena.buffers[slots[0].buffer].double() - exact).abs() <= near).all())


def test_factors_of_another_rank_than_their_configuration_says(tiny_llamas, make_lora, tmp_path) -> None:
    """peft refuses them; as factors they would be scaled by the wrong rank."""
    adapter = make_lora(tmp_path / "other", tiny_llamas.base, seed=5)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"r": 16}))
    with pytest.raises(GenomeError, match="peft cannot apply the adapter"):
        Merger(MergeSpec(models=[f"{tiny_llamas.base}+{adapter}"], merge_method="linear"))


@pytest.mark.filterwarnings("ignore:(Model has `tie_word|Setting `save_embedding_layers`):UserWarning")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adapter_that_unties_the_embeddings_is_refused(tiny_llamas, make_lora, tmp_path, module) -> None:
    """The resident model has one matrix for both, and mergekit would write two."""
    base = tiny_llamas.base
    adapter = make_lora(tmp_path / "saved", base, seed=5, target_modules=["q_proj"], modules_to_save=[module])
    stored = adapter / "adapter_model.safetensors"
    tensors = load_file(stored)
    saved = next(key for key in tensors if key.endswith(f"{module}.weight"))
    save_file(tensors | {saved: tensors[saved] + 0.25}, stored, metadata={"format": "pt"})
    with pytest.raises(GenomeError, match=r"saved one of the two by itself \(`modules_to_save`\)"):
        Merger(MergeSpec(models=[f"{base}+{adapter}"], merge_method="linear"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_a_flag_that_peft_corrects_is_no_other_model(make_lora, tmp_path) -> None:
    """GPT-2's matrices lie the other way round, which peft sees for itself."""
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "gpt2"
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).bfloat16().save_pretrained(base)
    adapter = make_lora(tmp_path / "lora", base, seed=5, target_modules=["c_attn"], fan_in_fan_out=True)
    merged = []
    for flag in (True, False):
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": flag}))
        merged.append(state(Merger(MergeSpec(models=[f"{base}+{adapter}"], merge_method="linear"))))
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())
