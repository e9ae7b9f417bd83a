"""The benchmarks of the loop: what they compute from measurements, and that overhead can be measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

_FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Any:
    """The scripts as modules, from their folder."""
    sys.path.insert(0, str(_FOLDER))
    try:
        import loop
        import loop_data
        import loop_limits
        import loop_systems
        import overhead

        yield SimpleNamespace(
            loop=loop, data=loop_data, limits=loop_limits, systems=loop_systems, overhead=overhead
        )
    finally:
        sys.path.remove(str(_FOLDER))


@pytest.mark.parametrize("proposer", ["cma", "hybrid+placebo"])
def test_overhead_of_a_real_run_is_measured_stored_and_reported(
    bench: Any, proposer: str, tmp_path: Path
) -> None:
    record = bench.overhead.measure(proposer, 10, 100)
    assert record["trials"] >= 100
    assert set(record["at"]) == {"10", "100"}
    for cell in record["at"].values():
        assert 0 < cell["ask"] + cell["store"] < cell["seconds"] < 1
    bench.overhead.store(tmp_path, {"one": record})
    assert bench.overhead.load(tmp_path) == {"one": record}
    text = bench.overhead.report([record])
    assert f"| {proposer} | 10 |" in text
    assert "PASS" in text or "FAIL" in text


def test_genomes_of_the_overhead_have_the_genes_that_they_say(bench: Any) -> None:
    from llmevo import genome, recipe

    for genes, (_, groups) in bench.overhead.SHAPES.items():
        made = genome.parse(bench.overhead.genome_text("ga", genes, 10))
        assert len(recipe.Recipes(made, groups).space) == genes


def test_growth_is_seen(bench: Any) -> None:
    batches = [{"first": 10 * n, "trials": 10, "ask": 0.1, "store": 0.0} for n in range(200)]
    grown = [{**batch, "seconds": 1.0 + batch["first"] / 100} for batch in batches]
    at = {str(mark): bench.overhead.at(grown, mark) for mark in (10, 1000)}
    record = {"proposer": "ga", "genes": 10, "mean": 1.0, "at": at}
    assert bench.overhead.growth(record) == pytest.approx(11.15 / 1.25)
    assert "FAIL" in bench.overhead.report([record])
    with pytest.raises(ValueError, match="from trial 1990 on"):
        bench.overhead.at(grown, 1990)


def test_candidates_are_those_of_mergekit_evolve(bench: Any) -> None:
    arrays = bench.data.genotypes("ties", 4)
    assert arrays.shape == (4, 3, 3, 1, 2)
    assert np.array_equal(arrays[:2], bench.data.genotypes("ties", 2))
    assert np.array_equal(bench.data.genotypes("linear", 4)[..., 0], arrays[..., 0])
    assert arrays[..., 0].min() >= 0.1
    assert arrays[..., 1].max() <= 0.9
    linear = bench.data.genome("linear", 30)["genome"]
    assert linear["base_model"] is None, "mergekit-evolve crashes otherwise"


def test_sums_have_one_right_answer(bench: Any) -> None:
    for row in bench.data.sums(50, seed=3):
        first, second = (int(word) for word in row["prompt"][8:-9].split(" + "))
        assert len(set(row["choices"])) == 4
        assert row["choices"].index(str(first + second)) == row["gold"]
    assert bench.data.sums(10, 1) == bench.data.sums(20, 1)[:10]


def test_blocks_take_turns_and_repeat_no_candidate(bench: Any) -> None:
    systems = ["llmevo, as it comes", "command line"]
    order = list(bench.loop.blocks(systems, 2))
    assert [system for system, _ in order] == systems * 2
    assert order[0][1] + order[2][1] == list(range(1, 21))
    assert order[1][1] + order[3][1] == [1, 2, 3, 4]


def test_rows_of_a_run_leave_out_the_first_candidate_and_what_libraries_say(bench: Any) -> None:
    def finished(number: int) -> str:
        cost = {"merge": 0.5, "evaluate": 1.0, "propose": 0.0, "store": 0.001}
        metrics = {task: {"acc,none": 0.1 * number} for task in bench.data.TASKS}
        trial = {"score": {"value": 1.0}, "cost": cost, "metrics": metrics, "error": None}
        return json.dumps({"event": "finished", "trial": trial})

    lines = [(11.0, "a warning"), (12.0, finished(0)), (14.0, finished(1)), (15.6, finished(2))]
    start, rows = bench.systems._rows_of_llmevo(lines, [1, 2], began=2.0)
    assert start == 10.0
    assert [row["candidate"] for row in rows] == [1, 2]
    assert [row["wall"] for row in rows] == pytest.approx([2.0, 1.6])
    assert bench.loop.median_rest(rows) == pytest.approx(0.3)
    assert rows[1]["tasks"]["sums"] == pytest.approx(0.2)


def test_the_table_says_ratio_target_and_disagreement(bench: Any) -> None:
    def row(number: int, wall: float, right: float) -> dict[str, Any]:
        tasks = dict.fromkeys(bench.data.TASKS, right)
        return {"candidate": number, "wall": wall, "merge": 0.1, "evaluate": wall - 0.11, "tasks": tasks}

    rows = {
        "ties 30 llmevo": {"1": row(1, 1.0, 0.5), "2": row(2, 1.2, 0.5)},
        "ties 30 mergekit-evolve": {"1": row(1, 44.0, 0.6)},
    }
    text = bench.loop.report({"rows": rows, "starts": {name: [1.0] for name in rows}})
    assert "| llmevo | 2 | 1.0 | 0.100 | 0.99 | 0.010 | 1.10 | 3273 | 40.0 |" in text
    assert "| mergekit-evolve | 1 | 1.0 | 0.100 | 43.89 | 0.010 | 44.00 | 82 |  |" in text
    assert "PASS  llmevo: 40.0 times mergekit-evolve; wanted 30" in text
    assert "mergekit-evolve: 3 of 30 answers" in text


def test_the_share_of_the_limit_follows_from_bytes_and_operations(bench: Any) -> None:
    found = {
        "items": 30,
        "seconds": {"wall": 2.0, "merge": 0.2, "evaluate": 1.7, "forward": 1.5},
        "tokens": 1000,
        "logits": 10,
        "operations": int(1e12),
        "bytes": int(1e9),
        "machine": {"copy": 10e9, "matmul": 1e12, "layers": 0.8e12},
    }
    text = bench.limits.table({"linear": found})
    assert "| merge | 0.200 | 10.0% | 0.100 | 50% |" in text
    assert "| forward | 1.500 | 75.0% | 1.000 | 67% |" in text
    assert "PASS  a whole trial at 55% of the limit" in text


def test_forward_passes_are_counted(bench: Any, tiny_llamas: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llamas.base)
    watch = bench.limits._Forwards(model)
    with torch.inference_mode():
        model(input_ids=torch.ones(2, 5, dtype=torch.long), logits_to_keep=1)
    config = model.config
    layer = 4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 128
    assert (watch.tokens, watch.logits) == (10, 2)
    assert watch.operations == 2 * (10 * config.num_hidden_layers * layer + 2 * config.vocab_size * 64)
    assert watch.seconds > 0


def test_weights_are_compared_element_by_element(bench: Any) -> None:
    import torch

    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0]), "ours": torch.tensor([1.0])}
    theirs = {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([4.0])}
    found = bench.limits._difference(ours, theirs)
    assert found == {
        "tensors": 2,
        "equal": 2 / 3,
        "largest": 0.5,
        "of the largest weight": pytest.approx(0.2),
    }
