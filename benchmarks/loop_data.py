"""What `loop.py` measures on: three experts as whole models, three tasks, and candidates for each method.

The experts are SmolLM2-135M-Instruct after a short LoRA training on one subject each (the quickstart's
facts), with the adapter added to the weights and rounded to bfloat16. The tasks have the shapes that
evaluations of merges are made of: choices of several tokens without examples, choices of one token without
examples, and numbers after five fixed examples.

Nothing here imports llmevo's own engines: the peers read the same files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "loop"
BASE = ROOT / ".cache" / "smollm2"
PARENTS = ("cities", "states", "languages")
TASKS = ("cities", "languages", "sums")
METHODS = ("linear", "ties", "task_arithmetic", "dare_ties")
LAYERS, GROUP = 30, 10  # of SmolLM2-135M; layers with genes of their own
SEED = 7
TRAIN = 320  # facts that an expert learns
SHOTS = 5

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {files}
test_split: test
{fewshot}output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_FEWSHOT = """\
fewshot_split: train
num_fewshot: {shots}
fewshot_config:
  sampler: first_n
"""


def experts(folder: Path = CACHE) -> None:
    """Make the parents, each once: about twenty seconds for each on two cores."""
    sys.path.insert(0, str(ROOT / "examples"))
    import quickstart_data as data
    import quickstart_experts as training

    single = _single()
    for name in PARENTS:
        whole = folder / "parents" / name
        if (whole / "config.json").is_file():
            continue
        learned, _ = data.split(data.SUBJECTS[name](single), SEED, TRAIN, 0)
        adapter = folder / "adapters" / name
        training.expert(BASE, adapter, learned, training.Training(), lambda step, steps, loss: None)
        _merged(adapter, whole)


def _single() -> Callable[[str], bool]:
    """Whether a word, after a space, is one token; makes the base model if it is not there."""
    from transformers import AutoTokenizer

    from llmevo.embedded import smollm2

    tokenizer = AutoTokenizer.from_pretrained(smollm2(BASE))
    return lambda word: len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1


def _merged(adapter: Path, whole: Path) -> None:
    """Write the base with the adapter added, in bfloat16, as one complete folder."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(torch.bfloat16)
    whole.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{whole.name}-", dir=whole.parent))
    try:
        model.save_pretrained(beside)
        AutoTokenizer.from_pretrained(BASE).save_pretrained(beside)
        os.replace(beside, whole)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def tasks(items: int, folder: Path = CACHE) -> Path:
    """Write the three tasks with `items` questions together; return their folder.

    The questions are the same for every run of this script; a smaller number is the beginning of a larger.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    import quickstart_data as data

    out = folder / f"tasks-{items}"
    out.mkdir(parents=True, exist_ok=True)
    each, single = items // len(TASKS), _single()
    for name in TASKS:
        _, facts = ([], []) if name == "sums" else data.split(data.SUBJECTS[name](single), SEED, 0, each)
        rng = random.Random(f"{SEED} {name}")
        rows = {"test": [data.question(fact, rng) for fact in facts] or sums(each, SEED + 1)}
        if name == "cities":
            rows["test"] = [_in_words(row) for row in rows["test"]]
        fewshot = ""
        if name == "sums":
            rows["train"] = sums(SHOTS, SEED + 2)
            fewshot = _FEWSHOT.format(shots=SHOTS)
        files = {}
        for split, lines in rows.items():
            file = out / f"{name}-{split}.jsonl"
            file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            files[split] = str(file.resolve())
        text = _TASK.format(name=name, files=json.dumps(files), fewshot=fewshot)
        (out / f"{name}.yaml").write_text(text)
    return out


def _in_words(row: dict[str, Any]) -> dict[str, Any]:
    """The question as ARC asks: a sentence, and choices that are sentences too."""
    city = row["prompt"].removesuffix(" is in")
    return {
        "prompt": f"Question: In which part of the world would you be on a walk through the city of {city}?\n"
        "Answer:",
        "choices": [f"Somewhere in the country of {choice}" for choice in row["choices"]],
        "gold": row["gold"],
    }


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Additions of two numbers below 100 with four answers that are near each other."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        first, second = rng.randrange(10, 100), rng.randrange(10, 100)
        wrong = rng.sample((-11, -10, -2, -1, 1, 2, 10, 11), 3)
        choices = [first + second + d for d in wrong]
        gold = rng.randrange(4)
        choices.insert(gold, first + second)
        prompt = f"What is {first} + {second}?\nAnswer:"
        rows.append({"prompt": prompt, "choices": [str(choice) for choice in choices], "gold": gold})
    return rows


def genome(method: str, items: int, folder: Path = CACHE) -> dict[str, Any]:
    """The search in mergekit-evolve's format, which llmevo reads too."""
    return {
        "genome": {
            "models": [str(folder / "parents" / name) for name in PARENTS],
            "merge_method": method,
            # mergekit-evolve crashes on linear with a base model
            "base_model": None if method == "linear" else str(BASE),
            "layer_granularity": GROUP,
        },
        "tasks": [{"name": name, "weight": 1 / len(TASKS), "metric": "acc,none"} for name in TASKS],
        "apply_chat_template": False,
        "fewshot_as_multiturn": False,
    }


def genotypes(method: str, count: int) -> np.ndarray:
    """Candidates as mergekit-evolve's arrays: weights in [0.1, 1], densities in [0.3, 0.9].

    Returns:
        Shape (count, layer groups, models, 1, parameters).
    """
    rng = np.random.default_rng(SEED)
    drawn = rng.random((count, LAYERS // GROUP, len(PARENTS), 1, 2))
    drawn[..., 0] = 0.1 + 0.9 * drawn[..., 0]
    drawn[..., 1] = 0.3 + 0.6 * drawn[..., 1]
    return drawn[..., :1] if method in ("linear", "task_arithmetic") else drawn


def prepare(method: str, count: int, items: int, folder: Path = CACHE) -> dict[str, Path]:
    """Write what the systems read: `genome` (YAML), `candidates` (JSON), `recipes` (YAML each), `tasks`."""
    from llmevo import genome as genomes
    from llmevo.recipe import Recipes

    experts(folder)
    where = folder / f"{method}-{items}"
    (where / "recipes").mkdir(parents=True, exist_ok=True)
    data = genome(method, items, folder)
    arrays = genotypes(method, count)
    (where / "genome.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    (where / "candidates.json").write_text(json.dumps(arrays.tolist()))
    ours = Recipes(genomes.Genome.model_validate(data), LAYERS)
    for number, array in enumerate(arrays):
        text = yaml.safe_dump(ours.from_genotype(array), sort_keys=False)
        (where / "recipes" / f"{number}.yaml").write_text(text)
    return {
        "genome": where / "genome.yaml",
        "candidates": where / "candidates.json",
        "recipes": where / "recipes",
        "tasks": tasks(items, folder),
    }
