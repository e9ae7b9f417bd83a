"""Merging two local models from Python, with the search loop in your own hands.

The two models are made here, so that the example needs nothing: a Llama of 0.1 M parameters has seen a
little of two subjects, and one copy learns more of what comes after a letter, the other of what comes before.
Put two of your own models of one architecture in their place, and tasks of your own.

The questions are those that the parents learned: what is shown is how the parts fit together, not a result.

    python examples/merge_two.py [folder]
"""

from __future__ import annotations

import json
import os
import string
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("TQDM_DISABLE", "1")  # bars would stand between the lines below

import yaml

import llmevo
from llmevo.genome import Genome
from llmevo.pipeline import Job, MergePipeline
from llmevo.recipe import Recipes, num_layers


def letters(word: str, sign: int) -> list[tuple[str, str]]:
    """Facts such as ("3 after d is", "g"), round the end of the alphabet."""
    places = product(range(1, 5), range(26))
    return [(f"{step} {word} {LETTERS[p]} is", LETTERS[(p + sign * step) % 26]) for step, p in places]


LETTERS = string.ascii_lowercase
FACTS = {"after": letters("after", 1), "before": letters("before", -1)}


def make_models(folder: Path) -> None:
    """A base that knows a little of both subjects, and what it becomes by learning more of either."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", "after", "before", "is", *string.digits, *string.ascii_lowercase]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<end>", eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    rows = {
        name: torch.tensor([tokenizer.encode(f"{asked} {answer}") for asked, answer in facts])
        for name, facts in FACTS.items()
    }
    # Fine-tunes of random weights do not merge: they have nothing in common but noise.
    learn(model, list(rows.values()), steps=30, lr=1e-3)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name in ("base", *FACTS):
        model.load_state_dict(start)
        if name in rows:
            learn(model, [rows[name]], steps=15, lr=3e-4)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def learn(model: Any, subjects: list[Any], steps: int, lr: float) -> None:
    """Learn to end each row of tokens (facts, tokens) of each subject with its last one."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        for rows in subjects:
            logits = model(rows[:, :-1]).logits[:, -1]
            torch.nn.functional.cross_entropy(logits, rows[:, -1]).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_task(folder: Path, name: str) -> None:
    """An lm-eval task: which letter ends the sentence."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"asked": asked, "gold": LETTERS.index(answer)}) for asked, answer in FACTS[name]]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{asked}}",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "{{gold}}",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def main(where: str | None = None) -> llmevo.Trial:
    folder = Path(where or tempfile.mkdtemp(prefix="merge-two-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_models(folder)
    for name in FACTS:
        make_task(folder / "tasks", name)

    genome = Genome.model_validate(
        {
            "genome": {
                "models": [str(folder / name) for name in FACTS],
                "base_model": str(folder / "base"),
                "merge_method": ["task_arithmetic", "ties"],  # the method is a gene, too
                "layer_granularity": 2,
                "dtype": "float32",
            },
            "tasks": [{"name": name, "weight": 0.5} for name in FACTS],
            "apply_chat_template": False,
            "evaluate": {"task_path": [str(folder / "tasks")], "dtype": "float32", "batch_size": 64},
        }
    )
    recipes = Recipes(genome, num_layers(genome))
    pipeline = MergePipeline(genome)
    for reference in recipes.references():
        outcome = pipeline.run(Job(0, {}, seed=0, recipe=reference.recipe))
        print(f"{reference.origin:16} {'failed' if outcome.score is None else f'{outcome.score.value:.3f}'}")
    search = llmevo.Optimizer(recipes.space, proposer="ga", direction="maximize", seed=0)
    while len(search.trials) < 24:
        for trial in search.ask(8):
            outcome = pipeline.run(Job(trial.number, trial.params, seed=0))
            search.tell(trial, outcome.score, error=outcome.error)
    best = search.best
    assert best is not None
    assert best.score is not None
    held_out = pipeline.run(Job(best.number, best.params, seed=0, split="holdout"))
    print(f"{'evolved':16} {best.score.value:.3f} (trial {best.number})")
    print(f"{'held-out items':16} {'failed' if held_out.score is None else f'{held_out.score.value:.3f}'}")
    (folder / "best.yaml").write_text(yaml.safe_dump(recipes.recipe(best.params), sort_keys=False))
    print(f"mergekit-yaml {folder / 'best.yaml'} OUT makes its weights")
    return best


if __name__ == "__main__":
    main(*sys.argv[1:2])
