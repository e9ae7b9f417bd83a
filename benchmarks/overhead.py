"""What a trial costs outside merge and evaluation, and whether that grows with the history.

    python benchmarks/overhead.py                        every proposer and size that is not stored yet
    python benchmarks/overhead.py --proposers cma --genes 800 --again
    python benchmarks/overhead.py --report               the table from what is stored

The real runner, optimizer, proposer, store and plain display drive a stub in place of the models, which
answers at once with the answers to 300 questions. What the stub takes is subtracted; the rest is ask, store,
tell and display. The time of a trial is that of its batch over the batch's size, since a batch is asked at
once.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmevo import genome as genomes
from llmevo import runner
from llmevo.cli.display import PlainDisplay
from llmevo.pipeline import Job, Outcome
from llmevo.trial import Score, Trial

RESULTS = Path(__file__).resolve().parent / "results"
FILE = "overhead.json"
PROPOSERS = ("cma", "ga", "hybrid+placebo", "random", "sobol", "topk_mean")
SHAPES = {10: (5, 2), 100: (5, 20), 800: (10, 80)}  # genes: parents, groups of layers
MARKS = (10, 100, 1000, 10_000)
TASKS, ITEMS = ("one", "two", "three"), 100
OPTIMUM = 0.6  # of every weight; they start at 0.3
WINDOW = 4  # batches at each mark
TRIAL = 2.0  # seconds of a trial that the overhead is a share of
SHARE, GROWTH = 0.03, 1.5  # what is wanted: at most so much of a trial, and no growth beyond the noise

Record = dict[str, Any]


class Stub:
    """An executor whose models answer at once: right with a chance that is best at a point inside the space.

    At a corner, a search would converge there and end early.

    Attributes:
        seconds: How long the answers took, all together.
    """

    workers = 1

    def __init__(self) -> None:
        self.seconds = 0.0

    def describe(self) -> dict[str, Any]:
        """What the runner keeps of a pipeline."""
        return {"items": {"search": dict.fromkeys(TASKS, ITEMS)}, "weights": dict.fromkeys(TASKS, 1 / 3)}

    def submit(self, job: Job) -> Future[Outcome]:
        """Answer now."""
        started = time.perf_counter()
        rng = np.random.default_rng(job.number)
        away = [value - OPTIMUM for value in job.params.values() if isinstance(value, float)]
        chance = 0.4 + 0.4 / (1 + 10 * float(np.mean(np.square(away))))
        right = (rng.random((len(TASKS), ITEMS)) < chance).astype(float)
        means = right.mean(axis=1)
        score = Score(
            float(means.mean()),
            float(np.sqrt((means * (1 - means) / (ITEMS - 1)).sum()) / len(TASKS)),
            dict(zip(TASKS, right.tolist(), strict=True)),
        )
        metrics = {task: {"acc,none": float(mean)} for task, mean in zip(TASKS, means, strict=True)}
        done: Future[Outcome] = Future()
        done.set_result(Outcome(job.number, score, metrics, {"merge": 0.1, "evaluate": 1.9}))
        self.seconds += time.perf_counter() - started
        return done

    def shutdown(self, cancel: bool = False) -> None:
        """Nothing is held."""


class Watch:
    """The plain display into a buffer, and for each batch how long it took from its `ask` to the next.

    Args:
        stub: Its seconds are not counted.

    Attributes:
        batches: First trial, number of trials, seconds; and of these the shares of ask and store.
    """

    def __init__(self, stub: Stub) -> None:
        self.batches: list[dict[str, float]] = []
        self._stub = stub
        self._display = PlainDisplay(io.StringIO())
        self._mark = (0.0, 0.0)
        self._open: dict[str, float] | None = None

    def started(self, info: runner.RunInfo) -> None:
        """The clock starts."""
        self._display.started(info)
        self._mark = (time.perf_counter(), self._stub.seconds)

    def note(self, line: str) -> None:
        """Shown."""
        self._display.note(line)

    def asked(self, trials: Sequence[Trial], seconds: float) -> None:
        """A batch begins; the time of its `ask` is its own."""
        self._close(seconds)
        self._open = {"first": trials[0].number, "trials": len(trials), "ask": seconds, "store": 0.0}
        self._display.asked(trials, seconds)

    def _close(self, ask: float) -> None:
        """End the open batch where the `ask` that has just returned began."""
        now = time.perf_counter() - ask
        if self._open is not None:
            stub = self._stub.seconds - self._mark[1]
            self.batches.append({**self._open, "seconds": now - self._mark[0] - stub})
        self._mark = (now, self._stub.seconds)

    def finished(self, trial: Trial, best: Trial | None) -> None:
        """A trial is stored and told."""
        assert self._open is not None
        self._open["store"] += trial.cost["store"]
        self._display.finished(trial, best)

    def sifted(self, items: int, entered: Sequence[int], kept: Sequence[int]) -> None:
        """Not here: halving is off."""
        self._display.sifted(items, entered, kept)

    def ended(self, summary: runner.RunSummary) -> None:
        """The last batch ends too; the summary is no trial's."""
        self._close(summary.elapsed and 0.0)
        self._display.ended(summary)


def genome_text(proposer: str, genes: int, trials: int) -> str:
    """A genome with `genes` weights, of parents that need not exist."""
    parents, groups = SHAPES[genes]
    name, _, guest = proposer.partition("+")
    search: dict[str, Any] = {"proposer": name, "trials": trials, "seed": 0, "references": False}
    search["halving"] = {"enabled": False}  # the stub answers everything at once
    if guest:
        search["guest"] = guest
    data = {
        "genome": {
            "models": [f"a/parent-{number}" for number in range(parents)],
            "base_model": "a/base",
            "merge_method": "task_arithmetic",
            "num_layers": groups,
            "layer_granularity": 1,
        },
        "tasks": [{"name": task, "weight": 1 / 3} for task in TASKS],
        "search": search,
        "evaluate": {"holdout": 0.0},
    }
    return yaml.safe_dump(data)


def measure(proposer: str, genes: int, trials: int) -> Record:
    """Make one run of `trials` trials and `WINDOW` batches more, and say how its batches went."""
    text = genome_text(proposer, genes, trials + (WINDOW + 1) * 40)
    stub = Stub()
    watch = Watch(stub)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        limit = trials + (WINDOW + 1) * 40
        summary = runner.run(
            genomes.parse(text), text, Path(folder) / "run", observer=watch, executor=stub, limit=limit
        )
    marks = [mark for mark in MARKS if mark <= trials]
    return {
        "proposer": proposer,
        "genes": genes,
        "trials": len(summary.trials),
        "reason": summary.reason,
        "wall": time.perf_counter() - started,
        "mean": sum(b["seconds"] for b in watch.batches) / sum(b["trials"] for b in watch.batches),
        "at": {str(mark): at(watch.batches, mark) for mark in marks},
    }


def at(batches: Sequence[dict[str, float]], mark: int) -> dict[str, float]:
    """Seconds per trial, medians over the `WINDOW` batches from the one with trial `mark` on.

    Returns:
        `seconds`, and of these `ask` and `store`; the rest is tell and display.

    Raises:
        ValueError: The run ended before.
    """
    window = [b for b in batches if b["first"] + b["trials"] > mark][:WINDOW]
    if len(window) < WINDOW:
        raise ValueError(f"the run must have {WINDOW} batches from trial {mark} on, but has {len(window)}.")
    return {
        key: statistics.median(batch[key] / batch["trials"] for batch in window)
        for key in ("seconds", "ask", "store")
    }


def growth(record: Record) -> float:
    """The time of a late trial over that of an early one."""
    marks = sorted(record["at"], key=int)
    return float(record["at"][marks[-1]]["seconds"] / record["at"][marks[0]]["seconds"])


def report(records: Iterable[Record]) -> str:
    """The table, and what it says of the targets."""
    lines = [
        "| proposer | genes | " + " | ".join(f"trial {mark:,}, ms" for mark in MARKS) + " | growth | "
        f"ask / store / rest of the last, ms | mean, ms | of a trial of {TRIAL:g} s |",
        "|---" * (len(MARKS) + 6) + "|",
    ]
    good = True
    for record in sorted(records, key=lambda r: (PROPOSERS.index(r["proposer"]), r["genes"])):
        cells = [record["at"].get(str(mark)) for mark in MARKS]
        last = [cell for cell in cells if cell][-1]
        rest = last["seconds"] - last["ask"] - last["store"]
        worst = max(cell["seconds"] for cell in cells if cell)
        good = good and worst / TRIAL < SHARE and growth(record) < GROWTH
        shown = " | ".join("-" if cell is None else f"{1000 * cell['seconds']:.2f}" for cell in cells)
        parts = " / ".join(f"{1000 * part:.2f}" for part in (last["ask"], last["store"], rest))
        lines.append(
            f"| {record['proposer']} | {record['genes']} | {shown} | {growth(record):.2f} | {parts} | "
            f"{1000 * record['mean']:.2f} | {worst / TRIAL:.2%} |"
        )
    verdict = "PASS" if good else "FAIL"
    wanted = f"every trial under {SHARE:.0%} of {TRIAL:g} s, and growth under {GROWTH:g}"
    return "\n".join([*lines, "", f"- {verdict}  {wanted}"])


def load(folder: Path) -> dict[str, Record]:
    """What is stored, by proposer and genes."""
    path = folder / FILE
    return json.loads(path.read_text())["runs"] if path.is_file() else {}


def store(folder: Path, records: dict[str, Record]) -> None:
    """Keep the records, with the machine they were made on."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "machine": platform.machine(), "numpy": np.__version__}
    (folder / FILE).write_text(json.dumps({"machine": machine, "runs": records}, indent=1) + "\n")


def main() -> None:
    """Measure what is asked for and not stored, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--proposers", nargs="+", choices=PROPOSERS, default=list(PROPOSERS))
    parser.add_argument("--genes", nargs="+", type=int, choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--trials", type=int, default=MARKS[-1], help="length of a run")
    parser.add_argument("--again", action="store_true", help="also measure what is stored")
    parser.add_argument("--report", action="store_true", help="only the table")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()
    for genes in [] if options.report else options.genes:
        for proposer in options.proposers:
            known = load(options.folder)
            key = f"{proposer} {genes}"
            if key in known and not options.again:
                continue
            known[key] = measure(proposer, genes, options.trials)
            store(options.folder, known)
            print(f"{key}: {known[key]['wall']:.1f} s, growth {growth(known[key]):.2f}", flush=True)
    print(report(load(options.folder).values()))


if __name__ == "__main__":
    main()
