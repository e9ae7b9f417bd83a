"""The evaluator against lm-eval's own `simple_evaluate` on the same items, and its own promises."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from llmevo.errors import GenomeError, StageError  # noqa: E402
from llmevo.evaluate import Evaluator  # noqa: E402
from llmevo.genome import Genome  # noqa: E402


def genome(folder: Path, *tasks: dict[str, Any], **top: Any) -> Genome:
    evaluate = {"task_path": [str(folder)], "batch_size": 4, **top.pop("evaluate", {})}
    data = {"genome": {"models": ["a", "b"]}, "tasks": list(tasks), "evaluate": evaluate, **top}
    return Genome.model_validate(data)


@pytest.fixture(scope="module")
def llama(tiny_llamas: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # on a busy machine, two threads wait for one another in models this small
    model = AutoModelForCausalLM.from_pretrained(tiny_llamas.base, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llamas.base)


def reference(llama: tuple[Any, Any], evaluator: Evaluator, spec: Genome, **options: Any) -> dict[str, Any]:
    """lm-eval's own results for the evaluator's search items."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from llmevo.evaluate.tasks import task_manager

    model, tokenizer = llama
    results: dict[str, Any] = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=sorted({task.name for task in spec.tasks}, key=[t.name for t in spec.tasks].index),
        task_manager=task_manager(spec),
        num_fewshot=spec.num_fewshot,
        samples={name: sorted(items) for name, items in evaluator._plan.order["search"].items()},
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    return results


ALL = [
    {"name": "money", "metric": "acc,none"},
    {"name": "sums", "metric": "exact_match,number"},
    {"name": "prose", "metric": "word_perplexity,none", "weight": 0.01},
    {"name": "cloze", "metric": "perplexity,none", "weight": 0.001},
]


@pytest.mark.parametrize(("shots", "chat", "plain"), [(0, False, True), (0, False, False), (2, True, False)])
def test_metrics_are_lm_evals(
    llama: tuple[Any, Any], task_folder: Path, shots: int, chat: bool, plain: bool
) -> None:
    tasks = ALL if not shots else [task for task in ALL if task["name"] != "prose"]
    evaluate = {"holdout": 0.0, "reference": plain}
    spec = genome(task_folder, *tasks, num_fewshot=shots, apply_chat_template=chat, evaluate=evaluate)
    evaluator = Evaluator(spec, *llama, device="cpu")
    packed = evaluator.describe()["packed"]
    assert (packed["requests"]["packed"] == 0) == plain
    assert packed["why_not"] == ("`evaluate.reference` is true" if plain else None)
    score, metrics = evaluator.evaluate("search")
    expected = reference(llama, evaluator, spec, apply_chat_template=chat, fewshot_as_multiturn=chat)
    for task in tasks:
        name = task["name"]
        for key, value in expected["results"][name].items():
            if "," in key and "_stderr" not in key:
                # Equal but for the order in which the items are summed up, which is the stored one here, and
                # for the rounding of packed sums.
                assert metrics[name][key] == pytest.approx(value, rel=1e-12 if plain else 1e-5), (name, key)
        metric = task["metric"].split(",")[0]
        filter_name = task["metric"].split(",")[1]
        logged = {s["doc_id"]: s[metric] for s in expected["samples"][name] if s["filter"] == filter_name}
        if metric in ("acc", "exact_match"):
            order = evaluator._plan.order["search"][name]
            assert list(score.items[name]) == [logged[item] for item in order]
    perplexity = [t for t in tasks if "perplexity" in t["metric"]]
    by_hand = sum(metrics[t["name"]][t["metric"]] * t.get("weight", 1) for t in tasks if t not in perplexity)
    by_hand -= sum(metrics[t["name"]][t["metric"]] * t["weight"] for t in perplexity)
    assert score.value == pytest.approx(by_hand, rel=1e-12)


def test_the_same_weights_score_the_same_twice(llama: tuple[Any, Any], task_folder: Path) -> None:
    evaluator = Evaluator(genome(task_folder, *ALL), *llama, device="cpu")
    first = evaluator.evaluate("search")
    held = evaluator.evaluate("holdout")
    assert evaluator.evaluate("search") == first
    assert evaluator.evaluate("holdout") == held
    assert held[0].items != first[0].items


def test_items_average_to_the_value_and_more_is_better(llama: tuple[Any, Any], task_folder: Path) -> None:
    for direction, turn in (("maximize", 1), ("minimize", -1)):
        evaluator = Evaluator(
            genome(task_folder, *ALL, {"name": "money", "metric": "mcc"}, search={"direction": direction}),
            *llama,
            device="cpu",
        )
        score, metrics = evaluator.evaluate("search")
        weights = evaluator.describe()["weights"]
        assert set(weights) == {"money/acc,none", "money/mcc", "sums", "prose", "cloze"}
        means = {key: math.fsum(items) / len(items) for key, items in score.items.items()}
        total = sum(weights[key] * mean for key, mean in means.items())
        assert score.value == pytest.approx(turn * total, rel=1e-9)
        assert means["prose"] == pytest.approx(-metrics["prose"]["word_perplexity,none"], rel=1e-9)
        assert set(score.items["money/acc,none"]) <= {0.0, 1.0}
        assert score.stderr is not None
        assert score.stderr > 0


def test_a_negative_weight_is_taken_at_its_word(llama: tuple[Any, Any], task_folder: Path) -> None:
    values = []
    for weight in (0.01, -0.01):
        spec = genome(task_folder, {"name": "prose", "metric": "word_perplexity,none", "weight": weight})
        values.append(Evaluator(spec, *llama, device="cpu").evaluate("search")[0])
    assert values[0] == values[1]
    assert values[0].value < 0


def test_a_group_scores_as_lm_eval_averages_it(llama: tuple[Any, Any], task_folder: Path) -> None:
    spec = genome(
        task_folder,
        {"name": "coins", "metric": "acc,none"},
        apply_chat_template=False,
        evaluate={"holdout": 0.0},
    )
    evaluator = Evaluator(spec, *llama, device="cpu")
    score, _ = evaluator.evaluate("search")
    expected = reference(llama, evaluator, spec)
    assert score.value == pytest.approx(expected["results"]["coins"]["acc,none"], rel=1e-12)
    assert set(score.items) == {"money", "money2"}


def test_splits_are_disjoint_seeded_and_limited(llama: tuple[Any, Any], task_folder: Path) -> None:
    def order(seed: int, **top: Any) -> Any:
        spec = genome(task_folder, {"name": "money"}, {"name": "cloze", "metric": "acc"}, **top)
        spec = spec.model_copy(update={"search": spec.search.model_copy(update={"seed": seed})})
        return Evaluator(spec, *llama, device="cpu")._plan.order

    whole = order(0, evaluate={"holdout": 0.25})
    assert {name: len(items) for name, items in whole["search"].items()} == {"money": 15, "cloze": 8}
    for name, count in (("money", 20), ("cloze", 10)):
        assert sorted(whole["search"][name] + whole["holdout"][name]) == list(range(count))
    assert order(0, evaluate={"holdout": 0.25}) == whole
    assert order(1, evaluate={"holdout": 0.25}) != whole
    limited = order(0, limit=10, evaluate={"holdout": 0.3})
    assert [len(limited[split]["money"]) for split in ("search", "holdout")] == [7, 3]


def test_gold_metrics_can_be_the_fitness(llama: tuple[Any, Any], task_folder: Path) -> None:
    spec = genome(task_folder, {"name": "money", "metric": "gold_margin,none"}, {"name": "money"})
    score, metrics = Evaluator(spec, *llama, device="cpu").evaluate("search")
    margins, right = score.items["money/gold_margin,none"], score.items["money/acc,none"]
    assert [float(margin > 0) for margin in margins] == list(right)
    assert -20 < metrics["money"]["gold_logprob,none"] < 0


@pytest.mark.parametrize("task", ALL[:3], ids=lambda task: task["name"])
def test_broken_weights_fail_the_trial_and_the_next_one_works(
    llama: tuple[Any, Any], task_folder: Path, task: dict[str, Any]
) -> None:
    model = copy.deepcopy(llama[0])
    evaluator = Evaluator(genome(task_folder, task), model, llama[1], device="cpu")
    before = evaluator.evaluate("search")
    weight = model.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = math.nan
    with pytest.raises(StageError, match=r"^evaluate: the model's logits are not finite\.$"):
        evaluator.evaluate("search")
    with torch.no_grad():
        weight.copy_(kept)
    assert evaluator.evaluate("search") == before


def test_chat_template_follows_the_genome(llama: tuple[Any, Any], task_folder: Path) -> None:
    model, tokenizer = llama
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    spec = genome(task_folder, {"name": "money"})
    assert Evaluator(spec, model, tokenizer, device="cpu").describe()["chat_template"] is True
    assert Evaluator(spec, model, bare, device="cpu").describe()["chat_template"] is False
    with pytest.raises(GenomeError, match="`apply_chat_template` is true, but the tokenizer has no chat"):
        Evaluator(spec.model_copy(update={"apply_chat_template": True}), model, bare, device="cpu")


def test_no_held_out_items_is_a_stage_error(llama: tuple[Any, Any], task_folder: Path) -> None:
    evaluator = Evaluator(
        genome(task_folder, {"name": "money"}, evaluate={"holdout": 0.0}), *llama, device="cpu"
    )
    with pytest.raises(StageError, match=r"`evaluate\.holdout` must be > 0"):
        evaluator.evaluate("holdout")


def test_batch_size_is_chosen_once_and_the_prompts_have_a_fingerprint(
    llama: tuple[Any, Any], task_folder: Path
) -> None:
    def describe(**top: Any) -> dict[str, Any]:
        return Evaluator(genome(task_folder, {"name": "money"}, **top), *llama, device="cpu").describe()

    facts = describe(evaluate={"batch_size": None})
    assert facts["batch_size"] == 16
    assert facts["items"] == {"money": {"search": 14, "holdout": 6}}
    assert facts["truncated"] == {"search": 0, "holdout": 0}
    assert describe()["fingerprint"] == facts["fingerprint"]
    assert describe(num_fewshot=1)["fingerprint"] != facts["fingerprint"]
    assert describe(evaluate={"max_length": 16})["truncated"]["search"] > 0


def test_a_right_answer_that_changed_is_noticed(
    llama: tuple[Any, Any], task_folder: Path, tmp_path: Path
) -> None:
    """No prompt shows it, so that the requests are the same."""
    rows = (task_folder / "money.test.jsonl").read_text().splitlines()
    task = (task_folder / "money.yaml").read_text()
    said = []
    for number, gold in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        items = folder / "money.test.jsonl"
        items.write_text("\n".join([json.dumps(json.loads(rows[0]) | {"gold": gold}), *rows[1:]]) + "\n")
        (folder / "money.yaml").write_text(task.replace(str(task_folder / items.name), str(items)))
        spec = genome(folder, {"name": "money"})
        facts = Evaluator(spec, *llama, device="cpu").describe()
        said.append((facts["fingerprint"], facts["documents"]))
    assert said[0] == said[1]
    assert said[2][0] == said[0][0]
    assert said[2][1] != said[0][1]
