"""Does a search find better LoRA settings than the default, for the same number of tokens?

    python benchmarks/lora_search.py              every arm and seed; goes on where it stopped
    python benchmarks/lora_search.py --report     tables and the figure, from what is stored
    python benchmarks/lora_search.py --pack       results/lora-search.jsonl.xz, the file in the repository

SmolLM2-135M learns which language a word is, from `genomes/lora-smollm2.yaml` and its space. Each arm may
train nine candidates, of which the default is the first, and hands over the one with the lowest validation
loss. The test examples are in no arm's sight. All candidates of a seed share the order of the examples and
the adapter's first weights, so one that two arms ask for is trained once.

default        one training
default again  nine, eight of them with other seeds (the same in all runs): what luck alone finds in nine
default long   one with the tokens of all nine
random         the default and eight drawn points
random long    what random chose, trained with the tokens of all nine: do short trainings tell of long ones?
optuna-tpe     optuna's TPE, one at a time and random for the first four: in its favour
cma, ga        llmevo's, in two batches of four
cma wide       cma whose first step is 0.3 of each range instead of a sixth
hybrid+placebo cma, and a guest for a half of the last batch: random steps from the best, no model
hybrid+smollm2 the same with SmolLM2-135M-Instruct as the guest
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from arms import Optuna as OptunaSearch
from arms import Ours, Search
from lora_candidates import ROOT, Candidates, Record, Store, mean

from llmevo.genome.train import TrainSettings
from llmevo.proposers import make
from llmevo.space import Params, Space
from llmevo.trial import Score

RESULTS = ROOT / "benchmarks" / "results"
STORE = ROOT / ".cache" / "lora-search.jsonl"
PACKED = RESULTS / "lora-search.jsonl.xz"
TRAININGS = 9
SEEDS = 5
BATCH = 4
_FAILED = 100.0  # the loss that other libraries are told of a training that diverged
_AGAIN = 1000  # the first seed of the default's further trainings, the same ones for every run

Make = Callable[[Space], Any]


def _proposer(name: str, **options: Any) -> Make:
    return lambda space: make(name, space, "maximize", population=BATCH, **options)


def _hybrid(**options: Any) -> Make:
    """Half of what comes after the default and CMA-ES's first generation."""
    base = {"base": "cma", "base_options": {"population": BATCH}, "share": 0.5, "warmup": 1 + BATCH}
    return lambda space: make("hybrid", space, "maximize", **base, **options)


def _smollm2(space: Space) -> Any:
    from llmevo.llm.local import LocalChat

    return _hybrid(client=LocalChat())(space)


OURS: dict[str, Make] = {
    "random": lambda space: make("random", space, "maximize"),
    "cma": _proposer("cma", sigma0=1 / 6),
    "cma wide": _proposer("cma", sigma0=0.3),
    "ga": _proposer("ga"),
    "hybrid+placebo": _hybrid(guest="placebo"),
    "hybrid+smollm2": _smollm2,
}
ALONE = ("default", "default again", "default long", "random long")
SEARCHES = ("random", "optuna-tpe", "cma", "cma wide", "ga", "hybrid+placebo", "hybrid+smollm2")
ARMS = (*ALONE[:-1], *SEARCHES, ALONE[-1])


def begin(arm: str, space: Space, seed: int) -> tuple[Search, int]:
    """An arm at its start, and how many points it is asked for at a time."""
    first = [space.start()]
    if arm in OURS:
        return Ours(space, seed, first, OURS[arm](space)), BATCH
    import optuna

    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    return OptunaSearch(space, first, sampler), 1


class Watch:
    """Says of each candidate whether it is the best so far, and so has its held-out loss measured."""

    def __init__(self) -> None:
        self.lowest = float("inf")

    def __call__(self, loss: float) -> bool:
        """Whether a mean validation loss is the lowest so far."""
        better = loss < self.lowest
        self.lowest = min(self.lowest, loss)
        return better


def run(arm: str, seed: int, candidates: Candidates, trainings: int = TRAININGS) -> Record:
    """One arm with one seed: the keys of its candidates in order, and the best's."""
    watch, made, origins = Watch(), [], []

    def settled(settings: TrainSettings, training_seed: int = seed) -> Record:
        made.append(candidates.score(settings, training_seed, watch))
        return made[-1]

    def train(params: Params, training_seed: int = seed, times: int = 1) -> Record:
        return settled(candidates.settings(params, times), training_seed)

    start = candidates.space.start()
    started = time.process_time()
    if arm == "random long":
        settled(candidates.chosen("random", seed, trainings))
    elif arm in ALONE:
        train(start, times=trainings if arm == "default long" else 1)
        for number in range(trainings - 1 if arm == "default again" else 0):
            train(start, _AGAIN + number)
    else:
        search, batch = begin(arm, candidates.space, seed)
        while len(made) < trainings:
            # The default is a batch of its own, as a run's references are.
            points = search.ask(min(batch, trainings - len(made)) if made else 1)
            if not points:
                break
            search.tell([params for params, _ in points], [_score(train(params)) for params, _ in points])
            origins += [origin for _, origin in points]
    finished = [record for record in made if "error" not in record]
    best = min(finished, key=lambda record: mean(record["validation"]), default=None)
    return {
        "key": f"{arm}/{seed}",
        "arm": arm,
        "seed": seed,
        "candidates": [record["key"] for record in made],
        "best": best and best["key"],
        "origins": origins,
        "seconds": round(time.process_time() - started, 1),
    }


def _score(record: Record) -> Score:
    losses = record.get("validation", [_FAILED])
    return Score.from_items([-loss for loss in losses])


def sweep(arms: Sequence[str], seeds: Sequence[int], store: Store, candidates: Candidates) -> None:
    """Make every run that is not stored yet, an arm with all its seeds before the next arm."""
    for arm in arms:
        for seed in seeds:
            if f"{arm}/{seed}" not in store.records:
                made = store.add(run(arm, seed, candidates))
                losses = store.records.get(made["best"] or "", {})
                shown = {part: round(mean(losses[part]), 4) for part in ("validation", "test") if losses}
                print(made["key"], shown, f"{made['seconds']} s", flush=True)


def pack(records: Mapping[str, Record], path: Path = PACKED) -> Path:
    """Write what is stored into one small file."""
    text = "".join(json.dumps(records[key], separators=(",", ":")) + "\n" for key in sorted(records))
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arms", help="names, with commas; default: all")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many; default {SEEDS}")
    parser.add_argument("--report", action="store_true", help="print the tables and draw the figure")
    parser.add_argument("--pack", action="store_true", help="compress the results")
    options = parser.parse_args(argv)
    arms = options.arms.split(",") if options.arms else ARMS
    unknown = set(arms) - set(ARMS)
    if unknown:
        parser.error(f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    store = Store(STORE, PACKED)
    if not (options.report or options.pack):
        sweep(arms, range(options.seeds), store, Candidates(store))
    if options.pack:
        print(pack(store.records))
    if options.report:
        from lora_analysis import report

        print(report(store.records, RESULTS))


if __name__ == "__main__":
    main()
