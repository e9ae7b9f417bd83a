"""What the fast mode's rounding and masks do to scores, beside mergekit's own arithmetic.

    python benchmarks/merging_scores.py                   from the folder in which `make run` has made .cache

Random recipes of four methods on the quickstart's experts are merged in both modes and evaluated on the same
items. DARE's masks differ by design: there the difference is that of two draws of the masks. Writes
results/merging_scores.json.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np

from llmevo.evaluate import Evaluator
from llmevo.genome import load
from llmevo.merge import Merger

RESULTS = Path(__file__).resolve().parent / "results" / "merging_scores.json"
METHODS = {"linear": False, "task_arithmetic": True, "ties": True, "dare_ties": True}


def recipe(method: str, models: list[str], base: str, rng: np.random.Generator) -> dict[str, Any]:
    """A random recipe; negative weights would do no more than spoil the model."""
    parts = []
    for model in models:
        own = {"weight": float(rng.uniform(0.1, 0.8))}
        if method in ("ties", "dare_ties"):
            own["density"] = float(rng.uniform(0.3, 0.9))
        parts.append({"model": model, "parameters": own})
    config: dict[str, Any] = {"merge_method": method, "models": parts, "dtype": "bfloat16"}
    return config | ({"base_model": base} if METHODS[method] else {})


def answers(evaluator: Any, rung: int) -> dict[str, Any]:
    """What each item scored, by task."""
    return {task: np.array(items) for task, items in evaluator.evaluate("search", rung=rung)[0].items.items()}


def measure(recipes: int, items: int) -> dict[str, Any]:
    """Evaluate every recipe in both modes."""
    genome = load(Path("genomes/quickstart.yaml"))
    merger = Merger(genome.genome, genome.merge, device="cpu", dtype="bfloat16")
    evaluator = Evaluator(genome, merger.model, merger.tokenizer, device="cpu")
    sizes = [sum(rung.values()) for rung in evaluator.describe()["rungs"]]
    rung = min(range(len(sizes)), key=lambda i: abs(sizes[i] - items))
    rng = np.random.default_rng(0)
    rows = {}
    for method in METHODS:
        gaps, flipped = [], []
        for number in range(recipes):
            config = recipe(method, genome.genome.models, str(genome.genome.base_model), rng)
            scored = []
            for exact in (False, True):
                merger.merge(config, seed=number, exact=exact)
                scored.append(answers(evaluator, rung))
            changes = np.concatenate([scored[0][task] - scored[1][task] for task in scored[0]])
            gaps.append(float(changes.mean()))
            flipped.append(int((changes != 0).sum()))
        rows[method] = {
            "mean difference": float(np.mean(gaps)),
            "mean absolute difference": float(np.mean(np.abs(gaps))),
            "largest difference": float(np.max(np.abs(gaps))),
            "flipped items": flipped,
        }
        print(method, rows[method], flush=True)
    return {"items": sizes[rung], "recipes": recipes, "methods": rows}


def main() -> None:
    """Read the arguments, measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=int, default=5, help="of each method")
    parser.add_argument("--items", type=int, default=200, help="the nearest rung is taken")
    arguments = parser.parse_args()
    results = measure(arguments.recipes, arguments.items)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
