"""What the fast mode's rounding and masks do to scores, beside mergekit's own arithmetic.

    python benchmarks/merging_scores.py                   from the folder in which `make run` has made .cache

Random recipes of four methods on the quickstart's experts, which are adapters, are merged in both modes and
evaluated on the same items: sums of them as factors, masked methods as matrices. DARE's masks differ by
design: there the difference is that of two draws of the masks. Writes results/merging_scores.json.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import merging
import numpy as np

from llmevo.evaluate import Evaluator
from llmevo.genome import load
from llmevo.merge import Merger

RESULTS = Path(__file__).resolve().parent / "results" / "merging_scores.json"
# Whether a method needs a base; a genome of sums holds adapters as factors, one with masks as matrices.
SUMS = {"linear": False, "task_arithmetic": True}
MASKED = {"ties": True, "dare_ties": True}
METHODS = SUMS | MASKED


def recipe(method: str, models: list[str], base: str, rng: np.random.Generator) -> dict[str, Any]:
    """A random recipe; negative weights would do no more than spoil the model."""
    parts = []
    for model in models:
        own = {"weight": float(rng.uniform(0.1, 0.8))}
        if method in MASKED:
            own["density"] = float(rng.uniform(0.3, 0.9))
        parts.append({"model": model, "parameters": own})
    config: dict[str, Any] = {"merge_method": method, "models": parts, "dtype": "bfloat16"}
    return config | ({"base_model": base} if METHODS[method] else {})


def answers(evaluator: Any, rung: int) -> dict[str, Any]:
    """What each item scored, by task."""
    return {task: np.array(items) for task, items in evaluator.evaluate("search", rung=rung)[0].items.items()}


def measure(methods: list[str], recipes: int, items: int) -> None:
    """Evaluate recipes of methods that hold adapters alike, in both modes, and store each when it is done."""
    genome = load(Path("genomes/quickstart.yaml"))
    spec = genome.genome.model_copy(update={"merge_method": methods})
    merger = Merger(spec, genome.merge, device="cpu", dtype="bfloat16")
    evaluator = Evaluator(genome, merger.model, merger.tokenizer, device="cpu")
    sizes = [sum(rung.values()) for rung in evaluator.describe()["rungs"]]
    rung = min(range(len(sizes)), key=lambda i: abs(sizes[i] - items))
    rng = np.random.default_rng(0)
    for method in methods:
        gaps, flipped, scores = [], [], []
        for number in range(recipes):
            config = recipe(method, spec.models, str(spec.base_model), rng)
            scored = []
            for exact in (False, True):
                merger.merge(config, seed=number, exact=exact)
                scored.append(answers(evaluator, rung))
            changes = np.concatenate([scored[0][task] - scored[1][task] for task in scored[0]])
            gaps.append(float(changes.mean()))
            flipped.append(int((changes != 0).sum()))
            scores.append(float(np.concatenate(list(scored[1].values())).mean()))
        row = {
            "mean difference": float(np.mean(gaps)),
            "mean absolute difference": float(np.mean(np.abs(gaps))),
            "largest difference": float(np.max(np.abs(gaps))),
            "flipped items": flipped,
            "exact scores": scores,
        }
        print(method, row, flush=True)
        merging.store(RESULTS, {"items": sizes[rung], "recipes": recipes, "methods": {method: row}})


def main() -> None:
    """Read the arguments, measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=int, default=5, help="of each method")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--items", type=int, default=200, help="the nearest rung is taken")
    arguments = parser.parse_args()
    for methods in (SUMS, MASKED):
        chosen = [method for method in methods if method in arguments.methods]
        if chosen:
            measure(chosen, arguments.recipes, arguments.items)


if __name__ == "__main__":
    main()
