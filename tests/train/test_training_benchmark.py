"""The training benchmark: every side learns the same and takes its turn; the table says what was measured."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from llmevo.genome.train import TrainSettings  # noqa: E402
from llmevo.trial import Score, State, Trial  # noqa: E402

_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script as a module, from its folder."""
    sys.path.insert(0, str(_FOLDER))
    try:
        yield importlib.import_module("training")
    finally:
        sys.path.remove(str(_FOLDER))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # accelerate's, on a CPU
def test_every_side_has_the_same_losses(
    bench: Any, tiny_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    loaded: list[Any] = []

    def load(dtype: Any) -> Any:
        loaded.append(dtype)
        chosen = {} if dtype is None else {"dtype": dtype}
        return AutoModelForCausalLM.from_pretrained(tiny_folder, **chosen).requires_grad_(False).eval()

    rows = [one for one in bench.examples(tokenizer, 40) if len(one) < 200][:6]
    settings = TrainSettings(batch_size=3, epochs=1, warmup=0, rank=4)
    made = bench.Bench(load, torch.float32, torch.float32, rows, settings, tmp_path)
    found = bench.measure(made, list(bench.TITLES), 1)
    assert set(loaded) == {None, torch.float32}
    assert made.model(None).dtype == torch.bfloat16
    assert all(side["first"] > 0 and len(side["seconds"]) == 1 for side in found.values())
    losses = {name: np.array(side["losses"]) for name, side in found.items()}
    assert all(len(one) == 2 for one in losses.values())
    for ours, theirs, _ in bench.PAIRS:
        apart = 0.05 if bench.AS_IT_COMES in ours else 1e-5  # bfloat16 beside float32
        assert np.abs(losses[ours] - losses[theirs]).max() < apart
    assert np.abs(losses["llmevo"] - losses["llmevo, top third"])[1] > 1e-4
    assert len(bench.table(found)) == len(bench.PAIRS)


def test_each_round_begins_with_another_side(bench: Any) -> None:
    order = bench.turns(["a", "b", "c"], 4)
    assert order == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_the_table_says_medians_ratio_target_and_how_far_losses_are_apart(bench: Any) -> None:
    sides = {
        "llmevo": {"seconds": [9.0, 2.0, 2.0], "losses": [3.0, 2.0]},
        "trainer": {"seconds": [5.0, 4.0, 9.0], "losses": [3.0, 2.00004]},
    }
    (row,) = bench.table(sides)
    assert row == (
        "| Trainer, padded to the longest | 5.00 | 720 | llmevo | 2.00 | 1800 | **2.50** | 1.5 | 4e-05 |"
    )


def test_what_halving_saved_is_counted_in_the_trials(bench: Any) -> None:
    def trained(number: int, rung: int | None, tokens: int, origin: str = "ga") -> Trial:
        score = replace(Score.from_items([-1.0, -2.0]), rung=rung)
        made = Trial(number, {}, origin, State.COMPLETE, score=score, cost={"tokens": tokens})
        return replace(made, metrics={"train": {"budget": 1000.0}})

    trials = [
        Trial(0, {}, "baseline", State.COMPLETE, score=Score.from_items([-1.0])),
        trained(1, None, 1000, "default"),
        trained(2, 0, 90),
        trained(3, 1, 300),
        trained(4, None, 1000),
        trained(5, 0, 90),
    ]
    found = bench.halving(trials)
    assert found == {
        "candidates": 4,
        "by_rung": {"0": 2, "1": 1, "all": 1},
        "spent": 1480,
        "whole": 4000,
    }
