"""Real candidates for benchmarks/halving.py: merges of the quickstart's experts, every item answered once.

`collect` makes the experts (examples/quickstart.py), draws candidates as the first generation of CMA-ES would
(normal around the genome's start, sigma 1/6 of each axis, reflected at the bounds), merges and evaluates each
on all items, and keeps what every item scored. Candidates that are stored are not made again.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "halving-items.npz"
TASKS = ("cities", "states", "languages", "scripts")
ITEMS = 250  # of each task, of both splits
MEASURES = ("acc", "gold_logprob", "gold_margin")
_SIGMA = 1 / 6
_CACHE = ROOT / ".cache"


@final
@dataclass(frozen=True, slots=True)
class Items:
    """What every item scored for every candidate, items in the run's stored order within each task.

    Args:
        correct: 0 or 1, shape (candidates, tasks, items).
        measures: Continuous measures by name, each of the same shape.
        units: The candidates in the unit cube, shape (candidates, genes).
        about: Where the numbers come from.
    """

    correct: npt.NDArray[np.float64]
    measures: dict[str, npt.NDArray[np.float64]]
    units: npt.NDArray[np.float64]
    about: dict[str, Any]


def load(path: Path = STORED) -> Items:
    """The stored candidates."""
    with np.load(path) as stored:
        measures = {name: stored[name].astype(float) for name in MEASURES[1:]}
        about = json.loads(str(stored["about"]))
        return Items(stored["acc"].astype(float), measures, stored["units"], about)


def collect(count: int) -> None:
    """Merge and evaluate until `count` candidates are known; then write the file in the repository."""
    lines = _CACHE / "halving-items.jsonl"
    known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    if len(known) < count:
        with lines.open("a") as out:
            for record in _evaluated(range(len(known), count)):
                known.append(record)
                out.write(json.dumps(record) + "\n")
                out.flush()
    _write(known[:count])


def _evaluated(numbers: range) -> Any:
    """A record for each candidate: its place in the unit cube, its items, its seconds."""
    sys.path.insert(0, str(ROOT / "examples"))
    import quickstart

    from llmevo import genome as genomes
    from llmevo.pipeline import Job, MergePipeline
    from llmevo.proposers.operators import reflect
    from llmevo.recipe import Recipes, num_layers

    quickstart.prepare(_CACHE, quickstart.FULL)
    text = (ROOT / "genomes" / "quickstart.yaml").read_text().replace(".cache/", f"{_CACHE}/")
    # All measures of an item come from the same forward pass; terms of no weight to speak of keep them.
    terms = [
        {"name": task, "metric": f"{measure},none", "weight": 0.25 if measure == "acc" else 1e-9}
        for task in TASKS
        for measure in MEASURES
    ]
    settings = {
        "tasks": terms,
        "limit": ITEMS,
        "evaluate.holdout": 0.0,
        "search.halving.enabled": False,
        "run.cache": False,
    }
    genome = genomes.parse(text, overrides=[f"{key}={json.dumps(value)}" for key, value in settings.items()])
    pipeline = MergePipeline(genome)
    space = Recipes(genome, num_layers(genome)).space
    for number in numbers:
        step = np.random.default_rng([0, number]).normal(0.0, _SIGMA, len(space))
        unit = reflect(space.start_unit() + step)
        started = time.perf_counter()
        outcome = pipeline.run(Job(number, space.from_unit(unit), seed=0))
        if outcome.score is None:
            raise SystemExit(f"candidate {number} failed: {outcome.error}")
        seconds = time.perf_counter() - started
        print(
            f"candidate {number}: {outcome.score.value:.4f} in {seconds:.1f} s", file=sys.stderr, flush=True
        )
        items = {key: np.round(values, 4).tolist() for key, values in outcome.score.items.items()}
        facts = {key: pipeline.describe()[key] for key in ("dtype", "fingerprint")}
        yield {"unit": unit.tolist(), "items": items, "seconds": outcome.seconds, **facts}


def _write(known: list[dict[str, Any]]) -> None:
    """One compressed array for each measure, small enough for a repository."""
    if len({record["fingerprint"] for record in known}) != 1:
        raise SystemExit("the stored candidates answered different items; remove .cache/halving-items.jsonl")
    arrays = {
        measure: np.array(
            [[record["items"][f"{task}/{measure},none"] for task in TASKS] for record in known],
            dtype=np.uint8 if measure == "acc" else np.float16,
        )
        for measure in MEASURES
    }
    about = {
        "genome": "genomes/quickstart.yaml",
        "tasks": TASKS,
        "items": ITEMS,
        "sigma": _SIGMA,
        "dtype": sorted({record["dtype"] for record in known}),
        "fingerprint": known[0]["fingerprint"],
    }
    units = np.array([record["unit"] for record in known], dtype=np.float32)
    np.savez_compressed(STORED, units=units, about=json.dumps(about), **arrays)
    print(f"{STORED}: {len(known)} candidates, {STORED.stat().st_size} bytes", file=sys.stderr)
