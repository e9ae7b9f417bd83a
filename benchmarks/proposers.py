"""Which proposer finds better points for the same number of evaluations?

    python benchmarks/proposers.py --part all       every arm but the real model; goes on where it stopped
    python benchmarks/proposers.py --part smollm2   the real model: slow
    python benchmarks/proposers.py --report         tables, verdicts and curves from what is stored
    python benchmarks/proposers.py --pack           results/proposers.jsonl.xz, the file in the repository

A run is one arm on one instance of a space. It is one line of `results/proposers.jsonl`, which holds the
curves as their steps: [evaluations, value] where the value changes. Runs that are stored are not made again.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
from arms import SLOW, arms, fits, search
from spaces import SPACES, Problem, problem

from llmevo.space import Params
from llmevo.trial import Score

RESULTS = Path(__file__).resolve().parent / "results"
BUDGET, ITEMS, SEEDS, FIRST = 128, 500, 20, 4
_SMALL = ("ellipsoid-4", "lora")  # where the real model runs
_SMALL_BUDGET = 64

Record = dict[str, Any]
Key = tuple[str, str, int, int, int]


def first_points(made: Problem, seed: int) -> list[Params]:
    """The start point and three drawn ones, the same for every arm."""
    rng = np.random.default_rng([seed, 1])
    return [made.space.start(), *(made.space.sample(rng) for _ in range(FIRST - 1))]


def score(made: Problem, params: Params, seed: int, number: int, items: int) -> Score:
    """What `items` questions say of a point; evaluation `number` has the same luck in every arm."""
    drawn = np.random.default_rng([seed, 2, number]).random(items)
    return Score.from_items((drawn < made.accuracy(params)).astype(float).tolist())


def run(arm: str, space: str, seed: int, *, budget: int = BUDGET, items: int = ITEMS) -> Record:
    """Search one instance with one arm, and say how the regret went."""
    made = problem(space, seed)
    batch = 4 + int(3 * np.log(len(made.space)))
    started = time.process_time()
    way = search(arm, made, seed, first_points(made, seed), batch)
    regrets: list[float] = []
    values: list[float] = []
    origins: list[str] = []
    while len(values) < budget:
        # The first points are a batch of their own, as a run's references are.
        points = way.ask(FIRST if not values else batch)
        if not points:
            break
        regrets += [made.regret(params) for params, _ in points]
        origins += [origin for _, origin in points]
        told = [score(made, params, seed, len(values) + k, items) for k, (params, _) in enumerate(points)]
        values += [entry.value for entry in told]
        way.tell([params for params, _ in points], told)
    del regrets[budget:], values[budget:], origins[budget:]
    chosen = [int(np.argmax(values[: count + 1])) for count in range(len(values))]
    record: Record = {"arm": arm, "space": space, "seed": seed, "budget": budget, "items": items}
    record["chosen"] = _steps(regrets[index] for index in chosen)
    record["best"] = _steps(np.minimum.accumulate(regrets))
    record["origins"] = dict(Counter(origins))
    record["guests"] = guest_notes(way, budget)
    record["seconds"] = round(time.process_time() - started, 2)
    return record


def guest_notes(way: Any, budget: int) -> Record:
    """What became of the model's answers: repairs, fallbacks, copies, points that were turned away."""
    optimizer = getattr(way, "optimizer", None)
    notes: Counter[str] = Counter()
    for trial in optimizer.trials[:budget] if optimizer is not None else ():
        away = trial.attrs.get("turned_away", ())
        notes["turned_away"] += len(away)
        given = [(trial.origin, trial.attrs), *((item["origin"], item.get("attrs", {})) for item in away)]
        for origin, attrs in given:
            told = attrs.get("llm")
            if not isinstance(told, dict):
                continue
            notes["points"] += 1
            notes["copied"] += origin == "llm+mutated"
            if "asked" in told:
                notes["calls"] += 1
                notes["repaired"] += "repaired" in told
                notes["fallback"] += origin.startswith("fallback:")
                notes.update({f"count_{name}": int(n) for name, n in told.get("counts", {}).items()})
    return {name: count for name, count in notes.items() if count}


def _steps(curve: Iterable[float]) -> list[list[float]]:
    """The places where a curve changes."""
    steps: list[list[float]] = []
    for place, value in enumerate(curve, start=1):
        short = float(f"{value:.4g}")
        if not steps or steps[-1][1] != short:
            steps.append([place, short])
    return steps


def key(record: Record) -> Key:
    """What makes a run a run."""
    return (record["arm"], record["space"], record["seed"], record["budget"], record["items"])


def load(folder: Path = RESULTS) -> dict[Key, Record]:
    """Every stored run, the packed ones first; of two the later counts."""
    found: dict[Key, Record] = {}
    for line in _lines(folder):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that was being written when a run was stopped
        found[key(record)] = record
    return found


def _lines(folder: Path) -> Iterator[str]:
    packed, plain = folder / "proposers.jsonl.xz", folder / "proposers.jsonl"
    if packed.is_file():
        yield from lzma.decompress(packed.read_bytes()).decode().splitlines()
    if plain.is_file():
        yield from plain.read_text().splitlines()


def pack(folder: Path = RESULTS) -> Path:
    """Write every stored run into one small file, and drop the plain one."""
    records = sorted(load(folder).values(), key=lambda record: [str(part) for part in key(record)])
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    path = folder / "proposers.jsonl.xz"
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    (folder / "proposers.jsonl").unlink(missing_ok=True)
    return path


def sweep(
    chosen: Sequence[str],
    spaces: Sequence[str],
    seeds: Sequence[int],
    *,
    budget: int,
    items: int,
    again: bool = False,
    folder: Path = RESULTS,
) -> int:
    """Make every run that is not stored yet; how many that were."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = set() if again else set(load(folder))
    made = 0
    with (folder / "proposers.jsonl").open("a") as file:
        for seed in seeds:
            for space in spaces:
                for arm in chosen:
                    if (arm, space, seed, budget, items) in stored or not fits(arm, problem(space, seed)):
                        continue
                    record = run(arm, space, seed, budget=budget, items=items)
                    file.write(json.dumps(record, separators=(",", ":")) + "\n")
                    file.flush()
                    made += 1
            print(f"seed {seed}: {made} runs made", flush=True)
    return made


def _range(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last)) if last else range(int(first))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=("all", "smollm2"), help="what to run")
    parser.add_argument("--arms", help="names, with commas; default: those of the part")
    parser.add_argument("--spaces", help="names, with commas")
    parser.add_argument("--seeds", type=_range, help="`a:b`, b not included; default 0:20")
    parser.add_argument(
        "--budget", type=int, help=f"evaluations; default {BUDGET}, of smollm2 {_SMALL_BUDGET}"
    )
    parser.add_argument("--items", type=int, default=ITEMS, help="questions per evaluation")
    parser.add_argument("--again", action="store_true", help="make runs that are stored once more")
    parser.add_argument("--report", action="store_true", help="print the tables and draw the curves")
    parser.add_argument("--pack", action="store_true", help="compress the results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    if options.part or options.arms:
        slow = options.part == "smollm2"
        fast = [name for name in arms() if name not in SLOW]
        chosen = options.arms.split(",") if options.arms else list(SLOW) if slow else fast
        spaces = options.spaces.split(",") if options.spaces else list(_SMALL) if slow else SPACES
        unknown = set(chosen) - set(arms())
        if unknown:
            parser.error(f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join(arms())}")
        sweep(
            chosen,
            spaces,
            options.seeds or range(3 if slow else SEEDS),
            budget=options.budget or (_SMALL_BUDGET if slow else BUDGET),
            items=options.items,
            again=options.again,
            folder=options.results,
        )
    if options.pack:
        print(pack(options.results))
    if options.report:
        from analysis import report

        print(report(load(options.results).values(), options.results))


if __name__ == "__main__":
    main()
