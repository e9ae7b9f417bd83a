"""SmolLM2 on real facts: the evaluator's numbers are lm-eval's."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from llmevo.evaluate import Evaluator, dtype  # noqa: E402
from llmevo.genome import EvaluateSpec, Genome  # noqa: E402


@pytest.mark.slow
def test_smollm2_scores_what_lm_eval_says(smollm2: Path, task_folder: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmevo.evaluate.tasks import task_manager

    torch.set_num_threads(1)
    precision = dtype(EvaluateSpec(), torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=precision)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    genome = Genome.model_validate(
        {
            "genome": {"models": ["a", "b"]},
            "tasks": [{"name": "money"}, {"name": "prose", "metric": "bits_per_byte,none"}],
            "apply_chat_template": False,
            "evaluate": {"task_path": [str(task_folder)], "holdout": 0.0},
        }
    )
    evaluator = Evaluator(genome, model, tokenizer, device="cpu")
    score, metrics = evaluator.evaluate("search")
    assert evaluator.evaluate("search")[0] == score
    expected = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=["money", "prose"],
        task_manager=task_manager(genome),
        bootstrap_iters=0,
        log_samples=False,
    )["results"]
    assert metrics["money"]["acc,none"] == expected["money"]["acc,none"]
    bits = expected["prose"]["bits_per_byte,none"]
    assert metrics["prose"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
