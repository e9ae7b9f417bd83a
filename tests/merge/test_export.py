"""Exported models: mergekit's, whole or absent, with the weights that were evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmevo.errors import GenomeError
from llmevo.genome import MergeSpec
from llmevo.merge import Merger, export

torch = pytest.importorskip("torch")


def _recipe(base: Path, *models: Any, method: str = "dare_ties") -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": [
            {"model": str(m), "parameters": {"weight": [0.4 + 0.2 * i, 0.6], "density": 0.5}}
            for i, m in enumerate(models)
        ],
        "dtype": "bfloat16",
    }


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def test_export_has_the_weights_that_were_evaluated(tiny_llamas, loras, tmp_path: Path) -> None:
    """With random masks and adapters: the hardest case, as peft draws random numbers as well."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [tiny_llamas.parents[0], f"{tiny_llamas.base}+{loras[0]}"]
    recipe = _recipe(tiny_llamas.base, *models)
    spec = MergeSpec(models=[str(m) for m in models], base_model=str(tiny_llamas.base))
    merger = Merger(spec, device="cpu", dtype="bfloat16")
    merger.merge(recipe, seed=2**40 + 3, exact=True)
    before = torch.get_rng_state()
    out = export(recipe, tmp_path / "out", card="# Best\n", seed=2**40 + 3)
    assert torch.equal(before, torch.get_rng_state())
    saved, state = _tensors(out), merger.model.state_dict()
    assert len(saved) == 38
    assert all(torch.equal(saved[key], state[key]) for key in saved)
    assert (out / "README.md").read_text() == "# Best\n"
    assert yaml.safe_load((out / "mergekit_config.yml").read_text()) == recipe
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "adapters' full copies must be gone"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).chat_template
    # Another merge in this process must read its files, not what the export left behind.
    merger.merge(recipe, seed=2**40 + 3, exact=True)
    assert all(torch.equal(saved[key], merger.model.state_dict()[key]) for key in saved)


def test_other_seed_other_masks(tiny_llamas, tmp_path: Path) -> None:
    recipe = _recipe(tiny_llamas.base, *tiny_llamas.parents[:2])
    one, two, again = (
        _tensors(export(recipe, tmp_path / f"{i}-{s}", seed=s)) for i, s in enumerate((1, 2, 1))
    )
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], two[key]) for key in one)
    card = (tmp_path / "0-1" / "README.md").read_text()
    assert str(tiny_llamas.parents[1]) in card
    assert "merge_method: dare_ties" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_an_adapter_as_the_base(tiny_llamas, loras, tmp_path: Path) -> None:
    """The tokenizer comes from the adapter's base: mergekit's own copy of the adapted model has none."""
    from transformers import AutoTokenizer

    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"{tiny_llamas.base}+{loras[1]}"}],
        "tokenizer_source": "base",
        "base_model": f"{tiny_llamas.base}+{loras[1]}",
    }
    out = export(recipe, tmp_path / "new" / "out")
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert not torch.equal(
        _tensors(out)["model.layers.0.self_attn.q_proj.weight"],
        _tensors(tiny_llamas.base)["model.layers.0.self_attn.q_proj.weight"],
    )


def test_what_is_there_is_kept_and_failures_leave_nothing(tiny_llamas, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    recipe = _recipe(tiny_llamas.base, tiny_llamas.parents[0])
    with pytest.raises(GenomeError, match="`out_dir` must be a new or an empty folder"):
        export(recipe, full)
    with pytest.raises(GenomeError, match="mergekit refused the recipe"):
        export(recipe | {"merge_method": "nonsense"}, tmp_path / "bad")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (export(recipe, empty) / "model.safetensors").is_file()
