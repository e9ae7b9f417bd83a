"""What a task asks that no model can answer is said when a run begins, and by the task's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from choice_task import sums, write_choice_task

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from llmevo.errors import GenomeError, StageError  # noqa: E402
from llmevo.evaluate import Evaluator  # noqa: E402
from llmevo.genome import Genome  # noqa: E402


@pytest.fixture(scope="module")
def llama(tiny_llamas: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llamas.base, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llamas.base)


def evaluator(
    folder: Path, llama: tuple[Any, Any], metric: str, change: dict[str, Any], **top: Any
) -> Evaluator:
    """One on the task `odd`: eight sums, the YAML and the third item changed."""
    item = change.pop("item", {})
    rows = sums(range(8))
    rows[2] |= item
    write_choice_task(folder, "odd", {"test": rows, "train": sums(range(20, 24))})
    path = folder / "odd.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    evaluate = {"task_path": [str(folder)], "holdout": 0.0, **top.pop("evaluate", {})}
    described = {"genome": {"models": ["a", "b"]}, "tasks": [{"name": "odd", "metric": metric}]}
    genome = Genome.model_validate({**described, **top, "apply_chat_template": False, "evaluate": evaluate})
    return Evaluator(genome, *llama, device="cpu")


_GENERATE = {
    "output_type": "generate_until",
    "doc_to_target": "x",
    "metric_list": [{"metric": "exact_match"}],
}
_LIKELY = {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}]}


@pytest.mark.parametrize(
    ("change", "top", "message"),
    [
        (
            {"item": {"choices": ["", "3"]}, "target_delimiter": ""},
            {},
            "the answer '' to '2 plus 1 is' has no",
        ),
        (
            {**_LIKELY, "doc_to_text": "", "doc_to_target": "", "target_delimiter": ""},
            {},
            "no token of its own",
        ),
        ({"item": {"choices": ["3 " * 40, "3"]}}, {"evaluate": {"max_length": 20}}, "and the model takes 20"),
        ({"item": {"choices": []}}, {}, "asks nothing about its item 2"),
        ({"fewshot_split": "train"}, {"num_fewshot": 5}, "cannot be made with 5 few-shot examples"),
        (
            {**_GENERATE, "generation_kwargs": {"max_gen_toks": 20}},
            {"evaluate": {"max_length": 20}},
            "generates up to 20 tokens, and the model takes 20",
        ),
    ],
)
def test_what_cannot_be_answered(llama, tmp_path, change, top, message: str) -> None:
    metric = change.get("metric_list", [{"metric": "acc"}])[0]["metric"]
    with pytest.raises(GenomeError, match="`tasks` ") as caught:
        evaluator(tmp_path, llama, f"{metric},none", dict(change), **top)
    assert message in str(caught.value)


def test_a_prompt_without_tokens(llama, tmp_path, monkeypatch) -> None:
    """Where the tokenizer puts nothing before a text, lm-eval would fail in every trial."""
    change = {**_GENERATE, "doc_to_text": "", "generation_kwargs": {"max_gen_toks": 2}}
    tokens = llama[1]("", add_special_tokens=True)["input_ids"]
    assert not tokens
    with pytest.raises(GenomeError, match="a prompt without any token"):
        evaluator(tmp_path, llama, "exact_match,none", change)


def test_a_task_s_own_code_fails_by_name(llama, tmp_path) -> None:
    (tmp_path / "own.py").write_text("def results(doc, answers):\n    raise KeyError('boom')\n")
    metrics = [{"metric": "mine", "aggregation": "mean", "higher_is_better": True}]
    made = evaluator(tmp_path, llama, "acc,none", {})
    path = tmp_path / "odd.yaml"
    task = yaml.safe_load(path.read_text()) | {"metric_list": metrics}
    path.write_text(yaml.safe_dump(task) + "process_results: !function own.results\n")
    assert made.evaluate("search")[0].value >= 0
    evaluate = {"task_path": [str(tmp_path)], "holdout": 0.0}
    described = {"genome": {"models": ["a", "b"]}, "tasks": [{"name": "odd", "metric": "mine,none"}]}
    genome = Genome.model_validate({**described, "apply_chat_template": False, "evaluate": evaluate})
    with pytest.raises(StageError, match=r"`process_results` of odd failed \(KeyError: 'boom'\)"):
        Evaluator(genome, *llama, device="cpu").evaluate("search")
