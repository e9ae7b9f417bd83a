"""How many LoRA candidates an hour, beside peft with transformers' Trainer, one candidate after the other?

    python benchmarks/training.py                      float32, every side
    python benchmarks/training.py --dtype bfloat16
    python benchmarks/training.py --device cuda --batch 16 --steps 30
    python benchmarks/training.py --sides "llmevo" "trainer, flat" --runs 5
    python benchmarks/training.py --halving RUN        what halving saved in a run of llmevo that trained
    python benchmarks/training.py --report             the tables of what is stored

SmolLM2-135M, or `--model FOLDER`, learns to say what functions of installed packages do: the examples are
made of their docstrings, as an instruction and its answer. All sides see the same batches of the same
examples in the same order, start from the same adapter and have the same schedule, and their losses are
compared. Each side has a run that is not counted; then they take turns, each round beginning with another
one (A B C, B C A, C A B); medians are compared.

"As it comes" is each with the dtype that it chooses by itself: transformers takes the one of the weights'
file, bfloat16 for SmolLM2, and llmevo what `evaluate.dtype: auto` finds to be fast. Learning rate, schedule,
rank and modules are the same for all, since the losses could not be compared otherwise.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import json
import logging
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import peft
import torch
import transformers

from llmevo import embedded, evaluate
from llmevo.genome import EvaluateSpec
from llmevo.genome.train import TrainSettings
from llmevo.store import Store
from llmevo.train import adapters, methods
from llmevo.train.data import Example
from llmevo.train.forward import Forward
from llmevo.train.loop import Training, plan
from llmevo.trial import Trial

_ROOT = Path(__file__).resolve().parent.parent
RESULTS = _ROOT / "benchmarks" / "results" / "training.json"
PACKAGES = (
    *("numpy", "scipy.stats", "scipy.linalg", "scipy.signal", "pandas", "torch", "sklearn.metrics"),
    *("statistics", "itertools", "collections", "pathlib", "random", "math", "json", "datetime"),
)
AS_IT_COMES = "as it comes"
TITLES = {
    "llmevo": "llmevo",
    "trainer": "Trainer, padded to the longest",
    "trainer, flat": "Trainer, padding-free",
    f"llmevo, {AS_IT_COMES}": "llmevo as it comes",
    f"trainer, {AS_IT_COMES}": "Trainer as it comes",
    "llmevo, top third, whole": "llmevo, adapters in the last third, layers below computed each time",
    "llmevo, top third": "llmevo, adapters in the last third",
    "trainer, top third": "Trainer, padded, adapters in the last third",
    "trainer, flat, top third": "Trainer, padding-free, adapters in the last third",
}
# Ours, theirs, and how many times as fast ours is wanted to be.
PAIRS: tuple[tuple[str, str, float | None], ...] = (
    ("llmevo", "trainer", 1.5),
    ("llmevo", "trainer, flat", 1.5),
    (f"llmevo, {AS_IT_COMES}", f"trainer, {AS_IT_COMES}", 2.5),
    ("llmevo, top third, whole", "trainer, top third", None),
    ("llmevo, top third", "trainer, top third", 1.5),
    ("llmevo, top third", "trainer, flat, top third", 1.5),
)


def docstrings() -> list[tuple[str, str]]:
    """A name and up to two paragraphs about it, of all functions that say something of themselves."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in sorted(dir(module)):
            thing = getattr(module, name)
            if name.startswith("_") or not callable(thing):
                continue
            paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(thing) or "").split("\n\n")]
            told = [
                p for p in paragraphs if len(p) > 30 and p[-1] == "." and "->" not in p and ">>>" not in p
            ]
            if told:
                found[" ".join(told[:2])] = f"{package}.{name}"
    return [(name, text) for text, name in found.items() if len(text) < 600]


def examples(tokenizer: Any, count: int) -> list[Example]:
    """Instructions with their answers, of which the answers are learnt."""
    rows = random.Random(0).sample(docstrings(), count)
    made = []
    for name, text in rows:
        prompt = tokenizer(f"### Instruction:\nSay what `{name}` does.\n\n### Response:\n").input_ids
        tokens = [*prompt, *tokenizer(text).input_ids, tokenizer.eos_token_id]
        made.append(Example(np.array(tokens), np.arange(len(tokens)) >= len(prompt)))
    return made


class Recording(transformers.Trainer):
    """Trainer with the loss of each step; its own log rounds them."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's own, and what it gave."""
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), float(loss)]
        return loss


class Bench:
    """The sides, on models in memory.

    Args:
        load: A dtype, or None for what the file has, to the frozen model.
        dtype: Of the sides that are compared at one.
        own: The dtype that llmevo chooses.
        rows: The examples.
        settings: Of the training.
        folder: For what Trainer writes.
    """

    def __init__(
        self,
        load: Callable[[torch.dtype | None], Any],
        dtype: torch.dtype,
        own: torch.dtype,
        rows: list[Example],
        settings: TrainSettings,
        folder: Path,
    ) -> None:
        self._load, self._dtype, self._own = load, dtype, own
        self._models: dict[torch.dtype | None, Any] = {}
        self._forwards: dict[tuple[torch.dtype, bool], Forward] = {}
        self.rows, self.settings, self.folder = rows, settings, folder

    def model(self, dtype: torch.dtype | None) -> Any:
        """The model in a dtype, loaded once."""
        if dtype not in self._models:
            self._models[dtype] = self._load(dtype)
        return self._models[dtype]

    def of_llmevo(self, settings: TrainSettings, dtype: torch.dtype, known: bool = False) -> list[float]:
        """Losses of our loop; with `known`, what the layers below make of the examples is kept."""
        model = self.model(dtype)
        if (dtype, known) not in self._forwards:
            self._forwards[dtype, known] = Forward(model, self.rows, self.rows if known else ())
        forward = self._forwards[dtype, known]
        steps = plan(self.rows, settings, 0)
        config = methods.config(settings, adapters.Targets(model), 0, len(steps))
        with adapters.adapted(model, settings, config, "cand0000", 0) as adapter, forward.above():
            training = Training(forward, adapter, self.rows, settings, 0, steps)
            training.run(model)
        return training.losses

    def of_trainer(
        self, settings: TrainSettings, dtype: torch.dtype | None, flat: bool = False
    ) -> list[float]:
        """Losses of transformers' Trainer, before its own log rounds them."""
        model = self.model(dtype)
        steps = plan(self.rows, settings, 0)
        data = [self.rows[index] for step in steps for index, _ in step]
        config = methods.config(settings, adapters.Targets(model), 0, len(steps))
        torch.manual_seed(0)
        with adapters.quiet_peft():
            wrapped = peft.get_peft_model(model, config)
        arguments = transformers.TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=1,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=settings.clip,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )
        columns = [
            {"input_ids": e.tokens.tolist(), "labels": np.where(e.targets, e.tokens, -100).tolist()}
            for e in data
        ]
        collate = transformers.DataCollatorWithFlattening() if flat else _padded
        try:
            trainer = Recording(wrapped, arguments, train_dataset=columns, data_collator=collate)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            return trainer.losses
        finally:
            wrapped.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config
            model.requires_grad_(False).eval()

    def sides(self) -> dict[str, Callable[[TrainSettings], list[float]]]:
        """What is timed, by name: each takes the settings that all share."""
        at, own = self._dtype, self._own

        def third(settings: TrainSettings) -> TrainSettings:
            return replace(settings, layers=max(adapters.Targets(self.model(at)).layers // 3, 1))

        return {
            "llmevo": lambda one: self.of_llmevo(one, at),
            "trainer": lambda one: self.of_trainer(one, at),
            "trainer, flat": lambda one: self.of_trainer(one, at, flat=True),
            f"llmevo, {AS_IT_COMES}": lambda one: self.of_llmevo(one, own),
            f"trainer, {AS_IT_COMES}": lambda one: self.of_trainer(one, None),
            "llmevo, top third, whole": lambda one: self.of_llmevo(third(one), at),
            "llmevo, top third": lambda one: self.of_llmevo(third(one), at, known=True),
            "trainer, top third": lambda one: self.of_trainer(third(one), at),
            "trainer, flat, top third": lambda one: self.of_trainer(third(one), at, flat=True),
        }


def _padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of equal length, as transformers' collators for padding make them."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[key], *([value] * (width - len(row[key])))] for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": filled("input_ids", 0),
        "labels": filled("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def turns(names: Sequence[str], rounds: int) -> list[list[str]]:
    """The order of each round; each begins with the one that was second in the round before."""
    return [[*names[n % len(names) :], *names[: n % len(names)]] for n in range(rounds)]


def measure(
    bench: Bench, names: list[str], runs: int, keep: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Seconds of each side, run by run, with its losses; `first` is the run that is not counted.

    Args:
        bench: The sides.
        names: Which of them.
        runs: How many are counted.
        keep: Is given what is known after each round.
    """
    sides = {name: side for name, side in bench.sides().items() if name in names}
    found: dict[str, Any] = {name: {"seconds": []} for name in sides}

    def timed(name: str, what: str) -> float:
        gc.collect()
        start = time.perf_counter()
        found[name]["losses"] = sides[name](bench.settings)
        seconds = time.perf_counter() - start
        print(f"{what}: {name:26s} {seconds:7.2f} s", flush=True)
        return seconds

    for name in sides:
        found[name]["first"] = timed(name, "not counted")
    for number, order in enumerate(turns(list(sides), runs), start=1):
        for name in order:
            found[name]["seconds"].append(timed(name, f"run {number}"))
        keep(found)
    return found


def table(sides: dict[str, Any]) -> list[str]:
    """A row for each pair of sides that were timed."""
    rows = []
    for ours, theirs, wanted in PAIRS:
        if ours not in sides or theirs not in sides:
            continue
        mine, other = (statistics.median(sides[name]["seconds"]) for name in (ours, theirs))
        gap = max(abs(a - b) for a, b in zip(sides[ours]["losses"], sides[theirs]["losses"], strict=True))
        target = "" if wanted is None else f"{wanted:g}"
        rows.append(
            f"| {TITLES[theirs]} | {other:.2f} | {3600 / other:.0f} | {TITLES[ours]} | {mine:.2f} "
            f"| {3600 / mine:.0f} | **{other / mine:.2f}** | {target} | {gap:.0e} |"
        )
    return rows


def halving(trials: Sequence[Trial]) -> dict[str, Any]:
    """On how many tokens the candidates of a run were trained, and how many it would have been without rungs.

    The references, which are trained whole, are left out.
    """
    trials = [trial for trial in trials if trial.metrics.get("train") and trial.origin != "default"]
    spent = sum(int(trial.cost["tokens"]) for trial in trials)
    whole = sum(int(trial.metrics["train"]["budget"]) for trial in trials)
    by_rung: dict[str, int] = {}
    for trial in trials:
        rung = "all" if trial.score is None or trial.score.rung is None else str(trial.score.rung)
        by_rung[rung] = by_rung.get(rung, 0) + 1
    return {"candidates": len(trials), "by_rung": by_rung, "spent": spent, "whole": whole}


def report(stored: dict[str, Any]) -> None:
    """Print the tables of what is stored."""
    share = 1.0
    if "halving" in stored:
        one = stored["halving"]
        share = one["spent"] / one["whole"]
        print(f"halving: {one}: {share:.1%} of the tokens, so {1 / share:.2f} times the candidates")
    for kind, one in stored.items():
        if kind == "halving":
            continue
        print(f"\n{kind}: {one['work']}")
        print("| side | s | an hour | side | s | an hour | ratio | wanted | losses apart |")
        print("|" + "---|" * 9)
        for row in table(one["sides"]):
            print(row)


def main() -> None:
    """Time the sides, store what was found, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=_ROOT / ".cache" / "smollm2")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=list(TITLES), choices=list(TITLES), metavar="SIDE")
    parser.add_argument("--halving", type=Path, metavar="RUN", help="count what halving saved in a run")
    parser.add_argument("--report", action="store_true", help="print what is stored, time nothing")
    options = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if options.halving is not None:
        with Store.open(options.halving, readonly=True) as store:
            stored["halving"] = halving(store.trials())
    elif not options.report:
        time_sides(options, stored)
    if not options.report:
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    report(stored)


def time_sides(options: argparse.Namespace, stored: dict[str, Any]) -> None:
    """Time the sides that are asked for, into `stored`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    folder = options.model if options.model.is_dir() else embedded.smollm2(options.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    device = torch.device(options.device)
    own = evaluate.dtype(EvaluateSpec(), device)

    def load(dtype: torch.dtype | None) -> Any:
        chosen = {} if dtype is None else {"dtype": dtype}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **chosen)
        return model.to(device).requires_grad_(False).eval()

    rows = examples(tokenizer, options.batch * options.steps)
    settings = TrainSettings(batch_size=options.batch, epochs=1, warmup=0)
    bench = Bench(load, getattr(torch, options.dtype), own, rows, settings, _ROOT / ".cache" / "training")
    lengths = np.array([len(row) for row in rows])
    work = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "settings": asdict(settings),
        "steps": options.steps,
        "tokens": int(lengths.sum()),
        "targets": int(sum(row.targets.sum() for row in rows)),
        "lengths": {f"{q} %": float(np.percentile(lengths, q)) for q in (0, 10, 50, 90, 100)},
        AS_IT_COMES: {"llmevo": str(own), "trainer": str(bench.model(None).dtype)},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    print(json.dumps(work))
    known = stored.get(f"{options.device} {options.dtype}", {})
    before = known.get("sides", {}) if known.get("work") == work else {}

    def keep(sides: dict[str, Any]) -> None:
        stored[f"{options.device} {options.dtype}"] = {"work": work, "sides": before | sides}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")

    measure(bench, options.sides, options.runs, keep)


if __name__ == "__main__":
    main()
