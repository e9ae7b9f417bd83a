"""Rungs: what they hold, that they extend one another, and that no item is asked twice."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.decoders import Fuse

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from llmevo.errors import StageError  # noqa: E402
from llmevo.evaluate import AnswerCache, Evaluator  # noqa: E402
from llmevo.evaluate.items import rung_sizes  # noqa: E402
from llmevo.genome import Genome  # noqa: E402
from llmevo.genome.sections import HalvingSpec  # noqa: E402

TASKS = [
    {"name": "money"},
    {"name": "money", "metric": "mcc"},
    {"name": "sums", "metric": "exact_match,number"},
    {"name": "prose", "metric": "word_perplexity,none", "weight": 0.01},
    {"name": "cloze", "metric": "perplexity,none", "weight": 0.001},
]


@given(
    st.integers(1, 200),
    st.integers(2, 4),
    st.sampled_from([None, True, False]),
    st.lists(st.integers(1, 300), min_size=1, max_size=6),
)
def test_rungs_are_growing_prefixes_of_every_task(
    first: int, eta: int, enabled: bool | None, sizes: list[int]
) -> None:
    counts = {f"task{i}": size for i, size in enumerate(sizes)}
    rungs = rung_sizes(HalvingSpec(enabled=enabled, first=first, eta=eta), counts)
    assert rungs[-1] == counts
    total = sum(sizes)
    if enabled is False or (enabled is None and total < 2 * first):
        assert len(rungs) == 1
    for smaller, larger in itertools.pairwise(rungs):
        assert smaller != larger
        assert all(1 <= smaller[task] <= larger[task] for task in counts)
    for rung in rungs[:-1]:
        share = sum(rung.values()) / total
        # Every task is asked the same share of its items, but for rounding and the one item that each has.
        assert all(abs(rung[task] - share * counts[task]) <= 1 + len(counts) for task in counts)
        assert sum(rung.values()) >= min(first, total) - len(counts)


def test_rung_sizes_by_hand() -> None:
    assert rung_sizes(HalvingSpec(first=60), {"a": 300, "b": 100}) == [
        {"a": 45, "b": 15},
        {"a": 90, "b": 30},
        {"a": 180, "b": 60},
        {"a": 300, "b": 100},
    ]


@pytest.fixture(scope="module")
def llama(tiny_llamas: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llamas.base, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llamas.base)


def make(
    llama: tuple[Any, Any],
    folder: Path,
    cache: AnswerCache | None = None,
    *,
    halving: bool = True,
    chat: bool = True,
    reference: bool = False,
) -> Evaluator:
    genome = Genome.model_validate(
        {
            "genome": {"models": ["a", "b"]},
            "tasks": TASKS,
            "search": {"halving": {"enabled": halving, "first": 8, "eta": 2}},
            "evaluate": {"task_path": [str(folder)], "holdout": 0.2, "batch_size": 4, "reference": reference},
            "apply_chat_template": chat,
        }
    )
    return Evaluator(genome, *llama, device="cpu", cache=cache)


def test_a_survivor_extends_its_items(llama: tuple[Any, Any], task_folder: Path) -> None:
    evaluator = make(llama, task_folder)
    rungs = evaluator.describe()["rungs"]
    assert len(rungs) == 4
    assert rungs[-1] == {name: items["search"] for name, items in evaluator.describe()["items"].items()}
    whole = evaluator.evaluate("search")
    assert evaluator.last == {"scored": sum(rungs[-1].values()), "cached": 0}
    before = 0
    for index, rung in enumerate(rungs):
        total = sum(rung.values())
        score, metrics = evaluator.evaluate("search", rung=index, weights="w")
        assert evaluator.last == {"scored": total - before, "cached": before}
        before = total
        for task in ("money/acc,none", "sums"):
            shown = score.items[task]
            assert len(shown) == rung[task.split("/")[0]]
            assert list(shown) == list(whole[0].items[task])[: len(shown)]
    assert (score, metrics) == whole
    assert evaluator.evaluate("search", rung=1, weights="w") == make(llama, task_folder).evaluate(
        "search", rung=1
    )


def test_one_rung_without_halving(llama: tuple[Any, Any], task_folder: Path) -> None:
    plain = make(llama, task_folder, halving=False)
    assert len(plain.describe()["rungs"]) == 1
    score, _ = plain.evaluate("search", rung=0)
    assert score == plain.evaluate("search")[0]
    with pytest.raises(StageError, match=r"`rung` must be within 0\.\.0, but got 1"):
        plain.evaluate("search", rung=1)


def test_the_same_weights_are_not_asked_twice(
    llama: tuple[Any, Any], task_folder: Path, tmp_path: Path
) -> None:
    cache = AnswerCache(tmp_path / "answers.db")
    first = make(llama, task_folder, cache)
    assert not first.known("search", 0, "w")
    shown = [first.evaluate("search", rung=1, weights="w"), first.evaluate("holdout", weights="w")]
    assert first.known("search", 1, "w")
    assert not first.known("search", 2, "w")
    assert not first.known("search", None, "w")
    broken = (copy.deepcopy(llama[0]), llama[1])
    other = make(broken, task_folder, cache)  # another process, whose model must not be asked
    with torch.no_grad():
        broken[0].model.norm.weight.fill_(float("nan"))
    assert other.known("search", 1, "w")
    assert other.known("holdout", None, "w")
    (tmp_path / "answers.db").unlink()  # known is a promise, whatever happens to the file
    assert [
        other.evaluate("search", rung=1, weights="w"),
        other.evaluate("holdout", weights="w"),
    ] == shown
    assert other.last["scored"] == 0
    with pytest.raises(StageError, match="not finite"):
        other.evaluate("search", rung=1, weights="v")
    assert not other.known("search", 0, "v")


def test_what_the_answers_depend_on_is_in_the_key(
    llama: tuple[Any, Any], task_folder: Path, tmp_path: Path
) -> None:
    cache = AnswerCache(tmp_path / "answers.db")
    make(llama, task_folder, cache).evaluate("search", weights="w")
    assert make(llama, task_folder, cache).known("search", None, "w")
    half = (copy.deepcopy(llama[0]).to(torch.bfloat16), llama[1])
    assert not make(half, task_folder, cache).known("search", 0, "w")
    turned, repeating = (copy.deepcopy(llama[0]) for _ in range(2))
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 500.0}
    repeating.generation_config.repetition_penalty = 1.5
    for model in (turned, repeating):  # the same weights, read from a folder whose configuration was edited
        assert not make((model, llama[1]), task_folder, cache).known("search", 0, "w")
    other = copy.deepcopy(llama[1])
    other.backend_tokenizer.decoder = Fuse()  # the same vocabulary, other texts
    assert not make((llama[0], other), task_folder, cache).known("search", 0, "w")
    elsewhere, filling = copy.deepcopy(llama[0]), copy.deepcopy(llama[1])
    elsewhere.config._name_or_path = "elsewhere"
    filling(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert make((elsewhere, filling), task_folder, cache).known("search", None, "w")


@pytest.mark.parametrize("reference", [False, True])
def test_answers_that_were_cut_off_and_those_not_understood_are_counted(
    llama: tuple[Any, Any], task_folder: Path, reference: bool
) -> None:
    model, tokenizer = llama
    evaluator = make(llama, task_folder, chat=False, reference=reference)
    _, metrics = evaluator.evaluate("search")
    rows = evaluator._plan.items("search")["sums"]
    texts = [row[0].resps[0] for row in rows]
    unparsed = [not any(character.isdigit() for character in text) for text in texts]
    assert metrics["sums"]["unparsed,number"] == pytest.approx(sum(unparsed) / len(unparsed))
    cut = []
    for row in rows:  # one at a time, with nothing of lm-eval's
        prompt = tokenizer(row[0].args[0], return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
        cut.append(tokenizer.eos_token_id not in tokens.tolist() and "\n" not in tokenizer.decode(tokens))
    assert sum(cut) > 0
    assert metrics["sums"]["truncated,raw"] == metrics["sums"]["truncated,number"] == sum(cut) / len(cut)
    again = evaluator.evaluate("search", weights="w")[1]
    assert evaluator.evaluate("search", weights="w")[1] == again == metrics
