"""The benchmark of packed evaluation runs, compares answers, and writes its table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(_FOLDER))
    try:
        import evaluation

        yield evaluation
    finally:
        sys.path.remove(str(_FOLDER))


def test_every_workload_is_compared(bench: Any, tiny_llamas: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llamas.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llamas.base)
    stored: dict[str, Any] = {bench.machine(model): {}}
    for workload in ("arc", "letters"):
        result = bench.compare(workload, model, tokenizer, 3, 1, lambda _: None)
        assert result["largest difference"] < 1e-4
        assert result["accuracies"][0] == result["accuracies"][1]
        assert result["tokens"]["packed"] < result["tokens"]["HFLM"] / 2
        stored[bench.machine(model)][workload] = result
    table = bench.report(stored)
    assert "float32" in table
    assert table.count("| yes |") == 2


def test_items_are_the_same_for_the_same_seed(bench: Any) -> None:
    for workload in bench.TITLES:
        made = bench.items(workload, 3)
        assert made == bench.items(workload, 3)
        assert made != bench.items(workload, 3, seed=1)
    contexts = [item.context for item in bench.items("fixed-shots", 3)]
    shared = len("\n\n".join(contexts[0].split("\n\n")[:5]))
    assert len({context[:shared] for context in contexts}) == 1
    assert len({item.context[:shared] for item in bench.items("random-shots", 3)}) == 3
