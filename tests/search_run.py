"""A real run to look at: runner, store and CMA-ES as they are, a function in place of the models."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmevo import genome as genomes
from llmevo import runner
from llmevo.cli.display import NoDisplay
from llmevo.pipeline import Job, Outcome
from llmevo.trial import Score

TASKS = ("sums", "steps")
NASTY = "<script>alert('x')</script> & <b>"
ITEMS = {"search": 40, "holdout": 200}


def genome_data(**search: Any) -> dict[str, Any]:
    """Three parents of four layers; nothing of them is on this machine."""
    return {
        "genome": {
            "models": ["a/german", "b/finnish", "c/<i>currency</i>"],
            "base_model": "a/base",
            "merge_method": ["task_arithmetic", "ties"],
            "num_layers": 4,
        },
        "tasks": [{"name": task, "weight": 0.5} for task in TASKS],
        "search": {"trials": 24, "proposer": "cma", "population": 6, "seed": 2, **search},
        "evaluate": {"holdout": 0.5},
    }


class FunctionExecutor:
    """Scores items as a model would answer them: 0 or 1, by a skill that follows from the weights.

    Args:
        gain: How far the best weights lift the skill; 0 for a search in which nothing matters.
        direction: Of the search. Items that are answered are better under both, as an evaluator has them.
        rungs: Items of each task on each rung below the last.
    """

    workers = 1

    def __init__(self, gain: float = 1.0, direction: str = "maximize", rungs: tuple[int, ...] = ()) -> None:
        self._gain = gain
        self._sign = 1.0 if direction == "maximize" else -1.0
        self._rungs = rungs
        self.jobs = 0

    def describe(self) -> dict[str, Any]:
        items = {task: dict(ITEMS) for task in TASKS}
        facts = {"items": items, "weights": dict.fromkeys(TASKS, 0.5), "device": "cpu"}
        sizes = [*self._rungs, ITEMS["search"]]
        return {**facts, "rungs": [dict.fromkeys(TASKS, size) for size in sizes]}

    def submit(self, job: Job) -> Future[Outcome]:
        self.jobs += 1
        done: Future[Outcome] = Future()
        done.set_result(self._answer(job))
        return done

    def shutdown(self, cancel: bool = False) -> None:
        pass

    def _answer(self, job: Job) -> Outcome:
        if job.number % 9 == 8 and job.params:
            return Outcome(
                job.number, error=f"expert {NASTY} gave NaN", stage="merge", seconds={"merge": 0.1}
            )
        weights = [value for name, value in job.params.items() if "weight" in name]
        miss = sum((float(w) - 0.9) ** 2 for w in weights if isinstance(w, float)) if weights else 1.5
        skill = 0.5 + self._gain * (0.35 - 0.15 * min(miss, 2.0))
        key = f"{job.split}{json.dumps(job.recipe)}".encode() if not job.params else job.split.encode()
        hard = np.random.default_rng(int.from_bytes(hashlib.sha256(job.split.encode()).digest()[:4], "big"))
        luck = np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:4], "big") + job.number)
        items = {}
        for task in TASKS:
            level = hard.random(ITEMS[job.split]) + 0.1 * luck.standard_normal(ITEMS[job.split])
            count = None if job.rung is None else self._rungs[job.rung]
            items[task] = [float(value < skill) for value in level[:count]]
        means = [float(np.mean(values)) for values in items.values()]
        errors = [float(np.std(values, ddof=1)) / len(values) ** 0.5 for values in items.values()]
        score = Score(self._sign * sum(means) / 2, float(np.hypot(*errors)) / 2, items)
        metrics = {task: {"acc,none": mean} for task, mean in zip(TASKS, means, strict=True)}
        return Outcome(job.number, score, metrics, {"merge": 0.1, "evaluate": 0.4})


def finished(
    folder: Path, gain: float = 1.0, limit: int | None = None, rungs: tuple[int, ...] = (), **search: Any
) -> Path:
    """Make a run and return its directory."""
    text = yaml.safe_dump(genome_data(**search))
    (folder / "genome.yaml").write_text(text)
    run_dir = folder / "run"
    genome = genomes.parse(text)
    executor = FunctionExecutor(gain, search.get("direction", "maximize"), rungs)
    runner.run(genome, text, run_dir, observer=NoDisplay(), executor=executor, limit=limit)
    return run_dir
