"""The merge on SmolLM2-135M: a real model's layout, sizes and tied embeddings."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llmevo.genome import MergeSpec
from llmevo.merge import Merger

torch = pytest.importorskip("torch")


@pytest.mark.slow
def test_task_arithmetic_on_smollm2(smollm2: Path, run_mergekit, tmp_path: Path, record_property) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parents = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for number in range(3):
            model = AutoModelForCausalLM.from_pretrained(smollm2)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
            model.save_pretrained(tmp_path / f"p{number}")
            AutoTokenizer.from_pretrained(smollm2).save_pretrained(tmp_path / f"p{number}")
            parents.append(str(tmp_path / f"p{number}"))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(smollm2),
        "models": [
            {"model": p, "parameters": {"weight": [0.2, 0.6 - 0.1 * i, 0.3]}} for i, p in enumerate(parents)
        ],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    merger = Merger(MergeSpec(models=parents, base_model=str(smollm2)), device="cpu", dtype="bfloat16")
    # A tensor that a parent has in common with the base is held once: steps of 1e-3 are lost on the final
    # norm's large bfloat16 values (576 of them, in each of the three parents).
    assert merger.bytes_held == 4 * 269_030_016 - 3 * 576 * 2
    start = time.perf_counter()
    written = merger.merge(recipe, seed=0, exact=True)
    record_property("merge_seconds", time.perf_counter() - start)
    assert written == 269_030_016
    expected = run_mergekit(recipe, tmp_path / "out")
    state = merger.model.state_dict()
    assert len(expected) == 272
    assert all(torch.equal(expected[key], state[key]) for key in expected)
    prompt = merger.tokenizer("The capital of France is", return_tensors="pt")
    reply = merger.model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in merger.tokenizer.decode(reply[0])
