"""Does successive halving find as good a merge for a quarter of the item-evaluations?

    python benchmarks/halving.py                 both parts, from the stored candidates: minutes on one core
    python benchmarks/halving.py --collect 200   merges and evaluates real candidates first: about an hour

Who goes on is decided by `llmevo.runner.rungs`, on rungs from `llmevo.evaluate.items`: what a run does.

(a) Simulated candidates with the figures of many real ones: true accuracies with a standard deviation of 3.3
    points around 0.6, and answers whose correlation between two candidates is 0.67, so that they differ on
    about 16 % of the items. An answer is right where a latent normal margin is positive, which has a part
    for the candidate, one for the item, and one for both.
(b) Real ones: merges of the quickstart's experts with every item answered once (halving_items.py). A batch is
    drawn from them and the items are shuffled within each task, again and again.

cost      item-evaluations over those of scoring every candidate on all items
regret    true accuracy of the best candidate minus that of the winner, in points
optimism  the winner's score minus its true accuracy, in points

In (a) the truth is the accuracy on endlessly many items. In (b) it is that on all stored items, of which the
search sees all (so that scoring everybody in full has no regret) or a half (and the truth is on the other).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, final

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    if "--collect" not in sys.argv:  # merging and evaluating takes all cores
        os.environ.setdefault(_name, "1")

import numpy as np
import numpy.typing as npt

from llmevo.evaluate.items import rung_sizes
from llmevo.genome.sections import HalvingSpec
from llmevo.pipeline import Outcome
from llmevo.runner.rungs import Rungs
from llmevo.trial import Score

RESULTS = Path(__file__).resolve().parent / "results" / "halving.json"
Array = npt.NDArray[np.float64]

ACCURACY, SPREAD, CORRELATION, ITEMS = 0.6, 0.033, 0.67, 1000
MEASURE = 0.9  # assumed correlation of a continuous measure with the accuracy, over candidates
SUBSET = 100
TARGET = (0.25, 0.5)  # cost, regret
SHAPES = ((1, 32), (1, 14), (1, 10), (1, 8), (4, 10))  # batches, candidates of each
_NORMAL = NormalDist()


@final
@dataclass(frozen=True, slots=True)
class Candidates:
    """Candidates with what each item scored.

    Args:
        correct: 0 or 1, shape (candidates, tasks, items).
        measures: Continuous measures by name, each of the same shape.
        truth: True accuracies, shape (candidates,).
    """

    correct: Array
    measures: dict[str, Array]
    truth: Array

    def of(self, numbers: Sequence[int]) -> Candidates:
        """Some of them."""
        rows = list(numbers)
        picked = {name: values[rows] for name, values in self.measures.items()}
        return Candidates(self.correct[rows], picked, self.truth[rows])


@final
@dataclass(frozen=True, slots=True)
class Result:
    """What a strategy gave, over all repetitions.

    Args:
        data: `simulated`, `stored` or `stored, half`.
        batches: Batches of a run.
        size: Candidates of a batch.
        strategy: What was done.
        cost: Share of the item-evaluations.
        regret: In points.
        regret_error: Its standard error.
        optimism: In points.
        optimism_error: Its standard error.
    """

    data: str
    batches: int
    size: int
    strategy: str
    cost: float
    regret: float
    regret_error: float
    optimism: float
    optimism_error: float


# A strategy takes a batch and gives the winner, its score, and the item-evaluations it took.
Strategy = Callable[[Candidates], tuple[int, float, int]]


def simulated(count: int, rng: np.random.Generator) -> Candidates:
    """Part (a)'s candidates; the measure is the margin, with another level for each candidate."""
    level = _NORMAL.inv_cdf(ACCURACY)
    abilities = rng.normal(0.0, SPREAD / _NORMAL.pdf(level), count)
    shared = math.sqrt(_latent())
    noise = math.sqrt(1 - shared**2) * rng.normal(size=(count, 1, ITEMS))
    answers = level + shared * rng.normal(size=(1, 1, ITEMS)) + noise
    other = rng.normal(0.0, SPREAD / _NORMAL.pdf(level), count)
    measured = MEASURE * abilities + math.sqrt(1 - MEASURE**2) * other
    return Candidates(
        (answers + abilities[:, None, None] > 0).astype(float),
        {"gold_margin": answers + measured[:, None, None]},
        np.array([_NORMAL.cdf(level + ability) for ability in abilities]),
    )


@functools.cache
def _latent() -> float:
    """The correlation of margins that gives answers the correlation `CORRELATION`, by bisection."""
    from scipy.stats import multivariate_normal

    level, low, high = _NORMAL.inv_cdf(ACCURACY), 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        both = multivariate_normal.cdf([level, level], cov=[[1, middle], [middle, 1]])
        phi = (both - ACCURACY**2) / (ACCURACY * (1 - ACCURACY))
        low, high = (middle, high) if phi < CORRELATION else (low, middle)
    return (low + high) / 2


def halving(spec: HalvingSpec) -> Strategy:
    """What a run does with this section of a genome."""

    def strategy(batch: Candidates) -> tuple[int, float, int]:
        candidates, tasks, items = batch.correct.shape
        prefixes = rung_sizes(spec, {str(task): items for task in range(tasks)})
        sizes = [sum(prefix.values()) for prefix in prefixes]
        weights = {str(task): 1 / tasks for task in range(tasks)}
        rungs = Rungs(tuple(sizes), spec.eta, spec.rank_by, weights=weights)
        right = batch.correct.cumsum(axis=2)
        measured = None if spec.rank_by == "score" else batch.measures[spec.rank_by].cumsum(axis=2)

        def answered(number: int, rung: int) -> Outcome:
            metrics: dict[str, dict[str, float]] = {}
            score = 0.0
            for task, count in prefixes[rung].items():
                score += right[number, int(task), count - 1] / count / tasks
                if measured is not None:
                    mean = measured[number, int(task), count - 1] / count
                    metrics[task] = {f"{spec.rank_by},none": float(mean)}
            return Outcome(number, Score(score, rung=rung), metrics)

        numbers = range(candidates)
        outcomes: dict[tuple[int, int], Outcome] = {}
        asked = [0] * candidates
        while True:
            stage = rungs.stage(numbers, outcomes)
            rung = len(sizes) - 1 if stage.rung is None else stage.rung
            for number in stage.missing:
                asked[number] = sizes[rung]
                outcomes[number, rung] = answered(number, rung)
            if stage.rung is None:
                last = {n: outcomes[n, rung].score for n in stage.alive}
                values = {n: score.value for n, score in last.items() if score is not None}
                winner = min(values, key=lambda n: (-values[n], n))
                return winner, values[winner], sum(asked)

    return strategy


def subset(size: int) -> Strategy:
    """Everybody on the same few items."""

    def strategy(batch: Candidates) -> tuple[int, float, int]:
        candidates, tasks, _ = batch.correct.shape
        scores = batch.correct[:, :, : size // tasks].mean(axis=(1, 2))
        winner = int(np.argmax(scores))
        return winner, float(scores[winner]), candidates * (size // tasks) * tasks

    return strategy


def strategies(measures: Sequence[str]) -> dict[str, Strategy]:
    """By name; the first halving is the default of a genome."""
    default = HalvingSpec(enabled=True)
    found: dict[str, Strategy] = {
        "all items": halving(default.model_copy(update={"enabled": False})),
        f"{SUBSET} items": subset(SUBSET),
        f"halving {default.first}/{default.eta} (default)": halving(default),
    }
    for first, eta in ((40, 2), (60, 2), (70, 2), (80, 2), (100, 2), (60, 3), (80, 3), (100, 4)):
        if (first, eta) != (default.first, default.eta):
            spec = HalvingSpec(enabled=True, first=first, eta=eta)
            found[f"halving {first}/{eta}"] = halving(spec)
    for measure in measures:
        spec = default.model_copy(update={"rank_by": measure})
        found[f"halving {default.first}/{default.eta} by {measure}"] = halving(spec)
    return found


def compare(
    data: str, batches: int, size: int, draw: Iterator[Candidates], chosen: dict[str, Strategy]
) -> list[Result]:
    """Every strategy on the same runs: the winner of a run is the best of its batches' winners."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}
    for run in draw:
        groups = [range(batch * size, (batch + 1) * size) for batch in range(batches)]
        whole = run.correct.shape[0] * run.correct[0].size
        for name, strategy in chosen.items():
            wins, asked = [], 0
            for group in groups:
                winner, score, took = strategy(run.of(group))
                wins.append((score, -group[winner]))
                asked += took
            score, place = max(wins)
            truth = run.truth[-place]
            rows[name].append((asked / whole, 100 * (run.truth.max() - truth), 100 * (score - truth)))
    return [_result(data, batches, size, name, np.array(values)) for name, values in rows.items()]


def _result(data: str, batches: int, size: int, name: str, values: Array) -> Result:
    cost, regret, optimism = values.mean(axis=0).tolist()
    errors = (values.std(axis=0, ddof=1) / math.sqrt(len(values))).tolist()
    return Result(data, batches, size, name, cost, regret, errors[1], optimism, errors[2])


def stored_runs(count: int, repetitions: int, *, half: bool) -> Iterator[Candidates]:
    """Runs drawn from the stored candidates, items shuffled within each task."""
    import halving_items

    stored = halving_items.load()
    rng = np.random.default_rng([7, count, half])
    candidates, tasks, items = stored.correct.shape
    for _ in range(repetitions):
        rows = rng.choice(candidates, count, replace=False)
        order = np.array([rng.permutation(items) for _ in range(tasks)])[None]

        def shuffled(values: Array, rows: Any = rows, order: Any = order) -> Array:
            return np.take_along_axis(values[rows], np.broadcast_to(order, (count, tasks, items)), axis=2)

        correct = shuffled(stored.correct)
        measures = {name: shuffled(values) for name, values in stored.measures.items()}
        seen = items // 2 if half else items
        truth = correct[:, :, seen:].mean(axis=(1, 2)) if half else correct.mean(axis=(1, 2))
        yield Candidates(correct[:, :, :seen], {n: v[:, :, :seen] for n, v in measures.items()}, truth)


def part_a(repetitions: int) -> list[Result]:
    """Simulated candidates."""
    results = []
    for batches, size in SHAPES:
        rng = np.random.default_rng([batches, size])
        draw = (simulated(batches * size, rng) for _ in range(repetitions))
        results += compare("simulated", batches, size, draw, strategies(["gold_margin"]))
    return results


def part_b(repetitions: int) -> list[Result]:
    """Stored candidates."""
    results = []
    chosen = strategies(["gold_logprob", "gold_margin"])
    for half in (False, True):
        for batches, size in SHAPES:
            draw = stored_runs(batches * size, repetitions, half=half)
            results += compare("stored, half" if half else "stored", batches, size, draw, chosen)
    return results


def tables(results: Sequence[Result]) -> str:
    """One table for each kind of data and shape of run, in Markdown."""
    lines = []
    for data, batches, size in dict.fromkeys((r.data, r.batches, r.size) for r in results):
        shape = f"one batch of {size}" if batches == 1 else f"a run of {batches} batches of {size}"
        lines += ["", f"{data} candidates, {shape}:", "", "| strategy | cost | regret | optimism |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {r.strategy} | {100 * r.cost:.0f} % | {r.regret:.2f} ± {r.regret_error:.2f} "
            f"| {r.optimism:+.2f} ± {r.optimism_error:.2f} |"
            for r in results
            if (r.data, r.batches, r.size) == (data, batches, size)
        ]
    return "\n".join(lines[1:])


def verdict(results: Sequence[Result]) -> str:
    """Whether the default keeps the target, for each kind of data and shape of run."""
    lines = [f"target: at most {TARGET[0]:.0%} of the cost with at most {TARGET[1]} points of regret"]
    for r in results:
        if r.strategy.endswith("(default)") and r.data != "stored, half":
            kept = "kept" if r.cost <= TARGET[0] and r.regret <= TARGET[1] else "MISSED"
            lines.append(
                f"{r.data}, {r.batches} x {r.size}: {100 * r.cost:.1f} %, {r.regret:.2f} points: {kept}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Both parts, the tables, and results/halving.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--collect", type=int, metavar="N", help="make N real candidates first")
    parser.add_argument("--repetitions", type=int, default=1000, help="runs of each shape")
    parser.add_argument("--part", choices=("a", "b", "all"), default="all")
    options = parser.parse_args(arguments)
    if options.collect:
        import halving_items

        halving_items.collect(options.collect)
    started = time.perf_counter()
    results = part_a(options.repetitions) if options.part in ("a", "all") else []
    results += part_b(options.repetitions) if options.part in ("b", "all") else []
    print(tables(results))
    print(f"\n{verdict(results)}")
    about = {"repetitions": options.repetitions, "seconds": round(time.perf_counter() - started, 1)}
    about |= {"numpy": np.__version__, "target": TARGET, "default": HalvingSpec().model_dump()}
    _keep(about, results)


def _keep(about: dict[str, Any], results: Sequence[Result]) -> None:
    """Write the results beside those of the part that was not run."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in ("simulated", "stored"):
        rows = [asdict(result) for result in results if result.data.startswith(part)]
        if rows:
            known[part] = {"about": about, "results": rows}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
