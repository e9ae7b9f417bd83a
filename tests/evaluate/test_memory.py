"""An accelerator whose memory is too small for a batch: halved, remembered, counted, the same answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from llmevo.errors import StageError  # noqa: E402
from llmevo.evaluate import Evaluator  # noqa: E402
from llmevo.genome import Genome  # noqa: E402

TASKS = [
    {"name": "money"},
    {"name": "cloze", "metric": "perplexity,none", "weight": 0.001},
    {"name": "sums", "metric": "exact_match,number"},
]


@pytest.fixture(scope="module")
def llama(tiny_llamas: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llamas.base, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llamas.base)


def evaluator(llama: tuple[Any, Any], folder: Path, *, plain: bool = False) -> Evaluator:
    spec = Genome.model_validate(
        {
            "genome": {"models": ["a", "b"]},
            "tasks": TASKS,
            "apply_chat_template": False,
            "evaluate": {"task_path": [str(folder)], "holdout": 0.0, "reference": plain, "batch_size": 8},
        }
    )
    return Evaluator(spec, *llama, device="cpu")


@contextlib.contextmanager
def room_for(model: Any, tokens: int) -> Iterator[list[int]]:
    """No forward pass has room for more tokens than this; gives those of the passes that were tried."""
    tried: list[int] = []

    def check(_module: Any, args: Any, given: dict[str, Any]) -> None:
        tried.append((given["input_ids"] if "input_ids" in given else args[0]).numel())
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tried[-1]} GiB.")

    hook = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield tried
    finally:
        hook.remove()


def close(mine: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    assert mine[0].value == pytest.approx(other[0].value, rel=1e-6)
    for task, items in other[0].items.items():
        assert list(mine[0].items[task]) == pytest.approx(list(items), abs=1e-5), task
    for task, metrics in other[1].items():
        assert mine[1][task] == pytest.approx(metrics, abs=1e-5), task


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "HFLM's"])
def test_batches_are_halved_until_they_fit(llama: tuple[Any, Any], task_folder: Path, plain: bool) -> None:
    ample = evaluator(llama, task_folder, plain=plain)
    expected = ample.evaluate("search")
    assert "halved" not in ample.last
    small = evaluator(llama, task_folder, plain=plain)
    with room_for(llama[0], 130) as tried:
        found = small.evaluate("search")
        halved = small.last["halved"]
        assert halved >= 1
        assert sum(tokens > 130 for tokens in tried) == halved
        tried.clear()
        again = small.evaluate("search")  # remembered: nothing is too large a second time
        assert max(tried) <= 130
        assert "halved" not in small.last
    close(found, expected)
    assert again == found


def test_one_row_that_does_not_fit_is_the_trials_failure_and_no_more(
    llama: tuple[Any, Any], task_folder: Path
) -> None:
    ours = evaluator(llama, task_folder)
    with room_for(llama[0], 10_000) as usual:
        expected = ours.evaluate("search")
    with room_for(llama[0], 20), pytest.raises(StageError, match=r"^evaluate: out of memory with one row of"):
        ours.evaluate("search")
    with room_for(llama[0], 10_000) as tried:  # another process was to blame: batches are as before
        assert ours.evaluate("search") == expected
    assert tried == usual
    plain = evaluator(llama, task_folder, plain=True)
    with room_for(llama[0], 20), pytest.raises(torch.OutOfMemoryError):
        plain.evaluate("search")
    assert plain.describe()["batch_size"] == 8
